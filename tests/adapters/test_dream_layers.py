"""Live Dream objects: pruned in place, the upstream code's signatures, caches and masks still working."""

import copy
import inspect

import pytest
import torch
from dreams import straight_forward, toy_dream
from toys import assert_same_tensors, bits, manual_plan, one_thread, tokens  # noqa: F401
from upstream_twins import DreamAttentionTwin, Store, dream_twin

import sinkprune as sp

HEADS = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [[0, 7, 9], None, [5]]
ALL = [[0, 1, 2, 3]] * 3


def zeroed_by_hand(model, heads, channels=None):
    """A copy whose removed heads' columns of ``o_proj``, and removed channels' of ``down_proj``, are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for head in set(range(4)) - set(heads[i]):
                layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
            for channel in set(range(40)) - set(channels[i]) if channels and channels[i] else ():
                layer.mlp.down_proj.weight[:, channel] = 0
    return model


def assert_untouched(model):
    """Nothing of ours is left in the model."""
    for layer in model.model.layers:
        assert "forward" not in layer.self_attn.__dict__
        assert not [name for name in layer.self_attn._modules if "sinkprune" in name]
        assert not [name for name in layer.self_attn.__dict__ if "sinkprune" in name]
        assert not layer.mlp.down_proj._forward_pre_hooks


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def aligned(logits):
    """A token late to in place, as the published sampler does it."""
    return torch.cat((logits[:, :1], logits[:, :-1]), 1)


def test_the_twin_is_a_dream_and_is_recognised_by_its_structure():
    model, ids = dream_twin(), tokens(2, 11)
    expected = straight_forward(vars(model.config), model.state_dict(), ids)
    torch.testing.assert_close(model(ids).logits.double(), expected, atol=2e-5, rtol=1e-4)
    native = toy_dream()
    assert sp.adapter_for(model).geometry() == sp.adapter_for(native).geometry()
    assert sp.adapter_for(model).fingerprint() == sp.adapter_for(native).fingerprint()


@pytest.mark.parametrize("attribute", ["is_causal", "num_heads", "o_proj"])
def test_other_qwen_trees_are_not_taken_for_it(attribute):
    model = dream_twin()
    attention = model.model.layers[1].self_attn
    if attribute == "is_causal":
        attention.is_causal = True
    else:
        delattr(attention, attribute)
    with pytest.raises(TypeError, match="no adapter recognises"):
        sp.adapter_for(model)


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_nothing_pruned_gives_the_original_logits(mode, kv_heads):
    model, ids = dream_twin(num_key_value_heads=kv_heads), tokens(2, 11)
    expected = model(ids).logits
    close(sp.apply(model, manual_plan(model, ALL), mode=mode)(ids).logits, expected)


@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["", "and channels"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pruned_heads_equal_heads_zeroed_by_hand(kv_heads, channels):
    model, ids = dream_twin(num_key_value_heads=kv_heads), tokens(2, 11)
    plan = manual_plan(model, HEADS, channels)
    expected = zeroed_by_hand(model, HEADS, channels)(ids).logits
    for mode in ("mask", "compact"):
        close(sp.apply(copy.deepcopy(model), plan, mode=mode)(ids).logits, expected)


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_hidden_by_the_verbs_and_by_masks_that_the_upstream_code_passes(form, side):
    model = dream_twin()
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS), mode=form)
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    seen, adapter = valid[1].bool(), sp.adapter_for(model)
    pairs = (valid[:, None, None, :] * valid[:, None, :, None]).bool()
    for mask in (pairs, valid[:, None, None, :].bool()):
        got = model(ids, attention_mask=mask).logits
        close(got[0], model(ids[:1], attention_mask="full").logits[0])
        close(got[1][seen], model(ids[1:, seen]).logits[0])
    predicted = adapter.predict(ids, valid)
    close(predicted[0], aligned(got)[0])
    close(predicted[1, 1:][seen[1:] & seen[:-1]], got[1, :-1][seen[1:] & seen[:-1]])
    close(adapter.predict(ids, valid, slice(5, 9)), predicted[:, 5:9], 0)
    if form == "dense":
        assert_untouched(model)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_prefix_dual_and_object_caches_work(mode):
    model, ids, changed = dream_twin(), tokens(2, 12), tokens(2, 4, seed=9)
    zeroed = zeroed_by_hand(model, HEADS)
    sp.apply(model, manual_plan(model, HEADS), mode=mode)
    replace = torch.zeros(2, 12, dtype=torch.bool)
    replace[:, 4:8] = True
    results = []
    for m in (model, zeroed):
        past = m(ids, use_cache=True).past_key_values
        prefix = [(k[:, :5].clone(), v[:, :5].clone()) for k, v in past]
        first = m(ids[:, 5:], past_key_values=prefix, use_cache=True)
        assert first.past_key_values[0][0].shape[1] == 12
        cached = {"past_key_values": past, "use_cache": True, "dual_cache": True, "replace_position": replace}
        store = Store()
        parts = [m(ids[:, :5], past_key_values=store).logits, m(ids[:, 5:], past_key_values=store).logits]
        results.append([first.logits, m(changed, **cached).logits, *parts])
    for got, expected in zip(*results, strict=True):
        close(got, expected)
    widths = [k.shape[-1] for k, _ in model(ids, use_cache=True).past_key_values]
    assert widths == ([16, 8, 16] if mode == "compact" else [16, 16, 16])


@pytest.mark.parametrize("masked", [False, True], ids=["", "with the sampler's mask"])
def test_tracked_mass_equals_materialised_probabilities_and_tracking_changes_nothing(masked):
    model, ids = dream_twin(), tokens(2, 12, seed=5)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :3] = not masked
    mask = valid[:, None, None, :] & valid[:, None, :, None] if masked else None
    expected = model(ids, attention_mask=mask).logits
    with sp.track(model) as tracker:
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert "hidden_states" in inspect.signature(model.model.layers[0].self_attn.forward).parameters
    probabilities = []
    straight_forward(vars(model.config), model.state_dict(), ids, valid, probabilities)
    mass = [p[..., valid[i], :].mean(-2).float().amax(-1) for i, p in enumerate(probabilities)]
    close(tracker.result().mass, torch.stack(mass, 1))
    assert_untouched(model)
    with pytest.raises(KeyError, match="mine"), sp.track(model):
        raise KeyError("mine")
    assert_untouched(model)


def test_profile_plan_apply_and_sample_and_native_plans_fit():
    model, native, prompts = dream_twin(), toy_dream(), tokens(3, 5)
    profile = sp.profile(model, prompts, steps=4, gen_length=8)
    other = sp.profile(native, prompts, steps=4, gen_length=8)
    close(profile.statistics["mass"], other.statistics["mass"])
    plan = sp.plan(native, other, "sink_variance", ratio=0.4)
    sp.apply(native, plan)
    sp.apply(model, plan)
    close(model(prompts).logits, native(prompts).logits)
    *_, got = sp.denoise(model, prompts, steps=4, gen_length=8)
    *_, expected = sp.denoise(native, prompts, steps=4, gen_length=8)
    assert torch.equal(got, expected)


def test_a_mask_is_undone_and_copies_and_casts_carry_it():
    model, ids = dream_twin(), tokens(2, 9)
    before, dense = bits(model), model(ids).logits
    sp.apply(model, manual_plan(model, HEADS, CHANNELS), mode="mask")
    assert_same_tensors(model.state_dict(), before)
    masked = model(ids).logits
    twin = copy.deepcopy(model)
    close(copy.deepcopy(model).double()(ids).logits.float(), masked)
    sp.restore(model)
    assert torch.equal(model(ids).logits, dense)
    assert_untouched(model)
    assert torch.equal(twin(ids).logits, masked)


def test_a_forward_that_someone_else_replaced_is_called_and_given_back():
    model, ids, calls = dream_twin(), tokens(1, 7), []
    attention = model.model.layers[0].self_attn

    def theirs(*args, **keywords):
        calls.append(1)
        return DreamAttentionTwin.forward(attention, *args, **keywords)

    attention.forward = theirs
    with sp.track(model):
        model(ids)
    assert calls == [1] and attention.forward is theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.config, "attention_dropout", 0.1) or m.train(),
            "training mode with attention dropout",
        ),
        (lambda m: m.model.layers[2].self_attn.o_proj.to("meta"), "on the meta device"),
        (
            lambda m: setattr(m.model.layers[1], "self_attn", m.model.layers[0].self_attn),
            "layers 0 and 1 share",
        ),
        (
            lambda m: setattr(m.model.layers[1].self_attn, "q_proj", torch.nn.Identity()),
            "q projection of layer 1",
        ),
    ],
    ids=["dropout", "meta", "shared", "quantised"],
)
def test_what_cannot_be_pruned_is_refused_by_name_before_anything_changes(change, message):
    model = dream_twin()
    plan = manual_plan(model, HEADS)
    plan.fingerprint = ""
    change(model)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        sp.apply(model, plan)
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == shapes
    assert_untouched(model)


def test_experts_in_place_of_an_mlp_keep_their_channels_and_lose_heads():
    model, ids = dream_twin(), tokens(1, 7)
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp)
    with pytest.raises(ValueError, match=r"removing mlp takes at most 0.000"):
        sp.plan(model, criterion="random", ratio=0.3, unit="parameters", targets=["mlp"])
    with pytest.raises(ValueError, match=r"the MLP of layer 0 is not gated \(experts\?\): only its heads"):
        sp.adapter_for(model).mlp_weights(0)
    expected = zeroed_by_hand(model, HEADS)(ids).logits
    close(sp.apply(model, manual_plan(model, HEADS))(ids).logits, expected)


def test_probabilities_are_not_returned_and_say_so():
    model, ids = dream_twin(), tokens(1, 7)
    sp.apply(model, manual_plan(model, HEADS))
    x = model.model.embed_tokens(ids)
    with pytest.raises(ValueError, match="call without output_attentions"):
        model.model.layers[2].self_attn(x, output_attentions=True)


def test_layers_of_different_widths_compile_whole():
    model, ids = dream_twin(num_hidden_layers=2), tokens(1, 8)
    sp.apply(model, manual_plan(model, HEADS[:2]))
    with torch.no_grad():
        expected = model(ids, attention_mask="full").logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(compiled(ids, attention_mask="full").logits, expected)
    torch._dynamo.reset()
