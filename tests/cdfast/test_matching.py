"""Layer ranges and matchings against restatements of their definitions."""

import itertools
import random
from fractions import Fraction

import pytest

from cdfast import VisualAttentionAligner
from cdfast.matching import (
    LAYER_RANGES,
    layers_in_range,
    match_adaptive,
    match_group,
    match_official,
    match_simple,
)
from tests.cdfast.tiny_models import tiny_llava, tiny_teacher

LOW, HIGH = Fraction(3, 10), Fraction(7, 10)
INSIDE = {
    "early": lambda depth: depth < LOW,
    "intermediate": lambda depth: LOW <= depth <= HIGH,
    "later": lambda depth: depth > HIGH,
    "all": lambda depth: True,
}
# (k, m): as many, more and fewer teacher layers, and single ones.
SIZES = [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (10, 16), (7, 3), (6, 4), (9, 8), (2, 3)]
# Layers need not start at 0 nor be neighbours.
STUDENT = [3 + 2 * i for i in range(12)]
TEACHER = [7 + 3 * i for i in range(20)]


@pytest.fixture(scope="module")
def models_24_40():
    sizes = {"hidden": 8, "heads": 2, "kv_heads": 2}
    return tiny_teacher(layers=40, **sizes), tiny_llava(layers=24, **sizes)


@pytest.mark.parametrize("layers", LAYER_RANGES)
def test_ranges_follow_the_definition_at_every_depth(layers):
    for depth in range(1, 61):
        relative = [Fraction(2 * i + 1, 2 * depth) for i in range(depth)]
        want = [i for i, r in enumerate(relative) if INSIDE[layers](r)]
        if want:
            assert layers_in_range(depth, layers) == want, depth
        else:
            with pytest.raises(ValueError, match=f"{depth} layers has none in the range"):
                layers_in_range(depth, layers)


def test_bounds_belong_to_the_intermediate_range():
    # (1 + 0.5)/5 and (3 + 0.5)/5 are 0.3 and 0.7; in floating point 1.5/5 < 0.3 would be possible.
    assert layers_in_range(5, "early") == [0]
    assert layers_in_range(5, "intermediate") == [1, 2, 3]
    assert layers_in_range(5, "later") == [4]


def test_the_three_ranges_divide_the_model():
    for depth in range(4, 61):
        names = ("early", "intermediate", "later")
        parts = [i for name in names for i in layers_in_range(depth, name)]
        assert parts == layers_in_range(depth, "all") == list(range(depth))


def test_unknown_range_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"layers: .*early, intermediate.*got 'middle'"):
        layers_in_range(24, "middle")


@pytest.mark.parametrize("k, m", SIZES)
def test_group_windows(k, m):
    student, teacher = STUDENT[:k], TEACHER[:m]
    matches = match_group(student, teacher)
    assert list(matches) == student
    windows = list(matches.values())
    if m >= k:
        assert windows == [tuple(teacher[j + i] for i in range(m - k + 1)) for j in range(k)]
        assert windows[0][0] == teacher[0]
        assert windows[-1][-1] == teacher[-1]
    else:
        assert windows == [(teacher[int(Fraction(j * m, k))],) for j in range(k)]
        assert {w[0] for w in windows} == set(teacher)


def test_group_in_the_papers_case():
    """24 student and 40 teacher layers: layers 7..16 and 12..27, so ten windows of seven."""
    student, teacher = layers_in_range(24, "intermediate"), layers_in_range(40, "intermediate")
    assert student == list(range(7, 17))
    assert teacher == list(range(12, 28))
    want = {s: tuple(range(s + 5, s + 12)) for s in range(7, 17)}
    assert match_group(student, teacher) == want


@pytest.mark.parametrize("k, m", SIZES)
def test_simple_is_uniform_one_to_one(k, m):
    student, teacher = STUDENT[:k], TEACHER[:m]
    matches = match_simple(student, teacher)
    assert list(matches) == student
    assert all(len(window) == 1 for window in matches.values())
    chosen = [teacher.index(window[0]) for window in matches.values()]
    exact = [Fraction(j * (m - 1), max(k - 1, 1)) for j in range(k)]
    assert chosen == [round(e) for e in exact]
    assert all(abs(c - e) <= Fraction(1, 2) for c, e in zip(chosen, exact))
    assert chosen[0] == 0
    assert k == 1 or chosen[-1] == m - 1


def best_monotone(similarity):
    """Every non-decreasing assignment tried; of equals, the earliest from the last layer up."""
    k, m = len(similarity), len(similarity[0])
    paths = list(itertools.combinations_with_replacement(range(m), k))
    total = {p: sum(row[i] for row, i in zip(similarity, p)) for p in paths}
    best = max(total.values())
    return min((p for p in paths if total[p] == best), key=lambda p: p[::-1])


@pytest.mark.parametrize("k, m", [(1, 1), (1, 6), (6, 1), (4, 4), (3, 7), (5, 3), (4, 8)])
@pytest.mark.parametrize("values", [3, 10_000], ids=["many-ties", "few-ties"])
def test_adaptive_is_the_best_monotone_assignment(k, m, values):
    # Whole numbers: sums are exact, so that ties are ties.
    generator = random.Random(100 * k + m)
    for _ in range(40):
        similarity = [[generator.randrange(values) for _ in range(m)] for _ in range(k)]
        got = match_adaptive(STUDENT[:k], TEACHER[:m], similarity)
        want = best_monotone(similarity)
        assert got == {s: (TEACHER[t],) for s, t in zip(STUDENT, want)}


def test_adaptive_takes_the_most_similar_layer_where_that_is_monotone():
    similarity = [[0.9, 0.1, 0.0], [0.2, 0.3, 0.8], [0.1, 0.2, 0.7]]
    assert match_adaptive([4, 5, 6], [10, 11, 12], similarity) == {4: (10,), 5: (12,), 6: (12,)}


def test_adaptive_never_goes_back():
    similarity = [[0.0, 0.0, 1.0], [0.9, 0.5, 0.0]]
    assert match_adaptive([0, 1], [0, 1, 2], similarity) == {0: (2,), 1: (2,)}


@pytest.mark.parametrize(
    "similarity", [[[0.1, 0.2]], [[0.1], [0.2]], [[0.1, 0.2], [0.3]]], ids=["row", "column", "rag"]
)
def test_adaptive_refuses_a_matrix_of_another_shape(similarity):
    with pytest.raises(ValueError, match="similarity: expected 2 rows of 2 values"):
        match_adaptive([0, 1], [0, 1], similarity)


@pytest.mark.parametrize(
    "teacher, starts, length", [(40, 13, 5), (28, 9, 3), (32, 11, 3), (24, 8, 2)]
)
def test_official_table(teacher, starts, length):
    matches = match_official(24, teacher)
    assert list(matches) == [8, 9, 10, 11, 12, 13, 14]
    for j, window in enumerate(matches.values()):
        assert window == tuple(starts + j + i for i in range(length))


def test_official_table_holds_no_other_depths():
    known = {(24, 40), (24, 28), (24, 32), (24, 24)}
    pairs = set(itertools.product(range(1, 61), repeat=2))
    assert {p for p in pairs if match_official(*p) is not None} == known


@pytest.mark.parametrize(
    "options, first, last",
    [
        ({"preset": "paper"}, (7, range(12, 19)), (16, range(21, 28))),
        ({"preset": "official"}, (8, range(13, 18)), (14, range(19, 24))),
        # Naming the layers or the matching replaces the authors' table.
        ({"preset": "official", "layers": "intermediate"}, (7, range(12, 19)), (16, range(21, 28))),
        ({"preset": "official", "matching": "simple"}, (7, [12]), (16, [27])),
        ({"preset": "paper", "layers": "early"}, (0, range(6)), (6, range(6, 12))),
        ({"preset": "paper", "layers": "later"}, (17, range(28, 34)), (23, range(34, 40))),
        ({"preset": "paper", "layers": "all"}, (0, range(17)), (23, range(23, 40))),
    ],
    ids=["paper", "official", "official-layers", "official-simple", "early", "later", "all"],
)
def test_aligner_in_the_papers_case(options, first, last, models_24_40):
    matches = VisualAttentionAligner(*models_24_40, **options).matches
    layers = list(matches)
    assert layers == list(range(first[0], last[0] + 1))
    assert matches[first[0]] == tuple(first[1])
    assert matches[last[0]] == tuple(last[1])


def test_official_without_a_table_entry_is_intermediate_group():
    teacher, student = tiny_teacher(layers=12), tiny_llava(layers=10)
    matches = VisualAttentionAligner(teacher, student, preset="official").matches
    want = match_group(layers_in_range(10, "intermediate"), layers_in_range(12, "intermediate"))
    assert matches == want
