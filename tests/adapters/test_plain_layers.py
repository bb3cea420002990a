"""What an apply, fuse or save would throw away is refused, and what trained before trains after."""

from __future__ import annotations

import copy
from collections.abc import Callable

import hf
import pytest
import torch
import upstream_twins
from torch import nn

import sinkprune as sp
from sinkprune.adapters import adapter_for

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "native": lambda: sp.load("tiny")[0],
    "live": upstream_twins.llada_twin,
    "transformers": lambda: hf.build("llama"),
}


class Doubled(nn.Linear):
    """A forward of its own, as LoRA's and weight norm's are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def wrap(model: nn.Module, role: str) -> None:
    adapter_for(model).linears(1)[role].__class__ = Doubled


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["q", "down"])
def test_a_projection_with_a_forward_of_its_own_is_refused_and_the_model_stays(family, role, tmp_path):
    model = FAMILIES[family]().eval()
    plan = sp.plan(model, ratio=0.4, criterion="magnitude")
    plan.layers = [type(kept)(kept.kept_heads, [0, 1, 2]) for kept in plan.layers]
    wrap(model, role)
    before = copy.deepcopy(model.state_dict())
    message = f"the {role} projection of layer 1 is a Doubled.*merge_and_unload"
    with pytest.raises(ValueError, match=message):
        sp.apply(model, plan)
    if family == "native":
        with pytest.raises(ValueError, match=message):
            sp.fuse(model)
    if family != "live":  # its tensors are saved as a native model's
        with pytest.raises(ValueError, match=message):
            sp.save(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert adapter_for(model).form == "dense"


def test_hooks_that_a_native_model_would_lose_are_refused():
    model = FAMILIES["native"]()
    plan = sp.plan(model, ratio=0.2, criterion="magnitude")
    handle = model.blocks[0].q_proj.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match=r"q projection of layer 0 .* forward hooks"):
        sp.apply(model, plan)
    handle.remove()
    sp.apply(model, plan)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inference", [False, True])
def test_every_parameter_trains_after_apply_and_after_save_and_load(family, inference, tmp_path):
    model = FAMILIES[family]().eval()
    plan = sp.plan(model, ratio=0.3, criterion="magnitude")
    with torch.inference_mode(inference):
        sp.apply(model, plan)
    model.train()
    ids = torch.arange(3, 21).view(2, 9)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        logits = model(ids).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        optimiser.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
    model.eval()
    sp.save(model, tmp_path / "saved")
    again, _ = sp.load(tmp_path / "saved")
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_frozen_projections_stay_frozen_in_the_native_compact_form():
    model = FAMILIES["native"]()
    for block in model.blocks:
        for module in (block.q_proj, block.k_proj, block.v_proj, block.ff_out):
            module.weight.requires_grad_(False)
    sp.fuse(model)
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    assert not attention.qkv_proj.weight.requires_grad and attention.o_proj.weight.requires_grad
    assert mlp.gate_up_proj.weight.requires_grad and not mlp.down_proj.weight.requires_grad


@pytest.mark.parametrize("family", ["live", "transformers"])
def test_fusing_a_model_that_keeps_its_modules_is_refused_and_it_can_be_planned(family):
    model = FAMILIES[family]().eval()
    with pytest.raises(ValueError, match="nothing to fuse"):
        sp.fuse(model)
    assert adapter_for(model).form == "dense"
    sp.plan(model, ratio=0.3, criterion="magnitude")
