"""Quality of a masked diffusion model on text: the negative log-likelihood bound, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkprune.adapters import adapter_for

NOISE_LEVELS = (0.15, 0.5, 0.9)


@dataclass
class Quality:
    """Nats per token on a set of windows.

    Attributes:
        nll: Monte Carlo estimate of the bound on -log p(x) / L (arXiv 2502.09992, equation 6).
        nll_se: its standard error over windows.
        per_window: the estimate of each window; the same windows and masks for every model, so differences
            pair.
        at_level: mean cross entropy of the masked tokens at each of the noise levels t.
        accuracy: share of masked tokens that the argmax gets right, at each noise level.
        tokens: tokens evaluated (windows x length).
    """

    nll: float
    nll_se: float
    per_window: list[float]
    at_level: dict[float, float]
    accuracy: dict[float, float]
    tokens: int

    def minus(self, other: Quality) -> tuple[float, float]:
        """Paired difference of the bounds and its standard error: this minus ``other``."""
        if len(self.per_window) != len(other.per_window):
            raise ValueError(f"{len(self.per_window)} and {len(other.per_window)} windows do not pair")
        return _mean_and_error([a - b for a, b in zip(self.per_window, other.per_window, strict=True)])


def evaluate(
    model: nn.Module,
    text: str | Tensor,
    *,
    tokenizer: Any = None,
    windows: int = 32,
    length: int = 128,
    draws: int = 4,
    batch: int = 16,
    seed: int = 0,
    mask_token_id: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Quality:
    """Estimate ``model``'s quality on ``text``.

    Windows of ``length`` tokens are spread evenly over the text. For the bound, a draw masks exactly l tokens
    of a window, l uniform in 1..length (stratified over windows and draws), and takes their mean cross
    entropy; the masks depend on ``seed`` alone, so two models see the same ones.

    Args:
        model: of a known family.
        text: a string (with ``tokenizer``) or int64 ids ``[N]``.
        windows, length, draws: how much to evaluate; every window is drawn ``draws`` times.
        batch: sequences per forward.
        seed: of the masks.
        mask_token_id: where the model's config lacks one.
        progress: called with the number of forwards just done.

    Raises:
        ValueError: a text shorter than one window, sizes below 1, a length beyond the context, or logits that
            are NaN.
    """
    adapter = adapter_for(model)
    mask_id = adapter.mask_token_id if mask_token_id is None else mask_token_id
    if mask_id is None:
        raise ValueError("the model's config names no mask token: pass mask_token_id")
    if min(windows, length, draws, batch) < 1:
        raise ValueError(
            f"windows, length, draws and batch must be at least 1, got {(windows, length, draws, batch)}"
        )
    ids = _encode(text, tokenizer)
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    starts = torch.linspace(0, len(ids) - length, windows).long()
    rows = ids[starts[:, None] + torch.arange(length)]
    generator = torch.Generator().manual_seed(seed)
    report = progress or (lambda count: None)

    counts = torch.randperm(windows * draws, generator=generator) + torch.rand(
        windows * draws, generator=generator
    )
    counts = (counts / (windows * draws) * length).long().clamp(max=length - 1) + 1
    order = torch.rand(windows * draws, length, generator=generator).argsort(-1).argsort(-1)
    losses, _ = _cross_entropy(model, rows.repeat(draws, 1), order < counts[:, None], mask_id, batch, report)
    per_window = losses.view(draws, windows).mean(0)

    at_level, accuracy = {}, {}
    order = torch.rand(windows, length, generator=generator).argsort(-1).argsort(-1)
    for level in NOISE_LEVELS:
        masked = order < max(1, round(level * length))
        loss, right = _cross_entropy(model, rows, masked, mask_id, batch, report)
        at_level[level], accuracy[level] = loss.mean().item(), right.mean().item()
    mean, error = _mean_and_error(per_window.tolist())
    return Quality(mean, error, per_window.tolist(), at_level, accuracy, windows * length)


@torch.no_grad()
def _cross_entropy(
    model: nn.Module, rows: Tensor, masked: Tensor, mask_id: int, batch: int, report: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and accuracy over each row's masked tokens: float64 ``[rows]`` each."""
    adapter, device = adapter_for(model), next(model.parameters()).device
    losses, rights = [], []
    for first in range(0, len(rows), batch):
        target, hide = rows[first : first + batch].to(device), masked[first : first + batch].to(device)
        logits = adapter.predict(target.masked_fill(hide, mask_id)).float()
        loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").double()
        right = (logits.argmax(-1) == target).double()
        hidden = hide.sum(1)
        losses.append(((loss * hide).sum(1) / hidden).cpu())
        rights.append(((right * hide).sum(1) / hidden).cpu())
        report(1)
    loss = torch.cat(losses)
    if not torch.isfinite(loss).all():
        raise ValueError("the model's logits are not finite on this text")
    return loss, torch.cat(rights)


def _encode(text: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, Tensor):
        if text.dim() != 1:
            raise ValueError(f"ids must have shape [N], got {tuple(text.shape)}")
        return text.cpu()
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; or pass ids")
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
