"""How much of what a head writes varies: its mean can be given back as a bias."""

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
class Fluctuation(HeadCriterion):
    """Energy over tokens of what head h writes, less its mean, relative to the residual stream's."""

    name: ClassVar[str] = "fluctuation"
    needs_calibration: ClassVar[bool] = True

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        return head_scores(
            adapter,
            [
                written_energy(adapter.attention_weights(i).o, seen.head_moments(centred=True))
                / seen.stream_moment
                for i, seen in enumerate(evidence.activations(adapter))
            ],
        )
