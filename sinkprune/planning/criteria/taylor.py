"""First-order change of the loss when a head's output is set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.adapters import Adapter
from sinkprune.evidence.evidence import Evidence
from sinkprune.evidence.own_thread import own_thread
from sinkprune.planning.criteria.base import HeadCriterion, head_scores, register_criterion
from sinkprune.progress import bar


@register_criterion
@dataclass
class Taylor(HeadCriterion):
    """Mean over rows of ``|Σ x_h · dL/dx_h|``, x the output projection's input and L the row's mean masked
    cross entropy (arXiv 1905.10650, equation 5). The only criterion here that needs gradients."""

    name: ClassVar[str] = "taylor"
    needs_calibration: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    batch: int = 8

    def score(self, adapter: Adapter, evidence: Evidence) -> Tensor:
        calibration, geometry = evidence.calibration, adapter.geometry()
        assert calibration is not None
        device = adapter.device
        found: dict[int, Tensor] = {}

        def watch(layer: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            found[layer] = args[0].detach().requires_grad_() if layer == 0 else args[0]
            found[layer].retain_grad()
            return (found[layer],)

        sums = [torch.zeros(heads, dtype=torch.float64) for heads in geometry.heads]
        hooks = [
            adapter.linears(layer)["o"].register_forward_pre_hook(own_thread(partial(watch, layer)))
            for layer in range(geometry.num_layers)
        ]
        try:
            with torch.enable_grad():
                for part in bar("planning", "batch", list(calibration.batches(self.batch))):
                    valid = None if part.valid is None else part.valid.to(device)
                    logits = adapter.predict(part.ids.to(device), valid).float()
                    loss = _loss(logits, part.targets.to(device), part.masked.to(device))
                    inputs = [found[layer] for layer in range(geometry.num_layers)]
                    for layer, slope in enumerate(torch.autograd.grad(loss, inputs)):
                        product = (inputs[layer].detach() * slope).double()
                        by_head = product.unflatten(-1, (geometry.heads[layer], -1)).sum((1, 3))
                        sums[layer] += by_head.abs().sum(0).cpu()
        finally:
            for hook in hooks:
                hook.remove()
        return head_scores(adapter, [total / len(calibration.ids) for total in sums])


def _loss(logits: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Sum over rows of each row's mean cross entropy of its masked tokens."""
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return ((loss * masked).sum(1) / masked.sum(1)).sum()
