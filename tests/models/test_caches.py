"""Caches against a plain implementation with the same staleness, against no cache where they are exact, and
their sizes."""

import copy

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from dreams import toy_dream
from stale import stale_generate
from torch.nn.functional import pad
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evaluation.footprint import cache_size, saved_bytes
from sinkprune.models.caches import CACHES, BlockCache, DualCache, PrefixCache

KEPT = [[0, 1, 3], [2], [0, 2]]
LLADA, DREAM, SDAR, LLADA2 = "llada", "dream", "sdar", "llada2"
BLOCK_CAUSAL = (SDAR, LLADA2)
BUILD = {
    LLADA: lambda: toy(n_kv_heads=2, sharpness=2.0),
    DREAM: toy_dream,
    SDAR: toy_sdar,
    LLADA2: toy_llada2,
}
SIZES = {"steps": 6, "gen_length": 12, "block_length": 6}


def pruned(model, mode, kept=KEPT):
    if mode != "dense":
        model = copy.deepcopy(model)
        sp.apply(model, manual_plan(model, kept), mode=mode)
    return model


@pytest.fixture(scope="module")
def models():
    return {family: build() for family, build in BUILD.items()}


@pytest.mark.parametrize("threshold", [None, 0.2], ids=["schedule", "threshold"])
@pytest.mark.parametrize("mode", ["dense", "mask", "compact"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", [LLADA, DREAM])
@torch.no_grad()
def test_cached_text_is_that_of_a_plain_loop_with_the_same_stale_keys(models, family, cache, mode, threshold):
    dense = models[family]
    kept = None if mode == "dense" else KEPT
    model = pruned(dense, mode)
    options = SIZES | {"cache": cache, "threshold": threshold}
    for seed in range(2):
        prompt = tokens(1, 5, seed=seed)
        expected = stale_generate(dense, prompt[0].tolist(), kept=kept, **options)
        assert [ids[0].tolist() for ids in sp.denoise(model, prompt, **options)] == expected


@torch.no_grad()
def test_staleness_shows_in_the_plain_loop(models):
    """Else the test above could pass with a cache that is never read."""
    texts = {
        cache: stale_generate(models[LLADA], tokens(1, 5)[0].tolist(), **SIZES, cache=cache)[-1]
        for cache in (None, "prefix", "dual")
    }
    assert len({tuple(text) for text in texts.values()}) == 3


@pytest.mark.parametrize("mode", ["dense", "mask", "compact"])
@pytest.mark.parametrize("length", [8, 5, 3], ids=["prompt ends a block", "within one", "shorter than one"])
@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_finished_blocks_of_a_block_causal_model_cache_exactly(models, family, mode, length):
    model = pruned(models[family], mode)
    runs = {}
    for cache in (None, "block"):
        seen = []
        stream = sp.denoise(
            model, tokens(2, length), steps=6, gen_length=12, cache=cache, callback=seen.append
        )
        runs[cache] = [ids.tolist() for ids in stream]
        assert [step.forwards for step in seen] == list(range(1, len(seen) + 1))
    assert runs["block"] == runs[None]


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
@torch.no_grad()
def test_block_diffusion_fills_block_after_block_over_what_is_there_only(models, family):
    """A plain loop over the model, a token a step; the block that the gen_length ends in is filled too."""
    model, prompt = models[family], tokens(1, 6)
    x = prompt[0].tolist()
    expected = []
    for end in (8, 12, 16):
        x += [60] * (end - len(x))
        while 60 in x:
            logits = model(torch.tensor([x])).logits[0]
            logits[:, 60] = -torch.inf
            best, token = logits.double().softmax(-1).max(-1)
            open_ = [i for i in range(len(x)) if x[i] == 60]
            position = max(open_, key=lambda i: best[i].item())
            x[position] = token[position].item()
            expected.append(x[:14] + [60] * (14 - len(x)))
    got = [ids[0].tolist() for ids in sp.denoise(model, prompt, steps=8, gen_length=8)]
    assert got == expected


PADDED = [(family, cache) for family in (LLADA, DREAM) for cache in (None, "prefix", "dual")]
PADDED += [(family, cache) for family in BLOCK_CAUSAL for cache in (None, "block")]


@pytest.mark.parametrize("algorithm", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(("family", "cache"), PADDED)
def test_a_left_padded_batch_gives_each_prompt_what_it_gets_alone(models, family, cache, algorithm):
    model = models[family]
    lengths = [3, 7, 11] if family in BLOCK_CAUSAL else [3, 8, 5]
    longest = max(lengths)
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.cat([pad(row, (longest - row.shape[1], 0)) for row in rows])
    valid = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    sizes = {"steps": 6, "gen_length": 12} if family in BLOCK_CAUSAL else SIZES
    for threshold in (None, 0.2) if algorithm == "low_confidence" else (None,):
        options = sizes | {"cache": cache, "algorithm": algorithm, "threshold": threshold}
        *_, together = sp.denoise(model, ids, valid, **options)
        for i, row in enumerate(rows):
            *_, alone = sp.denoise(model, row, **options)
            assert together[i, longest:].tolist() == alone[0, row.shape[1] :].tolist()


@pytest.mark.parametrize("family", [LLADA, DREAM])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_guidance_keeps_both_halves_in_the_cache(models, family, cache):
    """A step a block leaves nothing to reuse, so that text is the plain one; more steps do run."""
    model, prompt = models[family], tokens(1, 5)
    options = {"gen_length": 12, "block_length": 6, "cfg_scale": 1.5}
    *_, plain = sp.denoise(model, prompt, steps=2, **options)
    *_, cached = sp.denoise(model, prompt, steps=2, cache=cache, **options)
    assert torch.equal(plain, cached)
    *_, longer = sp.denoise(model, prompt, steps=6, cache=cache, **options)
    assert 60 not in longer


@pytest.mark.parametrize(("mode", "kv_heads"), [("dense", 6), ("mask", 6), ("compact", 4)])
@pytest.mark.parametrize(
    ("family", "cache", "held"),
    [
        (LLADA, "prefix", 11),
        (LLADA, "dual", 17),
        (DREAM, "prefix", 11),
        (DREAM, "dual", 17),
        (SDAR, "block", 16),
    ],
)
def test_a_compact_model_holds_its_kept_key_value_heads_only(models, family, cache, held, mode, kv_heads):
    """Two key/value heads a layer, of which the plan leaves [2, 1, 1] to read."""
    model, seen = pruned(models[family], mode, [[0, 1, 3], [2], [2, 3]]), []
    sizes = {"steps": 6, "gen_length": 12} if family == SDAR else SIZES
    for _ in sp.denoise(model, tokens(2, 5), cache=cache, callback=seen.append, **sizes):
        pass
    width = 10 if family == SDAR else 8
    expected = 2 * 2 * held * kv_heads * width * 4  # keys and values, two prompts, float32
    size = cache_size(model, held, batch=2)
    assert seen[-1].cache_bytes == size.bytes == expected
    assert size.dense == 2 * 2 * held * 6 * width * 4
    assert size.saved == size.dense - size.bytes
    mine = CACHES[cache]()
    list(sp.denoise(model, tokens(2, 5), cache=mine, **sizes))
    assert (mine.tokens, mine.batch, saved_bytes(model, mine)) == (held, 2, size.saved)


def test_a_cache_of_half_the_width_takes_half_the_bytes():
    wide, narrow = (cache_size(toy().to(dtype), 7) for dtype in (torch.float32, torch.bfloat16))
    assert wide.bytes == wide.dense == 2 * narrow.bytes == 2 * 7 * 3 * 4 * 8 * 4
    assert wide.saved == 0


@pytest.mark.parametrize(
    ("family", "cache", "expected"),
    [
        (LLADA, None, [17] * 6),
        (LLADA, "prefix", [17, 12, 12, 17, 6, 6]),
        (DREAM, "dual", [17, 6, 6, 17, 6, 6]),
        (SDAR, None, [8, 8, 12, 12, 16, 16, 20, 20]),  # nothing after the block
        (SDAR, "block", [8, 4, 8, 4, 8, 4, 8, 4]),  # a finished block is run once more, to be kept
    ],
)
def test_a_forward_runs_the_window_alone(models, family, cache, expected):
    model, ran = models[family], []
    sizes = {"steps": 6, "gen_length": 12} if family == SDAR else SIZES
    hook = model.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[1]))
    list(sp.denoise(model, tokens(1, 5), cache=cache, **sizes))
    hook.remove()
    assert ran == expected


def test_a_layer_without_heads_holds_nothing(models):
    model, seen = pruned(models[LLADA], "compact", [[], [0], [1]]), []
    for _ in sp.denoise(model, tokens(1, 5), cache="dual", callback=seen.append, **SIZES):
        pass
    assert seen[-1].cache_bytes == 2 * 17 * 2 * 8 * 4


def test_a_cache_of_ones_own_is_emptied_first_and_can_be_asked_afterwards(models):
    cache = PrefixCache()
    first = list(sp.denoise(models[LLADA], tokens(2, 5), cache=cache, **SIZES))
    held = cache.bytes
    assert held == cache_size(models[LLADA], 11, batch=2).bytes
    list(sp.denoise(models[LLADA], tokens(1, 9), cache=cache, **SIZES))
    again = list(sp.denoise(models[LLADA], tokens(2, 5), cache=cache, **SIZES))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert cache.bytes == held


@pytest.mark.parametrize("family", [LLADA, DREAM, SDAR])
@torch.no_grad()
def test_positions_alone_are_a_sequence_of_its_own(models, family):
    """Rotations are relative, so any start gives the same; for the block-causal one, any start of a block."""
    model, ids = models[family], tokens(2, 8)
    expected = model(ids).logits
    for positions in (torch.arange(8, 16), torch.arange(8, 16).expand(2, -1)):
        torch.testing.assert_close(model(ids, positions=positions).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "cache"), [(LLADA, DualCache), (LLADA, PrefixCache), (DREAM, DualCache), (SDAR, BlockCache)]
)
@torch.no_grad()
def test_a_cache_of_another_model_or_batch_is_refused(models, family, cache):
    model, held = models[family], cache()
    held.begin(4, 8, 8)
    model(tokens(2, 8), cache=held)
    window, positions = tokens(1, 4), torch.arange(4, 8)
    with pytest.raises(ValueError, match=r"layer 0 holds .*= \[2, 2, \d+\].*got .*= \[1, 2, \d+\]"):
        model(window, positions=positions, cache=held)
    other = models[SDAR if family != SDAR else LLADA]
    with pytest.raises(ValueError, match="a cache serves one model and one batch"):
        other(tokens(2, 4), positions=positions, cache=held)


@pytest.mark.parametrize("family", [LLADA, DREAM, SDAR])
@torch.no_grad()
def test_a_mask_or_positions_of_another_length_are_refused(models, family):
    model, held = models[family], {SDAR: BlockCache}.get(family, DualCache)()
    held.begin(4, 8, 8)
    model(tokens(1, 8), cache=held)
    with pytest.raises(ValueError, match=r"positions must have shape \(4,\) or \(1, 4\), got \(3,\)"):
        model(tokens(1, 4), positions=torch.arange(3), cache=held)
    with pytest.raises(ValueError, match=r"attention_mask must .*\(1, 8\).*got \(1, 4\)"):
        model(tokens(1, 4), torch.ones(1, 4), positions=torch.arange(4, 8), cache=held)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (LLADA, {"cache": "block"}, r"llada \(LLaDA\) takes the cache prefix or dual.*, got 'block'"),
        (DREAM, {"cache": "block"}, r"dream \(Dream\) takes the cache prefix or dual.*, got 'block'"),
        (SDAR, {"cache": "dual"}, r"sdar \(SDAR\) takes the cache block, got 'dual'"),
        (SDAR, {"cache": PrefixCache()}, "got 'prefix'"),
        (LLADA, {"cache": "kv"}, "cache must be None or one of block, .*dual, prefix, got 'kv'"),
        (SDAR, {"block_length": 2}, "sdar is block-causal: its blocks have 4 tokens, got block_length 2"),
        (SDAR, {"gen_length": 6}, "block_length must divide gen_length=6, got 4"),
        (SDAR, {"gen_length": 60, "steps": 15}, "exceed the context of 64"),
    ],
)
def test_a_cache_or_a_block_that_the_family_does_not_know_is_refused(models, family, options, message):
    options = {"steps": 2, "gen_length": 8} | options
    with pytest.raises(ValueError, match=message):
        next(sp.denoise(models[family], tokens(1, 5), **options))


def test_a_family_that_takes_no_cache_says_so(models, monkeypatch):
    monkeypatch.setattr(type(sp.adapter_for(models[LLADA])), "caches", ())
    with pytest.raises(ValueError, match=r"llada \(LLaDA\) takes no cache, got 'dual'"):
        next(sp.denoise(models[LLADA], tokens(1, 4), cache="dual", **SIZES))


@pytest.mark.parametrize("cache", [None, "block"])
def test_padding_that_cuts_a_block_causal_batch_into_other_blocks_is_refused(models, cache):
    valid = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(
        ValueError, match=r"blocks of 4 .*got padding of \[3, 0\]: sp.generate runs them in groups"
    ):
        next(sp.denoise(models[SDAR], tokens(2, 5), valid, steps=2, gen_length=8, cache=cache))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_statistics_are_gathered_under_a_cache(models, cache):
    """A column mass is over all keys, whatever part of the queries ran: it sums to one."""
    model = models[LLADA]
    with sp.track(model) as tracker:
        list(sp.denoise(model, tokens(1, 5), cache=cache, **SIZES))
        masses = [mass[:, :, :17].sum(-1) for mass in tracker.tracker.mass]
    assert tracker.steps == 6
    for mass in masses:
        torch.testing.assert_close(mass, torch.ones_like(mass))


def test_every_cache_has_its_name():
    assert {name: kind.name for name, kind in CACHES.items()} == {name: name for name in CACHES}
