"""Rules for whole layers, whose heads all have one score: for ``sp.plan(..., whole_layers=True)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion
from sinkprune.planning.criteria.output_norm import written_energy


@register_criterion
@dataclass
class LayerOutputChange(HeadCriterion):
    """Energy of what a layer's attention writes, relative to the residual stream's: small = go first."""

    name: ClassVar[str] = "layer_output_change"
    needs_calibration: ClassVar[bool] = True

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        scores = []
        for layer, seen in enumerate(evidence.activations(adapter)):
            written = written_energy(adapter.attention_weights(layer).o, seen.heads_moment[None])
            scores.append((written / seen.stream_moment).expand(adapter.geometry().heads[layer]))
        return head_scores(adapter, scores)


@register_criterion
@dataclass
class LayerInstability(HeadCriterion):
    """Minus the mean over a layer's heads of the sink position's variance over steps (arXiv 2602.17664)."""

    name: ClassVar[str] = "layer_instability"
    needs_profile: ClassVar[bool] = True
    gated: bool = False

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        assert evidence.profile is not None
        variance = evidence.profile.head_mean(
            "gated_position_variance" if self.gated else "position_variance"
        )
        widths = adapter.geometry().heads
        means = [-variance[i, :heads].mean() for i, heads in enumerate(widths)]
        return head_scores(adapter, [torch.full((n,), float(m)) for n, m in zip(widths, means, strict=True)])
