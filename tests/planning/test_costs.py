"""Counted work against PyTorch's own counter and against live matrices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune import ops
from sinkprune.planning.costs import step_flops
from sinkprune.plans import model_block_parameters

CASES = {
    "mha": ({}, [[0, 2], [1], [0, 1, 3]], None),
    "gqa": ({"n_kv_heads": 2}, [[0, 1, 2], [2], [0, 3]], None),
    "with channels": ({"n_kv_heads": 2}, [[0], [1, 2], [0, 1, 2, 3]], [None, [1, 2, 3], list(range(20))]),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    changes, heads, channels = request.param
    model = toy(**changes)
    return model, manual_plan(model, heads, channels)


def plain_attention(q, k, v, *, kv_head_of=None, **options):
    """Attention as two matrix products, whose work PyTorch's counter sees (it has no formula for ours)."""
    assert set(options.values()) <= {None}
    reads = torch.arange(q.shape[1]) * k.shape[1] // q.shape[1] if kv_head_of is None else kv_head_of
    scores = q @ k[:, reads].mT
    return (scores * q.shape[-1] ** -0.5).softmax(-1) @ v[:, reads], None


def counted_flops(model, ids, monkeypatch):
    """What PyTorch's dispatcher counts."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "attention", plain_attention)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
    return counter.get_total_flops()


def test_step_flops_equal_what_pytorch_counts(case, monkeypatch):
    model, plan = case
    ids = tokens(3, 50)
    geometry = plan.geometry
    assert step_flops(geometry, None, 3, 50) == pytest.approx(
        counted_flops(model, ids, monkeypatch), rel=0.02
    )
    sp.apply(model, plan)
    assert step_flops(geometry, plan, 3, 50) == pytest.approx(
        counted_flops(model, ids, monkeypatch), rel=0.02
    )


def block_numel(model):
    return sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)


def test_block_parameters_equal_the_live_matrices_before_and_after(case):
    model, plan = case
    dense = block_numel(model)
    assert model_block_parameters(plan.geometry) == dense
    sp.apply(model, plan)
    assert model_block_parameters(plan.geometry, plan) == block_numel(model)
    assert plan.parameters_removed == pytest.approx(1 - block_numel(model) / dense)


def test_the_ceiling_is_the_ratio_of_the_counts(case, monkeypatch):
    model, plan = case
    ids = tokens(2, 40)
    dense = counted_flops(model, ids, monkeypatch)
    got = sp.ceiling(model, plan, batch=2, length=40)
    sp.apply(model, plan)
    assert got == pytest.approx(dense / counted_flops(model, ids, monkeypatch), rel=0.02)
    assert got > 1
    assert sp.ceiling(model, plan, 2, 40) == got  # of the compact model too, whose geometry is the dense one
    assert sp.ceiling(plan.geometry, plan, 2, 40) == got


def test_a_plan_that_removes_nothing_has_a_ceiling_of_one():
    model = toy()
    assert sp.ceiling(model, manual_plan(model, [[0, 1, 2, 3]] * 3)) == 1


def test_the_ceiling_of_a_head_plan_grows_with_the_length():
    model = toy()
    plan = manual_plan(model, [[0, 1]] * 3)
    ceilings = [sp.ceiling(model, plan, length=length) for length in (1, 64, 4096)]
    assert ceilings == sorted(ceilings)
    assert ceilings[-1] < 2  # half of the heads at most halve the work


def test_a_ceiling_for_another_model_or_no_tokens_is_refused():
    model = toy()
    plan = manual_plan(model, [[0, 1]] * 3)
    with pytest.raises(ValueError, match=r"the plan is for .*, the model is"):
        sp.ceiling(toy(n_kv_heads=2), plan)
    for batch, length in ((0, 8), (1, 0)):
        with pytest.raises(ValueError, match=f"must be at least 1, got {batch} and {length}"):
            sp.ceiling(model, plan, batch, length)
