"""Experts that go: both forms of one plan agree, and survive the disk."""

import pytest
import torch
from block_causals import llada2_config, straight_llada2, toy_llada2
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.models.llada2 import LLaDA2, LLaDA2Config
from sinkprune.plans import LayerPlan, PrunePlan

IDS = torch.randint(0, 59, (2, 11), generator=torch.Generator().manual_seed(3))
EIGHT = [0, 2, 3, 5, 6, 7, 9, 11]  # of twelve in four groups
OTHERS = [1, 2, 3, 4, 7, 8, 10, 11]
ALL = [0, 1, 2, 3]


def plan_of(model, *layers):
    adapter = sp.adapter_for(model)
    return PrunePlan(adapter.geometry(), adapter.fingerprint(), list(layers))


def some_channels(experts):
    return [sorted({(7 * e + 3 * c) % 14 for c in range(9)}) for e in experts]


PLANS = {
    "experts": [LayerPlan(ALL), LayerPlan(ALL, kept_experts=EIGHT), LayerPlan(ALL, kept_experts=OTHERS)],
    "channels": [
        LayerPlan(ALL),
        LayerPlan(ALL, kept_expert_channels=some_channels(range(12))),
        LayerPlan(ALL),
    ],
    "all at once": [
        LayerPlan([1, 2], kept_channels=list(range(0, 40, 3))),
        LayerPlan([0, 3], kept_experts=EIGHT, kept_expert_channels=some_channels(EIGHT)),
        LayerPlan([2], kept_experts=OTHERS),
    ],
    "an MLP gone": [LayerPlan(ALL), LayerPlan(ALL, kept_channels=[], kept_experts=[]), LayerPlan(ALL)],
}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", PLANS)
def test_masked_equals_compact_and_both_are_something_else_than_dense(name):
    dense = logits(toy_llada2())
    masked, compact = (
        logits(sp.apply(model := toy_llada2(), plan_of(model, *PLANS[name]), mode=mode))
        for mode in ("mask", "compact")
    )
    torch.testing.assert_close(masked, compact, atol=2e-5, rtol=1e-5)
    assert (masked - dense).abs().max() > 0.01


def test_fewer_experts_are_the_model_whose_router_never_had_the_others():
    """Against the tests' own forward in float64, on the tensors of the experts that stay."""
    model = toy_llada2()
    config = llada2_config(num_experts=8)
    tensors = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")
        kept = {"1": EIGHT, "2": OTHERS}.get(part[2] if part[1] == "layers" else "")
        if kept is not None and "mlp.gate" in name:
            tensor = tensor[kept]
        elif kept is not None and "mlp.experts." in name:
            if int(part[5]) not in kept:
                continue
            part[5] = str(kept.index(int(part[5])))
            name = ".".join(part)
        tensors[name] = tensor
    compact = sp.apply(model, plan_of(model, *PLANS["experts"]))
    for row, sequence in enumerate(IDS):
        expected = straight_llada2(config, tensors, sequence)
        torch.testing.assert_close(logits(compact)[row].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_saved_and_loaded_it_is_the_same(tmp_path, name, mode):
    model = toy_llada2()
    sp.apply(model, plan_of(model, *PLANS[name]), mode=mode)
    again, _ = sp.load(sp.save(model, tmp_path / "m"))
    written, read = model.state_dict(), again.state_dict()
    assert written.keys() == read.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)  # of other alignment
    assert again.prune_plan == model.prune_plan
    assert again.prune_plan.geometry.experts == model.prune_plan.geometry.experts


def test_restore_gives_all_experts_back():
    model = toy_llada2()
    dense = logits(model)
    for name in PLANS:
        sp.restore(sp.apply(model, plan_of(model, *PLANS[name]), mode="mask"))
        assert torch.equal(logits(model), dense)


def test_a_quarter_of_the_bytes_goes_with_a_third_of_the_experts(tmp_path):
    model = toy_llada2()
    plan = plan_of(model, *PLANS["experts"])
    before = sum(p.numel() for p in model.parameters())
    sp.apply(model, plan)
    gone = before - sum(p.numel() for p in model.parameters())
    assert gone == 2 * 4 * (3 * 14 * 32 + 32)
    assert plan.parameters_removed == pytest.approx(gone / sum(block_sizes(toy_llada2())))


def block_sizes(model):
    for name, parameter in model.named_parameters():
        if "layers" in name and "norm" not in name:
            yield parameter.numel()


def test_a_layer_that_cannot_be_compacted_leaves_the_model_as_it_was():
    model = toy_llada2()
    model.layers[2].mlp.experts[11].up_proj = torch.nn.Sequential(model.layers[2].mlp.experts[11].up_proj)
    model.layers[2].mlp.experts[11].up_proj.weight = model.layers[2].mlp.experts[11].up_proj[0].weight
    plan = PrunePlan(sp.adapter_for(model).geometry(), "", PLANS["experts"])
    with pytest.raises(ValueError, match=r"experts\.11\.up_proj projection of layer 2 is a Sequential"):
        sp.apply(model, plan)
    assert sp.adapter_for(model).form == "dense"
    assert len(model.layers[1].mlp.experts) == 12


def test_a_schedule_keeps_all_experts():
    model = toy_llada2()
    schedule = sp.PhaseSchedule([0], [plan_of(model, *PLANS["experts"])])
    with pytest.raises(ValueError, match="its plans must keep all experts"), sp.scheduled(model, schedule):
        pass


def test_a_dense_router_of_few_experts_is_read_as_before():
    config = LLaDA2Config.from_dict(llada2_config(n_group=1, topk_group=1, num_experts=5))
    assert sp.adapter_for(LLaDA2(config)).geometry().experts.fewest() == 3
