"""Intervals and tests for evaluation: Wilson, bootstrap by cluster, exact McNemar."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

NORMAL_95 = 1.959963984540054
RESAMPLES = 2000
_SEED = 20251012
# Resamples drawn at a time: 100 x 20,000 clusters are 16 MB.
_AT_A_TIME = 100


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share observed in n trials."""
    z2 = NORMAL_95**2
    centre = share + z2 / (2 * n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def resample(
    totals: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES
) -> np.ndarray:
    """A statistic of totals over clusters drawn with replacement.

    Args:
        totals: (clusters, ...), what each cluster adds.
        statistic: from totals (n, ...) to values (n,).
        resamples: how many; the seed is fixed, so equal clusters give equal draws, which is what
            pairs the resamples of two models.

    Returns:
        float64 (resamples,).
    """
    n = len(totals)
    flat = totals.reshape(n, -1).astype(np.float64)
    rng = np.random.default_rng(_SEED)
    values = []
    for start in range(0, resamples, _AT_A_TIME):
        number = min(_AT_A_TIME, resamples - start)
        drawn = rng.integers(0, n, (number, n))
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
        values.append(statistic((weights @ flat).reshape(number, *totals.shape[1:])))
    return np.concatenate(values)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p of "no difference", from resampled differences; at least 2 / (resamples + 1)."""
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (1 + float(tail)) / (1 + len(differences)))


def mcnemar_p(first_only: int, second_only: int) -> float:
    """Two-sided exact McNemar p: of n = b + c discordant pairs, b ~ Binomial(n, 1/2).

    Args:
        first_only, second_only: pairs that only the first, or only the second, has right.
    """
    n, k = first_only + second_only, min(first_only, second_only)
    # Logarithms: 2**n overflows a float from n = 1024 on.
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
