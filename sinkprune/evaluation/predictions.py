"""Quality of a masked diffusion model on text: the negative log-likelihood bound, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sinkprune.adapters import adapter_for
from sinkprune.evaluation.intervals import Interval, bootstrap_difference
from sinkprune.evidence.calibration import random_ranks, text_rows
from sinkprune.progress import bar

NOISE_LEVELS = (0.15, 0.5, 0.9)

Texts = str | Tensor | Sequence[str] | Sequence[Tensor]


@dataclass
class Quality:
    """Nats per token on a set of windows, or of separate texts.

    Attributes:
        nll: Monte Carlo estimate of the bound on -log p(x) / L (arXiv 2502.09992, equation 6).
        nll_se: its standard error over windows.
        per_window: the estimate of each window; the same windows and masks for every model, so differences
            pair.
        at_level: mean cross entropy of the masked tokens at each of the noise levels t.
        accuracy: share of masked tokens that the argmax gets right, at each noise level.
        tokens: tokens that could be masked, in all windows.
        per_window_at_level, per_window_accuracy: of each window.
    """

    nll: float
    nll_se: float
    per_window: list[float]
    at_level: dict[float, float]
    accuracy: dict[float, float]
    tokens: int
    per_window_at_level: dict[float, list[float]] = field(default_factory=dict)
    per_window_accuracy: dict[float, list[float]] = field(default_factory=dict)

    def minus(self, other: Quality) -> tuple[float, float]:
        """Paired difference of the bounds and its standard error: this minus ``other``."""
        self._check_pair(other)
        return _mean_and_error([a - b for a, b in zip(self.per_window, other.per_window, strict=True)])

    def interval(self, other: Quality, level: float | None = None) -> Interval:
        """Paired difference, this minus ``other``, with its 95 % bootstrap interval over windows: of the
        bounds, or of the cross entropies at a noise level. For several calibration draws take
        ``bootstrap_difference``."""
        self._check_pair(other)
        if level is None:
            return bootstrap_difference(self.per_window, other.per_window)
        for side in (self, other):
            if level not in side.per_window_at_level:
                raise ValueError(f"level must be one of {list(side.per_window_at_level)}, got {level}")
        return bootstrap_difference(self.per_window_at_level[level], other.per_window_at_level[level])

    def _check_pair(self, other: Quality) -> None:
        if len(self.per_window) != len(other.per_window):
            raise ValueError(f"{len(self.per_window)} and {len(other.per_window)} windows do not pair")


def evaluate(
    model: nn.Module,
    text: Texts,
    *,
    tokenizer: Any = None,
    windows: int = 32,
    length: int = 128,
    draws: int = 4,
    levels: Sequence[float] = NOISE_LEVELS,
    highest_noise: float = 1.0,
    attention_mask: Tensor | None = None,
    never_mask: Sequence[int] = (),
    batch: int = 16,
    seed: int = 0,
    mask_token_id: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Quality:
    """Estimate ``model``'s quality on ``text``.

    Windows of ``length`` tokens are spread evenly over the text; separate texts are each a window of their
    own, whole. For the bound, a draw masks exactly l tokens of a window, l uniform in 1..its tokens
    (stratified over windows and draws), and takes their mean cross entropy; the masks depend on ``seed``
    alone, so two models see the same ones.

    Args:
        model: of a known family.
        text: a string (with ``tokenizer``) or int64 ids ``[N]``; or separate texts: strings, a list of ids
            ``[n]``, or ids ``[N, L]`` with ``attention_mask`` where padded. Strings get no special tokens:
            pass ids where a model wants them.
        windows, length: how much of one long text to evaluate; separate texts are all taken.
        draws: how often each window is masked for the bound.
        levels: noise levels to judge separately, each in (0, 1].
        highest_noise: l goes up to this share of the tokens. Below 1 the result is no bound, but the mean
            cross entropy over the noise that a model was trained for.
        attention_mask: bool or int ``[N, L]``, 1 at valid tokens.
        never_mask: ids that are neither masked nor counted (separators, special tokens); nor is padding.
        batch: sequences per forward.
        seed: of the masks.
        mask_token_id: instead of the config's; where that names none, the tokenizer's is taken.
        progress: called with the number of forwards just done.

    Raises:
        ValueError: a text shorter than one window or without a token that may be masked, sizes below 1,
            noise outside (0, 1], a length beyond the context, or logits that are NaN.
    """
    adapter = adapter_for(model)
    mask_id = adapter.mask_id(mask_token_id, tokenizer)
    if min(windows, length, draws, batch) < 1:
        raise ValueError(
            f"windows, length, draws and batch must be at least 1, got {(windows, length, draws, batch)}"
        )
    if not all(0 < level <= 1 for level in (*levels, highest_noise)):
        raise ValueError(
            f"levels and highest_noise must lie in (0, 1], got {tuple(levels)} and {highest_noise}"
        )
    context = adapter.geometry().context
    rows, valid = _rows(text, tokenizer, windows, length, attention_mask, context)
    if rows.shape[1] > context:
        raise ValueError(f"texts of {rows.shape[1]} tokens exceed the context of {context}")
    maskable = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
    if never_mask:
        maskable = maskable & ~torch.isin(rows, torch.tensor(list(never_mask)))
    if not maskable.any(1).all():
        row = int((~maskable.any(1)).nonzero()[0])
        raise ValueError(f"every text needs a token that may be masked; number {row} has none")
    generator = torch.Generator().manual_seed(seed)
    forwards = -(-draws * len(rows) // batch) + len(levels) * -(-len(rows) // batch)
    shown = bar("evaluating", "forward", total=forwards)

    def report(count: int) -> None:
        shown.update(count)
        if progress is not None:
            progress(count)

    measure = Measurement(model, mask_id, batch, report)

    masked = bound_masks(maskable, draws, generator, highest_noise)
    repeated = None if valid is None else valid.repeat(draws, 1)
    losses, _ = measure(rows.repeat(draws, 1), masked, repeated)
    per_window = losses.view(draws, len(rows)).mean(0)

    per_window_at_level, per_window_accuracy = {}, {}
    ranks = random_ranks(maskable, generator)
    for level in levels:
        counts = (maskable.sum(1) * level).round().clamp(min=1)
        loss, right = measure(rows, ranks < counts[:, None], valid)
        per_window_at_level[level], per_window_accuracy[level] = loss.tolist(), right.tolist()
    shown.close()
    mean, error = _mean_and_error(per_window.tolist())
    return Quality(
        nll=mean,
        nll_se=error,
        per_window=per_window.tolist(),
        at_level={level: _mean_and_error(values)[0] for level, values in per_window_at_level.items()},
        accuracy={level: _mean_and_error(values)[0] for level, values in per_window_accuracy.items()},
        tokens=int(maskable.sum()),
        per_window_at_level=per_window_at_level,
        per_window_accuracy=per_window_accuracy,
    )


def bound_masks(
    maskable: Tensor, draws: int, generator: torch.Generator, highest_noise: float = 1.0
) -> Tensor:
    """Masks of the Monte Carlo bound: bool ``[draws * N, L]`` of maskable tokens, bool ``[N, L]``.

    Each masks exactly l tokens, l uniform in 1..``highest_noise`` of the maskable ones, stratified over all
    masks. The mean cross entropy of the masked tokens is then an estimate of the bound per token.
    """
    masks = draws * len(maskable)
    share = (torch.randperm(masks, generator=generator) + torch.rand(masks, generator=generator)) / masks
    repeated = maskable.repeat(draws, 1)
    most = (repeated.sum(1) * highest_noise).round().clamp(min=1)
    counts = (share * most).long().minimum(most - 1) + 1
    return random_ranks(repeated, generator) < counts[:, None]


@dataclass
class Measurement:
    """Cross entropy and accuracy of a model at masked tokens."""

    model: nn.Module
    mask_id: int
    batch: int
    report: Callable[[int], object]

    @torch.no_grad()
    def __call__(self, rows: Tensor, masked: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means over each row's masked tokens, float64 ``[N]`` each, for ids ``[N, L]`` on the CPU.

        Args:
            masked: bool ``[N, L]``, at least one in each row.
            valid: bool ``[N, L]``, False at padding; None where nothing is padded.
        """
        adapter = adapter_for(self.model)
        device = adapter.device
        losses, rights = [], []
        for first in range(0, len(rows), self.batch):
            part = slice(first, first + self.batch)
            target, hide = rows[part], masked[part]
            seen = None if valid is None else valid[part]
            if seen is not None:
                width = int(seen.any(0).nonzero().max()) + 1  # padding on the right that all rows share
                target, hide, seen = target[:, :width], hide[:, :width], seen[:, :width].to(device)
            if seen is not None and bool(seen.all()):
                seen = None
            target, hide = target.to(device), hide.to(device)
            logits = adapter.predict(target.masked_fill(hide, self.mask_id), seen).float()
            loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").double()
            right = (logits.argmax(-1) == target).double()
            losses.append(_mean_where(loss, hide).cpu())
            rights.append(_mean_where(right, hide).cpu())
            self.report(1)
        loss = torch.cat(losses)
        if not torch.isfinite(loss).all():
            raise ValueError("the model's logits are not finite on this text")
        return loss, torch.cat(rights)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Row means of ``values`` at ``where``; what is elsewhere, NaN or not, does not count."""
    return values.masked_fill(~where, 0).sum(1) / where.sum(1)


def _rows(
    text: Texts,
    tokenizer: Any,
    windows: int,
    length: int,
    attention_mask: Tensor | None,
    context: int,
) -> tuple[Tensor, Tensor | None]:
    """Ids ``[N, L]`` on the CPU and their valid tokens, bool, or None."""
    if not isinstance(text, (str, Tensor)) and len(text) and isinstance(text[0], Tensor):
        tensors = cast(Sequence[Tensor], text)
        if any(ids.dim() != 1 or not len(ids) for ids in tensors):
            raise ValueError(f"each text's ids must have shape [n], n >= 1, got {[*map(_shape, tensors)]}")
        attention_mask = pad_sequence([torch.ones(len(ids)) for ids in tensors], batch_first=True)
        text = pad_sequence(list(tensors), batch_first=True)
    # A text that is longer than the context is refused later, not cut: hence the one token more.
    rows, valid = text_rows(cast(Any, text), tokenizer, context + 1, attention_mask)
    if rows.dim() == 2:
        return rows, valid
    if attention_mask is not None:
        raise ValueError("attention_mask goes with ids [N, L] of separate texts")
    if len(rows) < length:
        raise ValueError(f"the text has {len(rows)} tokens, fewer than one window of {length}")
    starts = torch.linspace(0, len(rows) - length, windows).long()
    return rows[starts[:, None] + torch.arange(length)], None


def _shape(ids: Tensor) -> tuple[int, ...]:
    return tuple(ids.shape)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
