"""The data-free baseline: heads with small weights go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion


@register_criterion
@dataclass
class Magnitude(HeadCriterion):
    """Root of the summed squares of a head's q, k, v and o weights.

    Query heads that share a key/value head each count the whole of it.
    """

    name: ClassVar[str] = "magnitude"

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        geometry = adapter.geometry()
        scores = []
        for layer in range(geometry.num_layers):
            weights = adapter.attention_weights(layer)
            shared = torch.tensor(geometry.kv_head_of(layer))
            width = weights.q.shape[0] // geometry.heads[layer]  # a family's layers may differ in it
            per_head = [
                _squares(weights.q, width),
                _squares(weights.o.T, width),
                _squares(weights.k, width)[shared],
                _squares(weights.v, width)[shared],
            ]
            scores.append(torch.stack(per_head).sum(0).sqrt())
        return head_scores(adapter, scores)


def _squares(weight: Tensor, head_dim: int) -> Tensor:
    """Sum of squares of each head's rows: ``[heads * head_dim, n]`` to float32 ``[heads]``."""
    return weight.detach().float().square().sum(1).view(-1, head_dim).sum(1).cpu()
