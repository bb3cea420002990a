"""Pruned models: masked equals zeroed by hand, compact equals masked, and a failure changes nothing."""

import copy
import weakref

import pytest
import torch
from toys import assert_same_tensors, bits, manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.models.modules import CompactMLP, SinkPrunedAttention
from sinkprune.ops import native
from sinkprune.plans import PrunePlan
from sinkprune.pruning import repacking

MODELS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1},
    "qkv bias": {"include_qkv_bias": True, "n_kv_heads": 2},
    "all biases, tied": {"include_bias": True, "weight_tying": True},
}
HEADS = {
    "uneven": [[0, 2], [1], [0, 1, 3]],
    "one head each": [[3], [0], [2]],
    "ragged groups": [[0, 2, 3], [1, 2, 3], [0, 1, 3]],  # the second key/value head has more readers
    "all": [[0, 1, 2, 3]] * 3,
    "a layer without heads": [[0, 1, 2], [], [1, 3]],
}
CHANNELS = [list(range(0, 40, 3)), None, [5]]


def logits(model, padded=True):
    ids = tokens(2, 11, seed=4)
    valid = torch.ones_like(ids)
    if padded:
        valid[1, :4] = 0
    with torch.no_grad():
        return model(ids, attention_mask=valid).logits[valid.bool()]


def zeroed_by_hand(model, kept_heads, kept_channels=None):
    """A copy whose removed heads' columns of ``attn_out``, and removed channels' of ``ff_out``, are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            for head in set(range(4)) - set(kept_heads[i]):
                block.attn_out.weight[:, head * 8 : head * 8 + 8] = 0
            if kept_channels is not None and kept_channels[i] is not None:
                for channel in set(range(40)) - set(kept_channels[i]):
                    block.ff_out.weight[:, channel] = 0
    return model


@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["", "and channels"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_masked_and_compact_models_equal_one_zeroed_by_hand(changes, heads, channels):
    model = toy(**changes)
    plan = manual_plan(model, heads, channels)
    expected = logits(zeroed_by_hand(model, heads, channels))
    masked = logits(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    compact = logits(sp.apply(model, plan))
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(compact, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_prune_too(dtype):
    model = toy(n_kv_heads=2).to(dtype)
    plan = manual_plan(model, HEADS["uneven"], CHANNELS)
    masked = logits(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    compact = logits(sp.apply(model, plan))
    assert compact.dtype == dtype
    torch.testing.assert_close(compact, masked, atol=1e-10 if dtype == torch.float64 else 0.3, rtol=0)


def storage_bytes(model):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    return sum(storages.values())


def test_compact_parameters_and_their_storage_shrink_by_what_the_plan_says():
    model = toy(n_kv_heads=2)
    plan = manual_plan(model, HEADS["uneven"], CHANNELS)
    per_head = 2 * 8 * 32
    # gone per layer: query heads, key/value heads nobody reads, channels
    gone = sum(per_head * (q + kv) + 3 * 32 * c for q, kv, c in ((2, 0, 26), (3, 1, 0), (1, 0, 39)))
    numel, size = sum(p.numel() for p in model.parameters()), storage_bytes(model)
    sp.apply(model, plan)
    assert sum(p.numel() for p in model.parameters()) == numel - gone
    assert storage_bytes(model) == size - 4 * gone


def test_a_masked_model_keeps_its_weights_and_restore_gives_back_its_bits():
    model = toy(n_kv_heads=2)
    before, dense = bits(model), logits(model)
    sp.apply(model, manual_plan(model, HEADS["uneven"], CHANNELS), mode="mask")
    assert_same_tensors(model.state_dict(), before)
    assert sp.adapter_for(model).form == "mask"
    assert not torch.equal(logits(model), dense)
    assert sp.restore(model) is model
    assert torch.equal(logits(model), dense)
    assert sp.adapter_for(model).form == "dense"
    sp.apply(model, manual_plan(model, HEADS["uneven"]))  # and it can be pruned again
    assert sp.adapter_for(model).form == "compact"


def test_a_compact_model_cannot_be_restored():
    model = toy()
    sp.apply(model, manual_plan(model, HEADS["uneven"]))
    with pytest.raises(ValueError, match="a compact model can't be restored"):
        sp.restore(model)


def test_apply_returns_the_model_and_notes_the_plan_on_it():
    model = toy()
    plan = manual_plan(model, HEADS["uneven"])
    assert sp.apply(model, plan) is model
    adapter = sp.adapter_for(model)
    assert model.prune_plan == plan
    assert [adapter.kept_heads(i) for i in range(3)] == HEADS["uneven"]
    assert adapter.geometry() == plan.geometry  # of the dense model


@pytest.mark.parametrize("where", ["pack_qkv", "pack_o", "pack_mlp"])
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, where):
    model = toy(n_kv_heads=2)
    before, dense = bits(model), logits(model)
    plan = manual_plan(model, HEADS["uneven"], [[0, 1]] * 3)
    original, calls = getattr(native, where), []

    def fail_in_layer_2(*args, **keywords):
        calls.append(where)
        if len(calls) == 3:
            raise MemoryError("no room for layer 2")
        return original(*args, **keywords)

    monkeypatch.setattr(native, where, fail_in_layer_2)
    with pytest.raises(MemoryError, match="layer 2"):
        sp.apply(model, plan)
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(logits(model), dense)
    assert sp.adapter_for(model).form == "dense"
    assert getattr(model, "prune_plan", None) is None
    monkeypatch.undo()
    sp.apply(model, plan)  # nothing stands in the way of a second try


def test_low_memory_frees_each_layer_before_the_next_and_gives_the_same_model(monkeypatch):
    model, twin = toy(n_kv_heads=2), toy(n_kv_heads=2)
    plan = manual_plan(model, HEADS["uneven"], CHANNELS)
    dense = [weakref.ref(block.q_proj.weight) for block in model.blocks]
    original, alive = repacking.compact_layer, []

    def watched(adapter, plan, layer):
        alive.append([ref() is not None for ref in dense])
        return original(adapter, plan, layer)

    monkeypatch.setattr(repacking, "compact_layer", watched)
    sp.apply(model, plan, low_memory=True)
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]
    assert_same_tensors(model.state_dict(), bits(sp.apply(twin, plan)))


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("again", ["mask", "compact"])
def test_a_pruned_model_is_not_pruned_again(mode, again):
    model = toy()
    plan = manual_plan(model, HEADS["uneven"])
    sp.apply(model, plan, mode=mode)
    before = logits(model)
    with pytest.raises(ValueError, match=f"already pruned .{mode} form."):
        sp.apply(model, plan, mode=again)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_a_plan_for_another_model_is_refused_and_nothing_changes(mode):
    model = toy(seed=1)
    before = bits(model)
    with pytest.raises(ValueError, match="made for other weights"):
        sp.apply(model, manual_plan(toy(seed=2), HEADS["uneven"]), mode=mode)
    with pytest.raises(
        ValueError, match=r"another geometry: kv_heads \(2, 2, 2\) in the plan and \(4, 4, 4\)"
    ):
        sp.apply(model, manual_plan(toy(n_kv_heads=2), HEADS["uneven"]), mode=mode)
    assert_same_tensors(model.state_dict(), before)
    assert sp.adapter_for(model).form == "dense"


def test_a_plan_without_a_fingerprint_fits_any_weights_of_its_geometry():
    model = toy(seed=3)
    plan = manual_plan(toy(seed=4), HEADS["uneven"])
    sp.apply(model, PrunePlan(plan.geometry, "", plan.layers))
    assert sp.adapter_for(model).form == "compact"


def test_an_unknown_mode_is_refused():
    model = toy()
    with pytest.raises(ValueError, match="mode must be 'compact' or 'mask', got 'sparse'"):
        sp.apply(model, manual_plan(model, HEADS["uneven"]), mode="sparse")


@pytest.mark.parametrize("low_memory", [False, True])
def test_full_width_qk_norm_is_refused_for_compact_by_name_but_can_be_masked(low_memory):
    model = toy(attention_layer_norm=True)
    before = bits(model)
    plan = manual_plan(model, HEADS["uneven"])
    with pytest.raises(ValueError, match=r"qk-norm runs over the full width.*use mode='mask'"):
        sp.apply(model, plan, low_memory=low_memory)
    assert_same_tensors(model.state_dict(), before)
    expected = logits(zeroed_by_hand(model, HEADS["uneven"]))
    sp.apply(model, plan, mode="mask")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_a_pruned_model_generates(mode):
    model = toy(n_kv_heads=2)
    sp.apply(model, sp.plan(model, criterion="random", ratio=0.9, min_heads=0), mode=mode)
    *_, ids = sp.denoise(model, tokens(2, 4), steps=4, gen_length=8)
    assert (ids != 60).all()


@pytest.mark.filterwarnings("error")
def test_planning_with_min_heads_0_can_empty_layers_and_the_forms_still_agree():
    model = toy(n_kv_heads=2)
    plan = sp.plan(model, criterion="random", ratio=0.8, min_heads=0, seed=1)
    assert any(not layer.kept_heads for layer in plan.layers)
    masked = logits(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    torch.testing.assert_close(logits(sp.apply(model, plan)), masked, atol=1e-5, rtol=0)


def test_compact_modules_name_the_sizes_that_do_not_fit():
    qkv, o = torch.randn(24, 16), torch.randn(16, 8)
    SinkPrunedAttention(qkv, o, 8, [2], [0])
    with pytest.raises(ValueError, match="one entry per kept head: 2, got 1"):
        SinkPrunedAttention(qkv, o, 8, [1, 2], [0])
    with pytest.raises(ValueError, match="need 48 rows and 16 columns, got 24 and 8"):
        SinkPrunedAttention(qkv, o, 8, [1, 2], [0, 1])
    with pytest.raises(ValueError, match="gate_up must have 10 rows, got 8"):
        CompactMLP(torch.randn(8, 16), torch.randn(16, 5))


def test_a_compact_layer_holds_the_packed_weights_themselves():
    qkv, o = torch.randn(24, 16), torch.randn(16, 8)
    layer = SinkPrunedAttention(qkv, o, 8, [2], [0])
    assert layer.qkv_proj.weight.data_ptr() == qkv.data_ptr()
    assert layer.o_proj.weight.data_ptr() == o.data_ptr()
