"""Figures of the report as inline SVG: plain data in, text out.

Text becomes paths, so a figure looks the same everywhere, and every id carries the figure's name,
so that many figures share one page. Colours are Okabe and Ito's, told apart without colour vision.
This module imports matplotlib; `cdfast.report` imports it only when it writes a page.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from cdfast.terms import TERMS

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
TEACHER_COLOUR = "#767676"
EVALUATION_SCALES = {
    "eval_loss_lm": "held-out LM loss\n(nats per answer token)",
    "eval_similarity/mean": "attention similarity\n(mean cosine)",
}
LOSSES = {term.logged: f"{term.label} loss" for term in TERMS}
# A log scale where the largest value is at least this many times the smallest.
LOG_SCALE_FROM = 5
# Heat maps of at most this many cells, and figures of this many bars, carry their values as text.
ANNOTATED_CELLS = 64
LABELLED_BARS = 20
_STYLE = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "svg.fonttype": "path",
    # A name with a $ is a name, not mathematics.
    "text.parse_math": False,
}


def number(value: Any) -> float:
    """`value` as a float; NaN for whatever cannot be drawn: None, text, infinity."""
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if finite else math.nan


def figure_style(name: str) -> Any:
    """The style of all figures, within a `with`; ids of an SVG depend on `name`."""
    return matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}])


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element whose ids begin with `name`, read aloud as `label`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The style element would apply to the whole page; the page has the rule itself.
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()


def accuracy_figure(
    name: str,
    groups: Mapping[str, Sequence[str]],
    columns: Sequence[tuple[str, Mapping[str, Any], int | None, bool]],
    text_only: Mapping[str, float],
    label: str,
) -> str:
    """Bars of accuracy per question kind with 95% intervals, beside chance and text-only.

    Args:
        name: prefix of the ids.
        groups: group -> its kinds; each group is a row of bars and ends with its average.
        columns: of each bar the heading, a report of `cdfast.evaluate`, the number of the run
            (None: the teacher), and whether it is a control.
        text_only: kind or "<group> average" -> accuracy without images.
        label: the figure in words.
    """
    first = columns[0][1]
    with figure_style(name):
        figure = Figure(figsize=(10, 0.9 + 2.7 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        for ax, (group, kinds) in zip(axes, groups.items()):
            ticks = [*kinds, f"{group} average"]
            positions = [*range(len(kinds)), len(kinds) + 0.3]
            width = 0.84 / len(columns)
            for column, (heading, report, run, control) in enumerate(columns):
                cells = [report["kinds"].get(kind, {}) for kind in kinds]
                values = [number(c.get("accuracy")) for c in cells]
                values.append(number(report.get("averages", {}).get(group)))
                bounds = [c.get("ci95") or (math.nan, math.nan) for c in cells]
                bounds.append((math.nan, math.nan))
                ax.bar(
                    [x + (column - (len(columns) - 1) / 2) * width for x in positions],
                    values,
                    width,
                    yerr=[
                        [max(v - number(low), 0.0) for v, (low, _) in zip(values, bounds)],
                        [max(number(high) - v, 0.0) for v, (_, high) in zip(values, bounds)],
                    ],
                    error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                    label=heading,
                    **_bar_style(run, control),
                )
            chance = [number(first["kinds"].get(k, {}).get("chance")) for k in kinds]
            chance.append(number(first.get("averages_chance", {}).get(group)))
            left, right = [x - 0.46 for x in positions], [x + 0.46 for x in positions]
            ax.hlines(chance, left, right, color="black", ls="--", lw=1.2, label="chance")
            alone = [number(text_only.get(tick)) for tick in ticks]
            if any(map(math.isfinite, alone)):
                style: dict[str, Any] = {"marker": "D", "s": 34, "color": "black", "zorder": 5}
                ax.scatter(positions, alone, **style, edgecolors="white", label="text-only")
            ax.set_xticks(positions, [tick.replace("_", " ") for tick in ticks])
            if len(ticks) > 10:
                ax.tick_params(axis="x", rotation=30)
            ax.set(ylim=(0, 1.02), xlim=(-0.6, positions[-1] + 0.6))
            ax.set(ylabel="accuracy\n(share answered right)")
            ax.grid(axis="y", color="#dddddd")
        axes[-1].set_xlabel("question kind")
        figure.suptitle("Accuracy per question kind, with 95% intervals")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return _svg(figure, name, label)


def _bar_style(run: int | None, control: bool) -> dict[str, Any]:
    """Teacher grey, each student its own colour, a control hatched in its student's."""
    colour = TEACHER_COLOUR if run is None else RUN_COLOURS[run % len(RUN_COLOURS)]
    return {"fc": "white", "ec": colour, "hatch": "/////"} if control else {"fc": colour}


def loss_figure(
    name: str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    stages: Sequence[tuple[int, str]],
    units: Mapping[str, str],
    label: str,
) -> str:
    """One panel per loss over the steps of all stages, one line per run.

    Args:
        name: prefix of the ids.
        runs: run -> log entries, with their `total_step` over all stages.
        stages: (first step, label) of the main run's stages.
        units: of each loss, by its name in the log.
        label: the figure in words.
    """
    present = [
        loss
        for loss in LOSSES
        if any(math.isfinite(number(e.get(loss))) for log in runs.values() for e in log)
    ]
    with figure_style(name):
        figure = Figure(figsize=(10, 1.1 + 1.8 * len(present)), layout="constrained")
        axes = figure.subplots(len(present), 1, squeeze=False, sharex=True)[:, 0]
        for ax, loss in zip(axes, present):
            seen: list[float] = []
            for index, (run, log) in enumerate(runs.items()):
                values = [number(entry.get(loss)) for entry in log]
                seen += [value for value in values if math.isfinite(value)]
                ax.plot(
                    [number(entry["total_step"]) for entry in log],
                    values,
                    label=run,
                    color=RUN_COLOURS[index % len(RUN_COLOURS)],
                    ls=LINE_STYLES[index % len(LINE_STYLES)],
                    lw=1.5,
                    marker="o" if len(log) <= 100 else "",
                    markersize=2.5,
                )
            if min(seen) > 0 and max(seen) >= LOG_SCALE_FROM * min(seen):
                ax.set_yscale("log")
                few_decades = max(seen) < 50 * min(seen)
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
                ax.yaxis.set_minor_formatter("")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_ylabel("\n".join([LOSSES[loss], *f"({units[loss]})".split(", ")]))
            ax.grid(color="#dddddd")
        _over_steps(figure, axes, stages, "Training losses")
        return _svg(figure, name, label)


def _over_steps(
    figure: Figure, axes: np.ndarray, stages: Sequence[tuple[int, str]], title: str
) -> None:
    """What panels over the steps of all stages share: the axis, its stages, title and legend."""
    axes[0].set_xlim(left=0)
    _mark_stages(axes, stages)
    axes[-1].set_xlabel("optimizer step (all stages)")
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)


def evaluation_figure(
    name: str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Sequence[str],
    layers: Sequence[str],
    stages: Sequence[tuple[int, str]],
    label: str,
) -> str:
    """One panel per quantity that was measured during training, one line per run.

    Below them, if there are any, the matched layers of the main run, one line per layer.

    Args:
        name: prefix of the ids.
        runs: run -> evaluations, with their `total_step` over all stages.
        panels: names of the quantities in the evaluations; others than those of
            `EVALUATION_SCALES` are accuracies.
        layers: names of the similarities of the main run's layers.
        stages: (first step, label) of the main run's stages.
        label: the figure in words.
    """
    count = len(panels) + bool(layers)
    with figure_style(name):
        figure = Figure(figsize=(10, 1.1 + 1.8 * count), layout="constrained")
        axes = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
        for ax, field in zip(axes, panels):
            for index, (run, log) in enumerate(runs.items()):
                ax.plot(
                    [number(entry["total_step"]) for entry in log],
                    [number(entry.get(field)) for entry in log],
                    label=run,
                    color=RUN_COLOURS[index % len(RUN_COLOURS)],
                    ls=LINE_STYLES[index % len(LINE_STYLES)],
                    lw=1.5,
                    marker="o" if len(log) <= 100 else "",
                    markersize=2.5,
                )
            accuracy = field.removeprefix("eval_") + "\n(share answered right)"
            ax.set_ylabel(EVALUATION_SCALES.get(field, accuracy))
            if field not in EVALUATION_SCALES:
                ax.set_ylim(0, 1.02)
            ax.grid(color="#dddddd")
        if layers:
            _layer_lines(axes[-1], *next(iter(runs.items())), layers)
        _over_steps(figure, axes, stages, "Held-out questions and samples during training")
        return _svg(figure, name, label)


def _layer_lines(
    ax: Axes, run: str, log: Sequence[Mapping[str, Any]], layers: Sequence[str]
) -> None:
    steps = [number(entry["total_step"]) for entry in log]
    shades = matplotlib.colormaps["cividis"].resampled(len(layers) + 1)
    for index, field in enumerate(layers):
        values = [number(entry.get(field)) for entry in log]
        layer = field.rpartition("_")[2]
        ax.plot(steps, values, color=shades(index), lw=1.2, label=f"layer {layer}")
    ax.set_ylabel(f"similarity per layer\n({run})")
    ax.grid(color="#dddddd")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, ncols=1 + len(layers) // 9)


def _mark_stages(axes: Iterable[Axes], stages: Sequence[tuple[int, str]]) -> None:
    for panel, ax in enumerate(axes):
        for start, text in stages:
            ax.axvline(start, color="#555555", ls=":", lw=1)
            if panel == 0:
                top = ax.get_xaxis_transform()
                ax.text(start, 1.03, text, transform=top, fontsize=8, rotation=30, va="bottom")


def similarity_figure(
    name: str,
    similarity: Mapping[str, Any],
    limits: tuple[float, float],
    title: str,
    label: str,
) -> str:
    """Heat maps of student x teacher layers, before and after, matched windows outlined.

    Args:
        name: prefix of the ids.
        similarity: of one run, as in results.json.
        limits: (lowest, highest) of the colour scale.
        title: above the maps.
        label: the figure in words.
    """
    parts = [part for part in ("before", "after") if similarity.get(part, {}).get("layers")]
    grids = [[[number(v) for v in row] for row in similarity[part]["layers"]] for part in parts]
    rows, columns = len(grids[0]), len(grids[0][0])
    with figure_style(name):
        height = min(max(1.7 + 0.36 * rows, 2.6), 7)
        figure = Figure(figsize=(10, height), layout="constrained")
        axes = figure.subplots(1, len(parts), squeeze=False)[0]
        for ax, part, grid in zip(axes, parts, grids):
            options: dict[str, Any] = {"cmap": "cividis", "vmin": limits[0], "vmax": limits[1]}
            edges = [x - 0.5 for x in range(columns + 1)], [y - 0.5 for y in range(rows + 1)]
            mesh = ax.pcolormesh(*edges, grid, edgecolors="white", linewidth=0.3, **options)
            ax.set_facecolor("#bbbbbb")
            for student, window in (similarity.get("matches") or {}).items():
                corner = (min(window) - 0.5, int(student) - 0.5)
                ax.add_patch(Rectangle(corner, len(window), 1, ec="#D55E00", fc="none", lw=2.5))
            if rows * columns <= ANNOTATED_CELLS:
                middle = sum(limits) / 2
                for y, x in ((y, x) for y in range(rows) for x in range(columns)):
                    shade = "white" if grid[y][x] < middle else "black"
                    text = f"{grid[y][x]:.2f}" if math.isfinite(grid[y][x]) else "–"
                    ax.text(x, y, text, ha="center", va="center", color=shade, fontsize=8)
            ax.invert_yaxis()
            ax.set(title=f"{part} training", xlabel="teacher layer (from 0)")
            ax.set(ylabel="student layer (from 0)")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.yaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(mesh, ax=list(axes), label="mean cosine (1: same)")
        assert bar.solids is not None
        bar.solids.set(edgecolor="face", rasterized=False)
        outline = Rectangle((0, 0), 1, 1, ec="#D55E00", fc="none", lw=2.5, label="matched layers")
        figure.legend(handles=[outline], loc="outside lower center", frameon=False)
        figure.suptitle(title)
        return _svg(figure, name, label)


def matched_figure(name: str, runs: Mapping[str, Mapping[str, Any]], label: str) -> str:
    """Similarity of each matched student layer with its teacher window: bars after, marks before.

    Args:
        name: prefix of the ids.
        runs: run -> similarity as in results.json.
        label: the figure in words.
    """
    layers = sorted({int(k) for s in runs.values() for k in s["after"]["matched"]})
    with figure_style(name):
        figure = Figure(figsize=(10, 3.3), layout="constrained")
        ax = figure.subplots()
        width = min(0.8 / len(runs), 0.25)
        for index, (run, similarity) in enumerate(runs.items()):
            shift = (index - (len(runs) - 1) / 2) * width
            positions = [x + shift for x in range(len(layers))]
            after, before = (
                [number(similarity.get(p, {}).get("matched", {}).get(str(k))) for k in layers]
                for p in ("after", "before")
            )
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            bars = ax.bar(positions, after, width * 0.92, color=colour, label=f"{run}, after")
            if len(runs) * len(layers) <= LABELLED_BARS:
                ax.bar_label(
                    bars, [f"{v:.2f}" if math.isfinite(v) else "" for v in after], padding=4
                )
            ax.plot(positions, before, "D", mfc="white", mec="black", ms=6, label="before")
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xlim(-0.6, len(layers) - 0.4)
        matches = next(iter(runs.values())).get("matches") or {}
        windows = [_window(matches.get(str(k), [])) for k in layers]
        ticks = [f"student {k}\nteacher {w}" for k, w in zip(layers, windows)]
        ax.set_xticks(range(len(layers)), ticks, fontsize=9 if len(layers) < 9 else 7)
        ax.set(xlabel="student layer and the teacher layers it is matched with (from 0)")
        ax.set(ylabel="mean cosine\n(1 = same attention)", ylim=(None, 1.08))
        ax.set(title="Attention similarity of matched layers, before and after training")
        ax.grid(axis="y", color="#dddddd")
        handles: dict[str, Any] = {}
        for handle, text in zip(*ax.get_legend_handles_labels()):
            if not isinstance(handle, Line2D) or text not in handles:
                handles[text] = handle
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
        return _svg(figure, name, label)


def _window(layers: Sequence[int]) -> str:
    """The first and the last of consecutive layers; otherwise all."""
    consecutive = list(layers) == list(range(min(layers, default=0), max(layers, default=-1) + 1))
    ends = [layers[0], layers[-1]] if consecutive and len(layers) > 1 else layers
    return "–".join(map(str, ends)) if consecutive else ", ".join(map(str, ends))
