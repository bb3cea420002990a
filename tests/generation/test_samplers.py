"""Dream's rules and confidence thresholds against plain re-implementations, and what a callback gets."""

import math

import pytest
import torch
from dreams import toy_dream
from toys import MASK, WordTokenizer, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.generation.samplers import make_sampler
from sinkprune.models.caches import PrefixCache

DREAM_RULES = ["maskgit_plus", "topk_margin", "entropy"]


def sure_of(rule, probabilities):
    """How sure a row is, from a list of probabilities."""
    ranked = sorted(probabilities, reverse=True)
    if rule == "topk_margin":
        return ranked[0] - ranked[1]
    if rule == "entropy":
        return math.fsum(p * math.log(p) for p in probabilities if p)
    return ranked[0]


def published_dream(model, prompt, steps, gen_length, rule):
    """One prompt, temperature 0: Dream's ``_sample``, token by token, the mask token left out."""
    x = prompt + [MASK] * gen_length
    times = torch.linspace(1, 1e-3, steps + 1)
    history = []
    for step in range(steps):
        logits = model(torch.tensor([x])).logits[0].double()
        logits = torch.cat((logits[:1], logits[:-1]))
        logits[:, MASK] = -math.inf
        rows = []
        for position in range(len(x)):
            if x[position] == MASK:
                probabilities = logits[position].softmax(-1).tolist()
                token = max(range(len(probabilities)), key=lambda t: probabilities[t])
                rows.append((-sure_of(rule, probabilities), position, token))
        share = 1 - times[step + 1] / times[step] if step < steps - 1 else torch.tensor(1.0)
        for _, position, token in sorted(rows)[: int(torch.tensor(float(len(rows))) * share)]:
            x[position] = token
        history.append(list(x))
    return history


@pytest.fixture(scope="module")
def dream():
    return toy_dream()


@pytest.fixture(scope="module")
def confident():
    """A LLaDA whose distributions are sharp, so that thresholds pass one, some and all tokens of a step."""
    model = toy()
    with torch.no_grad():
        model.model["transformer"]["ff_out"].weight.mul_(4)
    return model


@pytest.mark.parametrize("rule", DREAM_RULES)
@pytest.mark.parametrize(("steps", "gen_length"), [(12, 12), (5, 12), (1, 6)])
@torch.no_grad()
def test_every_step_equals_the_published_dream_sampler(dream, rule, steps, gen_length):
    for seed in range(2):
        prompt = tokens(1, 5, seed=seed)
        expected = published_dream(dream, prompt[0].tolist(), steps, gen_length, rule)
        stream = sp.denoise(dream, prompt, steps=steps, gen_length=gen_length, algorithm=rule)
        assert [ids[0].tolist() for ids in stream] == expected


def test_dreams_rules_differ(dream):
    """Else one of them could stand in for another above."""
    paths = {
        tuple(
            tuple(ids.flatten().tolist())
            for ids in sp.denoise(dream, tokens(8, 5), steps=6, gen_length=12, algorithm=rule)
        )
        for rule in DREAM_RULES
    }
    assert len(paths) == 3


def test_origin_commits_by_chance_alone_at_the_rate_of_the_schedule(dream):
    steps, times = 4, torch.linspace(1, 1e-3, 5).tolist()
    model, prompt = dream, tokens(1, 4).expand(40, -1)
    committed = []

    def count(step):
        committed.append(step.new.sum().item())

    *_, ids = sp.denoise(
        model, prompt, steps=steps, gen_length=48, algorithm="origin", seed=3, callback=count
    )
    left = 40 * 48
    for step, number in enumerate(committed[:-1]):
        rate = 1 - times[step + 1] / times[step]
        assert abs(number - left * rate) < 4 * math.sqrt(left * rate * (1 - rate))
        left -= number
    assert committed[-1] == left  # the last step takes what is left
    assert MASK not in ids


@torch.no_grad()
def test_a_tempered_rule_is_sure_of_the_tempered_distribution():
    logits = torch.randn(1, 50, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities = (logits[0] / 0.5).softmax(-1)
    for rule in DREAM_RULES:
        token, sure = make_sampler(rule, 0.5, torch.Generator().manual_seed(1)).draw(logits)
        for row in range(50):
            expected = sure_of(rule, probabilities[row].tolist())
            if rule == "maskgit_plus":
                expected = probabilities[row, token[0, row]].item()
            assert sure[0, row].item() == pytest.approx(expected, rel=1e-9)
    assert (token[0] != logits[0].argmax(-1)).any()


def plain_limits(probabilities, top_p, top_k):
    """Tokens that may be drawn: the fewest likeliest ones whose sum reaches top_p, then the first top_k."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    if top_p is not None:
        total, kept = 0.0, []
        for token in order:
            if total >= top_p:
                break
            kept.append(token)
            total += probabilities[token]
        order = kept
    return order[:top_k]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, None), (None, 3), (0.9, 4), (1.0, None), (1e-9, None)])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("rule", [*DREAM_RULES, "low_confidence"])
def test_tokens_are_drawn_from_the_likeliest_only(rule, temperature, top_p, top_k):
    logits = torch.randn(1, 200, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    sampler = make_sampler(rule, temperature, generator, top_p=top_p, top_k=top_k)
    token, sure = sampler.draw(logits)
    drawn = set()
    for row in range(200):
        tempered = (logits[0, row] / (temperature or 1)).softmax(-1).tolist()
        allowed = plain_limits(tempered, top_p, top_k)
        assert token[0, row] in allowed
        drawn.add(allowed.index(token[0, row].item()))
        left = [p / math.fsum(tempered[t] for t in allowed) for p in (tempered[t] for t in allowed)]
        if rule == "maskgit_plus":
            expected = left[allowed.index(token[0, row].item())]
        elif rule == "low_confidence":  # LLaDA's, of the whole distribution
            expected = logits[0, row].softmax(-1)[token[0, row]].item()
        else:
            expected = sure_of(rule, [*left, 0.0])
        assert sure[0, row].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert len(drawn) == 1 if top_p == 1e-9 or not temperature else len(drawn) > 2


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"top_k": 2.5}, "top_k must be a positive integer, got 2.5"),
    ],
)
def test_limits_out_of_range_are_refused(dream, limits, message):
    with pytest.raises(ValueError, match=message):
        next(sp.denoise(dream, tokens(1, 3), gen_length=4, steps=4, **limits))


def plain_threshold(model, prompt, gen_length, block_length, threshold):
    """Fast-dLLM's parallel decoding of one prompt: all tokens at least as sure as the threshold, or the
    surest."""
    x, history = prompt + [MASK] * gen_length, []
    for start in range(len(prompt), len(x), block_length):
        while MASK in x[start : start + block_length]:
            logits = model(torch.tensor([x])).logits[0].double()
            logits[:, MASK] = -math.inf
            best = [
                (logits[i].softmax(-1).max().item(), i)
                for i in range(start, start + block_length)
                if x[i] == MASK
            ]
            for sure, i in best:
                if sure >= threshold or (sure, i) == max(best):
                    x[i] = logits[i].argmax().item()
            history.append(list(x))
    return history


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0])
@torch.no_grad()
def test_a_threshold_commits_all_that_is_sure_enough_and_counts_its_forwards(confident, threshold):
    prompt, seen = tokens(1, 6), []
    expected = plain_threshold(confident, prompt[0].tolist(), 16, 8, threshold)
    options = {"gen_length": 16, "block_length": 8, "threshold": threshold}
    stream = sp.denoise(confident, prompt, callback=seen.append, **options)
    assert [ids[0].tolist() for ids in stream] == expected
    assert seen[-1].forwards == len(expected) <= 16
    assert (len(expected) < 16) == (threshold < 1)


def test_a_low_threshold_takes_one_forward_a_block_and_ignores_steps(confident):
    options = {"gen_length": 16, "block_length": 4, "threshold": 1e-9, "steps": 3}
    assert len(list(sp.denoise(confident, tokens(2, 6), **options))) == 4


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin"])
def test_a_threshold_goes_with_every_confidence_that_is_a_probability(confident, algorithm):
    options = {"gen_length": 8, "threshold": 0.5, "algorithm": algorithm}
    *_, ids = sp.denoise(confident, tokens(2, 6), **options)
    assert MASK not in ids


def test_a_callback_sees_every_step_and_its_tokens(dream):
    prompt, seen = tokens(2, 5), []
    options = {"steps": 6, "gen_length": 12, "block_length": 6}
    states = list(sp.denoise(dream, prompt, callback=seen.append, **options))
    before = torch.cat((prompt, torch.full((2, 12), MASK)), 1)
    for i, (step, ids) in enumerate(zip(seen, states, strict=True)):
        assert torch.equal(step.ids, ids)
        assert torch.equal(step.new, ids != before)
        assert (step.forwards, step.block, step.blocks, step.cache_bytes) == (i + 1, i // 3, 2, 0)
        before = ids


def test_generate_streams_to_its_callback(confident):
    tokenizer, seen = WordTokenizer(), []
    text = sp.generate(confident, tokenizer, "w3 w4", steps=4, gen_length=4, callback=seen.append)
    words = seen[-1].ids[0, 2:].tolist()
    assert text == tokenizer.decode(words[: words.index(0)] if 0 in words else words)
    assert sum(step.new.sum() for step in seen) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "topk"}, "algorithm must be one of entropy, .*topk_margin, got 'topk'"),
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0.0"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        ({"threshold": math.nan}, "threshold must be above 0 and at most 1, got nan"),
        ({"threshold": 0.9, "algorithm": "entropy"}, "low_confidence, maskgit_plus, .*got 'entropy'"),
        ({"threshold": 0.9, "remasking": "random"}, "needs an algorithm whose confidence .*got 'random'"),
        ({"threshold": 0.9, "algorithm": "origin"}, "got 'origin'"),
        ({"algorithm": "entropy", "steps": 9}, "at most gen_length=8, got 9"),
        ({"threshold": 0.9, "block_length": 3}, "block_length must divide gen_length=8, got 3"),
    ],
)
def test_bad_options_are_refused_before_the_first_forward(dream, monkeypatch, options, message):
    monkeypatch.setattr(type(dream), "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        next(sp.denoise(dream, tokens(1, 4), **({"steps": 4, "gen_length": 8} | options)))


def test_a_profile_under_a_threshold_traces_every_forward_and_can_be_saved(confident, tmp_path):
    seen, options = [], {"gen_length": 12, "threshold": 0.9, "cache": PrefixCache()}
    profile = sp.profile(confident, tokens(2, 5), steps=2, callback=seen.append, **options)
    assert profile.steps == seen[-1].forwards > 2
    assert profile.trace_positions.min() >= 0
    profile.save(tmp_path / "profile")
    settings = sp.SinkProfile.load(tmp_path / "profile").settings
    assert (settings["threshold"], settings["cache"]) == (0.9, "prefix")
    assert "callback" not in settings
