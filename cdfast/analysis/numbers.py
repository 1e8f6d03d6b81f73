"""The figures of an analysis in words and numbers: a sentence and a table for each.

Sentences are made from the numbers: they say which intervals exclude 0, and conclude nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdfast.page import MISSING, fixed, listed, table

Content = Mapping[str, Any]
Analyses = Mapping[str, Content]


def summary_rows(content: Content) -> tuple[list[str], list[list[str]]]:
    """A row per group and kind: accuracy of every model, similarity, r, and the substitution."""
    models = list(content["models"])
    weights = [w for w in content["substitution"]["all"] if w != "0"]
    heading = ["questions", "n", *models, "matched", "r", *(f"change at {w}" for w in weights)]
    rows = []
    for scope, number in content["cases"].items():
        groups, swap = content["groups"][scope], content["substitution"][scope]
        rows.append(
            [
                scope,
                str(number),
                *(fixed(content["answers"][scope][m]["accuracy"]) for m in models),
                fixed(groups["similarity"]),
                interval_text(groups["pearson"], groups["pearson_ci95"]),
                *(
                    interval_text(swap[w]["accuracy_change"], swap[w]["accuracy_change_ci95"])
                    for w in weights
                ),
            ]
        )
    return heading, rows


def interval_text(value: float | None, interval: Sequence[float] | None) -> str:
    """A signed number and its interval; a dash for none."""
    if value is None:
        return MISSING
    return f"{value:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def layers_table(runs: Analyses) -> str:
    """Which layers are matched, substituted, and compared in the figure by layer."""
    rows = [
        [
            run,
            *(_windows(content["settings"][name]) for name in ("matched", "substituted")),
            _windows(content["settings"]["layerwise"]["student"]),
        ]
        for run, content in runs.items()
    ]
    heading = ["", "matched", "substituted", "layer by layer"]
    caption = "Layers compared: student ← teacher, whose mean map is taken"
    return table(caption, heading, rows, left=(1, 2, 3))


def _windows(matches: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{layer} ← {listed(window)}" for layer, window in matches.items()) or MISSING


def correlation(found: Mapping[str, Any]) -> str:
    """Pearson's coefficient of `similarity_groups` and its interval, as text."""
    if found["pearson"] is None:
        return "no correlation: nothing varies"
    interval = found["pearson_ci95"]
    text = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"r = {found['pearson']:.2f}{text}"


def of_attention(by_scope: Mapping[str, Any], scopes: Sequence[str]) -> tuple[str, str]:
    """Of `answer_attention` of analysis.json: attention on the image, and every layer."""
    shares = "; ".join(
        f"{scope}: "
        + ", ".join(f"{m} {fixed(_mean(v['visual']))}" for m, v in by_scope[scope].items())
        for scope in scopes
    )
    sentence = f"Attention on the image, mean over layers: {shares}."
    return sentence, _per_layer("Attention of the answer token", "keys", by_scope, scopes)


def of_similarity(by_scope: Mapping[str, Any], scopes: Sequence[str]) -> tuple[str, str]:
    """Of `similarity` of analysis.json: means over layers, and every layer."""
    means = "; ".join(
        f"{scope}: "
        + ", ".join(
            f"{m} {fixed(_mean(v['visual']))} and {fixed(_mean(v['text']))}"
            for m, v in by_scope[scope].items()
        )
        for scope in scopes
    )
    sentence = (
        "Every student layer with the teacher layers that the table names in 'layer by layer'. "
        f"Over visual and over text tokens, mean over student layers: {means}."
    )
    return sentence, _per_layer("Similarity with the teacher", "tokens", by_scope, scopes)


def _per_layer(caption: str, of: str, by_scope: Mapping[str, Any], scopes: Sequence[str]) -> str:
    rows = [
        [model, scope, kind, *map(fixed, values)]
        for scope in scopes
        for model, kinds in by_scope[scope].items()
        for kind, values in kinds.items()
    ]
    depth = max(map(len, rows)) - 3
    rows = [[*row, *[""] * (depth + 3 - len(row))] for row in rows]
    heading = ["model", "questions", of, *(f"layer {n}" for n in range(depth))]
    return table(f"{caption} by layer", heading, rows, left=(1, 2))


def of_groups(runs: Analyses, scopes: Sequence[str]) -> tuple[str, str]:
    """Correlations with their intervals; every group, and every coefficient."""
    parts = []
    for scope in scopes:
        found = {run: content["groups"][scope] for run, content in runs.items()}
        each = ", ".join(f"{correlation(f)}{_in(run, runs)}" for run, f in found.items())
        zero = against_zero({run: f["pearson_ci95"] for run, f in found.items()}, len(runs) > 1)
        parts.append(f"{scope}: {each}; {zero}")
    sentence = (
        "Groups of questions of equal size, by visual similarity in the matched layers, and the "
        f"mean probability of their answers. {'. '.join(parts)}."
    )
    rows = [
        [
            *(run, scope, str(number), str(g["n"]), fixed(g["similarity"])),
            *(fixed(g["probability"]), bounds(g["ci95"]), fixed(g["accuracy"])),
        ]
        for scope in scopes
        for run, content in runs.items()
        for number, g in enumerate(content["groups"][scope]["groups"], 1)
    ]
    heading = ["run", "questions", "group", "n", "similarity", "probability", "95% interval"]
    coefficients = [
        [
            *(run, scope, str(f["n"]), str(f["units"])),
            *(fixed(f["pearson"]), bounds(f["pearson_ci95"])),
            *(fixed(f["spearman"]), bounds(f["spearman_ci95"])),
        ]
        for scope in scopes
        for run, f in ((run, content["groups"][scope]) for run, content in runs.items())
    ]
    of_cases = ["run", "questions", "n", "drawn units", "Pearson r", "95% interval"]
    return sentence, table("Groups by similarity", [*heading, "accuracy"], rows, left=(1,)) + table(
        "Correlation of similarity and answer probability over single questions",
        [*of_cases, "Spearman", "95% interval of it"],
        coefficients,
        left=(1,),
    )


def of_substitution(
    runs: Analyses, listed_scopes: Sequence[str], scopes: Sequence[str]
) -> tuple[str, str]:
    """Which changes of accuracy exclude 0, in `scopes`; every change, in `listed_scopes`."""
    first = next(iter(runs.values()))["substitution"]["all"]
    weights = [weight for weight in first if weight != "0"]
    parts = []
    for scope in scopes:
        for weight in weights:
            cells = {run: content["substitution"][scope][weight] for run, content in runs.items()}
            intervals = {run: cell["accuracy_change_ci95"] for run, cell in cells.items()}
            said = against_zero(intervals, len(runs) > 1)
            if len(cells) == 1:
                [cell] = cells.values()
                change = interval_text(cell["accuracy_change"], cell["accuracy_change_ci95"])
                said = f"{change}, {said}"
            parts.append(f"{scope}, weight {weight}: {said}")
    sentence = (
        "Change when the teacher's visual attention is blended into the substituted layers, by its "
        f"weight, on the same questions. Change of accuracy: {'. '.join(parts)}."
    )
    rows = []
    for scope in dict.fromkeys(listed_scopes):
        for run, content in runs.items():
            for weight, cell in content["substitution"][scope].items():
                row = [run, scope, weight]
                for name in ("accuracy", "probability"):
                    change = cell.get(f"{name}_change")
                    row += [fixed(cell[name]), fixed(change)]
                    row.append(bounds(cell.get(f"{name}_change_ci95")))
                rows.append(row)
    heading = ["run", "questions", "weight", "accuracy", "change", "95% interval"]
    heading += ["answer probability", "its change", "its 95% interval"]
    return sentence, table("Substituted attention", heading, rows, left=(1,))


def against_zero(intervals: Mapping[str, Sequence[float] | None], named: bool) -> str:
    """Which intervals lie above 0, below 0, or include it.

    Args:
        intervals: name -> [low, high], or None.
        named: whether there are several, so that the sentence needs their names.
    """
    found: dict[str, list[str]] = {"above 0": [], "below 0": [], "includes 0": [], "not known": []}
    for name, interval in intervals.items():
        if interval is None:
            found["not known"].append(name)
        elif interval[0] > 0:
            found["above 0"].append(name)
        else:
            found["below 0" if interval[1] < 0 else "includes 0"].append(name)
    said = [
        f"{what}{f': {listed(names)}' if named else ''}" for what, names in found.items() if names
    ]
    return f"interval {'; '.join(said)}"


def _in(run: str, runs: Analyses) -> str:
    return f" in {run}" if len(runs) > 1 else ""


def bounds(interval: Sequence[float] | None) -> str:
    """An interval of positive numbers; a dash for none."""
    return f"[{listed(map(fixed, interval))}]" if interval else MISSING


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
