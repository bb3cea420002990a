"""A plan for each phase of a denoising trajectory, switched between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sinkprune.adapters import Adapter, adapter_for
from sinkprune.models.marks import mark
from sinkprune.plans import PrunePlan
from sinkprune.pruning.repacking import mask_indices, restore


@dataclass(frozen=True)
class PhaseSchedule:
    """What a model keeps at which steps: ``plans[i]`` from step ``starts[i]`` (counted from 0) to the next
    start, the last one for ever; None keeps everything.

    Raises:
        ValueError: starts that do not ascend from 0, or plans of different models.
    """

    starts: Sequence[int]
    plans: Sequence[PrunePlan | None]

    def __post_init__(self) -> None:
        starts = list(self.starts)
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or len(starts) != len(self.plans):
            raise ValueError(
                f"a schedule needs one plan for each start, and starts that ascend from 0, got {starts} and "
                f"{len(self.plans)} plans"
            )
        plans = [plan for plan in self.plans if plan is not None]
        if any((p.geometry, p.fingerprint) != (plans[0].geometry, plans[0].fingerprint) for p in plans):
            raise ValueError("the plans of a schedule must be of one model")

    def at(self, step: int) -> PrunePlan | None:
        """The plan in force at ``step``."""
        return self.plans[max(i for i, start in enumerate(self.starts) if start <= step)]

    def heads_run(self, adapter: Adapter, steps: int) -> float:
        """Mean share of the query heads that run over ``steps`` steps."""
        total = sum(adapter.geometry().heads)
        kept = 0
        for step in range(steps):
            plan = self.at(step)
            kept += total if plan is None else sum(len(layer.kept_heads) for layer in plan.layers)
        return kept / (total * steps)


class Position:
    """How far a scheduled model is. ``step`` counts its forwards; ``restart()`` begins a new trajectory."""

    def __init__(self, adapter: Adapter, schedule: PhaseSchedule) -> None:
        self.step = 0
        self._adapter, self._schedule = adapter, schedule
        everything = [(None, None)] * adapter.geometry().num_layers
        self._indices = [
            everything if plan is None else mask_indices(adapter, plan) for plan in schedule.plans
        ]
        self._enter(0)

    def restart(self) -> None:
        self.step = 0
        self._enter(0)

    def advance(self) -> None:
        self.step += 1
        if self.step in self._schedule.starts:
            self._enter(list(self._schedule.starts).index(self.step))

    def _enter(self, phase: int) -> None:
        plan = self._schedule.plans[phase]
        for layer, (heads, channels) in enumerate(self._indices[phase]):
            self._adapter.mask(layer, heads, channels)
        mark(self._adapter.model, plan, "dense" if plan is None else "mask")


@contextmanager
def scheduled(model: nn.Module, schedule: PhaseSchedule) -> Iterator[Position]:
    """Run ``model`` under ``schedule`` inside the ``with``, in any loop; dense again outside it.

        with sp.scheduled(model, sp.PhaseSchedule([0, 32], [None, plan])):
            text = sp.generate(model, tokenizer, prompt, steps=64)

    Every forward is a step. At a boundary only the indices of the heads to run change: nothing is packed, and
    nothing compiled again in eager mode. So the weights stay whole: attention's core shrinks with the heads
    that run, and the projections, the MLP (whose channels are zeroed, not skipped) and the memory do not. A
    schedule with a dense phase could not shrink them anyway: the union of its head sets is every head.

    Args:
        model: of a known family in its dense form.
        schedule: whose plans are of this model.

    Yields:
        the ``Position``; call its ``restart()`` before each further trajectory.

    Raises:
        ValueError: a model that is pruned already or compiled, or a plan for another model.
    """
    adapter = adapter_for(model)
    adapter.require_dense("schedule")
    for plan in schedule.plans:
        if plan is None:
            continue
        if plan.geometry != adapter.geometry() or plan.fingerprint not in ("", adapter.fingerprint()):
            raise ValueError("the schedule's plans were made for another model")
        kept = plan.layers
        if any(layer.takes_experts for layer in kept):
            raise ValueError("a schedule switches heads and channels: its plans must keep all experts")
        adapter.check([layer.kept_heads for layer in kept], [layer.kept_channels for layer in kept], "mask")
    position = None
    try:
        position = Position(adapter, schedule)
        hook = adapter.step_module.register_forward_hook(lambda module, inputs, out: position.advance())
        try:
            yield position
        finally:
            hook.remove()
    finally:
        restore(model)
