"""Live LLaDA objects: pruned in place, the upstream code's signatures, caches and masks still working."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import (  # noqa: F401
    assert_same_tensors,
    bits,
    manual_plan,
    one_thread,
    published_config,
    straight_forward,
    tokens,
    toy,
)
from upstream_twins import LLaDAConfigTwin, LLaDATwin, llada_config, llada_twin

import sinkprune as sp
from sinkprune import ops

MODELS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "mqa, qkv bias": {"n_kv_heads": 1, "include_qkv_bias": True},
    "all biases": {"include_bias": True},
}
HEADS = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [[0, 7, 9], None, [5]]
ALL = [[0, 1, 2, 3]] * 3


def zeroed_by_hand(model, heads, channels=None):
    """A copy whose removed heads' columns of ``attn_out``, and removed channels' of ``ff_out``, are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(model.blocks()):
            for head in set(range(4)) - set(heads[i]):
                block.attn_out.weight[:, head * 8 : head * 8 + 8] = 0
            for channel in set(range(40)) - set(channels[i]) if channels and channels[i] else ():
                block.ff_out.weight[:, channel] = 0
    return model


def assert_untouched(model):
    """Nothing of ours is left in the model."""
    for block in model.blocks():
        assert not [name for name in block.__dict__ if "sinkprune" in name or name.startswith("_scaled")]
        assert not [name for name in block._modules if "sinkprune" in name]
        assert not block.ff_out._forward_pre_hooks
        assert block.config is model.config


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def test_the_twin_is_a_llada_and_is_recognised_by_its_structure():
    model, ids = llada_twin(n_kv_heads=2), tokens(2, 11)
    expected = straight_forward(vars(model.config), model.state_dict(), ids)
    torch.testing.assert_close(model(ids).logits.double(), expected, atol=2e-5, rtol=1e-4)
    native = toy(n_kv_heads=2)
    assert sp.adapter_for(model).geometry() == sp.adapter_for(native).geometry()
    assert sp.adapter_for(model).fingerprint() == sp.adapter_for(native).fingerprint()
    assert sp.adapter_for(model).mask_token_id == 60


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": None, "multi_query_attention": True}]
)
def test_an_inner_model_that_holds_a_hugging_face_config_works_in_every_verb(changes):
    """It has the published keys, and nothing that is worked out from them."""
    kv_heads = 1 if "multi_query_attention" in changes else changes.get("n_kv_heads", 4)
    model, ids = llada_twin(n_kv_heads=kv_heads), tokens(2, 11)
    expected = zeroed_by_hand(model, HEADS)(ids).logits
    model.model.config = SimpleNamespace(**published_config(**changes))
    assert sp.adapter_for(model).geometry().kv_heads == (kv_heads,) * 3
    profile = sp.profile(model, ids, steps=2, gen_length=2)
    assert sp.plan(model, profile, "sink_variance", ratio=0.4).heads_removed == 5
    close(sp.apply(model, manual_plan(model, HEADS))(ids).logits, expected)


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_nothing_pruned_gives_the_original_logits(changes, mode):
    model, ids = llada_twin(**changes), tokens(2, 11)
    expected = model(ids).logits
    close(sp.apply(model, manual_plan(model, ALL), mode=mode)(ids).logits, expected)


def test_equal_groups_run_in_the_upstream_attention():
    mha, gqa, heads = llada_twin(), llada_twin(n_kv_heads=2), [[0, 2], [1], [0, 1, 3]]
    sp.apply(mha, manual_plan(mha, heads))
    sp.apply(gqa, manual_plan(gqa, heads))
    assert not any("sinkprune_attention" in block._modules for block in mha.blocks())
    assert ["sinkprune_attention" in block._modules for block in gqa.blocks()] == [False, False, True]


@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["", "and channels"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_pruned_heads_equal_heads_zeroed_by_hand(changes, channels):
    model, ids = llada_twin(**changes), tokens(2, 11)
    plan = manual_plan(model, HEADS, channels)
    expected = zeroed_by_hand(model, HEADS, channels)(ids).logits
    for mode in ("mask", "compact"):
        close(sp.apply(copy.deepcopy(model), plan, mode=mode)(ids).logits, expected)


def test_compact_projections_are_smaller_and_keep_their_places():
    model = llada_twin(n_kv_heads=2)
    q_proj = model.blocks()[0].q_proj
    names = set(model.state_dict())
    sp.apply(model, manual_plan(model, HEADS, CHANNELS))
    block = model.blocks()[0]
    assert set(model.state_dict()) == names and block.q_proj is q_proj
    assert [block.q_proj.weight.shape, block.k_proj.weight.shape] == [(16, 32), (16, 32)]
    assert [block.attn_out.weight.shape, block.ff_proj.weight.shape] == [(32, 16), (3, 32)]
    assert (q_proj.out_features, block.attn_out.in_features) == (16, 16)
    assert sp.adapter_for(model).geometry().heads == (4, 4, 4)  # of the dense model


def test_block_groups_are_blocks_too():
    model, ids = llada_twin(group=2, n_layers=4), tokens(2, 9)
    heads = [*HEADS, [2, 3]]
    expected = zeroed_by_hand(model, heads)(ids).logits
    close(sp.apply(model, manual_plan(model, heads))(ids).logits, expected)


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_verbs_hide_padding_that_the_upstream_code_does_not(form, side):
    model = llada_twin(n_kv_heads=2)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS), mode=form)
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    seen, adapter = valid[1].bool(), sp.adapter_for(model)
    got = adapter.predict(ids, valid)
    close(got[0], model(ids[:1]).logits[0])
    close(got[1][seen], model(ids[1:, seen]).logits[0])
    close(adapter.predict(ids, valid, slice(3, 7)), got[:, 3:7], 0)
    # a direct call is the upstream's, which ignores the mask
    close(model(ids, attention_mask=valid).logits, model(ids).logits, 0)
    if form == "dense":
        assert_untouched(model)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_prefix_and_dual_caches_work(mode):
    model, ids = llada_twin(n_kv_heads=2), tokens(2, 12)
    zeroed = zeroed_by_hand(model, HEADS)
    sp.apply(model, manual_plan(model, HEADS), mode=mode)
    replace = torch.zeros(2, 12, dtype=torch.bool)
    replace[:, 4:8] = True
    changed = tokens(2, 4, seed=9)
    results = []
    for m in (model, zeroed):
        past = m(ids, use_cache=True).past_key_values
        prefix = [(k[:, :, :5].clone(), v[:, :, :5].clone()) for k, v in past]
        first = m(ids[:, 5:], past_key_values=prefix, use_cache=True)
        assert first.past_key_values[0][0].shape[2] == 12
        dual = m(changed, past_key_values=past, use_cache=True, replace_position=replace).logits
        again = m(changed, past_key_values=past, use_cache=True, replace_position=replace).logits
        assert torch.equal(dual, again)  # the same rows written twice
        results.append((first.logits, dual))
    for got, expected in zip(*results, strict=True):
        close(got, expected)
    if mode == "compact":
        assert [k.shape[1] for k, _ in past] == [2, 2, 2]
        assert [k.shape[1] for k, _ in model(ids, use_cache=True).past_key_values] == [2, 1, 2]


def test_tracked_mass_equals_materialised_probabilities_and_tracking_changes_nothing():
    model, ids = llada_twin(n_kv_heads=2), tokens(2, 12, seed=5)
    expected = model(ids).logits
    with sp.track(model) as tracker:
        assert torch.equal(model(ids).logits, expected)
    probabilities = []
    straight_forward(vars(model.config), model.state_dict(), ids, probabilities=probabilities)
    mass = torch.stack(probabilities).mean(-2).float().amax(-1)  # [S, L, H]
    close(tracker.result().mass, mass.transpose(0, 1))
    assert_untouched(model)
    with pytest.raises(KeyError, match="mine"), sp.track(model):
        raise KeyError("mine")
    assert_untouched(model)


def owners(call):
    """The key/value head of each query head of a call."""
    if call.kv_head_of is not None:
        return call.kv_head_of.tolist()
    return [head * call.key.shape[1] // call.query.shape[1] for head in range(call.query.shape[1])]


@pytest.mark.parametrize("form", ["mask", "compact"])
def test_a_pruned_model_is_tracked_with_a_cache(form):
    model, ids = llada_twin(n_kv_heads=2), tokens(1, 12)
    sp.apply(model, manual_plan(model, HEADS), mode=form)
    calls = []
    adapter = sp.adapter_for(model)
    past = [(k[:, :, :5], v[:, :, :5]) for k, v in model(ids, use_cache=True).past_key_values]
    adapter.observe(lambda layer, call: calls.append(call))
    model(ids[:, 5:], past_key_values=past)
    adapter.observe(None)
    for call, kept in zip(calls, HEADS, strict=True):
        assert (call.query.shape[2], call.key.shape[2]) == (7, 12)
        owner = owners(call)
        mass = ops.column_mass(
            call.query, call.key, call.lse, kept_heads=call.kept_heads, kv_head_of=call.kv_head_of
        )
        for i in kept if form == "mask" else range(len(kept)):
            scores = call.query[0, i] @ call.key[0, owner[i]].T / 8**0.5
            close(mass[0, i], scores.softmax(-1).mean(0))
    assert not adapter.observed()


def test_a_copy_that_honours_attention_bias_keeps_doing_so():
    model, ids = llada_twin(honours_bias=True, n_kv_heads=2), tokens(2, 9)
    causal = torch.full((1, 1, 9, 9), torch.finfo(torch.float32).min).triu(1)
    padded = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    padded[1, ..., :3] = False
    for bias in (causal, padded):
        dense = model(ids, attention_bias=bias).logits
        assert (dense - model(ids).logits).abs().max() > 0.1
        expected = zeroed_by_hand(model, HEADS)(ids, attention_bias=bias).logits
        for mode in ("mask", "compact"):
            whole = sp.apply(copy.deepcopy(model), manual_plan(model, ALL), mode=mode)
            close(whole(ids, attention_bias=bias).logits, dense)
            pruned = sp.apply(copy.deepcopy(model), manual_plan(model, HEADS), mode=mode)
            close(pruned(ids, attention_bias=bias).logits, expected)


def test_mmada_under_guidance_with_its_pairs_of_valid_tokens_for_a_bias():
    model, ids = llada_twin(honours_bias=True, include_qkv_bias=True, embedding_size=70), tokens(2, 9)
    assert sp.adapter_for(model).geometry().vocabulary == 70  # text and image tokens
    valid = torch.ones(2, 9, dtype=torch.long)
    valid[1, :3] = 0  # the unconditional half is padded, on the left
    pairs = (valid[:, :, None] & valid[:, None, :]).bool().unsqueeze(1)
    expected = zeroed_by_hand(model, HEADS)(ids, attention_bias=pairs).logits[valid.bool()]
    for mode in ("mask", "compact"):
        pruned = sp.apply(copy.deepcopy(model), manual_plan(model, HEADS), mode=mode)
        close(pruned(ids, attention_bias=pairs).logits[valid.bool()], expected)


@pytest.mark.parametrize("form", ["mask", "compact"])
def test_mass_under_a_bias_equals_materialised_probabilities(form):
    model, ids = llada_twin(honours_bias=True, n_kv_heads=2), tokens(2, 9)
    causal = torch.full((1, 1, 9, 9), torch.finfo(torch.float32).min).triu(1)
    sp.apply(model, manual_plan(model, HEADS), mode=form)
    calls = []
    sp.adapter_for(model).observe(lambda layer, call: calls.append(call))
    model(ids, attention_bias=causal)
    sp.adapter_for(model).observe(None)
    with sp.track(model) as tracker:
        model(ids, attention_bias=causal)
    mass = tracker.result().mass
    for layer, (call, kept) in enumerate(zip(calls, HEADS, strict=True)):
        owner = owners(call)
        for i in kept if form == "mask" else range(len(kept)):
            scores = call.query[:, i] @ call.key[:, owner[i]].mT / 8**0.5 + causal[0]
            close(mass[layer, :, i], scores.softmax(-1).mean(1).amax(-1))


def test_profile_plan_apply_and_sample_and_native_plans_fit():
    model, native = llada_twin(n_kv_heads=2), toy(n_kv_heads=2)
    prompts = tokens(3, 5)
    profile = sp.profile(model, prompts, steps=4, gen_length=8)
    other = sp.profile(native, prompts, steps=4, gen_length=8)
    close(profile.statistics["mass"], other.statistics["mass"])
    plan = sp.plan(native, other, "sink_variance", ratio=0.4)
    sp.apply(native, plan)
    sp.apply(model, plan)
    ids = tokens(2, 9)
    close(model(ids).logits, native(ids).logits)
    *_, got = sp.denoise(model, prompts, steps=4, gen_length=8)
    *_, expected = sp.denoise(native, prompts, steps=4, gen_length=8)
    assert torch.equal(got, expected)


def test_a_mask_is_undone_and_copies_and_casts_carry_it():
    model, ids = llada_twin(n_kv_heads=2), tokens(2, 9)
    before, dense = bits(model), model(ids).logits
    sp.apply(model, manual_plan(model, HEADS, CHANNELS), mode="mask")
    assert_same_tensors(model.state_dict(), before)
    masked = model(ids).logits
    twin = copy.deepcopy(model)
    close(copy.deepcopy(model).double()(ids).logits.float(), masked)
    sp.restore(model)
    assert torch.equal(model(ids).logits, dense)
    assert_untouched(model)
    assert torch.equal(twin(ids).logits, masked)  # a copy is independent of its original


def test_full_width_qk_norm_is_refused_for_compact_by_name_but_can_be_masked():
    model, ids = llada_twin(attention_layer_norm=True), tokens(2, 9)
    with pytest.raises(ValueError, match=r"qk-norm runs over the full width.*use mode='mask'"):
        sp.apply(model, manual_plan(model, HEADS))
    assert_untouched(model)
    expected = zeroed_by_hand(model, HEADS)(ids).logits
    close(sp.apply(model, manual_plan(model, HEADS), mode="mask")(ids).logits, expected)


class Quantised(nn.Linear):
    pass


def quantise(model):
    old = model.blocks()[1].k_proj
    model.blocks()[1].k_proj = new = Quantised(32, 16, bias=False)
    new.weight = old.weight


def packed_without_a_weight(model):
    model.blocks()[1].k_proj = nn.Identity()


def share(model):
    model.blocks()[2].q_proj = model.blocks()[0].q_proj


def shard(model):
    model.blocks()[1].tp_size = 2


def train_with_dropout(model):
    model.config.attention_dropout = 0.1
    model.train()


def offload(model):
    model.blocks()[2].attn_out.to("meta")


BAD = {
    quantise: "k projection of layer 1 is a Quantised .quantised, sharded or wrapped.",
    packed_without_a_weight: "k projection of layer 1 is a Identity without a weight",
    share: "layers 0 and 2 share their attention weights",
    shard: "layer 1 is a tensor-parallel shard",
    train_with_dropout: "training mode with attention dropout 0.1: call model.eval()",
    offload: "blocks.2.attn_out.weight is on the meta device",
}


@pytest.mark.parametrize("change", BAD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("low_memory", [False, True])
def test_what_cannot_be_pruned_is_refused_by_name_before_anything_changes(change, low_memory):
    model = llada_twin(n_kv_heads=2)
    plan = manual_plan(model, HEADS)
    plan.fingerprint = ""
    change(model)
    before = {name: (tensor.shape, id(tensor)) for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match=BAD[change]):
        sp.apply(model, plan, low_memory=low_memory)
    assert {name: (tensor.shape, id(tensor)) for name, tensor in model.named_parameters()} == before
    assert_untouched(model)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model, ids = llada_twin(n_kv_heads=2), tokens(2, 9)
    before, dense, original, calls = bits(model), model(ids).logits, ops.gather_heads, []

    def fail_in_layer_2(*args):
        calls.append(args)
        if len(calls) == 9:
            raise MemoryError("no room for layer 2")
        return original(*args)

    monkeypatch.setattr(ops, "gather_heads", fail_in_layer_2)
    with pytest.raises(MemoryError, match="layer 2"):
        sp.apply(model, manual_plan(model, HEADS))
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(model(ids).logits, dense)
    assert_untouched(model)


def test_fused_projections_are_tracked_and_refused_by_name_for_pruning():
    config = LLaDAConfigTwin(**llada_config())
    model = LLaDATwin(config, fused=True).eval()
    with sp.track(model) as tracker:
        model(tokens(1, 7))
    assert tracker.result().mass.shape == (3, 1, 4)
    for mode in ("mask", "compact"):
        with pytest.raises(ValueError, match="fuse q, k and v in att_proj"):
            sp.apply(model, manual_plan(model, HEADS), mode=mode)
    assert_untouched(model)


def test_dropout_and_causal_attention_are_refused_while_running():
    model, ids = llada_twin(attention_dropout=0.1, n_kv_heads=2), tokens(1, 5)
    sp.apply(model, manual_plan(model, HEADS))
    model.train()
    with pytest.raises(ValueError, match=r"dropout 0.1: call model.eval\(\) first"):
        model(ids)


def test_twelve_layers_of_different_widths_compile_whole():
    heads = [sorted(range(i % 4 + 1)) if i < 8 else [i % 4, 4 + i % 3] for i in range(12)]
    model = llada_twin(n_layers=12, n_heads=8, d_model=64, n_kv_heads=4)
    ids = tokens(1, 8)
    sp.apply(model, manual_plan(model, heads))
    with torch.no_grad():
        expected = model(ids).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(compiled(ids).logits, expected)
    with pytest.raises(TypeError, match="the model is compiled"):
        sp.apply(compiled, manual_plan(model, heads))
    torch._dynamo.reset()
