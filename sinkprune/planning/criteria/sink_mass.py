"""How strong a head's sink is, in either direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, register_criterion

DIRECTIONS = ("strong", "weak")


@register_criterion
@dataclass
class SinkMass(HeadCriterion):
    """The mean sink mass over steps and samples.

    ``keep="strong"`` removes heads without a sink first (in bidirectional models those are often diffuse and
    idle); ``keep="weak"`` removes strong sinks first, as found right for autoregressive models (arXiv
    2601.06787).
    """

    name: ClassVar[str] = "sink_mass"
    needs_profile: ClassVar[bool] = True
    keep: str = "strong"

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        if self.keep not in DIRECTIONS:
            raise ValueError(f"keep must be one of {DIRECTIONS}, got {self.keep!r}")
        assert evidence.profile is not None
        mass = evidence.profile.head_mean("mass")
        return mass if self.keep == "strong" else -mass
