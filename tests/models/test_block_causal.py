"""What SDAR and LLaDA2 have in common, of each: independent forwards, blocks, caches, pruned forms, files and
refusals."""

import copy

import pytest
import torch
from block_causals import (
    Kept,
    llada2_config,
    llada2_tensors,
    sdar_config,
    sdar_tensors,
    straight_llada2,
    straight_sdar,
    toy_llada2,
    toy_sdar,
)
from toys import assert_same_tensors, manual_plan, one_thread, tokens, write_checkpoint  # noqa: F401

import sinkprune as sp

HEADS = [[0, 2], [1], [0, 1, 3]]
EMPTIED = [[0, 1, 2], [], [1, 3]]


class SDARFamily:
    config, tensors = staticmethod(sdar_config), staticmethod(sdar_tensors)
    straight, channels = staticmethod(straight_sdar), [[0, 7, 9], None, [5]]
    output, width, experts_round = "self_attn.o_proj", 10, 0

    @staticmethod
    def toy():
        return toy_sdar(attention_bias=True)

    @staticmethod
    def untouched(name):
        return "layers.1.mlp." in name  # keeps all its channels in ``channels``


class LLaDA2Family:
    config, tensors = staticmethod(llada2_config), staticmethod(llada2_tensors)
    straight, channels = staticmethod(straight_llada2), [[0, 7, 9], None, None]  # the others are experts
    output, width, experts_round = "attention.dense", 12, 1e-6  # tokens are summed in another order

    @staticmethod
    def toy():
        return toy_llada2(use_qkv_bias=True, use_bias=True)

    @staticmethod
    def untouched(name):
        return "layers.1.mlp." in name or "layers.2.mlp." in name


CONFIGS = {
    "sdar, heads wider than hidden": (SDARFamily, {}),
    "sdar, narrower, mha, biases": (
        SDARFamily, {"head_dim": 6, "num_key_value_heads": 4, "attention_bias": True},
    ),
    "sdar, tied, block of one": (SDARFamily, {"tie_word_embeddings": True, "block_size": 1}),
    "sdar, block of 8, other theta": (
        SDARFamily, {"block_size": 8, "rope_theta": 10000.0, "num_hidden_layers": 2},
    ),
    "llada2, groups of experts": (LLaDA2Family, {}),
    "llada2, one group, one expert, none shared": (
        LLaDA2Family, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "num_shared_experts": None},
    ),
    "llada2, all layers experts, biases": (
        LLaDA2Family, {"first_k_dense_replace": 0, "use_qkv_bias": True, "use_bias": True},
    ),
    "llada2, all layers dense, whole RoPE": (
        LLaDA2Family, {"first_k_dense_replace": 3, "partial_rotary_factor": 1.0, "rotary_dim": 12},
    ),
    "llada2, mha, block of 8": (LLaDA2Family, {"num_key_value_heads": 4, "block_size": 8}),
}  # fmt: skip


@pytest.fixture(params=[SDARFamily, LLaDA2Family], ids=["sdar", "llada2"])
def family(request):
    return request.param


def expected_of(family, model, ids, valid=None):
    """The independent logits of each sequence on its own; zeros at padding."""
    config, tensors = model.config.to_dict(), model.state_dict()
    logits = torch.zeros(*ids.shape, config["vocab_size"], dtype=torch.float64)
    for row, sequence in enumerate(ids):
        seen = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid[row].bool()
        logits[row, seen] = family.straight(config, tensors, sequence[seen])
    return logits


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "changes"), CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shards", [1, 3])
def test_published_layout_gives_the_same_logits_as_an_independent_forward(tmp_path, kind, changes, shards):
    config = kind.config(**changes)
    tensors = kind.tensors(config)
    model, tokenizer = sp.load(write_checkpoint(tmp_path / "m", config, tensors, shards))
    ids = tokens(2, 13, seed=1)
    close(model(ids).logits, expected_of(kind, model, ids))
    assert tokenizer is None
    assert set(model.state_dict()) == set(tensors)


def test_a_token_sees_its_block_and_those_before(family):
    model, ids = family.toy(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 8:] = tokens(4, seed=9)
    got, expected = model(changed).logits[:, :8], model(ids).logits[:, :8]
    torch.testing.assert_close(got, expected, atol=family.experts_round, rtol=0)
    changed[0, 7] = 1 + changed[0, 7] % 50
    assert not torch.isclose(model(ids).logits[0, 4], model(changed).logits[0, 4]).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_is_cut_into_blocks_as_it_is_alone(family, side):
    model = family.toy()
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 3) if side == "left" else slice(8, 11)] = 0
    got = sp.adapter_for(model).predict(ids, valid)
    close(got[valid.bool()], expected_of(family, model, ids, valid)[valid.bool()])
    close(sp.adapter_for(model).predict(ids, valid, slice(4, 8)), got[:, 4:8])


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_block_by_block_with_a_cache_equals_the_whole(family, form):
    model, ids = family.toy(), tokens(2, 10)
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


@pytest.mark.parametrize("heads", [HEADS, EMPTIED], ids=["uneven", "a layer without heads"])
@pytest.mark.parametrize("with_channels", [False, True], ids=["", "and channels"])
def test_masked_and_compact_models_equal_one_zeroed_by_hand(family, heads, with_channels):
    model = family.toy()
    channels = family.channels if with_channels else [None] * 3
    plan = manual_plan(model, heads, channels)
    zeroed, width = copy.deepcopy(model), family.width
    with torch.no_grad():
        for i, layer in enumerate(zeroed.layers):
            for head in set(range(4)) - set(heads[i]):
                layer.get_submodule(family.output).weight[:, head * width : (head + 1) * width] = 0
            for channel in () if channels[i] is None else set(range(40)) - set(channels[i]):
                layer.mlp.down_proj.weight[:, channel] = 0
    ids = tokens(2, 11, seed=4)
    expected = expected_of(family, zeroed, ids)
    kept = {name: t for name, t in model.state_dict().items() if family.untouched(name)}
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        close(pruned(ids).logits, expected)
        assert kept and all(torch.equal(pruned.state_dict()[name], t) for name, t in kept.items())
    masked = sp.restore(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    assert torch.equal(masked(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_nothing_pruned_changes_nothing(family, mode):
    model, ids = family.toy(), tokens(2, 11)
    expected = model(ids).logits
    sp.apply(model, manual_plan(model, [[0, 1, 2, 3]] * 3), mode=mode)
    torch.testing.assert_close(model(ids).logits, expected, atol=0 if mode == "mask" else 1e-6, rtol=0)


@pytest.mark.parametrize("padding", [0, 3], ids=["", "padded"])
def test_column_mass_equals_that_of_the_independent_forward(family, padding):
    model, ids = family.toy(), tokens(2, 11, seed=5)
    valid = torch.ones(2, 11, dtype=torch.long)
    valid[1, :padding] = 0
    with sp.track(model) as tracker:
        sp.adapter_for(model).predict(ids, valid) if padding else model(ids)
    expected = []
    for row, seen in enumerate(valid.bool()):
        found = []
        family.straight(model.config.to_dict(), model.state_dict(), ids[row, seen], probabilities=found)
        expected.append(found[0].mean(-2).amax(-1).float())  # [layers, heads]
    torch.testing.assert_close(tracker.result().mass, torch.stack(expected, 1), atol=1e-5, rtol=0)


def test_it_profiles_plans_and_generates(family):
    model = family.toy()
    profile = sp.profile(model, tokens(2, 4), steps=4, gen_length=8)
    sp.apply(model, sp.plan(model, profile, "sink_variance", ratio=0.5))
    *_, ids = sp.denoise(model, tokens(2, 4), steps=4, gen_length=8)
    assert (ids != 60).all()


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_every_form_is_saved_and_loaded(family, tmp_path, form):
    model, ids = family.toy(), tokens(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS, family.channels), mode=form)
    sp.save(model, tmp_path / "m", shard_bytes=8192)
    loaded, _ = sp.load(tmp_path / "m")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    assert sp.adapter_for(loaded).form == form and type(loaded) is type(model)


def test_arguments_that_do_not_fit_are_refused(family):
    model, ids = family.toy(), tokens(1, 3)
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
