"""Plots of the paper's tables in miniature: a mean with its interval per row; curves over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_arms import ARMS, CURVE_STEPS
from cdfast.plots import RUN_COLOURS, TEACHER_COLOUR, figure_style

GROUPS = {"CR": "o", "VQA": "s"}
CURVES = {"CR": "CR", "VQA": "VQA", "similarity": "attention similarity"}
# matplotlib writes its version into a PNG, with which the same numbers would make another file.
_METADATA = {"Software": None}
_SIZE = {"dpi": 110, "metadata": _METADATA}


def draw_rows(path: Path, report: Mapping[str, Any]) -> bool:
    """Every table with a run as a panel: accuracy of each row, 95% t interval over seeds.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    tables = [t for t in report["tables"].values() if any(row["seeds"] for row in t["rows"])]
    if not tables:
        return False
    heights = [len(table["rows"]) + 1.5 for table in tables]
    with figure_style("paper-tables"):
        figure = Figure(figsize=(8, 0.9 + 0.34 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(tables), 1, squeeze=False, sharex=True, height_ratios=heights)
        for panel, found in zip(grid[:, 0], tables):
            _panel(panel, found, report["seeds"])
        # Of the whole figure: beside a panel's title it would not fit.
        figure.supxlabel(_legend(tables), size="medium")
        grid[-1, 0].set_xlim(0.2, 1.02)
        handles = grid[0, 0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
        figure.suptitle(_title(report), x=0.02, ha="left")
        figure.savefig(path, **_SIZE)
    return True


def _legend(tables: Sequence[Mapping[str, Any]]) -> str:
    text = "accuracy: mean, 95% interval from three seeds on, cut at 1; dots: seeds"
    lines = {"teacher": "dotted: teacher", "chance": "dashed: chance"}
    return "; ".join([text, *(line for key, line in lines.items() if any(t[key] for t in tables))])


def _title(report: Mapping[str, Any]) -> str:
    return "QUICK: says nothing" if report["quick"] else "The paper's tables in miniature"


def _panel(panel: Any, found: Mapping[str, Any], seeds: int) -> None:
    rows = found["rows"]
    places = range(len(rows), 0, -1)
    for index, (group, marker) in enumerate(GROUPS.items()):
        colour, shift = RUN_COLOURS[index], 0.14 if index == 0 else -0.14
        drawn = [(y + shift, row[group]) for y, row in zip(places, rows) if row["seeds"]]
        means = [values["mean"] for _, values in drawn]
        bounds = [_interval(values) for _, values in drawn]
        panel.errorbar(
            means,
            [y for y, _ in drawn],
            xerr=[
                [m - low for m, (low, _) in zip(means, bounds)],
                [high - m for m, (_, high) in zip(means, bounds)],
            ],
            fmt=marker,
            ms=4,
            capsize=2,
            color=colour,
            label=group,
        )
        for y, row in zip(places, rows):
            dots = list(row["by_seed"][group].values())
            # Between the groups' bars, which would hide them.
            panel.plot(dots, [y + shift / 3] * len(dots), ".", ms=4, color=colour, mew=0, zorder=3)
        if found["teacher"]:
            panel.axvline(found["teacher"][group]["mean"], color=colour, ls=":", lw=1)
        if found["chance"]:
            panel.axvline(found["chance"][group], color=colour, ls="--", lw=0.8, alpha=0.5)
    panel.set_yticks(list(places), [row_label(row, seeds) for row in rows])
    panel.set_ylim(0.4, len(rows) + 0.6)
    panel.set_title(f"({found['letter']}) {found['title']}", loc="left")
    panel.grid(axis="x", color="#dddddd")


def _interval(values: Mapping[str, Any]) -> tuple[float, float]:
    """The 95% t interval within 0 and 1, where accuracies and similarities end; of fewer than three
    runs, which say little about their spread, the mean alone."""
    if values["n"] < 3:
        return values["mean"], values["mean"]
    return max(values["low"], 0.0), min(values["high"], 1.0)


def row_label(row: Mapping[str, Any], seeds: int) -> str:
    """With what is missing of it."""
    done = len(row["seeds"])
    if done == seeds:
        return row["label"]
    return f"{row['label']}: {f'{done} of {seeds} seeds' if done else 'not run'}"


def draw_curves(path: Path, report: Mapping[str, Any]) -> bool:
    """Accuracy and similarity over training steps: mean over seeds, and each seed as a thin line.

    No band: where one seed leaves chance and another does not, an interval shows neither.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    found = next(t for t in report["tables"].values() if "curves" in t)
    curves = {arm: points for arm, points in found["curves"].items() if points}
    if not curves:
        return False
    with figure_style("paper-curves"):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for panel, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
            for index, (arm, points) in enumerate(curves.items()):
                _curve(panel, name, ARMS[arm].label, points, RUN_COLOURS[index])
            if name in GROUPS and found["teacher"]:
                panel.axhline(found["teacher"][name]["mean"], color=TEACHER_COLOUR, ls=":")
            if name in GROUPS and found["chance"]:
                panel.axhline(found["chance"][name], color=TEACHER_COLOUR, ls="--", lw=0.8)
            if not report["quick"]:
                panel.axvline(sum(CURVE_STEPS[:2]), color="#bbbbbb", lw=1, zorder=0)
            panel.set(xlabel="optimizer steps", title=label, ylim=(0, 1.03))
            panel.grid(color="#dddddd")
        handles = figure.axes[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        kind = "validation scenes; thick: mean, thin: each seed; grey: first captions"
        figure.suptitle(f"{_title(report)}, ({found['letter']}): {kind}")
        figure.savefig(path, **_SIZE)
    return True


def _curve(panel: Any, name: str, label: str, points: Any, colour: str) -> None:
    drawn = [p for p in points if p[name]["mean"] is not None]
    steps = [p["step"] for p in drawn]
    panel.plot(steps, [p[name]["mean"] for p in drawn], "o-", ms=3, color=colour, label=label)
    for seed in {seed: None for p in drawn for seed in p[name]["by_seed"]}:
        own = [(p["step"], p[name]["by_seed"][seed]) for p in drawn if seed in p[name]["by_seed"]]
        panel.plot(*zip(*own), "-", lw=0.6, color=colour, alpha=0.7)
