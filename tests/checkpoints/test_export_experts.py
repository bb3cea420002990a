"""Fewer experts as an ordinary checkpoint of the family: its config says how many there are."""

import json

import pytest
import torch
from block_causals import toy_llada2
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.plans import LayerPlan, PrunePlan

IDS = torch.randint(0, 59, (2, 11), generator=torch.Generator().manual_seed(3))
ALL, EIGHT = [0, 1, 2, 3], [0, 2, 3, 5, 6, 7, 9, 11]


def pruned(*layers):
    model = toy_llada2()
    plan = PrunePlan(sp.adapter_for(model).geometry(), "", [LayerPlan(ALL), *layers])
    return sp.apply(model, plan)


def test_the_export_is_a_dense_model_of_fewer_experts(tmp_path):
    model = pruned(LayerPlan(ALL, kept_experts=EIGHT), LayerPlan(ALL, kept_experts=EIGHT))
    folder = sp.export(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_experts"], config["moe_intermediate_size"]) == (8, 14)
    again, _ = sp.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((LayerPlan(ALL, kept_experts=EIGHT), LayerPlan(ALL)), r"layers keep \[\(8, 14\), \(12, 14\)\]"),
        ((LayerPlan(ALL, kept_expert_channels=[[0, 1]] * 12),) * 2, "a config of llada2_moe can't say"),
    ],
    ids=["uneven", "shared experts that would be narrower too"],
)
def test_what_no_config_says_is_refused_and_nothing_written(tmp_path, layers, message):
    with pytest.raises(ValueError, match=message):
        sp.export(pruned(*layers), tmp_path / "out", to="sglang")
    assert not (tmp_path / "out").exists()
