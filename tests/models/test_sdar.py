"""The native SDAR against an independent straight-line forward, from files that the tests' code wrote."""

import copy

import pytest
import torch
from block_causals import Kept, sdar_config, sdar_tensors, straight_sdar, toy_sdar
from toys import manual_plan, one_thread, tokens, write_checkpoint  # noqa: F401

import sinkprune as sp
from sinkprune.models.sdar import SDARConfig

CONFIGS = {
    "heads wider than hidden": {},
    "narrower, mha, biases": {"head_dim": 6, "num_key_value_heads": 4, "attention_bias": True},
    "tied, block of one": {"tie_word_embeddings": True, "block_size": 1},
    "block of 8, other theta": {"block_size": 8, "rope_theta": 10000.0, "num_hidden_layers": 2},
}
HEADS = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [[0, 7, 9], None, [5]]


def expected_of(model, ids, valid=None):
    """The independent logits of each sequence on its own; zeros at padding."""
    config, tensors = model.config.to_dict(), model.state_dict()
    logits = torch.zeros(*ids.shape, config["vocab_size"], dtype=torch.float64)
    for row, sequence in enumerate(ids):
        seen = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid[row].bool()
        logits[row, seen] = straight_sdar(config, tensors, sequence[seen])
    return logits


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_published_layout_gives_the_same_logits_as_an_independent_forward(tmp_path, changes, shards):
    config = sdar_config(**changes)
    tensors = sdar_tensors(config)
    model, tokenizer = sp.load(write_checkpoint(tmp_path / "m", config, tensors, shards))
    ids = tokens(2, 13, seed=1)
    close(model(ids).logits, expected_of(model, ids))
    assert tokenizer is None
    assert set(model.state_dict()) == set(tensors)


def test_a_token_sees_its_block_and_those_before():
    model, ids = toy_sdar(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 8:] = tokens(4, seed=9)
    assert torch.equal(model(ids).logits[:, :8], model(changed).logits[:, :8])
    changed[0, 7] = 1 + changed[0, 7] % 50
    assert not torch.isclose(model(ids).logits[0, 4], model(changed).logits[0, 4]).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_is_cut_into_blocks_as_it_is_alone(side):
    model = toy_sdar()
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 3) if side == "left" else slice(8, 11)] = 0
    got = sp.adapter_for(model).predict(ids, valid)
    close(got[valid.bool()], expected_of(model, ids, valid)[valid.bool()])
    close(sp.adapter_for(model).predict(ids, valid, slice(4, 8)), got[:, 4:8])


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_block_by_block_with_a_cache_equals_the_whole(form):
    model, ids = toy_sdar(), tokens(2, 10)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS), mode=form)
    cache, positions = Kept(), torch.arange(10)
    parts = [
        model(ids[:, part], positions=positions[part], cache=cache).logits
        for part in (slice(0, 4), slice(4, 8), slice(8, 10))
    ]
    close(torch.cat(parts, 1), model(ids).logits)
    kept = [pair[0].shape[1] for pair in cache.pairs.values()]
    assert kept == ([2, 1, 2] if form == "compact" else [2, 2, 2])


@pytest.mark.parametrize("heads", [HEADS, [[0, 1, 2], [], [1, 3]]], ids=["uneven", "a layer without heads"])
@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["", "and channels"])
def test_masked_and_compact_models_equal_one_zeroed_by_hand(heads, channels):
    model = toy_sdar(attention_bias=True)
    plan = manual_plan(model, heads, channels)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for i, layer in enumerate(zeroed.layers):
            for head in set(range(4)) - set(heads[i]):
                layer.self_attn.o_proj.weight[:, head * 10 : head * 10 + 10] = 0
            for channel in set(range(40)) - set(channels[i]) if channels and channels[i] else ():
                layer.mlp.down_proj.weight[:, channel] = 0
    ids = tokens(2, 11, seed=4)
    expected = expected_of(zeroed, ids)
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        close(pruned(ids).logits, expected)
    masked = sp.apply(copy.deepcopy(model), plan, mode="mask")
    sp.restore(masked)
    assert torch.equal(masked(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_nothing_pruned_changes_nothing(mode):
    model, ids = toy_sdar(), tokens(2, 11)
    expected = model(ids).logits
    sp.apply(model, manual_plan(model, [[0, 1, 2, 3]] * 3), mode=mode)
    torch.testing.assert_close(model(ids).logits, expected, atol=0 if mode == "mask" else 1e-6, rtol=0)


def test_column_mass_equals_that_of_the_independent_forward():
    model, ids = toy_sdar(), tokens(2, 11, seed=5)
    valid = torch.ones(2, 11, dtype=torch.long)
    valid[1, :3] = 0
    with sp.track(model) as tracker:
        sp.adapter_for(model).predict(ids, valid)
    expected = []
    for row, seen in enumerate(valid.bool()):
        found = []
        straight_sdar(model.config.to_dict(), model.state_dict(), ids[row, seen], probabilities=found)
        expected.append(found[0].mean(-2).amax(-1).float())  # [layers, heads]
    torch.testing.assert_close(tracker.result().mass, torch.stack(expected, 1), atol=1e-5, rtol=0)


def test_it_profiles_plans_and_generates():
    model = toy_sdar()
    profile = sp.profile(model, tokens(2, 4), steps=4, gen_length=8)
    sp.apply(model, sp.plan(model, profile, "sink_variance", ratio=0.5))
    *_, ids = sp.denoise(model, tokens(2, 4), steps=4, gen_length=8)
    assert (ids != 60).all()


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_every_form_is_saved_and_loaded(tmp_path, form):
    model, ids = toy_sdar(attention_bias=True), tokens(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS, CHANNELS), mode=form)
    sp.save(model, tmp_path / "m", shard_bytes=8192)
    loaded, _ = sp.load(tmp_path / "m")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert sp.adapter_for(loaded).form == form and type(loaded) is type(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": None}, "SDAR config: 'intermediate_size' must be a positive integer"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 9}, "the rotated width of a head even"),
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"hidden_act": "gelu"}, "only hidden_act='silu' is supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only rope_scaling=None is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type='default' is supported"),
        ({"use_sliding_window": True}, "only use_sliding_window=False is supported"),
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        SDARConfig.from_dict(sdar_config(**changes))


def test_config_round_trips_unknown_keys_and_reads_what_transformers_5_writes():
    written = SDARConfig.from_dict(sdar_config(initializer_range=0.02)).to_dict()
    assert written["initializer_range"] == 0.02 and written["head_dim"] == 10
    assert SDARConfig.from_dict(written).to_dict() == written
    config = sdar_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    del config["rope_theta"], config["head_dim"]
    assert SDARConfig.from_dict(config).rope_theta == 5.0
    assert SDARConfig.from_dict(config).width == 128  # the published default


def test_arguments_that_do_not_fit_are_refused():
    model, ids = toy_sdar(), tokens(1, 3)
    with pytest.raises(ValueError, match="65 tokens exceed the context of 64"):
        model(tokens(1, 65))
    with pytest.raises(ValueError, match=r"L >= 1, got \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"positions must have shape \(3,\) or \(1, 3\), got \(1, 4\)"):
        model(ids, positions=torch.arange(4)[None])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 3\), got \(1, 4\)"):
        model(ids, torch.ones(1, 4))
    cache = Kept()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 6\), got \(1, 3\)"):
        model(ids, torch.ones(1, 3), positions=torch.arange(3, 6), cache=cache)
