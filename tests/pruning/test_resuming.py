"""What a pruned and repaired model goes through, on every family: trained, resumed, saved and loaded."""

import copy

import pytest
import torch
from family_toys import TOYS
from hf import canvas_logits
from torch import nn
from toys import manual_plan, one_thread, tokens  # noqa: F401

import sinkprune as sp

HEADS, CHANNELS = [[0, 1], [2, 3], [0, 1]], [0, 3, 4, 5, 9, 11, 12]
NO_NATIVE = ("DDiTBlocks", "LLaDAMoELayers", "RND1Layers")  # save has no model of their tree
UNREACHED = ("backbone.sigma_map.weight",)  # of a noise level of zero


def channels_of(adapter):
    kept = []
    for layer in range(3):
        try:
            adapter.mlp_weights(layer)
            kept.append(CHANNELS)
        except ValueError:  # experts
            kept.append(None)
    return kept


def step(model, optimiser, ids):
    optimiser.zero_grad()
    rows = sp.adapter_for(model).predict(ids)
    nn.functional.cross_entropy(rows.flatten(0, 1).float(), ids.flatten()).backward()
    optimiser.step()


@torch.no_grad()
def logits(model, ids):
    return sp.adapter_for(model).predict(ids)


@pytest.mark.parametrize("name", [name for name in TOYS if name != "TransformersDiffusionGemma"])
def test_a_repaired_model_trains_whole_resumes_and_is_saved(name, tmp_path):
    """Every parameter moves that a token reaches; resumed after three steps of five, it ends the same."""
    model, ids = TOYS[name]().eval(), tokens(4, 60)
    plan = manual_plan(model, HEADS, channels_of(sp.adapter_for(model)))
    rows = sp.calibrate(model, tokens(200), length=16, sequences=4)
    sp.apply(model, plan, calibration=rows, repair="least_squares_bias")
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for count in range(5):
        if count == 3:
            state = {k: v.clone() for k, v in model.state_dict().items()}
            torch.save((model.prune_plan.to_dict(), state, optimiser.state_dict()), tmp_path / "run")
        step(model, optimiser, ids)
    still = {k for k, p in model.named_parameters() if torch.equal(p, before[k])} - {*UNREACHED}
    for name_of in still:  # an expert that no token went to
        gradient = model.get_parameter(name_of).grad
        assert ".experts." in name_of and (gradient is None or not gradient.any())

    said, state, moments = torch.load(tmp_path / "run", weights_only=True)
    again = sp.lay_out(TOYS[name]().eval(), sp.PrunePlan.from_dict(said))
    again.load_state_dict(state)
    optimiser = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0)
    optimiser.load_state_dict(moments)
    for _ in range(2):
        step(again, optimiser, ids)
    assert torch.equal(logits(again, ids), logits(model, ids))

    if name in NO_NATIVE:
        with pytest.raises(TypeError, match="save writes native models, and there is none"):
            sp.save(model, tmp_path / "saved")
        return
    back, _ = sp.load(sp.save(model, tmp_path / "saved"))
    torch.testing.assert_close(logits(back, ids), logits(model, ids), atol=2e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_a_masked_diffusion_gemma_trains_resumes_and_is_saved(tmp_path):
    """It has no compact form: masked heads get no gradient and write nothing; everything reached moves."""
    model = TOYS["TransformersDiffusionGemma"]()
    plan = manual_plan(model, HEADS)
    sp.apply(model, plan, mode="mask")
    ids, canvas = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]]), tokens(2, 8)

    def train(model, optimiser):
        optimiser.zero_grad()
        rows = model(input_ids=ids, decoder_input_ids=canvas).logits
        nn.functional.cross_entropy(rows.flatten(0, 1), canvas.flatten()).backward()
        optimiser.step()

    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for count in range(5):
        if count == 3:
            state = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
        train(model, optimiser)
    still = {k: p.grad for k, p in model.named_parameters() if torch.equal(p, before[k])}
    unreached = ("vision", ".experts.", "self_conditioning")  # by text without a second pass
    assert all(any(part in k for part in unreached) for k in still), still.keys()
    assert all(gradient is None or not gradient.any() for gradient in still.values())
    assert all(p.requires_grad for p in model.parameters())

    again = sp.apply(TOYS["TransformersDiffusionGemma"](), plan, mode="mask")
    again.load_state_dict(state[0])
    optimiser = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0)
    optimiser.load_state_dict(state[1])
    for _ in range(2):
        train(again, optimiser)
    assert torch.equal(canvas_logits(again), canvas_logits(model))
    back, _ = sp.load(sp.save(model, tmp_path / "saved"))
    torch.testing.assert_close(canvas_logits(back), canvas_logits(model), atol=1e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in back.parameters())
