"""The floor every criterion must clear: heads in an order drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, register_criterion


@register_criterion
@dataclass
class Random(HeadCriterion):
    """Uniform scores from ``seed``."""

    name: ClassVar[str] = "random"

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        geometry = adapter.geometry()
        return torch.rand(
            geometry.num_layers, max(geometry.heads), generator=torch.Generator().manual_seed(evidence.seed)
        )
