"""Weights that are not numbers are never ranked: each channel rule refuses them, by layer and role."""

from __future__ import annotations

import pytest
import torch
from dreams import toy_dream
from hf import build
from toys import one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp
from sinkprune.planning.channels import CHANNEL_RULES

MODELS = {
    "native": toy,
    "native Dream": toy_dream,
    "live LLaDA": llada_twin,
    "live Dream": dream_twin,
    "transformers": lambda: build("qwen3"),
}


@pytest.mark.parametrize("rule", CHANNEL_RULES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("role", "value"), [("gate", float("nan")), ("down", float("inf"))])
def test_a_weight_that_is_not_finite_is_named(make, rule, role, value):
    model = make()
    adapter = sp.adapter_for(model)
    ids = torch.randint(2, 20, (64,), generator=torch.Generator().manual_seed(0))
    rows = sp.calibrate(model, ids, sequences=2, length=8, mask_token_id=5)
    with torch.no_grad():
        adapter.linears(1)[role].weight[0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        sp.plan(
            model, criterion="random", ratio=0.25, unit="parameters", targets=("mlp",), calibration=rows,
            channel_rule=rule,
        )  # fmt: skip
