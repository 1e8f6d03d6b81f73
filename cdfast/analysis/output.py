"""What an analysis leaves beside its numbers: overlays, figures, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from cdfast.analysis import plots
from cdfast.analysis.cases import Case
from cdfast.analysis.measure import Plan
from cdfast.analysis.numbers import summary_rows
from cdfast.maps import AttentionMaps, batch_attention_maps
from cdfast.matching import layers_in_range
from cdfast.planes import GeometryError
from cdfast.prompts import find_tokens
from cdfast.similarity import num_layers

_EXPLORER_CASES = 8


def draw_cases(
    models: Mapping[str, PreTrainedModel],
    processor: Any,
    cases: Sequence[Case],
    plan: Plan,
    folder: Path,
    *,
    layers: str,
    number: int,
    words: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Overlays of cases of different kinds: teacher, student and baseline side by side.

    Shown are the first of the student's matched layers, the teacher's window of it, and the
    baseline's layer in the same place of its own range.

    Args:
        models, processor, cases, plan: of the analysis.
        folder: of the PNGs.
        layers: the range of layers that is matched.
        number: the most cases to draw.
        words: drawn beside the answer, in cases that have them.

    Returns:
        Per case `kind`, `answer`, `layers`, `words` and `file`; `error` where places in the picture
        are not known.
    """
    first = next(iter(plan.matched))
    shown: dict[str, list[int]] = {"teacher": list(plan.matched[first]), "student": [first]}
    if "baseline" in models:
        shown["baseline"] = layers_in_range(num_layers(models["baseline"]), layers)[:1]
    drawn = []
    for index, case in enumerate(one_of_each_kind(cases)[: max(0, number)]):
        prompt = case.prompt(processor)
        maps = {}
        for name, model in models.items():
            [maps[name]] = batch_attention_maps(
                model, processor, [prompt], layers=shown[name], backend=plan.backend
            )
        there = [word for word in words if _is_there(maps["student"], word)]
        entry = {"kind": case.kind, "answer": case.answer, "layers": shown, "words": there}
        try:
            pictures = {
                word or "answer": {
                    name: maps[name].overlay(
                        shown[name], word=word or None, occurrence=0 if word else None
                    )
                    for name in models
                }
                for word in ["", *there]
            }
        except GeometryError as error:
            return [{**entry, "error": str(error)}]
        question = " ".join(
            part["text"] for m in case.messages for part in m["content"] if part["type"] == "text"
        )
        path = folder / f"overlay-{index}-{case.kind}.png"
        plots.save(plots.overlay_figure(pictures, f"{question} {case.answer}"), path)
        drawn.append({**entry, "file": path.name})
    return drawn


def _is_there(maps: AttentionMaps, word: str) -> bool:
    try:
        found = find_tokens(maps.prompt, maps.tokens, word=word, occurrence=0)
    except ValueError:
        return False
    return all(maps.tokens[n].position in maps.rows for n in found)


def one_of_each_kind(cases: Sequence[Case]) -> list[Case]:
    """The first case of every kind, in the order of the cases."""
    return list({case.kind: case for case in reversed(cases)}.values())[::-1]


def explorer_cases(cases: Sequence[Case]) -> list[Case]:
    """The first case of every kind, at most 8: what a page's explorer shows."""
    return one_of_each_kind(cases)[:_EXPLORER_CASES]


def draw_figures(content: Mapping[str, Any], folder: Path) -> list[str]:
    """The PNG figures of an analysis; returns their names."""
    # One panel where there is one group: it is all there is.
    groups = content["scopes"]["groups"]
    scopes = ["all", *groups[:3]] if len(groups) > 1 else groups
    return [
        plots.save(figure, folder / f"{name}.png").name
        for name, figure in plots.figures_of(content, scopes).items()
    ]


def results_table(content: Mapping[str, Any]) -> Table:
    """A row per scope: accuracy of every model, similarity, correlation, the substitution."""
    swapped = ", ".join(content["settings"]["substituted"]) or "none"
    table = Table(
        caption="accuracy of each model; matched: visual similarity with the teacher; r: of it and "
        "the answer's probability, with its 95% interval; change: of accuracy with the teacher's "
        f"attention in layers {swapped}"
    )
    headings, rows = summary_rows(content)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table
