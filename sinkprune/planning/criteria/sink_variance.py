"""The paper's criterion: a head whose sink position varies over the denoising steps goes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, register_criterion


@register_criterion
@dataclass
class SinkVariance(HeadCriterion):
    """Minus the variance over steps of the sink position, mean over samples (arXiv 2602.17664, section 3).

    A diffuse head has an argmax that wanders though nothing stands out; ungated, as in the paper, it counts
    as unstable. ``gated=True`` counts only the steps on which the sink stands out.
    """

    name: ClassVar[str] = "sink_variance"
    needs_profile: ClassVar[bool] = True
    gated: bool = False

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        assert evidence.profile is not None
        return -evidence.profile.head_mean("gated_position_variance" if self.gated else "position_variance")
