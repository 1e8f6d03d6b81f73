"""Metrics of every family from answers that are known, their intervals, and tests of models."""

import math
from dataclasses import replace

import numpy as np
import pytest

from cdfast.evaluation.caption_tasks import _matching, _which
from cdfast.evaluation.files import LeftOut
from cdfast.evaluation.measures import compare, measure, score, unparsed
from cdfast.evaluation.statistics import mcnemar_p, wilson_interval
from cdfast.evaluation.tasks import TASKS, load_items
from cdfast.miniature.suites import Item
from tests.cdfast.test_evaluation_tasks import FILES

UNCLEAR = "hm"


def pairs(number, subsets=("swap_obj",), images=None):
    """Caption pairs asked in both orders; `images`: how many they are spread over."""
    return [
        Item(
            str(n),
            (subsets[n % len(subsets)],),
            str(n % (images or number)),
            _which(None, "right", "wrong"),
            "s",
        )
        for n in range(number)
    ]


def matchings(number):
    questions = _matching((None, None), ("one", "two"), "s")
    return [Item(str(n), ("all",), str(n), questions, "s") for n in range(number)]


def answered(items, right):
    """Answers that are right or wrong as told: one list of booleans for each item."""
    said = {}
    for item, row in zip(items, right):
        given = [
            question.answer if good else next(c for c in question.choices if c != question.answer)
            for question, good in zip(item.questions, row)
        ]
        said[item.id] = {
            "log_likelihood": [
                [-1.0 if choice == one else -2.0 for choice in question.choices]
                for question, one in zip(item.questions, given)
            ],
            "tokens": [[1] * len(question.choices) for question in item.questions],
            "replies": given,
        }
    return said


def values(task, items, said, mode="likelihood", normalise=False):
    measured = measure(score(TASKS[task], items, said, mode, normalise))
    return {name: metric["value"] for name, metric in measured["metrics"].items()}


@pytest.mark.parametrize("mode", ["likelihood", "generation"])
def test_choice_averages_orders(mode):
    items = pairs(4)
    said = answered(items, [(True, True), (True, False), (False, True), (False, False)])
    measured = measure(score(TASKS["sade"], items, said, mode, False))
    accuracy, both = (measured["metrics"][name] for name in ("accuracy", "both_orders"))
    assert (accuracy["value"], accuracy["chance"]) == (0.5, 0.5)
    assert (both["value"], both["chance"]) == (0.25, 0.25)
    assert accuracy["interval"] == both["interval"] == "wilson"
    assert both["ci95"] == list(wilson_interval(0.25, 4))


def test_mean_over_subsets_is_not_the_mean_over_records():
    items = pairs(3, subsets=("a", "b")) + [
        Item(str(n), ("b",), str(n), _which(None, "r", "w"), "s") for n in range(3, 9)
    ]
    said = answered(items, [(item.subsets == ("a",),) * 2 for item in items])
    assert values("sugarcrepe", items, said)["accuracy"] == 0.5
    assert values("sade", items, said)["accuracy"] == pytest.approx(2 / 9)
    measured = measure(score(TASKS["sugarcrepe"], items, said, "likelihood", False))
    assert {name: s["n"] for name, s in measured["subsets"].items()} == {"a": 2, "b": 7}
    assert measured["subsets"]["a"]["metrics"]["accuracy"]["value"] == 1
    assert measured["metrics"]["accuracy"]["interval"] == "bootstrap"


def test_records_of_one_image_get_a_bootstrap_interval():
    items = pairs(40, images=4)
    said = answered(items, [(int(item.cluster) < 2,) * 2 for item in items])
    measured = measure(score(TASKS["sade"], items, said, "likelihood", False))
    assert (measured["n"], measured["clusters"]) == (40, 4)
    accuracy = measured["metrics"]["accuracy"]
    assert accuracy["interval"] == "bootstrap"
    # Wilson's would be 0.35 to 0.65.
    assert accuracy["ci95"] == pytest.approx([0, 1], abs=0.01)


# s[i][j] of image i and caption j, and the text, image and group score.
MATRICES = [
    (((1, 0), (0, 1)), (1, 1, 1)),
    (((1, 0), (2, 3)), (1, 0, 0)),
    (((1, 2), (0, 3)), (0, 1, 0)),
    (((0, 1), (1, 0)), (0, 0, 0)),
    (((1, 1), (1, 1)), (0, 0, 0)),
    (((math.nan, 0), (0, 1)), (0, 0, 0)),
]


@pytest.mark.parametrize(("matrix", "wanted"), MATRICES)
def test_matching_by_likelihood_is_winogrounds_definition(matrix, wanted):
    items = matchings(1)
    said = answered(items, [[True] * 8])
    rows = said["0"]["log_likelihood"]
    for n, s in enumerate(v for row in matrix for v in row):
        # Yes and No; only their difference counts.
        rows[4 + n] = [None, None] if math.isnan(s) else [s - 5.0, -5.0]
    found = values("winoground", items, said)
    assert (found["text"], found["image"], found["group"]) == wanted
    assert found["choice"] == 1


@pytest.mark.parametrize(
    ("right", "wanted"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 1], (1, 1, 1, 1)),
        ([1, 0, 1, 0, 1, 1, 1, 1], (0.5, 0.5, 1, 0.5)),
        ([1, 0, 0, 1, 1, 1, 1, 1], (0.5, 0, 1, 0)),
        ([1, 1, 1, 1, 1, 1, 1, 0], (1, 1, 0, 0)),
    ],
)
def test_matching_by_generation(right, wanted):
    items = matchings(1)
    found = values("bivlc", items, answered(items, [map(bool, right)]), "generation")
    assert tuple(found[name] for name in ("choice", "text", "image", "group")) == wanted


def yes_no(number):
    [first, *_] = load_items(TASKS["reefknot"], FILES, LeftOut())
    [question] = first.questions
    return [
        Item(
            str(n),
            ("perception",),
            str(n),
            (replace(question, answer=("Yes", "No")[n % 2]),),
            "s",
        )
        for n in range(number)
    ]


def test_f1_of_known_counts():
    """6 positive, 6 negative; 4 true positives, 2 false negatives, 1 false positive."""
    items = yes_no(12)
    wrong = {0, 2, 1}
    said = answered(items, [[n not in wrong] for n in range(12)])
    for mode in ("likelihood", "generation"):
        found = values("reefknot", items, said, mode)
        assert found["precision"] == pytest.approx(4 / 5)
        assert found["recall"] == pytest.approx(4 / 6)
        assert found["f1"] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
        assert found["accuracy"] == pytest.approx(9 / 12)
        assert found["yes_ratio"] == pytest.approx(5 / 12)


def test_unclear_replies_are_wrong_and_counted():
    items = yes_no(4)
    said = answered(items, [[True]] * 4)
    said["0"]["replies"] = said["1"]["replies"] = [UNCLEAR]
    found = values("reefknot", items, said, "generation")
    assert found["accuracy"] == 0.5
    # One is a false negative, the other a false positive; neither said yes.
    assert found["f1"] == pytest.approx(0.5)
    assert found["yes_ratio"] == 0.25
    scored = score(TASKS["reefknot"], items, said, "generation", False)
    assert unparsed(scored, said) == {"unparsed": 2, "replies": 4}


def test_f1_is_averaged_over_the_subsets_of_rbench():
    items = load_items(TASKS["rbench"], FILES, LeftOut())
    said = answered(items, [[int(item.id) % 3 != 0] for item in items])
    each = []
    for subset in {s for item in items for s in item.subsets}:
        members = [item for item in items if subset in item.subsets]
        each.append(values("reefknot", members, said)["f1"])
    assert len(each) == 5
    assert len(set(each)) > 1
    assert values("rbench", items, said)["f1"] == pytest.approx(np.mean(each))


def test_length_normalisation_divides_by_tokens():
    items = pairs(1)
    said = answered(items, [(True, True)])
    said["0"]["log_likelihood"] = [[-3.0, -2.0], [-2.0, -3.0]]
    said["0"]["tokens"] = [[3, 1], [1, 3]]
    assert values("sade", items, said)["accuracy"] == 0
    assert values("sade", items, said, normalise=True)["accuracy"] == 1


def test_nan_is_wrong():
    items = pairs(2)
    said = answered(items, [(True, True)] * 2)
    said["1"]["log_likelihood"][0][0] = None
    assert values("sade", items, said)["accuracy"] == 0.75


def test_models_are_compared_on_the_records_both_answered():
    items = pairs(40)
    task = TASKS["sade"]
    first = answered(items, [(n % 2 == 0,) * 2 for n in range(40)])
    second = answered(items, [(n % 2 == 0 or n < 20,) * 2 for n in range(40)])
    del second["39"]
    a, b = (score(task, items, said, "likelihood", False) for said in (first, second))
    test = compare(a, b)
    assert test["n"] == 39
    assert test["difference"] == pytest.approx(10 / 39)
    assert test["p"] == mcnemar_p(0, 10)
    assert test["test"].startswith("exact McNemar")
    assert test["ci95"][0] > 0.1
    same = compare(a, a)
    assert (same["difference"], same["p"], same["ci95"]) == (0, 1, [0, 0])
    assert compare(a, score(task, items, {}, "likelihood", False)) is None


def test_f1_and_matching_are_compared_by_a_paired_bootstrap():
    items = yes_no(60)
    good = answered(items, [[n % 10 != 0] for n in range(60)])
    bad = answered(items, [[n % 3 != 0] for n in range(60)])
    a, b = (score(TASKS["reefknot"], items, said, "generation", False) for said in (good, bad))
    test = compare(a, b)
    assert test["test"] == "paired bootstrap"
    assert test["p"] < 0.01
    assert test["ci95"][0] < test["difference"] < test["ci95"][1] < 0
    other = compare(b, a)
    assert other["difference"] == pytest.approx(-test["difference"])
    items = matchings(30)
    halves = [answered(items, [[n % 2 == k] * 8 for n in range(30)]) for k in (0, 1)]
    a, b = (score(TASKS["winoground"], items, said, "likelihood", False) for said in halves)
    assert compare(a, b)["p"] > 0.5
