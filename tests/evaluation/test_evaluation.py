"""The NLL bound against a computation by hand, matched masks, and paired differences."""

import math
import statistics

import pytest
import torch
from toys import MASK, WordTokenizer, forward_of, manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evaluation.predictions import NOISE_LEVELS, Quality

SIZES = {"windows": 6, "length": 10, "draws": 3, "batch": 4}


@pytest.fixture(scope="module")
def model():
    return toy(n_kv_heads=2)


@pytest.fixture(scope="module")
def text():
    return tokens(70)


def inputs_seen(model, text, **options):
    """What ``evaluate`` gave the model to read, all rows in order, and the quality it found."""
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        quality = sp.evaluate(model, text, **(SIZES | options))
    finally:
        hook.remove()
    return torch.cat(seen), quality


def windows_of(text, windows, length):
    last = len(text) - length
    return torch.stack([text[(i * last) // (windows - 1) :][:length] for i in range(windows)])


def test_the_bound_and_the_levels_equal_a_computation_by_hand(model, text):
    seen, quality = inputs_seen(model, text)
    rows = windows_of(text, 6, 10)
    target = torch.cat([rows.repeat(3, 1), *[rows] * len(NOISE_LEVELS)])
    hidden = seen == MASK
    assert torch.equal(seen[~hidden], target[~hidden])
    log_p = forward_of(model, seen).log_softmax(-1)
    loss, right = [], []
    for row, ids, hide in zip(log_p, target, hidden, strict=True):
        where = hide.nonzero().flatten().tolist()
        loss.append(-sum(row[i, ids[i]].item() for i in where) / len(where))
        right.append(sum(row[i].argmax().item() == ids[i].item() for i in where) / len(where))
    per_window = [statistics.fmean(loss[w + 6 * d] for d in range(3)) for w in range(6)]
    assert quality.per_window == pytest.approx(per_window, abs=1e-5)
    assert quality.nll == pytest.approx(statistics.fmean(per_window), abs=1e-5)
    assert quality.nll_se == pytest.approx(statistics.stdev(per_window) / math.sqrt(6), abs=1e-5)
    assert quality.tokens == 60
    for i, level in enumerate(NOISE_LEVELS):
        rows_at = slice(18 + 6 * i, 24 + 6 * i)
        assert quality.at_level[level] == pytest.approx(statistics.fmean(loss[rows_at]), abs=1e-5)
        assert quality.accuracy[level] == pytest.approx(statistics.fmean(right[rows_at]))


def test_numbers_of_masked_tokens_are_stratified_and_exact_at_each_level(model, text):
    seen, _ = inputs_seen(model, text, windows=5, length=20, draws=8)
    masked = (seen == MASK).sum(1)
    drawn = sorted(masked[:40].tolist())
    # 40 draws over 20 lengths: each length of 1..20 twice
    assert drawn == sorted([*range(1, 21)] * 2)
    assert masked[40:].view(3, 5).unique(dim=1).flatten().tolist() == [3, 10, 18]


def test_masks_fall_on_every_position(model, text):
    seen, _ = inputs_seen(model, text, draws=20)
    share = (seen[:120] == MASK).double().mean(0)
    assert (share > 0.35).all() and (share < 0.75).all()


def constant_model():
    model = toy(include_bias=True, n_layers=1)
    head = model.model["transformer"]["ff_out"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return model, head


def test_a_uniform_model_pays_the_log_of_the_vocabulary(text):
    quality = sp.evaluate(constant_model()[0], text, **SIZES)
    assert quality.nll == pytest.approx(math.log(61), abs=1e-6)
    assert quality.nll_se == pytest.approx(0, abs=1e-9)
    assert list(quality.at_level.values()) == pytest.approx([math.log(61)] * 3, abs=1e-6)


def test_a_unigram_model_pays_the_cross_entropy_of_its_table():
    model, head = constant_model()
    with torch.no_grad():
        head.bias[3], head.bias[4] = math.log(200.0), math.log(100.0)
    text = torch.tensor([3, 3, 4]).repeat(40)  # every window of 12 has eight 3s and four 4s
    quality = sp.evaluate(model, text, windows=10, length=12, draws=40)
    total = 200 + 100 + 59
    expected = -(2 * math.log(200 / total) + math.log(100 / total)) / 3
    assert abs(quality.nll - expected) < 4 * quality.nll_se
    assert quality.accuracy[0.9] == pytest.approx(2 / 3, abs=0.1)


def test_two_models_see_the_same_masks_and_another_seed_gives_others(model, text):
    other = toy(seed=9)
    sp.apply(other, manual_plan(other, [[0], [1], [2]]))
    (first, _), (second, _), (reseeded, _) = (
        inputs_seen(model, text), inputs_seen(other, text), inputs_seen(model, text, seed=1)
    )  # fmt: skip
    assert torch.equal(first, second)
    assert not torch.equal(first, reseeded)


def test_the_batch_size_and_the_global_generator_do_not_matter(model, text):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sp.evaluate(model, text, **SIZES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = sp.evaluate(model, text, **(SIZES | {"batch": 7}))
    assert second.per_window == pytest.approx(first.per_window, abs=1e-6)


def test_a_difference_is_paired_by_window(model, text):
    dense, other = sp.evaluate(model, text, **SIZES), sp.evaluate(toy(seed=9), text, **SIZES)
    differences = [b - a for a, b in zip(dense.per_window, other.per_window, strict=True)]
    mean, error = other.minus(dense)
    assert mean == pytest.approx(statistics.fmean(differences))
    assert mean == pytest.approx(other.nll - dense.nll)
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(6))
    assert dense.minus(dense) == (0, 0)


def test_differences_of_unequal_numbers_of_windows_are_refused():
    one, two = (Quality(1.0, 0.0, [1.0] * n, {}, {}, n) for n in (1, 2))
    for difference in (one.minus, one.interval):
        with pytest.raises(ValueError, match="1 and 2 windows do not pair"):
            difference(two)


def test_separate_texts_are_judged_whole_without_padding_or_protected_tokens(model):
    texts = [torch.cat((torch.tensor([7]), tokens(n, seed=n), torch.tensor([7]))) for n in (5, 11, 3)]
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kw: seen.append((args[0], kw)), with_kwargs=True
    )
    quality = sp.evaluate(model, texts, draws=4, levels=(0.3,), never_mask=[7], batch=1)
    hook.remove()
    rows = [ids[0] for ids, _ in seen]
    targets = [*texts * 4, *texts]
    loss = []
    for row, ids in zip(rows, targets, strict=True):
        assert len(row) == len(ids), "no padding is computed"
        hidden = row == MASK
        assert not hidden[ids == 7].any() and torch.equal(row[~hidden], ids[~hidden])
        log_p = forward_of(model, row[None])[0].log_softmax(-1)
        loss.append(-log_p[hidden, ids[hidden]].mean().item())
    expected = [statistics.fmean(loss[i:12:3]) for i in range(3)]
    assert quality.per_window == pytest.approx(expected, abs=1e-5)
    assert quality.per_window_at_level == {0.3: pytest.approx(loss[12:], abs=1e-5)}
    assert quality.at_level[0.3] == pytest.approx(statistics.fmean(loss[12:]), abs=1e-5)
    assert quality.tokens == sum(int((ids != 7).sum()) for ids in texts)


def test_strings_lists_of_ids_and_padded_ids_are_one_thing(model):
    texts = [tokens(n, seed=n) for n in (5, 11, 3)]
    strings = [WordTokenizer().decode(ids.tolist()) for ids in texts]
    padded = torch.stack([torch.cat((ids, ids.new_zeros(11 - len(ids)))) for ids in texts])
    mask = torch.tensor([[1] * len(ids) + [0] * (11 - len(ids)) for ids in texts])
    first = sp.evaluate(model, texts)
    assert sp.evaluate(model, strings, tokenizer=WordTokenizer()) == first
    assert sp.evaluate(model, padded, attention_mask=mask) == first
    assert sp.evaluate(model, padded, attention_mask=mask, batch=2).per_window == pytest.approx(
        first.per_window, abs=1e-5
    )
    whole = sp.evaluate(model, padded)
    assert whole.tokens == 33 and first.tokens == 19


def test_noise_can_be_kept_to_what_a_model_was_trained_for(model, text):
    seen, quality = inputs_seen(
        model, text, windows=4, length=20, draws=5, levels=(0.25, 0.1), highest_noise=0.5
    )
    masked = (seen == MASK).sum(1)
    assert sorted(masked[:20].tolist()) == sorted([*range(1, 11)] * 2)
    assert masked[20:].tolist() == [5] * 4 + [2] * 4
    assert list(quality.at_level) == [0.25, 0.1]


def test_a_level_does_not_depend_on_the_other_levels(model, text):
    alone, among = (sp.evaluate(model, text, levels=levels, **SIZES) for levels in ((0.5,), (0.2, 0.5)))
    assert alone.per_window_at_level[0.5] == among.per_window_at_level[0.5]
    assert alone.nll == among.nll


def test_the_interval_of_a_difference_holds_it_and_is_of_the_level_asked_for(model, text):
    dense, other = sp.evaluate(model, text, **SIZES), sp.evaluate(toy(seed=9), text, **SIZES)
    whole, level = other.interval(dense), other.interval(dense, 0.5)
    assert whole.mean == pytest.approx(other.nll - dense.nll)
    assert whole.low < whole.mean < whole.high
    assert level.mean == pytest.approx(other.at_level[0.5] - dense.at_level[0.5])
    assert dense.interval(dense) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"level must be one of \[0.15, 0.5, 0.9\], got 0.3"):
        other.interval(dense, 0.3)


def test_one_window_has_no_standard_error(model, text):
    quality = sp.evaluate(model, text, windows=1, length=10, draws=2)
    assert math.isfinite(quality.nll)
    assert math.isnan(quality.nll_se)


def test_progress_counts_every_forward(model, text):
    done = []
    forwards = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    sp.evaluate(model, text, progress=done.append, **SIZES)
    hook.remove()
    assert sum(done) == len(forwards) > 0


def test_text_is_encoded_without_special_tokens(model, text):
    as_text = " ".join(f"w{i}" for i in text.tolist())
    from_text = sp.evaluate(model, as_text, tokenizer=WordTokenizer(), **SIZES)
    assert from_text == sp.evaluate(model, text, **SIZES)


def test_a_config_without_a_mask_token_asks_for_one(model, text):
    nameless = toy(n_kv_heads=2, mask_token_id=None)
    with pytest.raises(ValueError, match="pass mask_token_id"):
        sp.evaluate(nameless, text, **SIZES)
    assert sp.evaluate(nameless, text, mask_token_id=MASK, **SIZES) == sp.evaluate(model, text, **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": tokens(9)}, "the text has 9 tokens, fewer than one window of 10"),
        ({"text": tokens(2, 3, 4)}, r"ids must be integers \[N\] or \[rows, L\]"),
        ({"text": [tokens(3), tokens(0)]}, r"must have shape \[n\], n >= 1, got \[\(3,\), \(0,\)\]"),
        ({"text": []}, "text needs a tokenizer"),
        ({"text": [], "tokenizer": WordTokenizer()}, "at least one"),
        ({"text": ["w1", ""], "tokenizer": WordTokenizer()}, "at least one token"),
        ({"text": [tokens(5), torch.tensor([7, 7])], "never_mask": [7]}, "number 1 has none"),
        ({"text": [tokens(5), tokens(65)]}, "65 tokens exceed the context of 64"),
        ({"text": tokens(2, 5), "attention_mask": torch.ones(2, 4)}, r"shape \(2, 5\), got \(2, 4\)"),
        ({"attention_mask": torch.ones(70)}, "attention_mask"),
        ({"levels": (0.5, 1.5)}, r"must lie in \(0, 1\]"),
        ({"highest_noise": 0.0}, r"must lie in \(0, 1\]"),
        ({"text": "w1 w2"}, "text needs a tokenizer"),
        ({"windows": 0}, r"at least 1, got \(0, 10, 3, 4\)"),
        ({"length": 0}, "at least 1"),
        ({"draws": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"length": 65}, "65 tokens exceed the context of 64"),
    ],
)
def test_bad_evaluation_arguments_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        sp.evaluate(model, **({"text": tokens(70)} | SIZES | change))


def test_logits_that_are_not_finite_are_refused(text):
    model = toy()
    with torch.no_grad():
        model.model["transformer"]["ln_f"].weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        sp.evaluate(model, text, **SIZES)
