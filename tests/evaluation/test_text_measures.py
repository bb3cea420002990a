"""Measures of text against sacrebleu on whole corpora, a recursive subsequence, and counting by hand."""

import math
from functools import cache

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from sinkprune.evaluation.text_measures import bleu, distinct, mean, perplexity, rouge_l

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw,", "with", "one", "eye,", "the", "dog's", "bone"]


def corpus(seed, texts=12, change=0.3):
    """References, and texts that differ from them in a share of their words."""
    g = np.random.default_rng(seed)
    references = [list(g.choice(WORDS, g.integers(5, 15))) for _ in range(texts)]
    changed = [[w if g.random() > change else g.choice(WORDS) for w in row] for row in references]
    return [" ".join(row) for row in changed], [" ".join(row) for row in references]


def test_bleu_is_sacrebleus_of_the_corpus():
    for seed, change in ((0, 0.3), (1, 0.9), (2, 0.0)):
        texts, references = corpus(seed, change=change)
        expected = BLEU().corpus_score(texts, [references]).score
        assert bleu(texts, references).value == pytest.approx(expected)
    assert bleu(["", "a"], ["the cat", "sat on"]).value == 0


def test_the_interval_of_a_bleu_difference_resamples_the_corpus():
    (good, references), (poor, _) = corpus(0), corpus(0, change=0.6)
    got = bleu(poor, references).minus(bleu(good, references))
    g = np.random.default_rng(5)
    differences = []
    for _ in range(150):
        pick = g.integers(0, 12, 12)
        refs = [[references[i] for i in pick]]
        one, other = (BLEU().corpus_score([side[i] for i in pick], refs).score for side in (poor, good))
        differences.append(one - other)
    assert got.mean == pytest.approx(
        BLEU().corpus_score(poor, [references]).score - BLEU().corpus_score(good, [references]).score
    )
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), abs=6)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    @cache
    def common(a, b):
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return common(a[:-1], b[:-1]) + 1
        return max(common(a[:-1], b), common(a, b[:-1]))

    g = np.random.default_rng(0)
    for _ in range(20):
        a, b = (tuple(g.choice(list("abcd"), g.integers(1, 9))) for _ in range(2))
        recall, precision = common(a, b) / len(b), common(a, b) / len(a)
        expected = 0 if recall == 0 else 2 * recall * precision / (recall + precision)
        assert rouge_l([" ".join(a)], [" ".join(b)]).value == pytest.approx(100 * expected)
    assert rouge_l(["police killed the gunman"], ["The gunman killed: police!"]).value == 50.0
    assert rouge_l(["", "a", ""], ["", "", "a"]).value == pytest.approx(100 / 3)


def test_distinct_n_counts_a_texts_different_n_grams():
    assert distinct(["a b a b"], 1).value == 0.5
    assert distinct(["a b a b"], 2).value == pytest.approx(2 / 3)
    assert distinct(["a a a a", "a b c d"], 1).value == pytest.approx((0.25 + 1) / 2)
    assert math.isnan(distinct(["a", ""], 2).value)


def test_perplexity_is_the_exponential_of_the_mean():
    assert perplexity([math.log(4), math.log(16)]).value == pytest.approx(8)


def test_texts_without_a_value_on_either_side_do_not_pair():
    nan = math.nan
    one, other = mean([1.0, nan, 3.0, 9.0]), mean([0.0, 5.0, 1.0, nan])
    assert one.minus(other).mean == pytest.approx((1 + 2) / 2)
    assert all(map(math.isnan, mean([1.0, nan]).minus(mean([nan, 1.0]))))
    with pytest.raises(ValueError, match="4 and 2 texts do not pair"):
        one.minus(mean([1.0, 2.0]))
