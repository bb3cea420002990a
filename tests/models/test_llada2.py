"""The native LLaDA2 against an independent straight-line forward, from files that the tests' code wrote."""

import copy

import pytest
import torch
from block_causals import Kept, llada2_config, llada2_tensors, straight_llada2, toy_llada2
from toys import assert_same_tensors, manual_plan, one_thread, tokens, write_checkpoint  # noqa: F401

import sinkprune as sp
from sinkprune.models.llada2 import LLaDA2Config

CONFIGS = {
    "groups of experts": {},
    "one group, one expert, none shared": {
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "num_shared_experts": None,
    },
    "all layers experts, biases": {"first_k_dense_replace": 0, "use_qkv_bias": True, "use_bias": True},
    "all layers dense, whole RoPE": {"first_k_dense_replace": 3, "partial_rotary_factor": 1.0},
    "mha, block of 8": {"num_key_value_heads": 4, "block_size": 8},
}  # fmt: skip
HEADS = [[0, 2], [1], [0, 1, 3]]


def expected_of(model, ids, valid=None):
    """The independent logits of each sequence on its own; zeros at padding."""
    config, tensors = model.config.to_dict(), model.state_dict()
    logits = torch.zeros(*ids.shape, config["vocab_size"], dtype=torch.float64)
    for row, sequence in enumerate(ids):
        seen = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid[row].bool()
        logits[row, seen] = straight_llada2(config, tensors, sequence[seen])
    return logits


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_published_layout_gives_the_same_logits_as_an_independent_forward(tmp_path, changes):
    config = llada2_config(**changes)
    tensors = llada2_tensors(config)
    model, _ = sp.load(write_checkpoint(tmp_path / "m", config, tensors, shards=3))
    ids = tokens(2, 13, seed=1)
    close(model(ids).logits, expected_of(model, ids))
    assert set(model.state_dict()) == set(tensors)


def test_a_config_without_a_block_gets_the_published_samplers():
    config = llada2_config()
    del config["block_size"]
    assert LLaDA2Config.from_dict(config).block_size == 32


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_is_cut_into_blocks_as_it_is_alone(side):
    model = toy_llada2()
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 3) if side == "left" else slice(8, 11)] = 0
    got = sp.adapter_for(model).predict(ids, valid)
    close(got[valid.bool()], expected_of(model, ids, valid)[valid.bool()])


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_block_by_block_with_a_cache_equals_the_whole(form):
    model, ids = toy_llada2(), tokens(2, 10)
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
def test_masked_and_compact_models_equal_one_zeroed_by_hand(heads):
    model = toy_llada2(use_qkv_bias=True, use_bias=True)
    plan = manual_plan(model, heads)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for i, layer in enumerate(zeroed.layers):
            for head in set(range(4)) - set(heads[i]):
                layer.attention.dense.weight[:, head * 12 : head * 12 + 12] = 0
    ids = tokens(2, 11, seed=4)
    expected = expected_of(zeroed, ids)
    experts = {name: t for name, t in model.state_dict().items() if ".mlp." in name}
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        close(pruned(ids).logits, expected)
        assert all(torch.equal(pruned.state_dict()[name], t) for name, t in experts.items())
    masked = sp.restore(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    assert torch.equal(masked(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_nothing_pruned_changes_nothing(mode):
    model, ids = toy_llada2(), tokens(2, 11)
    expected = model(ids).logits
    sp.apply(model, manual_plan(model, [[0, 1, 2, 3]] * 3), mode=mode)
    torch.testing.assert_close(model(ids).logits, expected, atol=0 if mode == "mask" else 1e-6, rtol=0)


def test_only_heads_of_expert_layers_can_be_pruned():
    model = toy_llada2()
    message = "the MLP of layer 1 is a mixture of experts: only its heads can be pruned"
    with pytest.raises(ValueError, match=message):
        sp.plan(model, criterion="random", ratio=0.1, unit="parameters", targets=["mlp"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in ("mask", "compact"):
        with pytest.raises(ValueError, match=message):
            sp.apply(model, manual_plan(model, HEADS, [None, [0, 3], None]), mode=mode)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    heads = sp.plan(model, criterion="random", ratio=0.1, unit="parameters", targets=["heads"])
    assert heads.parameters_removed == pytest.approx(0.1, abs=0.03)
    assert sp.adapter_for(model).geometry().channels == (40, 3 * 14 + 28, 3 * 14 + 28)


def test_channels_of_its_dense_layer_can_be_pruned():
    model, ids = toy_llada2(), tokens(1, 9)
    plan = manual_plan(model, [[0, 1, 2, 3]] * 3, [[0, 7, 9], None, None])
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.layers[0].mlp.down_proj.weight[:, sorted(set(range(40)) - {0, 7, 9})] = 0
    for mode in ("mask", "compact"):
        close(sp.apply(copy.deepcopy(model), plan, mode=mode)(ids).logits, expected_of(zeroed, ids))


def test_column_mass_equals_that_of_the_independent_forward():
    model, ids = toy_llada2(), tokens(2, 11, seed=5)
    with sp.track(model) as tracker:
        model(ids)
    expected = []
    for sequence in ids:
        found = []
        straight_llada2(model.config.to_dict(), model.state_dict(), sequence, probabilities=found)
        expected.append(found[0].mean(-2).amax(-1).float())  # [layers, heads]
    torch.testing.assert_close(tracker.result().mass, torch.stack(expected, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
def test_every_form_is_saved_and_loaded(tmp_path, form):
    model, ids = toy_llada2(use_qkv_bias=True), tokens(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS), mode=form)
    sp.save(model, tmp_path / "m", shard_bytes=8192)
    loaded, _ = sp.load(tmp_path / "m")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    assert sp.adapter_for(loaded).form == form and type(loaded) is type(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_intermediate_size": None}, "LLaDA2 config: 'moe_intermediate_size' must be a positive"),
        ({"n_group": 5}, "num_experts must be a multiple of n_group"),
        ({"topk_group": 5}, "topk_group at most n_group"),
        ({"num_experts_per_tok": 7}, "7 experts of a token must lie in 2 groups of at least 2"),
        ({"partial_rotary_factor": 0.25}, "the rotated width of a head even, got 4, 2 and 3"),
        ({"score_function": "softmax"}, "only score_function='sigmoid' is supported"),
        ({"norm_head": True}, "only norm_head=False is supported"),
    ],
)
def test_a_config_it_cannot_compute_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaDA2Config.from_dict(llada2_config(**changes))
