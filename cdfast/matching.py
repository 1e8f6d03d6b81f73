"""Which teacher layers each student layer is aligned with.

Source: CompoDistill, "visual attention alignment" (visual understanding layers, group matching);
the authors' code for the table of `official`.
"""

from __future__ import annotations

from collections.abc import Sequence

LAYER_RANGES = ("early", "intermediate", "later", "all")
MATCHINGS = ("group", "simple", "adaptive")

# The authors' code: a 24-layer student aligns layers 8..14; by teacher depth, the teacher layer
# where the window of the first student layer starts and the length of the window.
_OFFICIAL_STUDENT_DEPTH = 24
_OFFICIAL_STUDENT_LAYERS = range(8, 15)
_OFFICIAL_WINDOWS = {40: (13, 5), 28: (9, 3), 32: (11, 3), 24: (8, 2)}

Matches = dict[int, tuple[int, ...]]


def layers_in_range(depth: int, layers: str) -> list[int]:
    """0-based layers i of a model of `depth` layers with relative depth (i + 0.5)/depth in range.

    Args:
        depth: number of decoder layers, >= 1.
        layers: "early" (< 0.3), "intermediate" ([0.3, 0.7]), "later" (> 0.7) or "all".

    Returns:
        Layer indices in ascending order.

    Raises:
        ValueError: `layers` is no known range, or no layer of the model lies in it.

    Source: paper, visual understanding layers (30%-70% of the depth) and its ablation.
    """
    if layers not in LAYER_RANGES:
        raise ValueError(
            f"layers: expected one of {', '.join(LAYER_RANGES)}; got {layers!r}. "
            "Use layers='intermediate' for the paper's setting."
        )
    # 10 (2i + 1) against 6 depth and 14 depth: exact integers, because (i + 0.5)/L == 0.3 happens
    # (L = 5, i = 1) and must not depend on rounding.
    inside = {
        "early": lambda x: x < 6 * depth,
        "intermediate": lambda x: 6 * depth <= x <= 14 * depth,
        "later": lambda x: x > 14 * depth,
        "all": lambda x: True,
    }[layers]
    found = [i for i in range(depth) if inside(10 * (2 * i + 1))]
    if not found:
        raise ValueError(
            f"layers: a model of {depth} layers has none in the range {layers!r}; use layers='all'."
        )
    return found


def match_group(student_layers: Sequence[int], teacher_layers: Sequence[int]) -> Matches:
    """Sliding windows: student layer j is aligned with the mean map of a window of teacher layers.

    With k student and m >= k teacher layers, the window has n = m - k + 1 layers and starts at
    teacher layer j (in order). With m < k the window is one layer, floor(j m / k).

    Source: paper, group matching.
    """
    k, m = len(student_layers), len(teacher_layers)
    if m >= k:
        n = m - k + 1
        return {s: tuple(teacher_layers[j : j + n]) for j, s in enumerate(student_layers)}
    return {s: (teacher_layers[j * m // k],) for j, s in enumerate(student_layers)}


def match_simple(student_layers: Sequence[int], teacher_layers: Sequence[int]) -> Matches:
    """Uniform one-to-one: student layer j with teacher layer round(j (m - 1)/max(k - 1, 1)).

    Source: paper, ablation of the matching.
    """
    k, m = len(student_layers), len(teacher_layers)
    return {
        s: (teacher_layers[round(j * (m - 1) / max(k - 1, 1))],)
        for j, s in enumerate(student_layers)
    }


def match_adaptive(
    student_layers: Sequence[int],
    teacher_layers: Sequence[int],
    similarity: Sequence[Sequence[float]],
) -> Matches:
    """Each student layer with its most similar teacher layer, never going back in depth.

    Among all assignments whose teacher layers do not decrease, the one with the largest sum of
    similarities (dynamic programming; the earliest teacher layer wins a tie).

    Args:
        student_layers, teacher_layers: layers in range, ascending.
        similarity: (k, m) similarity of student layer j's map with teacher layer i's.

    Source: paper, ablation of the matching; monotonicity is ours.
    """
    k, m = len(student_layers), len(teacher_layers)
    if len(similarity) != k or any(len(row) != m for row in similarity):
        raise ValueError(
            f"similarity: expected {k} rows of {m} values (student x teacher layers in range); "
            f"got {[len(row) for row in similarity]}."
        )
    best = [list(similarity[0])]  # best[j][i]: best sum with student layer j on teacher layer i
    origin: list[list[int]] = []
    for j in range(1, k):
        row, back, lead = [], [], 0
        for i in range(m):
            if best[-1][i] > best[-1][lead]:
                lead = i
            row.append(best[-1][lead] + similarity[j][i])
            back.append(lead)
        best.append(row)
        origin.append(back)
    i = max(range(m), key=lambda t: (best[-1][t], -t))
    chosen = [i]
    for back in reversed(origin):
        i = back[i]
        chosen.append(i)
    return {s: (teacher_layers[t],) for s, t in zip(student_layers, reversed(chosen))}


def match_official(student_depth: int, teacher_depth: int) -> Matches | None:
    """The authors' table of layers and windows; None where it has no entry for these depths.

    Source: the authors' code.
    """
    if student_depth != _OFFICIAL_STUDENT_DEPTH or teacher_depth not in _OFFICIAL_WINDOWS:
        return None
    start, length = _OFFICIAL_WINDOWS[teacher_depth]
    return {
        s: tuple(range(start + j, start + j + length))
        for j, s in enumerate(_OFFICIAL_STUDENT_LAYERS)
    }
