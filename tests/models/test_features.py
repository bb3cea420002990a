"""dLLM-Cache against a plain loop with the same kept features, and what it keeps."""

import pytest
import torch
from dreams import toy_dream
from stale import lazy_generate
from torch.nn.functional import pad
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.evaluation.footprint import saved_bytes
from sinkprune.models.features import FeatureCache

KEPT = [[0, 1, 3], [2], [0, 2]]  # of four heads, two to a key/value head
READ = [[0, 1], [1], [0, 1]]
BUILD = {"llada": lambda: toy(n_kv_heads=2, sharpness=2.0), "dream": toy_dream}
SIZES = {"steps": 8, "gen_length": 12, "block_length": 6}


@pytest.mark.parametrize("mode", ["dense", "mask", "compact"])
@pytest.mark.parametrize(
    ("prompt_interval", "response_interval", "ratio"), [(50, 7, 0.25), (3, 4, 0.5), (5, 2, 0.0), (4, 8, 1.0)]
)
@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.no_grad()
def test_text_is_that_of_a_plain_loop_with_the_same_kept_features(
    family, prompt_interval, response_interval, ratio, mode
):
    model = BUILD[family]()
    prompt, intervals = tokens(1, 5), (prompt_interval, response_interval)
    pruned = {} if mode == "dense" else {"kept": KEPT, "compared": READ if mode == "compact" else None}
    expected = lazy_generate(model, prompt[0].tolist(), **SIZES, intervals=intervals, ratio=ratio, **pruned)
    if mode != "dense":
        sp.apply(model, manual_plan(model, KEPT), mode=mode)
    cache = FeatureCache(*intervals, ratio)
    assert [ids[0].tolist() for ids in sp.denoise(model, prompt, cache=cache, **SIZES)] == expected


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_refreshed_every_step_it_is_no_cache(family):
    model, prompt = BUILD[family](), tokens(2, 5)
    plain = list(sp.denoise(model, prompt, **SIZES))
    cached = list(sp.denoise(model, prompt, cache=FeatureCache(1, 1), **SIZES))
    assert torch.equal(torch.stack(plain), torch.stack(cached))
    stale = list(sp.denoise(model, prompt, cache=FeatureCache(50, 50, 0.0), **SIZES))
    assert not torch.equal(torch.stack(plain), torch.stack(stale))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_left_padded_batch_gives_each_prompt_what_it_gets_alone(family):
    model, longest = BUILD[family](), 8
    rows = [tokens(1, n, seed=n) for n in (3, 8, 5)]
    ids = torch.cat([pad(row, (longest - row.shape[1], 0)) for row in rows])
    valid = torch.tensor([[0] * (longest - row.shape[1]) + [1] * row.shape[1] for row in rows])
    options = SIZES | {"cache": FeatureCache(3, 4, 0.5)}
    *_, together = sp.denoise(model, ids, valid, **options)
    for i, row in enumerate(rows):
        *_, alone = sp.denoise(model, row, **options)
        assert together[i, longest:].tolist() == alone[0, row.shape[1] :].tolist()


def test_only_the_tokens_that_turned_run(monkeypatch):
    model, ran = toy(), []
    original = sp.ops.attention
    monkeypatch.setattr(
        "sinkprune.models.common.ops.attention",
        lambda q, *args, **options: ran.append(q.shape[2]) or original(q, *args, **options),
    )
    list(sp.denoise(model, tokens(1, 5), cache=FeatureCache(4, 3, 0.25), steps=4, gen_length=12))
    whole, turned = 5 + 12, int(12 * 0.25)
    assert ran == [whole, whole, whole, whole, turned, turned, whole, turned, turned, whole, 12, 12]


def test_it_keeps_keys_values_and_what_layers_added():
    """A layer that kept no head keeps what its MLP added, and no keys."""
    model, cache = toy(), FeatureCache()
    sp.apply(model, manual_plan(model, [[0, 1], [2], []]))
    list(sp.denoise(model, tokens(2, 5), cache=cache, **SIZES))
    values, features = 2 * 2 * 17 * 3 * 8, 2 * 2 * 17 * 3 * 32
    assert cache.bytes == 4 * (values + features)
    assert saved_bytes(model, cache) == 4 * 2 * 2 * 17 * (12 - 3) * 8


@pytest.mark.parametrize("settings", [(0, 1, 0.5), (1, 0, 0.5), (1, 1, 1.5), (1, 1, -0.1)])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="intervals must be at least 1 and update_ratio within"):
        FeatureCache(*settings)
