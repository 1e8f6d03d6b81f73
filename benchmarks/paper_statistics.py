"""Means, spreads and paired differences over seeds, with Student's t in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95


def student_t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t.

    The finite sums in theta = atan(t / sqrt(freedom)), one for odd and one for even degrees of
    freedom.

    Args:
        t: at least 0.
        freedom: degrees of freedom, at least 1.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if freedom < 1 or t < 0:
        raise ValueError(f"expected t >= 0 and freedom >= 1; got t {t}, freedom {freedom}.")
    theta = math.atan(t / math.sqrt(freedom))
    cosine2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    # Terms with cos^(k), k of the parity of freedom - 2, up to freedom - 2.
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def student_t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| < t) = confidence, by bisection to the last digits of a float."""
    low, high = 0.0, 1.0
    while student_t_within(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if student_t_within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and the 95% t interval of the mean; None where n is less
    than they need."""
    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    mean = math.fsum(values) / n
    if n == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None}
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = student_t_quantile(n - 1) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, Any]:
    """`summary` of the differences value - reference over the seeds that both have.

    Args:
        values, reference: seed -> number.
    """
    return summary([values[seed] - reference[seed] for seed in sorted(values.keys() & reference)])
