"""Infilled and continued text against loops written out here, pairing, and a causal model as the judge."""

import math

import hf
import pytest
import torch
from block_causals import toy_sdar
from toys import MASK, WordTokenizer, forward_of, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evaluation.generation_quality import CausalScorer

SIZES = {"windows": 5, "prompt_length": 7, "gen_length": 6, "batch": 2}


@pytest.fixture(scope="module")
def model():
    return toy(n_kv_heads=2)


@pytest.fixture(scope="module")
def text():
    return WordTokenizer().decode(tokens(60).tolist())


@pytest.fixture(scope="module")
def dense(model, text):
    return sp.evaluate_generation(model, WordTokenizer(), text, **SIZES)


@pytest.fixture(scope="module")
def other(text):
    return sp.evaluate_generation(toy(seed=9), WordTokenizer(), text, **SIZES)


def windows_of(text):
    ids = torch.tensor(WordTokenizer().encode(text, add_special_tokens=False))
    return torch.stack([ids[(i * (60 - 13)) // 4 :][:13] for i in range(5)])


def restore(model, ids, places, per_step=1):
    """Fill ``places`` of one sequence, the surest first, from the independent forward."""
    ids, left = ids.clone(), list(places)
    ids[places] = MASK
    while left:
        logits = forward_of(model, ids[None])[0]
        logits[:, MASK] = -math.inf
        sure, token = logits.softmax(-1).max(-1)
        for place in sorted(left, key=lambda i: -sure[i])[:per_step]:
            ids[place] = token[place]
            left.remove(place)
    return ids


@pytest.mark.parametrize("per_step", [1, 3])
def test_infilling_restores_the_middle_and_continuing_the_end(model, text, per_step):
    got = sp.evaluate_generation(model, WordTokenizer(), text, steps=6 // per_step, **SIZES)
    right = 0
    for i, row in enumerate(windows_of(text)):
        middle = restore(model, row, list(range(3, 9)), per_step)[3:9]
        right += (middle == row[3:9]).sum().item()
        assert got.texts["infilling"][i] == WordTokenizer().decode(middle.tolist())
        end = restore(model, row, list(range(7, 13)), per_step)[7:]
        assert got.texts["continuation"][i] == WordTokenizer().decode(end.tolist()).split(" w0")[0]
        assert got.references["infilling"][i] == WordTokenizer().decode(row[3:9].tolist())
        assert got.references["continuation"][i] == WordTokenizer().decode(row[7:].tolist())
    assert got.measures["infilling_accuracy"].value == pytest.approx(right / 30)


def test_a_model_is_wholly_like_itself_and_less_like_another(dense, other):
    assert dense.likeness(dense) == {
        f"{task}_{name}": pytest.approx((100, 100, 100))
        for task in ("infilling", "continuation")
        for name in ("bleu", "rouge_l")
    }
    assert all(interval == (0, 0, 0) for interval in dense.minus(dense).values())
    assert other.likeness(dense)["infilling_rouge_l"].mean < 100
    change = other.minus(dense)["infilling_distinct_1"]
    sides = [q.measures["infilling_distinct_1"].value for q in (other, dense)]
    assert change.mean == pytest.approx(sides[0] - sides[1])
    assert change.low <= change.mean <= change.high


def test_a_summary_has_every_measure_with_its_interval(dense):
    summary = dense.summary()
    tasks = [f"{t}_{m}" for t in ("infilling", "continuation")
             for m in ("bleu", "rouge_l", "distinct_1", "distinct_2")]  # fmt: skip
    assert set(summary) == {"infilling_accuracy", *tasks}
    assert all(set(values) == {"mean", "low", "high"} for values in summary.values())


def test_separate_texts_give_a_window_each_from_their_beginning(model):
    texts = [WordTokenizer().decode(tokens(20, seed=seed).tolist()) for seed in range(3)]
    got = sp.evaluate_generation(model, WordTokenizer(), texts, prompt_length=7, gen_length=6, steps=1)
    assert got.references["continuation"] == [" ".join(t.split()[7:13]) for t in texts]


def test_other_texts_do_not_pair(dense, model, text):
    shorter = sp.evaluate_generation(model, WordTokenizer(), text, **(SIZES | {"gen_length": 4}))
    for compare in (dense.minus, dense.likeness):
        with pytest.raises(ValueError, match="same texts and options"):
            compare(shorter)


def test_a_block_causal_model_only_continues(text):
    got = sp.evaluate_generation(toy_sdar(), WordTokenizer(), text, **(SIZES | {"gen_length": 8}))
    assert list(got.texts) == ["continuation"]
    assert "infilling_accuracy" not in got.measures


def test_options_of_the_sampler_and_progress_reach_it(model, text):
    done = []
    got = sp.evaluate_generation(
        model, WordTokenizer(), text, **SIZES, temperature=1.0, seed=3, block_length=3, progress=done.append
    )
    expected = [*sp.denoise(model, windows_of(text)[:2, :7], steps=6, gen_length=6, temperature=1.0, seed=3,
                            block_length=3)][-1][:, 7:]  # fmt: skip
    assert got.texts["continuation"][:2] == [
        WordTokenizer().decode(row.tolist()).split(" w0")[0] for row in expected
    ]
    assert sum(done) == 3 * (6 + 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_length": 1}, "prompt_length at least 2"),
        ({"windows": 0}, "at least 1"),
        ({"prompt_length": 60}, "a text has 60 tokens, fewer than one window of 66"),
        ({"text": []}, "a text has 0 tokens"),
        ({"tokenizer": None}, "needs a tokenizer"),
    ],
)
def test_bad_arguments_are_refused(model, text, change, message):
    with pytest.raises(ValueError, match=message):
        sp.evaluate_generation(model, **({"tokenizer": WordTokenizer(), "text": text} | SIZES | change))


class Judge(WordTokenizer):
    bos_token_id = 1


def test_a_causal_model_scores_each_text_on_its_own(model, text):
    causal = hf.build("llama")
    texts = ["w5 w9 w3", "w7", "", "w4 w4 w8 w2 w30"]
    expected = []
    for row in texts:
        ids = torch.tensor([[1, *Judge().encode(row, add_special_tokens=False)]])
        with torch.no_grad():
            log_p = causal(ids).logits[0].double().log_softmax(-1)
        expected.append([-log_p[i - 1, ids[0, i]].item() for i in range(1, ids.shape[1])])
    got = CausalScorer(causal, Judge(), batch=2)(texts)
    for nats, row in zip(got, expected, strict=True):
        assert nats == pytest.approx(sum(row) / len(row), abs=1e-5) if row else math.isnan(nats)
    without = CausalScorer(causal, WordTokenizer())(["w5 w9", "w7"])
    assert math.isfinite(without[0]) and math.isnan(without[1])
    scored = sp.evaluate_generation(
        model, WordTokenizer(), text, scorer=CausalScorer(causal, Judge()), **SIZES
    )
    nats = CausalScorer(causal, Judge())(scored.texts["infilling"])
    assert scored.measures["infilling_perplexity"].value == pytest.approx(math.exp(sum(nats) / len(nats)))
