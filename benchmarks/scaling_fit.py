"""Exponents of measured curves, and where a fitted curve reaches a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST = 3
FARTHEST = 1000.0  # times the last measured size: beyond, a fit says nothing
# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom; the last also stands for
# more, which makes an interval a little wider than it has to be.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def fit(
    sizes: Sequence[float], values: Sequence[float | None], share: float = 0.5
) -> dict[str, Any] | None:
    """value = scale size^exponent, by least squares in logarithms over the largest sizes.

    There, fixed costs weigh least. The interval is from the residuals, so it tells how straight
    the curve is as well as how noisy.

    Args:
        sizes: positive, ascending.
        values: None or 0 where nothing was measured.
        share: of the measured sizes that is used, 3 at least.

    Returns:
        exponent, standard_error, the bounds `low` and `high` of its 95% interval, log_scale, the
        number of points, the first and last size; None for fewer than 3 measured points.
    """
    measured = [(s, v) for s, v in zip(sizes, values) if v]
    if len(measured) < FEWEST:
        return None
    count = max(FEWEST, math.ceil(share * len(measured)))
    used = measured[-count:]
    x, y = np.log(np.array(used, dtype=np.float64)).T
    spread = ((x - x.mean()) ** 2).sum()
    exponent = float(((x - x.mean()) * y).sum() / spread)
    log_scale = float(y.mean() - exponent * x.mean())
    residuals = y - (log_scale + exponent * x)
    freedom = count - 2
    error = math.sqrt(float((residuals**2).sum()) / freedom / spread)
    margin = STUDENT_T[min(freedom, len(STUDENT_T)) - 1] * error
    return {
        "exponent": exponent,
        "standard_error": error,
        "low": exponent - margin,
        "high": exponent + margin,
        "log_scale": log_scale,
        "points": count,
        "first": used[0][0],
        "last": used[-1][0],
    }


def value_at(fitted: dict[str, Any], size: float) -> float:
    return math.exp(fitted["log_scale"]) * size ** fitted["exponent"]


def through(fitted: dict[str, Any], exponent: float) -> dict[str, Any]:
    """The curve of another exponent that meets the fitted one at its last size."""
    shift = (fitted["exponent"] - exponent) * math.log(fitted["last"])
    return fitted | {"exponent": exponent, "log_scale": fitted["log_scale"] + shift}


def size_at(fitted: dict[str, Any], value: float) -> float | None:
    """The size at which the fitted curve reaches a value; None if it does so too far away."""
    at_most = fitted["last"] * FARTHEST
    if fitted["exponent"] <= 0 or value_at(fitted, at_most) < value:
        return None
    return math.exp((math.log(value) - fitted["log_scale"]) / fitted["exponent"])


def predicted(sizes: Sequence[float], values: Sequence[float | None], size: float) -> float | None:
    """The value at a size from the last two measured ones; None before there is one.

    After one, the exponent is 2, that of attention in the number of tokens.
    """
    measured = [(s, v) for s, v in zip(sizes, values) if v]
    if not measured:
        return None
    last, value = measured[-1]
    exponent = 2.0
    if len(measured) > 1:
        before, less = measured[-2]
        exponent = math.log(value / less) / math.log(last / before)
    return value * (size / last) ** exponent
