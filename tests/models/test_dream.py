"""The native Dream against an independent straight-line forward, from files that the tests' code wrote."""

import copy

import pytest
import torch
from dreams import published_config, published_tensors, straight_forward, toy_dream
from toys import manual_plan, one_thread, tokens, write_checkpoint  # noqa: F401

import sinkprune as sp
from sinkprune.models.dream import DreamConfig

CONFIGS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "without biases": {"attention_bias": False, "tie_word_embeddings": True},
    "two layers, other theta": {"num_hidden_layers": 2, "rope_theta": 10000.0},
}
HEADS = [[0, 2], [1], [0, 1, 3]]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_published_layout_gives_the_same_logits_as_an_independent_forward(tmp_path, changes, shards):
    config = published_config(**changes)
    tensors = published_tensors(config)
    model, tokenizer = sp.load(write_checkpoint(tmp_path / "m", config, tensors, shards))
    ids = tokens(2, 13, seed=1)
    expected = straight_forward(config, tensors, ids)
    torch.testing.assert_close(model(ids).logits.double(), expected, atol=2e-5, rtol=1e-4)
    assert tokenizer is None
    assert set(model.state_dict()) == set(tensors)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["rows", "pairs, as the published sampler builds them"])
def test_padding_is_honoured_on_both_sides(side, form):
    model = toy_dream()
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    seen = valid[1].bool()
    mask, positions = valid, None
    if form != "rows":
        mask = (valid[:, None, None, :] * valid[:, None, :, None]).bool()
        positions = (valid.cumsum(-1) - 1).masked_fill(valid == 0, 1)
    got = model(ids, mask, positions).logits.double()
    expected = straight_forward(model.config.to_dict(), model.state_dict(), ids, valid)
    torch.testing.assert_close(got[0], expected[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got[1][seen], expected[1][seen], atol=2e-5, rtol=1e-4)
    alone = model(ids[1:, seen], "full").logits.double()  # RoPE is relative
    torch.testing.assert_close(got[1][seen], alone[0], atol=2e-5, rtol=1e-4)


def test_masks_that_are_more_than_padding_are_refused():
    model, ids = toy_dream(), tokens(1, 5)
    with pytest.raises(ValueError, match="padding alone"):
        model(ids, torch.ones(5, 5, dtype=torch.bool).tril()[None, None])
    with pytest.raises(ValueError, match=r"'full' or have shape \(1, 5\) or \(1, 1, 5, 5\), got \(5, 5\)"):
        model(ids, torch.ones(5, 5))
    with pytest.raises(ValueError, match="got 'half'"):
        model(ids, "half")
    with pytest.raises(ValueError, match="must be bool"):
        model(ids, torch.zeros(1, 1, 5, 5))


def test_the_adapter_undoes_the_shift_and_the_model_keeps_it():
    model, ids = toy_dream(), tokens(2, 9, seed=3)
    published = model(ids).logits
    aligned = torch.cat((published[:, :1], published[:, :-1]), 1)  # what the published sampler does
    adapter = sp.adapter_for(model)
    torch.testing.assert_close(adapter.predict(ids), aligned, atol=1e-6, rtol=0)
    for rows in (slice(0, 3), slice(4, 9), slice(None)):
        torch.testing.assert_close(adapter.predict(ids, None, rows), aligned[:, rows], atol=1e-6, rtol=0)


def test_sampling_reads_the_row_before_each_token():
    model, prompt = toy_dream(), tokens(1, 6, seed=4)
    *_, ids = sp.denoise(model, prompt, steps=1, gen_length=1)
    canvas = torch.cat((prompt, torch.tensor([[60]])), 1)
    logits = straight_forward(model.config.to_dict(), model.state_dict(), canvas)[0, -2]
    logits[60] = -torch.inf
    assert ids[0, -1] == logits.argmax()


@pytest.mark.parametrize("heads", [HEADS, [[0, 1, 2], [], [1, 3]]], ids=["uneven", "a layer without heads"])
@pytest.mark.parametrize("channels", [None, [[0, 7, 9], None, [5]]], ids=["", "and channels"])
def test_masked_and_compact_models_equal_one_zeroed_by_hand(heads, channels):
    model = toy_dream()
    plan = manual_plan(model, heads, channels)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for i, layer in enumerate(zeroed.layers):
            for head in set(range(4)) - set(heads[i]):
                layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
            for channel in set(range(40)) - set(channels[i]) if channels and channels[i] else ():
                layer.mlp.down_proj.weight[:, channel] = 0
    ids, valid = tokens(2, 11, seed=4), torch.ones(2, 11, dtype=torch.long)
    valid[1, :4] = 0
    expected = zeroed(ids, valid).logits[valid.bool()]
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        torch.testing.assert_close(pruned(ids, valid).logits[valid.bool()], expected, atol=1e-5, rtol=0)
    masked = sp.apply(model, plan, mode="mask")
    sp.restore(masked)
    assert sp.adapter_for(masked).form == "dense"


def test_column_mass_equals_that_of_the_independent_forward():
    model, ids = toy_dream(), tokens(2, 12, seed=5)
    with sp.track(model) as tracker:
        model(ids)
    probabilities = []
    straight_forward(model.config.to_dict(), model.state_dict(), ids, probabilities=probabilities)
    mass = torch.stack(probabilities).mean(-2).float()  # [S, L, H, keys]
    torch.testing.assert_close(tracker.result().mass, mass.amax(-1).transpose(0, 1), atol=1e-5, rtol=0)


def test_it_profiles_plans_and_generates():
    model = toy_dream()
    profile = sp.profile(model, tokens(2, 4), steps=4, gen_length=8)
    plan = sp.plan(model, profile, "sink_variance", ratio=0.5)
    sp.apply(model, plan)
    *_, ids = sp.denoise(model, tokens(2, 4), steps=4, gen_length=8)
    assert (ids != 60).all()


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_every_form_is_saved_and_loaded(tmp_path, form):
    model, ids = toy_dream(), tokens(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS, [[0, 7, 9], None, [5]]), mode=form)
    sp.save(model, tmp_path / "m", shard_bytes=8192)
    loaded, _ = sp.load(tmp_path / "m")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert sp.adapter_for(loaded).form == form and type(loaded) is type(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "'hidden_size' must be a positive integer"),
        ({"num_attention_heads": 5}, "must be an even multiple"),
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "only hidden_act='silu' is supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only rope_scaling=None is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type='default' is supported"),
        ({"use_sliding_window": True}, "only use_sliding_window=False is supported"),
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        DreamConfig.from_dict(published_config(**changes))


def test_config_round_trips_unknown_keys_and_reads_what_transformers_5_writes():
    written = DreamConfig.from_dict(published_config(initializer_range=0.02)).to_dict()
    assert written["initializer_range"] == 0.02 and written["num_key_value_heads"] == 2
    assert DreamConfig.from_dict(written).to_dict() == written
    config = published_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    del config["rope_theta"]
    assert DreamConfig.from_dict(config).rope_theta == 5.0


def test_too_long_and_empty_sequences_are_refused():
    model = toy_dream()
    with pytest.raises(ValueError, match="65 tokens exceed the context of 64"):
        model(tokens(1, 65))
    with pytest.raises(ValueError, match=r"L >= 1, got \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"positions must have shape \(3,\) or \(1, 3\)"):
        model(tokens(1, 3), None, torch.arange(4)[None])
