"""How badly a layer's output is missed without a head, after the others have been refitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion

DAMPING = 1e-2  # of the mean square of the inputs


@register_criterion
@dataclass
class Reconstruction(HeadCriterion):
    """Squared error that removing head h adds when the remaining columns of the output projection are
    refitted by least squares, of every token relative to the energy of its own hidden state there.

    A layer's heads go one by one, each time the cheapest, so that two heads that can stand in for each other
    do not both look free (the structured form of optimal brain surgery: arXiv 2203.07259, 2302.04089). A
    head's score is the largest error on the way to its removal.

    ``alike``: every token counts the same, and the error is relative to their mean energy. Where one token
    in a hundred holds a massive activation (arXiv 2402.17762), that mean is its alone.
    """

    name: ClassVar[str] = "reconstruction"
    needs_calibration: ClassVar[bool] = True
    alike: bool = False

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        scores = []
        for layer, seen in enumerate(evidence.activations(adapter)):
            heads = adapter.geometry().heads[layer]
            gram = seen.relative_covariance()
            if self.alike:
                gram = seen.heads_moment - seen.heads_mean[:, None] * seen.heads_mean
                gram = gram / seen.stream_moment
            gram.diagonal().add_(DAMPING * gram.diagonal().mean() + 1e-12)
            weight = adapter.attention_weights(layer).o.detach().to(gram.dtype)
            scores.append(removal_errors(weight, gram, heads))
        return head_scores(adapter, scores)


def removal_errors(weight: Tensor, gram: Tensor, heads: int) -> Tensor:
    """The error at which each head goes: weight ``[hidden, H D]``, Gram ``[H D, H D]``, both float64;
    ``[H]``."""
    width = len(gram) // heads
    inverse, weight = torch.linalg.inv(gram), weight.clone()
    errors = torch.full((heads,), torch.inf, dtype=gram.dtype)
    worst, left = 0.0, list(range(heads))
    while left:
        costs = {}
        for head in left:
            part = slice(head * width, (head + 1) * width)
            own = weight[:, part]
            costs[head] = float((torch.linalg.solve(inverse[part, part], own.T) * own.T).sum())
        cheapest = min(left, key=lambda head: (costs[head], head))
        worst = max(worst, costs[cheapest])
        errors[cheapest] = worst
        left.remove(cheapest)
        part = slice(cheapest * width, (cheapest + 1) * width)
        solved = torch.linalg.solve(inverse[part, part], inverse[part])  # [D, H D]
        weight = weight - weight[:, part] @ solved
        inverse = inverse - inverse[:, part] @ solved
        weight[:, part] = 0
        inverse[part], inverse[:, part] = 0, 0
        inverse[part, part] = torch.eye(width, dtype=gram.dtype, device=gram.device)
    return errors
