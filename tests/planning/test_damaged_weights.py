"""A plan is not made of weights that hold a NaN or an infinity, whatever the rule reads, on any family."""

from __future__ import annotations

import math

import block_causals
import hf
import pytest
import torch
from ddit_twins import ddit_twin
from decoder_twins import fast_dllm_twin
from decoders import FAMILIES as DECODERS
from dreams import toy_dream
from layer_twins import llada2_twin, sdar_twin
from toys import MASK, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp
from sinkprune.evidence.calibration import Calibration
from sinkprune.planning.channels import CHANNEL_RULES

FAMILIES = {
    "llada": toy, "dream": toy_dream, "llada2": block_causals.toy_llada2, "sdar": block_causals.toy_sdar,
    "illada": DECODERS["illada"].toy, "wedlm": DECODERS["wedlm"].toy,
    "nemotron": DECODERS["nemotron_labs_diffusion"].toy, "live llada": llada_twin, "live dream": dream_twin,
    "live llada2": llada2_twin, "live sdar": sdar_twin, "live fast_dllm": fast_dllm_twin,
    "live ddit": lambda: ddit_twin("sdpa"), "qwen3": lambda: hf.build("qwen3"),
    "bert": lambda: hf.build("bert"), "modernbert": lambda: hf.build("modernbert"),
}  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_head_weights_are_refused_by_layer_and_role(family, value):
    model = FAMILIES[family]()
    for role in ("q", "k", "v", "o"):
        weight = getattr(sp.adapter_for(model).attention_weights(2), role)
        with torch.no_grad():
            held = weight[1, 2].clone()
            weight[1, 2] = value
            # random reads no weights, so that nothing but the check can notice
            with pytest.raises(ValueError, match=f"the {role} projection's weight of layer 2 is not finite"):
                sp.plan(model, criterion="random", ratio=0.25)
            weight[1, 2] = held
    sp.plan(model, criterion="random", ratio=0.25)


@pytest.mark.parametrize("rule", CHANNEL_RULES)
@pytest.mark.parametrize("family", [name for name in FAMILIES if "llada2" not in name])
def test_damaged_mlp_weights_are_refused_under_every_channel_rule(family, rule):
    model = FAMILIES[family]()
    ids = tokens(2, 6)
    rows = Calibration(ids, ids, ids == MASK)
    weights = sp.adapter_for(model).mlp_weights(1)
    for role in ("gate", "up", "down"):
        weight = getattr(weights, role)
        if weight is None:
            continue
        with torch.no_grad():
            held = weight[0, 1].clone()
            weight[0, 1] = math.nan
            with pytest.raises(ValueError, match=f"the {role} projection's weight of layer 1 is not finite"):
                sp.plan(
                    model, criterion="random", ratio=0.25, unit="parameters", targets="mlp",
                    channel_rule=rule, calibration=rows,
                )  # fmt: skip
            weight[0, 1] = held
