"""From the numbers of every case to those of the analysis: means, groups, correlations, intervals.

Intervals are percentile bootstraps over units: cases of one unit (a question asked in two orders)
are drawn together, because they are no independent observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Cases = Sequence[Mapping[str, Any]]
RESAMPLES = 2000
# Fewer units than this say nothing about an interval.
_FEWEST_UNITS = 3
# Keeps the memory of drawing means below that of the cases.
_DRAWS_AT_ONCE = 100


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation coefficient; NaN where either does not vary or there are fewer than 3 pairs."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    a, b = x - x.mean(), y - y.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's coefficient of the ranks."""
    return pearson(ranks(x), ranks(y))


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    units: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> list[float] | None:
    """95% percentile interval of a statistic of cases, drawn unit by unit with replacement.

    Args:
        statistic: of the numbers of the drawn cases; a NaN is left out.
        units: of every case.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        [low, high]; None for fewer than 3 units, or where no draw had a value.
    """
    index = _by_unit(units)
    if len(index) < _FEWEST_UNITS:
        return None
    largest = max(map(len, index))
    # A row per unit, filled up with -1: faster than a list of arrays.
    members = np.array([cases + [-1] * (largest - len(cases)) for cases in index])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        cases = members[rng.integers(0, len(members), len(members))].ravel()
        drawn.append(statistic(cases[cases >= 0]))
    return _percentiles(np.array(drawn))


def bootstrap_mean(
    values: np.ndarray, units: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> list[float] | None:
    """`bootstrap` of the mean of `values`, many draws at once."""
    index = _by_unit(units)
    if len(index) < _FEWEST_UNITS:
        return None
    sums = np.array([values[cases].sum() for cases in index])
    counts = np.array([len(cases) for cases in index])
    rng = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, resamples, _DRAWS_AT_ONCE):
        number = min(_DRAWS_AT_ONCE, resamples - begin)
        chosen = rng.integers(0, len(index), (number, len(index)))
        drawn.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return _percentiles(np.concatenate(drawn))


def _by_unit(units: Sequence[str]) -> list[list[int]]:
    """The cases of each unit."""
    index: dict[str, list[int]] = {}
    for case, unit in enumerate(units):
        index.setdefault(unit, []).append(case)
    return list(index.values())


def _percentiles(drawn: np.ndarray) -> list[float] | None:
    values = drawn[np.isfinite(drawn)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None


def scopes(cases: Cases) -> dict[str, list[Mapping[str, Any]]]:
    """All cases, those of every group, and those of every kind, by name."""
    found: dict[str, list[Mapping[str, Any]]] = {"all": list(cases)}
    for case in cases:
        found.setdefault(case["group"], []).append(case)
    for case in cases:
        if case["kind"] != case["group"]:
            found.setdefault(case["kind"], []).append(case)
    return found


def summarise(cases: Cases, groups: int, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The first four experiments.

    Args:
        cases: from `analysis.measure`.
        groups: into how many groups of equal size cases are put by similarity.
        seed: of the intervals.
        resamples: of the intervals.

    Returns:
        `answer_attention`: scope -> model -> "visual" and "text", per layer. `similarity`: scope ->
        model -> "visual" and "text", per student layer. `groups`: scope -> see `similarity_groups`.
        `substitution`: scope -> see `substitution_effect`. `answers`: scope -> model -> mean
        probability and accuracy. `cases`: scope -> their number. `scopes`: the names of the groups
        and kinds among the scopes.
    """
    by_scope = scopes(cases)
    return {
        "scopes": {
            "groups": list(dict.fromkeys(case["group"] for case in cases)),
            "kinds": list(dict.fromkeys(case["kind"] for case in cases)),
        },
        "cases": {name: len(members) for name, members in by_scope.items()},
        "answers": {name: _answers(members) for name, members in by_scope.items()},
        "answer_attention": {n: _per_layer(m, "attention") for n, m in by_scope.items()},
        "similarity": {n: _per_layer(m, "similarity") for n, m in by_scope.items()},
        "groups": {n: similarity_groups(m, groups, seed, resamples) for n, m in by_scope.items()},
        "substitution": {n: substitution_effect(m, seed, resamples) for n, m in by_scope.items()},
    }


def _answers(cases: Cases) -> dict[str, dict[str, float]]:
    return {
        model: {
            "probability": _mean(c["answers"][model]["probability"] for c in cases),
            "accuracy": _mean(c["answers"][model]["right"] for c in cases),
        }
        for model in cases[0]["answers"]
    }


def _per_layer(cases: Cases, name: str) -> dict[str, dict[str, list[float]]]:
    return {
        model: {
            kind: [float(v) for v in np.mean([c[name][model][kind] for c in cases], axis=0)]
            for kind in ("visual", "text")
        }
        for model in cases[0][name]
    }


def similarity_groups(
    cases: Cases, groups: int, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Groups of cases by similarity of visual attention, against the student's answer probability.

    Cases are ordered by the student's mean visual similarity with the teacher over the matched
    layers, and cut into groups of (almost) equal size.

    Returns:
        `groups`: per group, in ascending order, its number of cases `n`, mean `similarity`, mean
        `probability`, `accuracy` and `ci95` of the probability; `pearson` and `spearman` over
        single cases, each with its `_ci95`; mean `similarity` with its `_ci95`; `n` cases and
        `units`.
    """
    similarity = np.array([c["matched"] for c in cases])
    answers = [c["answers"]["student"] for c in cases]
    probability = np.array([a["probability"] for a in answers])
    right = np.array([a["right"] for a in answers], float)
    units = [c["unit"] for c in cases]
    table = []
    for members in np.array_split(np.argsort(similarity, kind="stable"), min(groups, len(cases))):
        own = probability[members]
        table.append(
            {
                "n": len(members),
                "similarity": float(similarity[members].mean()),
                "probability": float(own.mean()),
                "accuracy": float(right[members].mean()),
                "ci95": bootstrap_mean(own, [units[i] for i in members], seed, resamples),
            }
        )
    result: dict[str, Any] = {"n": len(cases), "units": len(set(units)), "groups": table}
    result["similarity"] = float(similarity.mean())
    result["similarity_ci95"] = bootstrap_mean(similarity, units, seed, resamples)
    for name, coefficient in (("pearson", pearson), ("spearman", spearman)):
        result[name] = _finite(coefficient(similarity, probability))
        drawn = _of_pairs(coefficient, similarity, probability)
        result[f"{name}_ci95"] = bootstrap(drawn, units, seed, resamples)
    return result


def substitution_effect(cases: Cases, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Accuracy and answer probability of the student by weight of the teacher's attention.

    Returns:
        weight ("0": the student as it is) -> `accuracy`, `probability`, and for other weights the
        paired differences `accuracy_change` and `probability_change` with their `_ci95`; {} where
        nothing was substituted.
    """
    if not cases[0]["substitution"]:
        return {}
    units = [c["unit"] for c in cases]
    plain = [c["answers"]["student"] for c in cases]
    found: dict[str, Any] = {"0": _outcome(plain)}
    for weight in cases[0]["substitution"]:
        swapped = [c["substitution"][weight] for c in cases]
        found[weight] = _outcome(swapped)
        for name, key in (("accuracy", "right"), ("probability", "probability")):
            change = np.array([float(b[key]) - float(a[key]) for a, b in zip(plain, swapped)])
            found[weight][f"{name}_change"] = float(change.mean())
            found[weight][f"{name}_change_ci95"] = bootstrap_mean(change, units, seed, resamples)
    return found


def _outcome(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy": _mean(a["right"] for a in answers),
        "probability": _mean(a["probability"] for a in answers),
    }


def _of_pairs(
    coefficient: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray
) -> Callable[[np.ndarray], float]:
    return lambda chosen: coefficient(x[chosen], y[chosen])


def _mean(values: Any) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
