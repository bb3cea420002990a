"""How sure a figure is: bootstrap confidence intervals over texts and over calibration draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # sums over texts [..., k] to values [...]


class Interval(NamedTuple):
    """An estimate, and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_difference(
    a: Any,
    b: Any,
    *,
    statistic: Statistic | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """The paired difference ``a`` - ``b`` with its percentile bootstrap interval.

    Texts are drawn with replacement, the same ones for both sides. Where there are several calibration draws
    (one pruned model each) these are drawn too, independently of the texts: the pigeonhole bootstrap of
    crossed factors (Owen 2007), which errs on the wide side where draws and texts interact. With a handful of
    draws that hardly do, intervals are somewhat too narrow.

    Args:
        a, b: ``[texts]`` or ``[draws, texts]``, one value for each text; a side without draws (a dense model)
            pairs with each draw of the other. With ``statistic``, one more dimension ``k`` at the end.
        statistic: turns sums over texts ``[..., k]`` into values ``[...]``, for what is no mean over texts
            (BLEU); None takes the mean.
        confidence: of the interval, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: shapes that do not pair, no text, or values that are not finite.
    """
    one, other = _sums(a, statistic), _sums(b, statistic)
    if one.shape[1:] != other.shape[1:] or len({len(one), len(other), 1}) > 2:
        raise ValueError(f"a and b must pair, got shapes {np.shape(a)} and {np.shape(b)}")
    return _interval([one, other], statistic or _mean, confidence, resamples, seed)


def bootstrap_interval(
    a: Any,
    *,
    statistic: Statistic | None = None,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """The mean (or ``statistic``) of ``a`` with its interval; arguments as in ``bootstrap_difference``."""
    return _interval([_sums(a, statistic)], statistic or _mean, confidence, resamples, seed)


def _sums(values: Any, statistic: Statistic | None) -> np.ndarray:
    """``[draws, texts, k]``: what a sum over texts is to be taken of."""
    array = np.asarray(values, dtype=np.float64)
    shape = array.shape
    if statistic is None:
        array = np.stack((array, np.ones_like(array)), axis=-1)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"expected values [texts] or [draws, texts], not empty, got shape {shape}")
    if not np.isfinite(array).all():
        raise ValueError("an interval needs finite values")
    return array


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _interval(
    sides: list[np.ndarray], statistic: Statistic, confidence: float, resamples: int, seed: int
) -> Interval:
    """The first side less the second, if there is one."""
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence must lie in (0, 1) and resamples be at least 1, got {confidence} and {resamples}"
        )
    draws, texts = max(map(len, sides)), sides[0].shape[1]
    generator = np.random.default_rng(seed)
    text_counts = generator.multinomial(texts, np.full(texts, 1 / texts), size=resamples)
    draw_weights = generator.multinomial(draws, np.full(draws, 1 / draws), size=resamples) / draws
    # The first row of weights takes every text and draw once: the estimate itself.
    text_counts = np.concatenate((np.ones((1, texts)), text_counts))
    draw_weights = np.concatenate((np.full((1, draws), 1 / draws), draw_weights))
    totals = []
    for side in sides:
        values = statistic(np.einsum("rt,dtk->rdk", text_counts, side, optimize=True))  # [resamples, draws]
        totals.append((np.broadcast_to(values, draw_weights.shape) * draw_weights).sum(1))
    difference = totals[0] - sum(totals[1:])
    tail = (1 - confidence) / 2
    low, high = np.quantile(difference[1:], (tail, 1 - tail))
    return Interval(float(difference[0]), float(low), float(high))
