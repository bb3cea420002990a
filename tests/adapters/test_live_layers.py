"""Live SDAR, LLaDA2 and LLaDA-MoE objects: pruned in place, the upstream masks and caches still working."""

import copy

import layer_twins
import pytest
import torch
from block_causals import straight_llada2, straight_sdar, toy_llada2, toy_sdar
from layer_twins import llada2_twin, llada_moe_twin, sdar_twin
from toys import assert_same_tensors, bits, manual_plan, one_thread, tokens  # noqa: F401
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinkprune as sp

HEADS = [[0, 2], [1], [0, 1, 3]]
ALL = [[0, 1, 2, 3]] * 3
TWINS = {"sdar": sdar_twin, "llada2_moe": llada2_twin, "llada_moe": llada_moe_twin}
BLOCK_CAUSAL = {"sdar": (sdar_twin, toy_sdar), "llada2": (llada2_twin, toy_llada2)}


def attention_of(layer):
    return layer.get_submodule(layer.name)


def zeroed_by_hand(model, heads):
    """A copy whose removed heads' columns of the output projection are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for kept, layer in zip(heads, model.model.layers, strict=True):
            attention = attention_of(layer)
            out = attention.dense if hasattr(attention, "dense") else attention.o_proj
            for head in set(range(4)) - set(kept):
                out.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
    return model


def block_mask(length, block=4):
    """As the published samplers build it: 1 at keys of the query's block and those before it."""
    of_block = torch.arange(length) // block
    return (of_block[None, :] <= of_block[:, None])[None, None]


def call(model, ids, **keywords):
    """The upstream call on whole sequences."""
    mask = block_mask(ids.shape[1]).expand(len(ids), -1, -1, -1)
    return model(ids, attention_mask=mask, **keywords).logits


def assert_untouched(model):
    """Nothing of ours is left in the model."""
    for layer in model.model.layers:
        attention = attention_of(layer)
        assert "forward" not in attention.__dict__
        assert not [name for name in attention._modules if "sinkprune" in name]


def close(got, expected, atol=2e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_the_twins_are_recognised_by_their_structure_and_predict_as_they_are(twin):
    model, ids = twin(), tokens(2, 11)
    adapter = sp.adapter_for(model)
    assert TWINS[adapter.geometry().family] is twin
    close(adapter.predict(ids), call(model, ids))
    close(adapter.predict(ids, None, slice(3, 6)), call(model, ids)[:, 3:6])
    assert_untouched(model)


@pytest.mark.parametrize(("twin", "native"), BLOCK_CAUSAL.values(), ids=BLOCK_CAUSAL.keys())
def test_they_equal_the_native_models_and_share_their_plans(twin, native):
    model, own, ids = twin(), native(), tokens(2, 11)
    adapters = sp.adapter_for(model), sp.adapter_for(own)
    assert adapters[0].geometry() == adapters[1].geometry()
    assert adapters[0].fingerprint() == adapters[1].fingerprint()
    assert adapters[0].block_size == 4
    valid = torch.ones(2, 11, dtype=torch.long)
    valid[1, :3] = 0
    rows = valid.bool()
    close(adapters[0].predict(ids, valid)[rows], adapters[1].predict(ids, valid)[rows])
    plan = sp.plan(own, criterion="random", ratio=0.4)
    sp.apply(own, plan)
    sp.apply(model, plan)
    close(adapters[0].predict(ids, valid)[rows], adapters[1].predict(ids, valid)[rows])


class ThroughTheRegistry(layer_twins.LLaDA2AttentionTwin):
    """As newer published copies: the attention call goes through transformers' functions by name."""

    def forward(self, x, position_ids, attention_mask=None, past_key_value=None, **keywords):
        batch, length, _ = x.shape
        counts = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
        heads = self.query_key_value(x).view(batch, length, sum(counts), self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in heads.split(counts, dim=-2))
        q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = (
            layer_twins.part_turned(t, position_ids, self.rope_dim, self.config.rope_theta) for t in (q, k)
        )
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, q, k, v, attention_mask, dropout=0.0)
        return self.dense(out.reshape(batch, length, -1)), None, past_key_value


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_a_llada2_whose_attention_is_a_registered_function_is_pruned_like_any_other(mode):
    model, other, ids = llada2_twin(), llada2_twin(), tokens(2, 11)
    for layer in other.model.layers:
        layer.attention.__class__ = ThroughTheRegistry
    close(call(other, ids), call(model, ids))
    plan = sp.plan(other, criterion="magnitude", ratio=0.3)
    for pruned in (model, other):
        sp.apply(pruned, plan, mode=mode)
    close(call(other, ids), call(model, ids))
    dense = llada2_twin()
    close(call(other, ids), call(zeroed_by_hand(dense, [layer.kept_heads for layer in plan.layers]), ids))


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_nothing_pruned_changes_nothing(twin, mode):
    model, ids = twin(), tokens(2, 11)
    expected = call(model, ids)
    assert torch.equal(call(sp.apply(model, manual_plan(model, ALL), mode=mode), ids), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_pruned_heads_equal_heads_zeroed_by_hand(twin, kv_heads):
    model, ids = twin(num_key_value_heads=kv_heads), tokens(2, 11)
    zeroed, plan = zeroed_by_hand(model, HEADS), manual_plan(model, HEADS)
    valid = torch.ones(2, 11, dtype=torch.long)
    valid[1, 8:] = 0
    expected = sp.adapter_for(zeroed).predict(ids, valid)[valid.bool()]
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), plan, mode=mode)
        close(call(pruned, ids), call(zeroed, ids))
        close(sp.adapter_for(pruned).predict(ids, valid)[valid.bool()], expected)
    masked = sp.restore(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    assert torch.equal(call(masked, ids), call(model, ids))
    assert_untouched(masked)


def test_biases_of_a_fused_projection_go_with_their_heads():
    model, ids = llada2_twin(use_qkv_bias=True, use_bias=True), tokens(2, 11)
    expected = call(zeroed_by_hand(model, HEADS), ids)
    sp.apply(model, manual_plan(model, HEADS))
    close(call(model, ids), expected)
    widths = [attention_of(layer).query_key_value.bias.shape[0] // 12 for layer in model.model.layers]
    assert widths == [2 + 2 * 2, 1 + 2 * 1, 3 + 2 * 2]


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("twin", [sdar_twin, llada2_twin], ids=BLOCK_CAUSAL.keys())
def test_transformers_caches_of_blocks_work(twin, mode):
    model, ids = twin(), tokens(1, 8)
    zeroed = zeroed_by_hand(model, HEADS)
    sp.apply(model, manual_plan(model, HEADS), mode=mode)
    results = []
    for m in (model, zeroed):
        cache, mask = DynamicCache(), block_mask(8)
        logits = []
        for first in (0, 4):
            part = slice(first, first + 4)
            logits.append(
                m(
                    ids[:, part], attention_mask=mask[:, :, part, : first + 4],
                    position_ids=torch.arange(8)[None, part], past_key_values=cache, use_cache=True,
                    store_kv=True,
                ).logits
            )  # fmt: skip
        results.append(torch.cat(logits, 1))
    close(*results)
    close(results[1], call(zeroed, ids))
    kept = [layer.keys.shape[1] for layer in cache.layers]
    assert kept == [2, 2, 2]
    cache = DynamicCache()
    model(ids, attention_mask=block_mask(8), past_key_values=cache, store_kv=True)
    kept = [layer.keys.shape[1] for layer in cache.layers]
    assert kept == ([2, 1, 2] if mode == "compact" else [2, 2, 2])


def test_the_flash_attention_of_a_block_that_sees_all_is_replaced_only_where_ours_is_needed():
    model, ids, mask = sdar_twin(), tokens(1, 4), torch.ones(1, 4, 4)
    zeroed = zeroed_by_hand(model, HEADS)
    expected = zeroed(ids, attention_mask=mask).logits
    for mode, calls in (("mask", 0), ("compact", 2)):  # compact layers with equal groups are upstream's own
        pruned = sp.apply(copy.deepcopy(model), manual_plan(model, HEADS), mode=mode)
        layer_twins.flash_calls.clear()
        close(pruned(ids, attention_mask=mask).logits, expected)
        assert len(layer_twins.flash_calls) == calls


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_tracked_mass_equals_materialised_probabilities_and_tracking_changes_nothing(twin):
    model, ids = twin(), tokens(2, 11, seed=5)
    expected, masses = call(model, ids), []

    def materialise(q, k, v, mask):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = (q @ k.mT).double() / q.shape[-1] ** 0.5
        masses.append((score if mask is None else score.masked_fill(~mask, -torch.inf)).softmax(-1).mean(-2))

    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **keywords):
        materialise(query, key, value, attn_mask)
        return original(query, key, value, attn_mask=attn_mask, **keywords)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        call(model, ids)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    largest = torch.stack([mass.amax(-1).float() for mass in masses])  # [layers, B, heads]
    with sp.track(model) as tracker:
        close(call(model, ids), expected)
    close(tracker.result().mass, largest)
    with sp.track(model) as tracker:
        sp.adapter_for(model).predict(ids)
    close(tracker.result().mass, largest)
    assert_untouched(model)


@pytest.mark.parametrize("heads", [HEADS, [[0, 1], [2, 3], [0, 1]]], ids=["uneven", "whole groups"])
@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize(("twin", "native"), BLOCK_CAUSAL.values(), ids=BLOCK_CAUSAL.keys())
def test_a_live_object_saves_as_the_native_model_it_equals(tmp_path, twin, native, form, heads):
    model, ids = twin(), tokens(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, heads), mode=form)
    sp.save(model, tmp_path / "m")
    loaded, _ = sp.load(tmp_path / "m")
    assert type(loaded) is type(native()) and sp.adapter_for(loaded).form == form
    close(loaded(ids).logits, sp.adapter_for(model).predict(ids))


def test_only_heads_of_expert_layers_can_be_pruned():
    for twin in (llada2_twin, llada_moe_twin):
        model = twin()
        before = bits(model)
        with pytest.raises(ValueError, match=r"layer 1 is not gated \(experts\?\): only its heads"):
            sp.plan(model, criterion="random", ratio=0.1, unit="parameters", targets=["mlp"])
        with pytest.raises(ValueError, match=r"the MLP of layer 2 is not gated"):
            sp.apply(model, manual_plan(model, HEADS, [[1, 5], None, [0, 3]]))
        assert_same_tensors(model.state_dict(), before)
        linears = sp.adapter_for(model).linears
        assert len(linears(0)) == len(linears(1)) + 3
    assert sp.adapter_for(llada_moe_twin()).geometry().channels == (40, 28, 28)
    with pytest.raises(TypeError, match="there is none for LayersTwin"):
        sp.save(llada_moe_twin(), "nowhere")


def test_a_shard_is_refused_by_name():
    model = llada2_twin()
    attention_of(model.model.layers[2]).tp_size = 2
    with pytest.raises(ValueError, match="layer 2 is a tensor-parallel shard"):
        sp.apply(model, manual_plan(model, HEADS))


def test_twins_compute_what_the_architectures_describe():
    for twin, straight in ((sdar_twin, straight_sdar), (llada2_twin, straight_llada2)):
        model, ids = twin(), tokens(2, 11)
        expected = torch.stack([straight(vars(model.config), model.state_dict(), s) for s in ids])
        torch.testing.assert_close(call(model, ids).double(), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_they_profile_plan_and_sample(twin):
    model = twin()
    plan = sp.plan(model, sp.profile(model, tokens(2, 4), steps=2, gen_length=4), "sink_variance", ratio=0.4)
    *_, ids = sp.denoise(sp.apply(model, plan), tokens(2, 4), steps=2, gen_length=4)
    assert (ids != 60).all()


@pytest.mark.parametrize("form", ["tracked", "mask"])
def test_other_functions_keep_their_meaning_while_a_pruned_or_tracked_forward_runs(form):
    model, ids, answers = sdar_twin(), tokens(1, 8), []

    def ask(module, args):
        ones = torch.ones(3, dtype=torch.bool)
        answers.append(
            (bool(torch.all(ones)), torch.all(torch.ones(2, 2), dim=1).shape, bool(torch.any(ones)))
        )

    handles = [attention_of(layer).q_proj.register_forward_pre_hook(ask) for layer in model.model.layers]
    if form == "mask":
        sp.apply(model, manual_plan(model, HEADS), mode="mask")
        call(model, ids)
    else:
        with sp.track(model):
            call(model, ids)
    for handle in handles:
        handle.remove()
    assert answers == [(True, (2,), True)] * len(handles)
