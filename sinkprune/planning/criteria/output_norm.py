"""How much a head writes into the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion


@register_criterion
@dataclass
class OutputNorm(HeadCriterion):
    """Root mean square over tokens of ``W_o,h x_h``, what head h adds; the layer's mean energy is divided out
    with ``relative=True``, so that layers with a large stream do not look more important."""

    name: ClassVar[str] = "output_norm"
    needs_calibration: ClassVar[bool] = True
    relative: bool = False

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        scores = []
        for layer, seen in enumerate(evidence.activations(adapter)):
            energy = written_energy(adapter.attention_weights(layer).o, seen.head_moments())
            scores.append((energy / (seen.stream_moment if self.relative else 1.0)).sqrt())
        return head_scores(adapter, scores)


def written_energy(o: Tensor, moments: Tensor) -> Tensor:
    """``tr(W_h M_h W_hᵀ)`` of every head: its columns of ``o`` ``[hidden, H D]`` and ``[H, D, D]``; float64
    ``[H]``."""
    heads, width = moments.shape[:2]
    columns = o.detach().to(moments.dtype).unflatten(1, (heads, width)).transpose(0, 1)  # [H, hidden, D]
    return ((columns @ moments) * columns).sum((1, 2)).clamp(min=0)
