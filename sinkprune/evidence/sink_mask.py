"""The paper's soft sink mask: how much each position of a row is a sink."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.calibration import Calibration
from sinkprune.evidence.tracking import track


@dataclass(frozen=True)
class SinkMask:
    """``sigmoid(alpha * (mass - (mean + sigma * std)))`` over the valid positions of a row.

    The mass is the attention that a position draws: summed over queries, heads and layers, so that a row's
    sum is queries x heads x layers. At that scale ``alpha`` = 5 makes the mask all but hard: positions above
    the threshold count 1, the others 0. Source: the public code of arXiv 2602.17664.
    """

    alpha: float = 5.0
    sigma: float = 2.0

    def of(self, mass: Tensor, valid: Tensor | None = None) -> Tensor:
        """float32 ``[rows, L]`` in (0, 1) of a mass ``[rows, L]``; 0 where ``valid`` is False."""
        counted = torch.ones_like(mass) if valid is None else valid.to(mass)
        number = counted.sum(1, keepdim=True).clamp(min=1)
        mean = (mass * counted).sum(1, keepdim=True) / number
        std = ((mass - mean).square().mul(counted).sum(1, keepdim=True) / number).sqrt()
        return torch.sigmoid(self.alpha * (mass - mean - self.sigma * std)) * counted


@torch.no_grad()
def sink_masks(adapter: Adapter, calibration: Calibration, rule: SinkMask, batch: int = 16) -> list[Tensor]:
    """The sink mask of every calibration row, float32 ``[rows, L]`` per batch, from the model as it is."""
    device = adapter.device
    masks = []
    for part in calibration.batches(batch):
        valid = None if part.valid is None else part.valid.to(device)
        with track(adapter.model, max_keys=part.ids.shape[1]) as tracker:
            adapter.predict(part.ids.to(device), valid, slice(0, 1))
        assert tracker.tracker is not None
        # The tracker's mass is a mean over queries; the public code's is a sum.
        mean = torch.stack([layer.sum(1).to(device) for layer in tracker.tracker.mass]).sum(0)
        queries = part.ids.shape[1] if valid is None else valid.sum(1, keepdim=True)
        masks.append(rule.of(mean * queries, valid))
    return masks
