"""Leave one head out, and look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.calibration import Calibration
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion
from sinkprune.progress import bar

MEASURES = ("divergence", "loss")


@register_criterion
@dataclass
class Ablation(HeadCriterion):
    """What one head's removal costs on the calibration rows, measured: a forward of all rows per head.

    ``measure="divergence"`` is the Kullback-Leibler divergence of the masked tokens' distribution from the
    dense model's, in nats; ``"loss"`` the change of their mean cross entropy, whose differences between heads
    are smaller than its noise unless there are many rows.
    """

    name: ClassVar[str] = "ablation"
    needs_calibration: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    measure: str = "divergence"
    batch: int = 32

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}, got {self.measure!r}")
        calibration, geometry = evidence.calibration, adapter.geometry()
        assert calibration is not None
        dense = self.predictions(adapter, calibration)
        device = dense[0].device
        scores = []
        for layer, heads in enumerate(bar("planning", "layer", geometry.heads)):
            costs = torch.zeros(heads)
            for head in range(heads):
                others = torch.tensor([h for h in range(heads) if h != head], device=device, dtype=torch.long)
                try:
                    adapter.mask(layer, others, None)
                    costs[head] = self.cost(adapter, calibration, dense)
                finally:
                    adapter.mask(layer, None, None)
            scores.append(costs)
        return head_scores(adapter, scores)

    @torch.no_grad()
    def predictions(self, adapter: Adapter, calibration: Calibration) -> list[Tensor]:
        """Log-probabilities of the masked tokens ``[masked, V]``, batch by batch."""
        device = adapter.device
        found = []
        for part in calibration.batches(self.batch):
            valid = None if part.valid is None else part.valid.to(device)
            logits = adapter.predict(part.ids.to(device), valid)
            found.append(logits[part.masked.to(device)].float().log_softmax(-1))
        return found

    def cost(self, adapter: Adapter, calibration: Calibration, dense: list[Tensor]) -> float:
        total, count = 0.0, 0
        pruned = self.predictions(adapter, calibration)
        for part, before, after in zip(calibration.batches(self.batch), dense, pruned, strict=True):
            if self.measure == "divergence":
                cost = (before.exp() * (before - after)).sum()
            else:
                targets = part.targets.to(after.device)[part.masked.to(after.device)]
                cost = F.nll_loss(after, targets, reduction="sum") - F.nll_loss(
                    before, targets, reduction="sum"
                )
            total, count = total + float(cost), count + len(after)
        return total / count
