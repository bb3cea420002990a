"""FLAP's rule: how much each input channel of the output projection fluctuates, times its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion


@register_criterion
@dataclass
class FLAP(HeadCriterion):
    """Sum over a head's channels of variance over tokens times squared norm of the output column,
    standardised within each layer (arXiv 2312.11983, equations 5 and 6).

    Meant with its bias compensation: ``sp.apply(..., calibration=..., repair="bias")``.
    """

    name: ClassVar[str] = "flap"
    needs_calibration: ClassVar[bool] = True

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        scores = []
        for layer, seen in enumerate(evidence.activations(adapter)):
            variance = seen.heads_moment.diagonal() - seen.heads_mean.square()
            squares = adapter.attention_weights(layer).o.detach().double().square().sum(0)
            values = (variance * squares).view(adapter.geometry().heads[layer], -1).sum(1)
            scores.append((values - values.mean()) / values.std(correction=0).clamp(min=1e-30))
        return head_scores(adapter, scores)
