"""Live MDLM and BD3LM objects: fused heads pruned in place, whichever attention their code calls."""

import copy

import ddit_twins
import pytest
import torch
from ddit_twins import ddit_twin
from toys import bits, manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp

HEADS = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [[0, 7, 100], None, [5]]
ALL = [[0, 1, 2, 3]] * 3
CALLS = ["packed", "varlen", "sdpa"]


def zeroed_by_hand(model, heads, channels=None):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(model.backbone.blocks):
            for head in set(range(4)) - set(heads[i]):
                block.attn_out.weight[:, head * 8 : head * 8 + 8] = 0
            if channels and channels[i]:
                block.mlp[2].weight[:, sorted(set(range(128)) - set(channels[i]))] = 0
    return model


def run(model, ids):
    """The upstream call."""
    return model(ids, torch.zeros(len(ids)), sample_mode=True).logits


def assert_untouched(model):
    for block in model.backbone.blocks:
        assert "forward" not in block.__dict__
        assert not [name for name in block._modules if "sinkprune" in name]
        assert not block._forward_pre_hooks and not block.mlp[2]._forward_pre_hooks
    original = ddit_twins.regular_attention_multi_headed_original
    assert ddit_twins.regular_attention_multi_headed is original
    assert ddit_twins.flash_attn.flash_attn_interface.flash_attn_varlen_qkvpacked_func is ddit_twins.varlen


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("call", CALLS)
def test_it_is_recognised_and_predicts_what_the_upstream_code_does(call):
    model, ids = ddit_twin(call), tokens(2, 11)
    adapter = sp.adapter_for(model)
    assert adapter.geometry().channels == (128,) * 3 and adapter.geometry().mlp_matrices == 2
    assert adapter.mask_token_id == 60 and adapter.block_size == (4 if call == "sdpa" else None)
    assert torch.equal(adapter.predict(ids, None, slice(2, 5)), run(model, ids)[:, 2:5])
    assert_untouched(model)


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_pruned_changes_nothing(call, mode):
    model, ids = ddit_twin(call), tokens(2, 11)
    expected = run(model, ids)
    assert torch.equal(run(sp.apply(model, manual_plan(model, ALL), mode=mode), ids), expected)


@pytest.mark.parametrize("channels", [None, CHANNELS], ids=["", "and channels"])
@pytest.mark.parametrize("call", CALLS)
def test_pruned_heads_equal_heads_zeroed_by_hand(call, channels):
    model, ids = ddit_twin(call), tokens(2, 11)
    plan = manual_plan(model, HEADS, channels)
    expected = run(zeroed_by_hand(model, HEADS, channels), ids)
    for mode in ("mask", "compact"):
        close(run(sp.apply(copy.deepcopy(model), plan, mode=mode), ids), expected)
    masked = sp.restore(sp.apply(copy.deepcopy(model), plan, mode="mask"))
    assert torch.equal(run(masked, ids), run(model, ids))
    assert_untouched(masked)
    sp.apply(model, plan)
    assert [block.attn_qkv.weight.shape[0] for block in model.backbone.blocks] == [48, 24, 72]


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("call", CALLS)
def test_padding_is_hidden_although_the_upstream_code_takes_no_mask(call, side, form):
    model = ddit_twin(call)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS), mode=form)
    ids, valid = tokens(2, 11, seed=2), torch.ones(2, 11, dtype=torch.long)
    valid[1, slice(0, 3) if side == "left" else slice(8, 11)] = 0
    seen = valid[1].bool()
    got = sp.adapter_for(model).predict(ids, valid)
    close(got[0], run(model, ids[:1])[0])
    close(got[1][seen], run(model, ids[1:, seen])[0])


@pytest.mark.parametrize("call", CALLS)
def test_tracked_mass_equals_materialised_probabilities(call):
    model, ids = ddit_twin(call), tokens(2, 12, seed=5)
    expected = run(model, ids)
    with sp.track(model) as tracker:
        close(run(model, ids), expected)
    inputs = []
    hooks = [
        block.attn_qkv.register_forward_hook(lambda module, args, out: inputs.append(out.double()))
        for block in model.backbone.blocks
    ]
    run(model, ids)
    for hook in hooks:
        hook.remove()
    of_block = torch.arange(12) // 4
    hidden = (of_block[None, :] > of_block[:, None]) & (call == "sdpa")
    masses = []
    for rows in inputs:
        q, k, _ = rows.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        angle = torch.arange(12, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(4) / 4)

        def turned(x, angle=angle):
            a, b = x[..., :4], x[..., 4:]
            return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

        score = (turned(q) @ turned(k).mT / 8**0.5).masked_fill(hidden, -torch.inf)
        masses.append(score.softmax(-1).mean(-2).amax(-1).float())
    close(tracker.result().mass, torch.stack(masses))
    assert_untouched(model)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_the_block_cache_of_bd3lm_works(mode):
    model, ids = ddit_twin("sdpa"), tokens(2, 12)
    whole = run(zeroed_by_hand(model, HEADS), ids)
    sp.apply(model, manual_plan(model, HEADS), mode=mode)
    model.reset_kv_cache(2)
    parts = []
    for part in ids.split(4, dim=1):
        parts.append(model(part, torch.zeros(2), sample_mode=True, store_kv=True).logits)
    close(torch.cat(parts, 1), whole)
    kept = [block.kv_cache.shape[-1] for block in model.backbone.blocks]
    assert kept == ([48, 24, 72] if mode == "compact" else [96, 96, 96])


@pytest.mark.parametrize("call", CALLS)
def test_it_profiles_plans_and_samples(call):
    model = ddit_twin(call)
    profile = sp.profile(model, tokens(2, 4), steps=2, gen_length=4)
    plan = sp.plan(model, profile, "sink_variance", ratio=0.3, unit="parameters", targets=["heads", "mlp"])
    assert plan.parameters_removed == pytest.approx(0.3, abs=0.03)
    *_, ids = sp.denoise(sp.apply(model, plan), tokens(2, 4), steps=2, gen_length=4)
    assert (ids != 60).all()


def test_what_it_cannot_do_is_refused_by_name_before_anything_changes():
    model = ddit_twin("sdpa", attn_backend="flex")
    before = bits(model)
    with pytest.raises(ValueError, match="FlexAttention"):
        sp.apply(model, manual_plan(model, HEADS), mode="mask")
    with pytest.raises(ValueError, match="attn_backend='sdpa'"), sp.track(model):
        pass
    assert_untouched(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    told = ddit_twin("packed", time_conditioning=True)
    with pytest.raises(ValueError, match="conditioned on the noise level"):
        sp.adapter_for(told).predict(tokens(1, 4))
    with pytest.raises(TypeError, match="there is none for DDiTTwin"):
        sp.save(told, "nowhere")
