"""Measures of text that a model wrote, kept as sums per text so that they pair and resample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sinkprune.evaluation.intervals import Interval, Statistic, bootstrap_difference, bootstrap_interval

ORDERS = 4  # of BLEU's n-grams
RESAMPLES = 2000
NOTHING = Interval(float("nan"), float("nan"), float("nan"))  # there was nothing to measure


@dataclass(frozen=True)
class Measure:
    """One measure of some texts.

    Attributes:
        per_text: float64 ``[texts, k]``, what is summed over texts; NaN where a text has nothing to measure.
        of_sums: turns the sums ``[..., k]`` into the measure ``[...]``.
    """

    per_text: np.ndarray
    of_sums: Statistic

    @property
    def value(self) -> float:
        """Over all texts that have something to measure; NaN where none has."""
        return self.interval(resamples=1).mean

    def interval(self, resamples: int = RESAMPLES) -> Interval:
        """The value with its 95 % bootstrap interval over texts."""
        present = self._present
        if not present.any():
            return NOTHING
        return bootstrap_interval(self.per_text[present], statistic=self.of_sums, resamples=resamples)

    def minus(self, other: Measure, resamples: int = RESAMPLES) -> Interval:
        """This minus ``other``, paired by text: of the texts in which both have something to measure."""
        if self.per_text.shape != other.per_text.shape:
            raise ValueError(
                f"measures of {len(self.per_text)} and {len(other.per_text)} texts do not pair: the same "
                "texts and options are needed"
            )
        both = self._present & other._present
        if not both.any():
            return NOTHING
        return bootstrap_difference(
            self.per_text[both], other.per_text[both], statistic=self.of_sums, resamples=resamples
        )

    @property
    def _present(self) -> np.ndarray:
        return ~np.isnan(self.per_text).any(1)


def mean(values: Sequence[float]) -> Measure:
    """The mean over texts; NaN stands for a text without a value."""
    array = np.asarray(values, dtype=np.float64)
    return Measure(np.stack((array, np.ones_like(array)), axis=-1), _ratio)


def perplexity(nats_per_token: Sequence[float]) -> Measure:
    """The exponential of the mean over texts of their nats per token."""
    return Measure(mean(nats_per_token).per_text, _exponential_of_ratio)


def bleu(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Corpus BLEU in 0…100, one reference a text, as sacrebleu computes it (13a tokens, exponential
    smoothing; Post 2018)."""
    rows = []
    for text, reference in zip(texts, references, strict=True):
        score = _sacrebleu().corpus_score([text], [[reference]])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return Measure(np.array(rows, dtype=np.float64), _bleu_of_sums)


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Mean ROUGE-L in 0…100: the F-measure of the longest common subsequence of words (Lin 2004).

    Words are runs of letters and digits in lower case, without stemming. Two texts without a word are equal.
    """
    return mean([100 * _rouge_l(_words(a), _words(b)) for a, b in zip(texts, references, strict=True)])


def distinct(texts: Sequence[str], n: int) -> Measure:
    """Mean share of a text's word n-grams that are different ones, in 0…1 (Li et al. 2016, per text, so that
    it does not depend on how many texts there are). A text of fewer than n words has none."""
    shares = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / len(grams) if grams else float("nan"))
    return mean(shares)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _exponential_of_ratio(sums: np.ndarray) -> np.ndarray:
    return np.exp(_ratio(sums))


@cache
def _sacrebleu() -> Any:
    """Raises ``ImportError`` naming the package to install."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install sacrebleu") from error
    return BLEU(max_ngram_order=ORDERS)


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU of counts, totals and the two lengths ``[..., 2 x ORDERS + 2]``: sacrebleu's own formula."""
    flat = sums.reshape(-1, sums.shape[-1]).round().astype(int).tolist()
    scores = [
        _sacrebleu().compute_bleu(row[:ORDERS], row[ORDERS:-2], row[-2], row[-1], smooth_method="exp").score
        for row in flat
    ]
    return np.array(scores).reshape(sums.shape[:-1])


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(text: list[str], reference: list[str]) -> float:
    if not text and not reference:
        return 1.0
    common = _longest_common_subsequence(text, reference)
    return 2 * common / (len(text) + len(reference))  # harmonic mean of common/|text| and common/|reference|


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    best = [0] * (len(b) + 1)  # best[j]: of what was read of a, and the first j of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]
