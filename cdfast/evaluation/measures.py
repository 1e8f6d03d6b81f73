"""From what a model said to the records of a task: metrics, intervals, and tests between models.

Every metric is a function of sums over records, so that its interval can be drawn by resampling
clusters of records (those with the same image, or pair of images). What a model said is scored
twice: "likelihood" (the most likely choice) and "generation" (what its free reply means).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdfast.evaluation.answers import parse_reply
from cdfast.evaluation.statistics import (
    bootstrap_p,
    mcnemar_p,
    percentile_interval,
    resample,
    wilson_interval,
)
from cdfast.evaluation.tasks import Task
from cdfast.miniature.suites import Item

MODES = ("likelihood", "generation")
# What a record adds, for each family. n: 1. All others are 0 to 1.
COLUMNS = {
    "choice": ("n", "right", "every_order"),
    "matching": ("n", "choice", "text", "image", "group"),
    "yes_no": ("n", "right", "tp", "fp", "fn", "said_yes"),
}
_SHARES = {"accuracy": "right", "both_orders": "every_order", "yes_ratio": "said_yes"}
METRICS = {
    "choice": ("accuracy", "both_orders"),
    "matching": ("choice", "text", "image", "group"),
    "yes_no": ("accuracy", "precision", "recall", "f1", "yes_ratio"),
    "delegated": ("score",),
}
# Metrics that are shares of records: Wilson's interval holds where the records are independent.
_WILSON = ("accuracy", "both_orders", "yes_ratio")
# Of scores drawn at random; of replies drawn at random, where an image takes four right answers.
_CHANCE = {
    "likelihood": {"choice": 1 / 2, "text": 1 / 4, "image": 1 / 4, "group": 1 / 6},
    "generation": {"choice": 1 / 2, "text": 1 / 4, "image": 1 / 16, "group": 1 / 64},
}

Said = Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """What the records of a task add to the sums.

    Args:
        task: the task.
        mode: "likelihood" or "generation".
        items: those that were scored.
        added: float64 (items, columns).
    """

    task: Task
    mode: str
    items: Sequence[Item]
    added: np.ndarray

    def totals(self, items: Sequence[int], subsets: Sequence[str] | None) -> np.ndarray:
        """Sums over each cluster of the items: float64 (clusters, subsets or 1, columns)."""
        number: dict[str, int] = {}
        for i in items:
            number.setdefault(self.items[i].cluster, len(number))
        out = np.zeros((len(number), len(subsets or [0]), self.added.shape[1]))
        for i in items:
            item = self.items[i]
            for s, subset in enumerate(subsets or item.subsets[:1]):
                if subset in item.subsets:
                    out[number[item.cluster], s] += self.added[i]
        return out


def score(
    task: Task, items: Sequence[Item], said: Mapping[str, Said], mode: str, normalise: bool
) -> Scored:
    """Score the items that a model has answered.

    Args:
        task: the task.
        items: its records.
        said: for each item's id the lines of a results file (see `cdfast.evaluation.run`).
        mode: "likelihood" or "generation".
        normalise: divide a choice's log-likelihood by its number of tokens.
    """
    answered = [item for item in items if item.id in said]
    record = {"choice": _choice, "matching": _matching, "yes_no": _yes_no}[task.family]
    added = [record(item, said[item.id], mode, normalise) for item in answered]
    width = len(COLUMNS[task.family])
    return Scored(task, mode, answered, np.array(added, dtype=np.float64).reshape(-1, width))


def scores_of(said: Said, normalise: bool) -> list[list[float]]:
    """Of every question the scores of its choices; NaN where the model gave none."""
    return [
        [
            math.nan if value is None else value / (length if normalise else 1)
            for value, length in zip(logs, tokens)
        ]
        for logs, tokens in zip(said["log_likelihood"], said["tokens"])
    ]


def chosen(item: Item, said: Said, mode: str, normalise: bool) -> list[int | None]:
    """Of every question the index of the choice taken; None: NaN, or a reply that means none."""
    if mode == "generation":
        return [
            parse_reply(reply, question.choices, question.options)
            for question, reply in zip(item.questions, said["replies"])
        ]
    return [
        None if any(map(math.isnan, row)) else row.index(max(row))
        for row in scores_of(said, normalise)
    ]


def _right(item: Item, said: Said, mode: str, normalise: bool) -> list[bool]:
    return [
        index is not None and question.choices[index] == question.answer
        for question, index in zip(item.questions, chosen(item, said, mode, normalise))
    ]


def _choice(item: Item, said: Said, mode: str, normalise: bool) -> list[float]:
    right = _right(item, said, mode, normalise)
    return [1, sum(right) / len(right), all(right)]


def _matching(item: Item, said: Said, mode: str, normalise: bool) -> list[float]:
    """Winoground's scores; the order of the questions is that of caption_tasks._matching."""
    right = _right(item, said, mode, normalise)
    choice = sum(right[:4]) / 4
    if mode == "generation":
        # A reply is yes or no: an image is found if the caption is said to fit it and not the
        # other one. Captions are compared by letters, in each of the two orders.
        image = all(right[4:])
        texts = [right[order] and right[2 + order] for order in (0, 1)]
        return [1, choice, sum(texts) / 2, image, sum(t and image for t in texts) / 2]
    yes, no = (item.questions[4].choices.index(word) for word in ("Yes", "No"))
    s00, s01, s10, s11 = (row[yes] - row[no] for row in scores_of(said, normalise)[4:])
    # s[i][j] is of image i and caption j. Comparisons with NaN are false.
    text = s00 > s01 and s11 > s10
    image = s00 > s10 and s11 > s01
    return [1, choice, text, image, text and image]


def _yes_no(item: Item, said: Said, mode: str, normalise: bool) -> list[float]:
    [question] = item.questions
    [right] = _right(item, said, mode, normalise)
    [index] = chosen(item, said, mode, normalise)
    positive = question.answer == "Yes"
    # An answer that means neither counts as the wrong one.
    return [
        1,
        right,
        positive and right,
        not positive and not right,
        positive and not right,
        index is not None and question.choices[index] == "Yes",
    ]


def _metric(family: str, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """From sums (..., columns) to a metric (...); 0 where it has nothing to divide by."""
    column = {c: i for i, c in enumerate(COLUMNS[family])}

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def share(sums: np.ndarray) -> np.ndarray:
        return ratio(sums[..., column[_SHARES.get(name, name)]], sums[..., column["n"]])

    def f_score(sums: np.ndarray) -> np.ndarray:
        tp, fp, fn = (sums[..., column[c]] for c in ("tp", "fp", "fn"))
        if name == "f1":
            return ratio(2 * tp, 2 * tp + fp + fn)
        return ratio(tp, tp + (fp if name == "precision" else fn))

    return f_score if name in ("precision", "recall", "f1") else share


def _statistic(family: str, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """From sums (..., subsets, columns) to the metric's mean over the subsets (...)."""
    metric = _metric(family, name)
    return lambda sums: metric(sums).mean(-1)


def measure(scored: Scored) -> dict[str, Any]:
    """Every metric of a task with its 95% interval, overall and for each subset.

    Returns:
        `n` (records), `clusters`, `metrics`: name -> `value`, `ci95`, `interval` ("wilson" or
        "bootstrap") and `chance` (None where there is none to state), `subsets`: name -> `n` and
        `metrics`.
    """
    subsets = list(dict.fromkeys(s for item in scored.items for s in item.subsets))
    everything = range(len(scored.items))
    result = _measure(scored, everything, subsets if scored.task.over_subsets else None)
    result["subsets"] = {}
    for subset in subsets if len(subsets) > 1 else ():
        members = [i for i in everything if subset in scored.items[i].subsets]
        result["subsets"][subset] = _measure(scored, members, [subset])
    return result


def _measure(scored: Scored, items: Sequence[int], subsets: Sequence[str] | None) -> dict[str, Any]:
    totals = scored.totals(items, subsets)
    independent = len(totals) == len(items) and len(subsets or [0]) == 1
    metrics = {}
    for name in METRICS[scored.task.family]:
        statistic = _statistic(scored.task.family, name)
        value = float(statistic(totals.sum(0)))
        wilson = name in _WILSON and independent
        if wilson:
            interval = wilson_interval(value, len(items))
        else:
            interval = percentile_interval(resample(totals, statistic))
        metrics[name] = {
            "value": value,
            "ci95": list(interval),
            "interval": "wilson" if wilson else "bootstrap",
            "chance": _chance(scored, items, name),
        }
    return {"n": len(items), "clusters": len(totals), "metrics": metrics}


def _chance(scored: Scored, items: Sequence[int], name: str) -> float | None:
    if name in _CHANCE[scored.mode]:
        return _CHANCE[scored.mode][name]
    if name not in ("accuracy", "both_orders"):
        return None
    shares = [[1 / len(q.choices) for q in scored.items[i].questions] for i in items]
    each = [math.prod(s) if name == "both_orders" else sum(s) / len(s) for s in shares]
    return sum(each) / len(each)


def unparsed(scored: Scored, said: Mapping[str, Said]) -> dict[str, int]:
    """How many replies of a task mean none of the choices, and of how many."""
    counts = Counter(
        index is None
        for item in scored.items
        for index in chosen(item, said[item.id], "generation", False)
    )
    return {"unparsed": counts[True], "replies": counts.total()}


def compare(first: Scored, second: Scored) -> dict[str, Any] | None:
    """Whether the second model's headline metric differs from the first one's.

    Only records that both have answered count.

    Returns:
        `metric`, `n` (shared records), `difference` (second minus first), its `ci95` by a paired
        bootstrap over clusters, `p` (two-sided) and `test`; None without shared records.
    """
    task = first.task
    place = {item.id: i for i, item in enumerate(second.items)}
    shared = [i for i, item in enumerate(first.items) if item.id in place]
    if not shared:
        return None
    items = [first.items[i] for i in shared]
    a = Scored(task, first.mode, items, first.added[shared])
    b = Scored(task, first.mode, items, second.added[[place[item.id] for item in items]])
    subsets = None
    if task.over_subsets:
        subsets = list(dict.fromkeys(s for item in items for s in item.subsets))
    statistic = _statistic(task.family, task.headline)
    ids = range(len(items))
    totals = np.stack([a.totals(ids, subsets), b.totals(ids, subsets)], axis=1)

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[..., 1, :, :]) - statistic(sums[..., 0, :, :])

    drawn = resample(totals, difference)
    result = {
        "metric": task.headline,
        "n": len(items),
        "difference": float(difference(totals.sum(0))),
        "ci95": list(percentile_interval(drawn)),
    }
    if task.family != "choice":
        return {**result, "p": bootstrap_p(drawn), "test": "paired bootstrap"}
    right = COLUMNS["choice"].index("every_order")
    one, other = a.added[:, right] > 0, b.added[:, right] > 0
    p = mcnemar_p(int((one & ~other).sum()), int((~one & other).sum()))
    return {**result, "p": p, "test": "exact McNemar, right in every order"}
