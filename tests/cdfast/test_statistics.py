"""Intervals and tests, against scipy and against what is known."""

import numpy as np
import pytest
from scipy import stats

from cdfast.evaluation.statistics import (
    bootstrap_p,
    mcnemar_p,
    percentile_interval,
    resample,
    wilson_interval,
)


def mean(sums):
    return sums[..., 1] / sums[..., 0]


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (50, 100), (997, 1000)])
def test_wilson_is_that_of_scipy(right, n):
    want = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((want.low, want.high))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (700, 800)])
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(b, c):
    want = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_p(b, c) == pytest.approx(want, rel=1e-9)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(2, 3, 400)
    totals = np.stack([np.ones(400), values], axis=1)
    low, high = percentile_interval(resample(totals, mean))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)


def test_records_of_one_image_count_as_one_cluster():
    """Ten copies of each record: as clusters the interval stays, as records it would shrink."""
    values = np.random.default_rng(1).integers(0, 2, 60).astype(float)
    single = np.stack([np.ones(60), values], axis=1)
    copies = percentile_interval(resample(10 * single, mean))
    assert copies == pytest.approx(percentile_interval(resample(single, mean)))
    shrunk = percentile_interval(resample(np.repeat(single, 10, axis=0), mean))
    assert shrunk[1] - shrunk[0] < 0.5 * (copies[1] - copies[0])


def test_resamples_are_the_same_every_time_and_pair_models():
    totals = np.stack([np.ones(30), np.arange(30.0)], axis=1)
    drawn = resample(totals, mean)
    assert np.array_equal(drawn, resample(totals, mean))
    shifted = resample(totals + np.array([0, 1]), mean)
    np.testing.assert_allclose(shifted - drawn, 1)
    assert drawn.std() > 1


def test_bootstrap_p():
    assert bootstrap_p(np.full(1999, 0.3)) == pytest.approx(2 / 2000)
    assert bootstrap_p(np.zeros(1999)) == 1
    assert bootstrap_p(np.array([-1.0] * 50 + [1.0] * 949)) == pytest.approx(102 / 1000)
