"""Phase schedules: every step runs under its own plan, as if that had been applied by hand."""

import pytest
import torch
from hf import build
from toys import MASK, assert_same_tensors, bits, manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import llada_twin

import sinkprune as sp

EARLY, LATE = [[0, 2]] * 3, [[1, 2, 3], [0], [0, 1, 2, 3]]
FAMILIES = {"native": lambda: toy(sharpness=2.0), "live": llada_twin, "bert": lambda: build("bert")}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_equals_applying_its_plan_by_hand(family):
    make = FAMILIES[family]
    model = make()
    plans = [manual_plan(model, EARLY), None, manual_plan(model, LATE, [[0, 5, 7], None, list(range(30))])]
    schedule = sp.PhaseSchedule([0, 2, 3], plans)
    expected = []
    for plan in [plans[0], plans[0], None, plans[2], plans[2]]:
        other = make()
        if plan is not None:
            sp.apply(other, plan, mode="mask")
        expected.append(other)
    ids = tokens(2, 9)
    with torch.no_grad(), sp.scheduled(model, schedule) as position:
        for _ in range(2):
            for step, other in enumerate(expected):
                assert position.step == step
                torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=1e-6)
            position.restart()
        dense = make()(ids).logits
    torch.testing.assert_close(model(ids).logits, dense, rtol=0, atol=1e-6)
    assert sp.adapter_for(model).form == "dense"


def test_a_samplers_steps_are_counted_and_a_static_schedule_is_the_static_plan():
    model = toy(sharpness=2.0)
    plan = manual_plan(model, EARLY)
    prompt = tokens(2, 5)
    with sp.scheduled(model, sp.PhaseSchedule([0], [plan])) as position:
        scheduled = list(sp.denoise(model, prompt, steps=6, gen_length=12))
        assert position.step == 6
    sp.apply(model, plan, mode="mask")
    for a, b in zip(scheduled, sp.denoise(model, prompt, steps=6, gen_length=12), strict=True):
        assert torch.equal(a, b)


def test_the_model_is_dense_again_after_a_failure_inside():
    model = toy()
    before, ids = bits(model), tokens(1, 8)
    dense = model(ids).logits
    with (
        pytest.raises(RuntimeError, match="mine"),
        sp.scheduled(model, sp.PhaseSchedule([0], [manual_plan(model, EARLY)])),
    ):
        raise RuntimeError("mine")
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(model(ids).logits, dense)
    assert not model._forward_hooks


def test_the_heads_that_run_are_the_mean_over_steps():
    model = toy()
    schedule = sp.PhaseSchedule([0, 4], [manual_plan(model, EARLY), None])
    share = schedule.heads_run(sp.adapter_for(model), 8)
    assert share == pytest.approx((0.5 + 1) / 2)


def test_bad_schedules_are_refused_before_anything_changes():
    model = toy()
    plan = manual_plan(model, EARLY)
    for starts in ([], [1], [0, 0], [0, 5, 3]):
        with pytest.raises(ValueError, match="starts that ascend from 0"):
            sp.PhaseSchedule(starts, [plan] * len(starts))
    with pytest.raises(ValueError, match="must be of one model"):
        sp.PhaseSchedule([0, 1], [plan, manual_plan(toy(seed=1), LATE)])
    with (
        pytest.raises(ValueError, match="made for another model"),
        sp.scheduled(toy(seed=1), sp.PhaseSchedule([0], [plan])),
    ):
        pass
    sp.apply(model, plan, mode="mask")
    with (
        pytest.raises(ValueError, match="already pruned"),
        sp.scheduled(model, sp.PhaseSchedule([0], [plan])),
    ):
        pass
    assert model.prune_plan is plan
