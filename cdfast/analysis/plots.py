"""Figures of the analysis, in the colours of the report: drawn once, for PNG files and pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cdfast.analysis.numbers import correlation
from cdfast.plots import LINE_STYLES, RUN_COLOURS, TEACHER_COLOUR, figure_style, svg_text

_DPI = 150
_MARKERS = "osD^vP*"
# Right of the point, above it.
_DIRECTIONS = ((True, True), (False, False), (True, False), (False, True))
_HATCHES = ("", "///", "...")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    with figure_style(path.stem):
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def inline(figure: Figure, name: str, label: str) -> str:
    """A figure as an <svg> element whose ids begin with `name`, read aloud as `label`."""
    with figure_style(name):
        return svg_text(figure, name, label)


def figures_of(content: Mapping[str, Any], scopes: Sequence[str]) -> dict[str, Figure]:
    """The figures of one analysis by name: attention, similarity, groups, substitution.

    Args:
        content: of analysis.json; where nothing was substituted there is no such figure.
        scopes: a panel each.
    """
    figures = {
        "attention": attention_figure(content["answer_attention"], scopes),
        "similarity": similarity_figure(content["similarity"], scopes),
        "groups": groups_figure({"student": content["groups"]}, scopes),
    }
    if content["substitution"]["all"]:
        names = list(dict.fromkeys([*scopes, *content["scopes"]["kinds"]]))
        bars = {name.replace("_", " "): content["substitution"][name] for name in names}
        figures["substitution"] = substitution_figure({"": bars})
    return figures


def _look(model: str, models: Sequence[str]) -> dict[str, Any]:
    """Colour, line and marker of a model: told apart without colour too."""
    students = [name for name in models if name != "teacher"]
    place = 0 if model == "teacher" else 1 + students.index(model)
    colour = TEACHER_COLOUR if place == 0 else RUN_COLOURS[(place - 1) % len(RUN_COLOURS)]
    line, marker = LINE_STYLES[place % len(LINE_STYLES)], _MARKERS[place % len(_MARKERS)]
    return {"color": colour, "ls": line, "marker": marker, "ms": 4}


def _depths(values: Sequence[float]) -> np.ndarray:
    """Relative depth (i + 0.5) / L of each layer."""
    return (np.arange(len(values)) + 0.5) / len(values)


def _numbers(values: Sequence[float]) -> np.ndarray:
    """Number of each layer, from 0."""
    return np.arange(len(values))


def _lines_by_model(
    figure: Figure,
    by_scope: Mapping[str, Any],
    scopes: Sequence[str],
    *,
    places: Callable[[Sequence[float]], np.ndarray],
    label: str,
    of: str,
    ylabel: str,
) -> np.ndarray:
    """A column of panels per scope, visual above text, a line per model over its layers; the axes.

    Args:
        places: of the layers on the x axis.
        label: of a line, with {model} for its name.
        of: what the two rows are of, "keys" or "tokens".
    """
    axes = figure.subplots(2, len(scopes), squeeze=False, sharex=True, sharey="row")
    for column, scope in enumerate(scopes):
        models = list(by_scope[scope])
        for row, kind in enumerate(("visual", "text")):
            ax = axes[row, column]
            for model in models:
                values = by_scope[scope][model][kind]
                look = _look(model, models)
                ax.plot(places(values), values, label=label.format(model=model), **look)
            ax.grid(color="#dddddd")
            ax.set(title=f"{scope}: {kind} {of}", ylabel=ylabel if not column else "")
    return axes


def attention_figure(by_scope: Mapping[str, Any], scopes: Sequence[str]) -> Figure:
    """Attention of the answer token on visual and on text keys, by relative depth.

    Args:
        by_scope: `answer_attention` of analysis.json, or with the students of several runs.
        scopes: a column of panels each.
    """
    with figure_style("attention"):
        figure = Figure(figsize=(4.2 * len(scopes) + 0.6, 5.8), layout="constrained")
        words = {"label": "{model}", "of": "keys", "ylabel": "attention"}
        axes = _lines_by_model(figure, by_scope, scopes, places=_depths, **words)
        for ax in axes[1]:
            ax.set(xlabel="relative depth of the layer", xlim=(0, 1))
        figure.suptitle("Attention of the answer token, summed over keys")
        _legend(figure, axes[0, 0], 3)
    return figure


def similarity_figure(by_scope: Mapping[str, Any], scopes: Sequence[str]) -> Figure:
    """Layer-wise similarity with the teacher over visual and text keys, for every student.

    Args:
        by_scope: `similarity` of analysis.json, or with the students of several runs.
        scopes: a column of panels each.
    """
    with figure_style("similarity"):
        figure = Figure(figsize=(4.2 * len(scopes) + 0.6, 5.8), layout="constrained")
        words = {"label": "teacher - {model}", "of": "tokens", "ylabel": "mean cosine"}
        axes = _lines_by_model(figure, by_scope, scopes, places=_numbers, **words)
        for ax in axes.flat:
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[1]:
            ax.set(xlabel="layer (from 0)")
        figure.suptitle("Similarity of attention with the teacher, layer by layer")
        _legend(figure, axes[0, 0], 3)
    return figure


def _legend(figure: Figure, ax: Axes, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _whiskers(values: Sequence[float], intervals: Sequence[Any]) -> list[list[float]]:
    """Lengths below and above each value; 0 where there is no interval."""
    bounds = [interval or (value, value) for value, interval in zip(values, intervals)]
    return [
        [max(value - low, 0) for value, (low, _) in zip(values, bounds)],
        [max(high - value, 0) for value, (_, high) in zip(values, bounds)],
    ]


def groups_figure(by_run: Mapping[str, Mapping[str, Any]], scopes: Sequence[str]) -> Figure:
    """Mean answer probability of students by similarity group, with 95% intervals.

    Args:
        by_run: student -> `groups` of its analysis.json; a line each.
        scopes: a panel each.
    """
    runs = list(by_run)
    with figure_style("groups"):
        figure = Figure(figsize=(4.2 * len(scopes) + 0.6, 3.9), layout="constrained")
        axes = figure.subplots(1, len(scopes), squeeze=False, sharey=True)[0]
        for ax, scope in zip(axes, scopes):
            for run in runs:
                groups = by_run[run][scope]["groups"]
                x = [group["similarity"] for group in groups]
                y = [group["probability"] for group in groups]
                spread = _whiskers(y, [group["ci95"] for group in groups])
                ax.errorbar(x, y, spread, label=run, capsize=3, lw=1.5, **_look(run, runs))
            found = by_run[runs[0]][scope]
            title = f"{scope} ({found['n']} cases)"
            ax.set(title=title if len(runs) > 1 else f"{title}\n{correlation(found)}")
            ax.set(xlabel="visual similarity with the teacher", ylim=(0, 1.02))
            ax.grid(color="#dddddd")
        axes[0].set(ylabel="mean probability of the answer")
        figure.suptitle("Answer probability of the student by similarity group")
        if len(runs) > 1:
            _legend(figure, axes[0], 5)
    return figure


def substitution_figure(panels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Change of accuracy and answer probability when the teacher's attention is put in place.

    Args:
        panels: title of a column of panels -> name of a group of bars -> `substitution_effect`.
    """
    bars = len(next(iter(panels.values())))
    width = max(6.0, 0.8 * bars + 1.6) if len(panels) == 1 else 4.6
    with figure_style("substitution"):
        figure = Figure(figsize=(width * len(panels), 5.6), layout="constrained")
        axes = figure.subplots(2, len(panels), squeeze=False, sharex="col", sharey="row")
        for column, (title, effects) in zip(axes.T, panels.items()):
            for ax, name in zip(column, ("accuracy", "probability")):
                _bars(ax, effects, name)
            column[0].set(title=title)
            names = list(effects)
            column[1].set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
        for ax, name in zip(axes[:, 0], ("accuracy", "probability")):
            ax.set(ylabel=f"change of {name}")
        figure.suptitle("The student with the teacher's visual attention in chosen layers")
        _legend(figure, axes[0, 0], 3)
    return figure


def _bars(ax: Axes, effects: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """A group of bars per name of `effects`, a bar per weight of the teacher."""
    weights = [weight for weight in next(iter(effects.values())) if weight != "0"]
    width = 0.8 / len(weights)
    for n, weight in enumerate(weights):
        cells = [by_weight[weight] for by_weight in effects.values()]
        values = [cell[f"{name}_change"] for cell in cells]
        shift = (n - (len(weights) - 1) / 2) * width
        ax.bar(
            [x + shift for x in range(len(cells))],
            values,
            width * 0.92,
            yerr=_whiskers(values, [cell[f"{name}_change_ci95"] for cell in cells]),
            color=RUN_COLOURS[n % len(RUN_COLOURS)],
            hatch=_HATCHES[n % len(_HATCHES)],
            label=f"{float(weight):g} of the teacher",
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )
    ax.axhline(0, color="black", lw=0.8)
    ax.grid(axis="y", color="#dddddd")


def matched_accuracy_figure(points: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Accuracy of every run beside the similarity of its matched layers: a point each, named.

    Args:
        points: group of questions -> run -> `similarity`, its `interval` or None, and `accuracy`.
    """
    with figure_style("matched-accuracy"):
        figure = Figure(figsize=(4.6 * len(points) + 0.6, 3.9), layout="constrained")
        axes = figure.subplots(1, len(points), squeeze=False)[0]
        for ax, (group, by_run) in zip(axes, points.items()):
            for number, (run, point) in enumerate(by_run.items()):
                look = {**_look(run, list(by_run)), "ls": "", "ms": 7}
                x, y = point["similarity"], point["accuracy"]
                xerr = _whiskers([x], [point["interval"]])
                ax.errorbar([x], [y], xerr=xerr, capsize=3, elinewidth=0.8, label=run, **look)
                # Runs that are alike lie on each other: their names in different directions.
                right, up = _DIRECTIONS[number % len(_DIRECTIONS)]
                place = {"ha": "left" if right else "right", "va": "bottom" if up else "top"}
                away = 5 + 10 * (number // len(_DIRECTIONS))
                shift = (5 if right else -5, away if up else -away)
                ax.annotate(
                    run, (x, y), xytext=shift, textcoords="offset points", fontsize=8, **place
                )
            ax.margins(0.18)
            ax.set(title=group, xlabel="visual similarity with the teacher, matched layers")
            ax.grid(color="#dddddd")
        axes[0].set(ylabel="accuracy\n(share answered right)")
        figure.suptitle("Accuracy of each run beside its similarity with the teacher")
        _legend(figure, axes[0], 5)
    return figure


def overlay_figure(pictures: Mapping[str, Mapping[str, Image.Image]], title: str) -> Figure:
    """Overlays of one case: a row per token, a column per model.

    Args:
        pictures: token -> model -> overlay.
        title: the question and answer.
    """
    columns = list(next(iter(pictures.values())))
    with figure_style("overlays"):
        size = (3 * len(columns) + 0.4, 3.2 * len(pictures) + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(pictures), len(columns), squeeze=False)
        for row, (token, by_model) in zip(axes, pictures.items()):
            for ax, model in zip(row, columns):
                ax.imshow(np.asarray(by_model[model]))
                ax.set_axis_off()
                ax.set_title(f"{model}: {token}")
        figure.suptitle(title, wrap=True)
    return figure
