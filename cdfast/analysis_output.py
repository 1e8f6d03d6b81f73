"""What an analysis leaves beside its numbers: overlays, figures, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from cdfast import analysis_plots as plots
from cdfast.analysis import Plan
from cdfast.cases import Case
from cdfast.maps import AttentionMaps, batch_attention_maps
from cdfast.matching import layers_in_range
from cdfast.planes import GeometryError
from cdfast.prompts import find_tokens
from cdfast.similarity import num_layers


def draw_cases(
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    cases: Sequence[Case],
    plan: Plan,
    options: Any,
) -> list[dict[str, Any]]:
    """Overlays of cases of different kinds: teacher, student and baseline side by side.

    Shown are the first of the student's matched layers, the teacher's window of it, and the
    baseline's layer in the same place of its own range.
    """
    first = next(iter(plan.matched))
    layers: dict[str, list[int]] = {"teacher": list(plan.matched[first]), "student": [first]}
    if "baseline" in models:
        layers["baseline"] = layers_in_range(num_layers(models["baseline"]), options.layers)[:1]
    one_of_each = list({case.kind: case for case in reversed(cases)}.values())[::-1]
    drawn = []
    for number, case in enumerate(one_of_each[: max(0, options.overlays)]):
        prompt = case.prompt(processor)
        maps = {}
        for name, model in models.items():
            backend = options.backend
            kept = layers[name]
            [maps[name]] = batch_attention_maps(
                model, processor, [prompt], layers=kept, backend=backend
            )
        words = [word for word in options.overlay_words if _is_there(maps["student"], word)]
        entry = {"kind": case.kind, "answer": case.answer, "layers": layers, "words": words}
        try:
            pictures = {
                word or "answer": {
                    name: maps[name].overlay(
                        layers[name], word=word or None, occurrence=0 if word else None
                    )
                    for name in models
                }
                for word in ["", *words]
            }
        except GeometryError as error:
            return [{**entry, "error": str(error)}]
        question = " ".join(
            part["text"] for m in case.messages for part in m["content"] if part["type"] == "text"
        )
        path = options.output_dir / f"overlay-{number}-{case.kind}.png"
        plots.overlay_figure(path, pictures, f"{question} {case.answer}")
        drawn.append({**entry, "file": path.name})
    return drawn


def _is_there(maps: AttentionMaps, word: str) -> bool:
    try:
        found = find_tokens(maps.prompt, maps.tokens, word=word, occurrence=0)
    except ValueError:
        return False
    return all(maps.tokens[n].position in maps.rows for n in found)


def draw_figures(content: Mapping[str, Any], folder: Path) -> list[str]:
    """The PNG figures of an analysis; returns their names."""
    # One panel where there is one group: it is all there is.
    groups = content["scopes"]["groups"]
    groups = ["all", *groups[:3]] if len(groups) > 1 else groups
    made = [
        plots.attention_figure(folder / "attention.png", content["answer_attention"], groups),
        plots.similarity_figure(folder / "similarity.png", content["similarity"], groups),
        plots.groups_figure(folder / "groups.png", content["groups"], groups),
    ]
    if content["substitution"]["all"]:
        path = folder / "substitution.png"
        names = list(dict.fromkeys([*groups, *content["scopes"]["kinds"]]))
        made.append(plots.substitution_figure(path, content["substitution"], names))
    return [path.name for path in made]


def results_table(content: Mapping[str, Any]) -> Table:
    """A row per scope: accuracy of every model, correlation, and the effect of the substitution."""
    models = list(content["models"])
    weights = [w for w in content["substitution"]["all"] if w != "0"]
    swapped = ", ".join(content["settings"]["substituted"]) or "none"
    table = Table(
        caption="accuracy; r: similarity of visual attention against answer probability, with its "
        f"95% interval; change: of accuracy with the teacher's attention in layers {swapped}"
    )
    headings = ["scope", "n", *models, "r", *(f"change at {w}" for w in weights)]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "scope" else "right")
    for scope, number in content["cases"].items():
        groups, swap = content["groups"][scope], content["substitution"][scope]
        table.add_row(
            scope,
            str(number),
            *(f"{content['answers'][scope][m]['accuracy']:.3f}" for m in models),
            _with_interval(groups["pearson"], groups["pearson_ci95"]),
            *(
                _with_interval(swap[w]["accuracy_change"], swap[w]["accuracy_change_ci95"])
                for w in weights
            ),
        )
    return table


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")
