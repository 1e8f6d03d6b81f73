"""The report's section about what was measured while a run trained (`eval_steps`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cdfast.page import figure, fixed, table

MEAN = "eval_similarity/mean"
_NO_ACCURACY = ("eval_runtime", "eval_probe_seconds")
# Longer tables are thinned in the page; results.json has every entry.
ROWS = 200


def evaluation_section(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], stages: Sequence[tuple[int, str]]
) -> str:
    """Curves and their numbers; empty where no run was evaluated while it trained.

    Args:
        runs: run -> evaluations of all stages, with `total_step` and `stage`.
        stages: (first step, label) of the main run's stages.
    """
    runs = {name: log for name, log in runs.items() if log}
    panels = _panels(runs)
    if not panels:
        return ""
    from cdfast.plots import evaluation_figure

    layers = sorted(
        {n for log in runs.values() for entry in log for n in entry if "similarity/layer_" in n},
        key=lambda name: int(name.rpartition("_")[2]),
    )
    main = next(iter(runs.values()))
    drawn = [layer for layer in layers if any(layer in entry for entry in main)]
    columns = [*panels, *layers]
    every = max(math.ceil(len(log) / ROWS) for log in runs.values())
    rows = [
        [name, str(e["total_step"]), e["stage"], *(fixed(e.get(column)) for column in columns)]
        for name, log in runs.items()
        for e in log[::every]
    ]
    heading = ["run", "step", "stage", *(c.removeprefix("eval_") for c in columns)]
    caption = "Evaluations" + (f", one in {every}; all: results.json" if every > 1 else "")
    last = "; ".join(
        f"{name}: " + ", ".join(f"{p.removeprefix('eval_')} {_last(log, p)}" for p in panels)
        for name, log in runs.items()
    )
    return figure(
        evaluation_figure("evaluations", runs, panels, drawn, stages, f"In training. Last {last}"),
        "Measured every eval_steps steps: loss of held-out samples, answers to a small part of the "
        "validation questions, and similarity of student and teacher attention in the matched "
        "layers (text rows), where a teacher is loaded. The "
        "accuracy table above is of the end, on the questions of evaluate_split.",
        table(caption, heading, rows, left=(2,)),
    )


def _panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What has a curve, of accuracies by group, mean similarity and LM loss."""
    names = dict.fromkeys(
        name
        for log in runs.values()
        for entry in log
        for name, value in entry.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and math.isfinite(value)
    )
    groups = [
        n
        for n in names
        if not n.startswith(("eval_loss", "eval_similar")) and n not in _NO_ACCURACY
    ]
    # Rates of an evaluation without a probe are no accuracies.
    groups = [name for name in groups if not name.endswith("_per_second")]
    return [*groups, *(name for name in (MEAN, "eval_loss_lm") if name in names)]


def _last(log: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [entry[name] for entry in log if entry.get(name) is not None]
    return fixed(values[-1] if values else None)
