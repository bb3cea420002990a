"""Weights whose columns lie side by side in memory (a stored transpose, seen turned) prune like others."""

from __future__ import annotations

import copy

import pytest
import torch
from block_causals import toy_llada2, toy_sdar
from decoder_twins import illada_twin
from decoders import FAMILIES as DECODERS
from dreams import toy_dream
from hf import build
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp

MODELS = {
    "LLaDA": toy, "Dream": toy_dream, "LLaDA2": toy_llada2, "SDAR": toy_sdar,
    "iLLaDA": DECODERS["illada"].toy, "live LLaDA": llada_twin, "live Dream": dream_twin,
    "live iLLaDA": illada_twin, "Qwen3": lambda: build("qwen3"), "BERT": lambda: build("bert"),
}  # fmt: skip
IDS = torch.randint(2, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def column_major(model):
    """A copy whose matrices have their transposes in memory."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().t().contiguous().t())
    return model


def make_mlps_smaller(model):
    """Not where they are experts."""
    adapter = sp.adapter_for(model)
    return all("down" in adapter.linears(layer) for layer in range(adapter.geometry().num_layers))


def plan_for(model):
    geometry = sp.adapter_for(model).geometry()
    heads = [list(range(count // 2, count)) for count in geometry.heads]
    gated = geometry.mlp_matrices == 3 and make_mlps_smaller(model)
    channels = [list(range(0, count, 2)) if gated and count else None for count in geometry.channels]
    return manual_plan(model, heads, channels)


@torch.no_grad()
def logits(model):
    return sp.adapter_for(model).predict(IDS)


@pytest.mark.parametrize("mode", ["mask", "compact"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_plan_gives_what_it_gives_for_rows_side_by_side(make, mode, tmp_path):
    model = make()
    plan = plan_for(model)
    turned = column_major(model)
    assert any(p.dim() == 2 and not p.is_contiguous() for p in turned.parameters())
    sp.apply(turned, plan, mode=mode)
    sp.apply(model, plan, mode=mode)
    torch.testing.assert_close(logits(turned), logits(model), atol=1e-5, rtol=0)
    loaded, _ = sp.load(sp.save(turned, tmp_path / "out"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [toy, toy_dream, toy_sdar, llada_twin, lambda: build("qwen3")])
def test_calibration_and_repair_take_them_too(make):
    model = column_major(make())
    rows = sp.calibrate(model, IDS.flatten().repeat(4), sequences=4, length=8, mask_token_id=5)
    expected = make()
    for target in (model, expected):
        plan = sp.plan(target, ratio=0.25, calibration=rows)
        sp.apply(target, plan, calibration=rows)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=0)
