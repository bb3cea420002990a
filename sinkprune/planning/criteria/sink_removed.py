"""What a head still adds once its sink is taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion
from sinkprune.planning.criteria.output_norm import written_energy


@register_criterion
@dataclass
class SinkRemoved(HeadCriterion):
    """Energy over tokens of what head h writes without the contribution of the key that draws the most
    attention (where it stands out), less its mean, relative to the residual stream's.

    Moving sinks rest on values of small norm (arXiv 2601.19657): what remains is what the head is for.
    """

    name: ClassVar[str] = "sink_removed"
    needs_calibration: ClassVar[bool] = True

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        return head_scores(
            adapter,
            [
                written_energy(adapter.attention_weights(i).o, seen.residual_moment) / seen.stream_moment
                for i, seen in enumerate(evidence.activations(adapter))
            ],
        )
