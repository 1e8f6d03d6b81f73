"""Figures of the analysis as PNG, in the colours and line styles of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cdfast.plots import LINE_STYLES, RUN_COLOURS, TEACHER_COLOUR, figure_style

_DPI = 150
_MARKERS = "osD^v"


def _look(model: str, models: Sequence[str]) -> dict[str, Any]:
    """Colour, line and marker of a model: told apart without colour too."""
    students = [name for name in models if name != "teacher"]
    place = 0 if model == "teacher" else 1 + students.index(model)
    colour = TEACHER_COLOUR if model == "teacher" else RUN_COLOURS[place - 1]
    return {"color": colour, "ls": LINE_STYLES[place], "marker": _MARKERS[place], "ms": 4}


def _depths(values: Sequence[float]) -> np.ndarray:
    """Relative depth (i + 0.5) / L of each layer."""
    return (np.arange(len(values)) + 0.5) / len(values)


def _numbers(values: Sequence[float]) -> np.ndarray:
    """Number of each layer, from 0."""
    return np.arange(len(values))


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


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


def attention_figure(path: Path, by_scope: Mapping[str, Any], scopes: Sequence[str]) -> Path:
    """Attention of the answer token on visual and on text keys, by relative depth.

    Args:
        path: of the PNG.
        by_scope: `answer_attention` of analysis.json.
        scopes: a column of panels each.
    """
    with figure_style("attention"):
        figure = Figure(figsize=(4.2 * len(scopes) + 0.6, 5.6), layout="constrained")
        words = {"label": "{model}", "of": "keys", "ylabel": "attention"}
        axes = _lines_by_model(figure, by_scope, scopes, places=_depths, **words)
        for ax in axes[1]:
            ax.set(xlabel="relative depth of the layer", xlim=(0, 1))
        figure.suptitle("Attention of the answer token, summed over keys")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _save(figure, path)


def similarity_figure(path: Path, by_scope: Mapping[str, Any], scopes: Sequence[str]) -> Path:
    """Layer-wise similarity with the teacher over visual and text keys, for student and baseline.

    Args:
        path: of the PNG.
        by_scope: `similarity` of analysis.json.
        scopes: a column of panels each.
    """
    with figure_style("similarity"):
        figure = Figure(figsize=(4.2 * len(scopes) + 0.6, 5.6), layout="constrained")
        words = {"label": "teacher - {model}", "of": "tokens", "ylabel": "mean cosine"}
        axes = _lines_by_model(figure, by_scope, scopes, places=_numbers, **words)
        for ax in axes.flat:
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[1]:
            ax.set(xlabel="layer (from 0)")
        figure.suptitle("Similarity of attention with the teacher's matched layers")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return _save(figure, path)


def groups_figure(path: Path, by_scope: Mapping[str, Any], scopes: Sequence[str]) -> Path:
    """Mean answer probability of the student by similarity group, with 95% intervals.

    Args:
        path: of the PNG.
        by_scope: `groups` of analysis.json.
        scopes: a panel each.
    """
    with figure_style("groups"):
        figure = Figure(figsize=(4.2 * len(scopes) + 0.6, 3.6), layout="constrained")
        for ax, scope in zip(figure.subplots(1, len(scopes), squeeze=False)[0], scopes):
            found = by_scope[scope]
            groups = found["groups"]
            x = [group["similarity"] for group in groups]
            y = [group["probability"] for group in groups]
            bounds = [group["ci95"] or (v, v) for group, v in zip(groups, y)]
            spread = [
                [max(v - low, 0) for v, (low, _) in zip(y, bounds)],
                [max(high - v, 0) for v, (_, high) in zip(y, bounds)],
            ]
            ax.errorbar(x, y, spread, fmt="o-", color=RUN_COLOURS[0], capsize=3)
            ax.set(xlabel="visual similarity with the teacher", ylim=(0, 1.02))
            ax.set(ylabel="mean probability of the answer")
            ax.set(title=f"{scope} ({found['n']} cases)\n{_correlation(found)}")
            ax.grid(color="#dddddd")
        figure.suptitle("Answer probability of the student by similarity group")
        return _save(figure, path)


def _correlation(found: Mapping[str, Any]) -> str:
    if found["pearson"] is None:
        return "no correlation: nothing varies"
    interval = found["pearson_ci95"]
    text = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"r = {found['pearson']:.2f}{text}"


def substitution_figure(path: Path, by_scope: Mapping[str, Any], scopes: Sequence[str]) -> Path:
    """Change of accuracy and answer probability when the teacher's attention is put in place.

    Args:
        path: of the PNG.
        by_scope: `substitution` of analysis.json.
        scopes: a group of bars each.
    """
    weights = [weight for weight in by_scope[scopes[0]] if weight != "0"]
    with figure_style("substitution"):
        figure = Figure(figsize=(max(6.0, 1.1 * len(scopes) + 2), 5.6), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        width = 0.8 / len(weights)
        for ax, name in zip(axes, ("accuracy", "probability")):
            for n, weight in enumerate(weights):
                cells = [by_scope[scope][weight] for scope in scopes]
                values = [cell[f"{name}_change"] for cell in cells]
                bounds = [c[f"{name}_change_ci95"] or (v, v) for c, v in zip(cells, values)]
                shift = (n - (len(weights) - 1) / 2) * width
                ax.bar(
                    [x + shift for x in range(len(scopes))],
                    values,
                    width * 0.92,
                    yerr=[
                        [max(v - low, 0) for v, (low, _) in zip(values, bounds)],
                        [max(high - v, 0) for v, (_, high) in zip(values, bounds)],
                    ],
                    color=RUN_COLOURS[n],
                    hatch=("", "///", "...")[n % 3],
                    label=f"{float(weight):g} of the teacher",
                    error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                )
            ax.axhline(0, color="black", lw=0.8)
            ax.set(ylabel=f"change of {name}")
            ax.grid(axis="y", color="#dddddd")
        names = [scope.replace("_", " ") for scope in scopes]
        axes[1].set_xticks(range(len(scopes)), names, rotation=30 if len(scopes) > 6 else 0)
        figure.suptitle("The student with the teacher's visual attention in chosen layers")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _save(figure, path)


def overlay_figure(
    path: Path, pictures: Mapping[str, Mapping[str, Image.Image]], title: str
) -> Path:
    """Overlays of one case: a row per token, a column per model.

    Args:
        path: of the PNG.
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
        return _save(figure, path)
