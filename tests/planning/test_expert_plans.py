"""What a plan says of experts: what is legal, what is stored of it, and what it costs a token."""

from dataclasses import replace

import pytest

from sinkprune.plans import (
    Experts,
    Geometry,
    LayerPlan,
    PrunePlan,
    layer_sizes,
    model_block_parameters,
    stored_parameters,
)

EXPERTS = Experts(count=(0, 12, 12), channels=14, top_k=3, shared=28, groups=4, open_groups=2)
GEOMETRY = Geometry("llada2_moe", 32, 12, 61, 64, (4,) * 3, (2,) * 3, (40, 70, 70), experts=EXPERTS)
EIGHT = [0, 2, 3, 5, 6, 7, 9, 11]
HEADS = [0, 1, 2, 3]


def plan_of(**layer):
    return PrunePlan(GEOMETRY, "", [LayerPlan(HEADS), LayerPlan(HEADS, **layer), LayerPlan(HEADS)])


def test_a_plan_of_experts_reads_back_as_written_in_schema_2(tmp_path):
    channels = [[0, expert + 1, 13] for expert in range(8)]
    plan = plan_of(kept_experts=EIGHT, kept_expert_channels=channels)
    plan.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json")
    assert (plan.to_dict()["schema"], again) == (2, plan)
    assert again.geometry.experts == EXPERTS
    assert "kept_experts" not in plan.to_dict()["layers"][0], "keys of schema 2 only where they say something"


def test_a_plan_that_says_nothing_of_experts_is_of_schema_1():
    plain = replace(GEOMETRY, experts=None)
    written = PrunePlan(plain, "", [LayerPlan(HEADS)] * 3).to_dict()
    assert written["schema"] == 1
    assert set(written["layers"][0]) == {"kept_heads", "kept_channels"}
    assert "experts" not in written["geometry"]


def test_a_geometry_from_before_experts_agrees_with_its_model_and_no_other():
    before = replace(GEOMETRY, experts=None)
    assert GEOMETRY.agrees(before)
    assert before.agrees(GEOMETRY)
    assert not GEOMETRY.agrees(replace(GEOMETRY, experts=replace(EXPERTS, count=(0, 16, 16))))
    assert not before.agrees(replace(GEOMETRY, hidden=64))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"kept_experts": [0, 2, 1]}, "kept_experts must be sorted and unique"),
        ({"kept_experts": [0, 12]}, r"kept_experts must lie in \[0, 12\), got 0..12"),
        ({"kept_experts": EIGHT[1:]}, "every group of experts must keep as many, got 1, 2, 2, 2"),
        (
            {"kept_experts": [0, 3, 6, 9]},
            r"8 experts at least must stay \(top 3, from 2 of 4 groups\), got 4",
        ),
        ({"kept_expert_channels": [[0]] * 11}, "one list for each of 12 kept experts.* got 11"),
        (
            {"kept_experts": EIGHT, "kept_expert_channels": [[0]] * 7 + [[1, 2]]},
            r"all of one length of at least 1, got 8 of lengths \[1, 2\]",
        ),
        ({"kept_expert_channels": [[]] * 12}, r"one length of at least 1, got 12 of lengths \[0\]"),
        ({"kept_expert_channels": [[14]] * 12}, r"kept_expert_channels\[0\] must lie in \[0, 14\)"),
        ({"kept_channels": [28]}, r"kept_channels must lie in \[0, 28\)"),
    ],
)
def test_experts_that_the_router_cannot_run_are_refused_in_a_line(layer, message):
    with pytest.raises(ValueError, match=f"layer 1: .*{message}"):
        plan_of(**layer)


def test_experts_of_a_dense_layer_are_refused():
    with pytest.raises(ValueError, match="layer 0: kept_experts of a layer without experts"):
        PrunePlan(GEOMETRY, "", [LayerPlan(HEADS, kept_experts=[0]), LayerPlan(HEADS), LayerPlan(HEADS)])


def test_stored_parameters_fall_with_experts_and_work_does_not():
    plan = plan_of(kept_experts=EIGHT)
    assert layer_sizes(GEOMETRY, 1, plan.layers[1]) == layer_sizes(GEOMETRY, 1, None) == (4, 2, 70)
    gone = stored_parameters(GEOMETRY, 1, None) - stored_parameters(GEOMETRY, 1, plan.layers[1])
    assert gone == 4 * (3 * 14 * 32 + 32)  # gate, up and down of four experts, and their rows of the router
    assert plan.parameters_removed == pytest.approx(gone / model_block_parameters(GEOMETRY))


def test_narrower_experts_are_less_work_and_less_stored():
    plan = plan_of(kept_expert_channels=[[1, 2, 5, 8]] * 12)
    assert layer_sizes(GEOMETRY, 1, plan.layers[1]) == (4, 2, 28 + 3 * 4)
    assert (
        stored_parameters(GEOMETRY, 1, None) - stored_parameters(GEOMETRY, 1, plan.layers[1])
        == 3 * 32 * 12 * 10
    )


def test_a_layer_without_its_mlp_or_without_all_stores_what_is_left():
    attention = plan_of(kept_channels=[], kept_experts=[]).layers[1]
    assert layer_sizes(GEOMETRY, 1, attention) == (4, 2, 0)
    assert stored_parameters(GEOMETRY, 1, attention) == 32 * 2 * 12 * 6
    assert stored_parameters(GEOMETRY, 1, LayerPlan([], [], [])) == 0


def test_a_router_without_groups_needs_its_top_k():
    alone = Experts(count=(8,), channels=4, top_k=2)
    assert alone.fewest() == 2
    assert alone.refusal(0, [3, 7]) is None
    assert "2 experts at least must stay" in alone.refusal(0, [3])
    assert Experts(count=(8,), channels=4, top_k=1, groups=2).fewest() == 4, "a group ranks by its two best"
