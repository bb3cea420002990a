"""Bootstrap intervals against scipy's, against resampling written out, and by how often they are right."""

import numpy as np
import pytest
import scipy.stats

from sinkprune.evaluation.intervals import Interval, bootstrap_difference, bootstrap_interval


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_the_interval_of_a_difference_is_scipys_paired_percentile_interval():
    a, b = normal(40) + 1, normal(40, seed=1)
    got = bootstrap_difference(a, b, resamples=20000)
    expected = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile", n_resamples=20000,
        rng=np.random.default_rng(5), vectorized=True,
    ).confidence_interval  # fmt: skip
    assert got.mean == pytest.approx((a - b).mean())
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_pairing_removes_what_both_sides_share():
    shared, noise = 100 * normal(30), normal(30, seed=1)
    low, high = bootstrap_difference(shared + 0.1 * noise + 1, shared)[1:]
    assert 0.9 < low < high < 1.1


def test_draws_and_texts_are_both_resampled():
    a, b = normal(6, 30) + 3 * normal(6, 1, seed=1) + normal(1, 30, seed=2), normal(30, seed=3)
    generator = np.random.default_rng(9)
    means = []
    for _ in range(4000):
        draws, texts = generator.integers(0, 6, 6), generator.integers(0, 30, 30)
        means.append(a[draws][:, texts].mean() - b[texts].mean())
    got = bootstrap_difference(a, b)
    assert got.mean == pytest.approx(a.mean() - b.mean())
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.2)
    assert bootstrap_difference(b, a).mean == pytest.approx(-got.mean)
    flat = bootstrap_difference(a.mean(0), b)
    assert flat.high - flat.low < got.high - got.low


def test_draws_of_both_sides_pair():
    b = 50 * normal(5, 1) + normal(5, 20, seed=1)
    got = bootstrap_difference(b + 1, b)
    assert got == pytest.approx((1, 1, 1))


def test_a_statistic_sees_the_sums_over_the_texts_drawn():
    ratio = np.random.default_rng(0).uniform(1, 2, size=(25, 2))
    got = bootstrap_interval(ratio, statistic=lambda sums: sums[..., 0] / sums[..., 1])
    generator = np.random.default_rng(9)
    picks = generator.integers(0, 25, (4000, 25))
    values = ratio[picks, 0].sum(1) / ratio[picks, 1].sum(1)
    assert got.mean == pytest.approx(ratio[:, 0].sum() / ratio[:, 1].sum())
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=0.01)


def test_it_covers_the_truth_about_as_often_as_it_says():
    covered = [bootstrap_interval(normal(40, seed=s), resamples=200) for s in range(400)]
    share = np.mean([low <= 0 <= high for _, low, high in covered])
    assert 0.9 < share < 0.98
    narrow = [bootstrap_interval(normal(40, seed=s), resamples=200, confidence=0.5) for s in range(400)]
    assert 0.42 < np.mean([low <= 0 <= high for _, low, high in narrow]) < 0.57


def test_a_seed_gives_one_interval():
    a, b = normal(10), normal(10, seed=1)
    assert bootstrap_difference(a, b) == bootstrap_difference(a, b)
    assert bootstrap_difference(a, b, seed=1) != bootstrap_difference(a, b)
    assert bootstrap_difference(a, a) == Interval(0, 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (normal(3), normal(4), r"must pair, got shapes \(3,\) and \(4,\)"),
        (normal(2, 5), normal(3, 5), r"must pair, got shapes \(2, 5\) and \(3, 5\)"),
        ([], [], r"not empty, got shape \(0,\)"),
        ([1.0, np.nan], [1.0, 2.0], "finite"),
        (normal(2, 2, 2, 2), normal(2), "expected values"),
    ],
)
def test_values_that_do_not_pair_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(a, b)


def test_a_confidence_beyond_one_is_refused():
    with pytest.raises(ValueError, match="confidence must lie"):
        bootstrap_interval([1.0, 2.0], confidence=95)
