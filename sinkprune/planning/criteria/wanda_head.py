"""Wanda, summed over a head: weights times the norm of what reaches them."""

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
class WandaHead(HeadCriterion):
    """Mean of ``|W| · rms(x)`` over a head's q, k, v rows and output columns (arXiv 2306.11695, per head).

    ``soft_sink=True`` weighs tokens by 1 - the soft sink mask, the paper's form (arXiv 2602.17664). Query
    heads that share a key/value head each count the whole of it.
    """

    name: ClassVar[str] = "wanda_head"
    needs_calibration: ClassVar[bool] = True
    soft_sink: bool = False

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        geometry, scores = adapter.geometry(), []
        for layer, seen in enumerate(evidence.activations(adapter)):
            weights, heads = adapter.attention_weights(layer), geometry.heads[layer]
            entry = (seen.attention_moment_soft if self.soft_sink else seen.attention_moment).sqrt()
            shared = torch.tensor(geometry.kv_head_of(layer), device=entry.device)
            width = weights.q.shape[0] // heads
            rows = [
                (w.detach().abs().double() @ entry).view(-1, width).mean(1)
                for w in (weights.q, weights.k, weights.v)
            ]
            q, k, v = (r / len(entry) for r in rows)
            columns = weights.o.detach().abs().double().mean(0) * seen.heads_moment.diagonal().sqrt()
            scores.append(q + k[shared] + v[shared] + columns.view(heads, -1).mean(1))
        return head_scores(adapter, scores)
