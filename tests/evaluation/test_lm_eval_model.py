"""lm-eval's three questions against exact enumeration, and a local task from end to end, offline."""

import importlib
import itertools
import json
import math
import sys

import pytest
import torch
from block_causals import toy_sdar
from toys import MASK, WordTokenizer, forward_of, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sinkprune.evaluation.lm_eval_model import LMEvalModel


@pytest.fixture(scope="module")
def model():
    return toy(n_kv_heads=2)


def ask(kind, *pairs):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def words(ids):
    return WordTokenizer().decode(list(map(int, ids)))


def likelihoods(model, *pairs, **options):
    judge = LMEvalModel(model, WordTokenizer(), **options)
    return judge.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)


def exact_bound(model, prompt, continuation):
    """The bound's expectation: the mean over l of the mean over sets of l masked tokens, scaled by L / l."""
    ids, length = torch.tensor(prompt + continuation), len(continuation)
    places = range(len(prompt), len(ids))
    by_count = []
    for count in range(1, length + 1):
        sums = []
        for hidden in itertools.combinations(places, count):
            seen = ids.clone()
            seen[list(hidden)] = MASK
            log_p = forward_of(model, seen[None])[0].log_softmax(-1)
            sums.append(sum(log_p[i, ids[i]].item() for i in hidden))
        by_count.append(length / count * sum(sums) / len(sums))
    return sum(by_count) / length


def test_the_likelihood_is_the_bound_of_the_continuation_alone(model):
    prompt = tokens(9).tolist()
    for length, tolerance in ((1, 1e-6), (2, 0.03), (3, 0.03)):
        continuation = tokens(length, seed=length).tolist()
        pair = (words(prompt), " " + words(continuation))
        [(got, greedy)] = likelihoods(model, pair, draws=3000)
        assert got == pytest.approx(exact_bound(model, prompt, continuation), rel=tolerance)
        assert greedy is False
    assert likelihoods(model, (words(prompt), "")) == [(0.0, False)]
    [(alone, _)] = likelihoods(model, ("", words(prompt[:1])))
    assert alone == pytest.approx(exact_bound(model, [], prompt[:1]), rel=1e-6)


def test_the_same_masks_are_used_whatever_else_is_asked(model):
    one, other = ("w1 w2", " w3 w4 w5"), ("w7", " w8 w9")
    both = likelihoods(model, one, other, draws=3)
    assert both == likelihoods(model, one, draws=3) + likelihoods(model, other, draws=3)
    assert likelihoods(model, one, draws=3, seed=5) != both[:1]


def test_equal_masks_are_run_once(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    likelihoods(model, ("w1 w2", " w3 w4"), draws=500, batch=2)
    hook.remove()
    assert sum(map(len, seen)) == 3 and max(map(len, seen)) == 2


def test_whether_a_continuation_is_greedy_is_restored_surest_first(model):
    ids = tokens(10)
    for step in range(3):
        left = [i for i in (7, 8, 9) if step == 0 or ids[i] == MASK]
        ids[left] = MASK
        logits = forward_of(model, ids[None])[0]
        logits[:, MASK] = -math.inf
        sure, token = logits.softmax(-1).max(-1)
        place = max(left, key=lambda i: sure[i])
        ids[place] = token[place]
    prompt, right = words(ids[:7]), words(ids[7:])
    wrong = words([*ids[7:9], int(ids[9]) % 50 + 1])
    answers = likelihoods(model, (prompt, " " + right), (prompt, " " + wrong), draws=1, check_greedy=True)
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_prompt_beyond_the_context_loses_its_beginning(model):
    prompt = words(tokens(80))
    kept = words(tokens(80)[80 - 62 :])
    assert likelihoods(model, (prompt, " w3 w4")) == likelihoods(model, (kept, " w3 w4"))
    with pytest.raises(ValueError, match="continuation of 65 tokens exceeds the context of 64"):
        likelihoods(model, ("w1", " " + words(tokens(65))))


def test_a_long_text_is_the_sum_of_its_pieces(model):
    ids = tokens(70)
    judge = LMEvalModel(model, WordTokenizer(), draws=6)
    [whole] = judge.loglikelihood_rolling(ask("loglikelihood_rolling", (words(ids),)), disable_tqdm=True)
    pieces = likelihoods(model, ("", words(ids[:64])), ("", words(ids[64:])), draws=6)
    assert whole == pytest.approx(sum(value for value, _ in pieces))


def test_a_local_task_from_end_to_end(model, tmp_path):
    options = {"steps": 4, "gen_length": 8, "block_length": 4}
    rows = []
    for seed in range(3):
        prompt, choices = tokens(6, seed=seed).tolist(), tokens(2, 2, seed=seed + 9).tolist()
        bounds = [exact_bound(model, prompt, choice) for choice in choices]
        rows.append({"prompt": words(prompt), "choices": [*map(words, choices)],
                     "gold": bounds.index(max(bounds)), "bounds": bounds})  # fmt: skip
        rows[-1]["text"] = sp.generate(model, WordTokenizer(), rows[-1]["prompt"], **options)
    stop = rows[0]["text"].split()[5]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    choose = common | {
        "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    write = common | {
        "task": "write", "output_type": "generate_until", "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": [" " + stop]}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    judge = LMEvalModel(model, WordTokenizer(), draws=2000, **options)
    result = simple_evaluate(
        model=judge,
        tasks=[choose, write],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert result["results"]["choose"]["acc,none"] == 1.0
    for row, sample in zip(rows, result["samples"]["choose"], strict=True):
        assert [r[0][0] for r in sample["resps"]] == pytest.approx(row["bounds"], rel=0.05)
    expected = [row["text"].split(" " + stop)[0] for row in rows]
    assert [sample["resps"][0][0] for sample in result["samples"]["write"]] == expected
    assert expected[0] != rows[0]["text"]


@pytest.mark.parametrize("make", [toy, toy_sdar])
def test_text_after_prompts_of_any_lengths_is_what_each_gets_alone(make):
    model = make()
    texts = [words(tokens(n, seed=n)) for n in (9, 2, 13, 6, 70, 3, 17, 5)]
    judge = LMEvalModel(model, WordTokenizer(), gen_length=12, batch=3)
    got = judge.generate_until(ask("generate_until", *((text, {}) for text in texts)), disable_tqdm=True)
    kept = [" ".join(text.split()[-(64 - 12) :]) for text in texts]  # the context's room
    alone = {"steps": 12, "gen_length": 12, "seed": 0}
    assert got == [sp.generate(model, WordTokenizer(), text, **alone) for text in kept]
    assert judge.generate_until([], disable_tqdm=True) == []


def test_bad_arguments_are_refused(model):
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        LMEvalModel(model, None)
    with pytest.raises(ValueError, match="draws and batch must be at least 1, got 0 and 32"):
        LMEvalModel(model, WordTokenizer(), draws=0)
    with pytest.raises(ValueError, match="leaves no room"):
        LMEvalModel(model, WordTokenizer(), gen_length=64).generate_until(ask("generate_until", ("w1", {})))


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "sinkprune.evaluation.lm_eval_model")
    with pytest.raises(ImportError, match="pip install lm-eval"):
        importlib.import_module("sinkprune.evaluation.lm_eval_model")
