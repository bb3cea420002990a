"""The rule that costs least on this model, measured: no one rule finds the idle heads of every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.adapters import Adapter, Geometry
from sinkprune.allocation import Rules, head_units, remove_heads
from sinkprune.calibration import Calibration
from sinkprune.criteria.base import Evidence, HeadCriterion, criterion_for, register_criterion

CANDIDATES = (
    "output_norm", "output_norm:relative=true", "fluctuation", "sink_removed", "reconstruction", "flap",
    "wanda_head", "magnitude", "sink_variance", "sink_variance:gated=true", "sink_mass:keep=strong",
    "sink_mass:keep=weak",
)  # fmt: skip


@register_criterion
@dataclass
class Selected(HeadCriterion):
    """The scores of the candidate whose plan loses least on the calibration rows.

    Each candidate removes ``ratio`` of the heads, and the mean cross entropy of the masked tokens is
    measured: one forward of the rows per distinct plan. Candidates that need a profile take part where there
    is one. ``chosen`` names the winner afterwards.
    """

    name: ClassVar[str] = "selected"
    needs_calibration: ClassVar[bool] = True
    ratio: float = 0.38
    batch: int = 32
    chosen: str = ""

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        assert evidence.calibration is not None
        geometry = adapter.geometry()
        losses: dict[str, float] = {}
        best: tuple[float, str, Tensor] | None = None
        for name in CANDIDATES:
            rule = criterion_for(name)
            if rule.needs_profile and evidence.profile is None:
                continue
            scores = rule.score(adapter, evidence)
            kept = _kept(geometry, scores, self.ratio)
            if str(kept) not in losses:
                losses[str(kept)] = masked_loss(adapter, evidence.calibration, kept, self.batch)
            loss = losses[str(kept)]
            if best is None or loss < best[0]:
                best = (loss, name, scores)
        assert best is not None
        self.chosen = best[1]
        return best[2]


def _kept(geometry: Geometry, scores: Tensor, ratio: float) -> list[list[int]]:
    budget = round(ratio * sum(geometry.heads))
    return remove_heads(geometry, head_units(geometry, scores, Rules()), budget, "global", None)


@torch.no_grad()
def masked_loss(
    adapter: Adapter, calibration: Calibration, kept_heads: list[list[int]] | None, batch: int
) -> float:
    """Mean cross entropy of the rows' masked tokens with only these heads (None: all); nats per token."""
    device = next(adapter.model.parameters()).device
    widths = adapter.geometry().heads
    total, count = 0.0, 0
    try:
        for layer, heads in enumerate(kept_heads or []):
            if len(heads) < widths[layer]:
                adapter.mask(layer, torch.tensor(heads, dtype=torch.long, device=device), None)
        for part in calibration.batches(batch):
            valid = None if part.valid is None else part.valid.to(device)
            masked = part.masked.to(device)
            logits = adapter.predict(part.ids.to(device), valid)[masked].float()
            total += float(F.cross_entropy(logits, part.targets.to(device)[masked], reduction="sum"))
            count += len(logits)
    finally:
        for layer in range(len(kept_heads or [])):
            adapter.mask(layer, None, None)
    return total / count
