"""The tables of an evaluation over several models: in the terminal, as Markdown and as HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from cdfast.evaluation.measures import METRICS, MODES
from cdfast.evaluation.tasks import AVERAGES, TASKS
from cdfast.page import MISSING, page, table, text
from cdfast.storage import write_text

FILES = ("evaluation.json", "evaluation.md", "evaluation.html")
_HOW = {
    "likelihood": "by likelihood: the most likely of the answers",
    "generation": "by generation: what the free greedy reply means; unclear ones are wrong",
}
_NAMES = {"f1": "F1", "yes_ratio": "yes-ratio", "both_orders": "right in every order"}

Results = Mapping[str, Any]


class Shown(NamedTuple):
    """A table: its first column holds headings, the others numbers."""

    caption: str
    heading: list[str]
    rows: list[list[str]]


def averages(tasks: Mapping[str, Any], mode: str) -> dict[str, dict[str, Any]]:
    """The averages of a model: the mean headline metric over the tasks of a group.

    Args:
        tasks: of one model: task -> mode -> what `cdfast.evaluation.measures.measure` returned.
        mode: "likelihood" or "generation".

    Returns:
        Group -> `value`, `tasks` (those evaluated) and `of` (how many the paper averages).
    """
    result = {}
    for group, members in AVERAGES.items():
        values = {
            name: tasks[name][mode]["metrics"][TASKS[name].headline]["value"]
            for name in members
            if name in tasks and mode in tasks[name]
        }
        if values:
            mean = sum(values.values()) / len(values)
            result[group] = {"value": mean, "tasks": list(values), "of": len(members)}
    return result


def main_tables(results: Results, intervals: bool = True) -> list[Shown]:
    """Models down, tasks across, for each way of scoring; then differences from the first model.

    Args:
        results: the content of evaluation.json.
        intervals: behind every number its 95% interval.
    """
    used = {
        mode for m in results["models"].values() for task in m["tasks"].values() for mode in task
    }
    shown = [_main_table(results, mode, intervals) for mode in MODES if mode in used]
    return shown + _comparisons(results)


def tables(results: Results) -> list[Shown]:
    """All tables of `results` (the content of evaluation.json), those over all models first."""
    shown = main_tables(results)
    for name in results["tasks"]:
        shown += [_task_table(results, name, mode) for mode in MODES if _has(results, name, mode)]
    left_out = [
        [TASKS[name].title, reason, str(count), "; ".join(entry["names"][reason][:3])]
        for name, entry in results["left_out"].items()
        for reason, count in entry["counts"].items()
    ]
    if left_out:
        heading = ["task", "reason", "records", "the first"]
        shown.append(Shown("Records left out (--on-error skip)", heading, left_out))
    return shown


def _has(results: Results, task: str, mode: str) -> bool:
    return any(mode in m["tasks"].get(task, {}) for m in results["models"].values())


def _main_table(results: Results, mode: str, intervals: bool) -> Shown:
    names = [name for name in results["tasks"] if _has(results, name, mode)]
    first = next(iter(results["models"].values()))
    groups = first["averages"].get(mode, {})
    heading = ["model"]
    for name in names:
        metric = TASKS[name].headline
        heading.append(TASKS[name].title + (f" ({_NAMES[metric]})" if metric in _NAMES else ""))
    for group, average in groups.items():
        part = len(average["tasks"])
        heading.append(f"{group} avg" + (f" ({part}/{average['of']})" * (part < average["of"])))
    rows = []
    for model, entry in results["models"].items():
        headlines = [entry["tasks"][n][mode]["metrics"][TASKS[n].headline] for n in names]
        cells = [_cell(m) if intervals else percent(m["value"]) for m in headlines]
        found = entry["averages"].get(mode, {})
        rows.append([model, *cells, *(percent(found[group]["value"]) for group in groups)])
    chances = [first["tasks"][n][mode]["metrics"][TASKS[n].headline]["chance"] for n in names]
    rows.append(["chance", *map(percent, chances), *("" for _ in groups)])
    brackets = ". Brackets: 95% intervals" if intervals else ""
    return Shown(f"All models (%), {_HOW[mode]}{brackets}", heading, rows)


def _comparisons(results: Results) -> list[Shown]:
    rows = [
        [
            f"{model}: {TASKS[name].title}, {mode}",
            _NAMES.get(test["metric"], test["metric"]),
            str(test["n"]),
            f"{100 * test['difference']:+.1f}",
            f"[{100 * test['ci95'][0]:+.1f}, {100 * test['ci95'][1]:+.1f}]",
            f"{test['p']:.2g}",
            test["test"],
        ]
        for model, tasks in results["comparisons"].items()
        for name, modes in tasks.items()
        for mode, test in modes.items()
    ]
    if not rows:
        return []
    heading = ["model: task", "metric", "records", "difference", "95% interval", "p", "test of p"]
    first = next(iter(results["models"]))
    caption = f"Differences from {first} (percentage points), on the same records"
    return [Shown(caption, heading, rows)]


def _task_table(results: Results, name: str, mode: str) -> Shown:
    task = TASKS[name]
    metrics = METRICS[task.family]
    subsets = next(iter(results["models"].values()))["tasks"][name][mode]["subsets"]
    rows = []
    for model, entry in results["models"].items():
        measured = entry["tasks"][name][mode]
        parts = {"": measured, **{s: measured["subsets"].get(s) for s in subsets}}
        for part, found in parts.items():
            if found:
                cells = [_cell(found["metrics"][metric]) for metric in metrics]
                rows.append([f"{model}{part and f': {part}'}", str(found["n"]), *cells])
        if "unparsed" in entry["tasks"][name] and mode == "generation":
            told = entry["tasks"][name]["unparsed"]
            share = f"{told['unparsed']} of {told['replies']} replies"
            rows.append([f"{model}: unclear", "", share, *("" for _ in metrics[1:])])
    heading = ["model", "records", *(_NAMES.get(metric, metric) for metric in metrics)]
    mean = "; the mean over its subsets" if task.over_subsets else ""
    return Shown(f"{task.title} (%), by {mode}{mean}", heading, rows)


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal, or a dash."""
    return MISSING if value is None else f"{100 * value:.1f}"


def _cell(metric: Mapping[str, Any]) -> str:
    if metric["ci95"] is None:
        return percent(metric["value"])
    low, high = metric["ci95"]
    return f"{percent(metric['value'])} [{percent(low)}, {percent(high)}]"


def print_tables(results: Results) -> None:
    """Print the tables over all models, without intervals; these are in the files."""
    console = Console()
    for shown in main_tables(results, intervals=False):
        printed = RichTable(box=SIMPLE_HEAD, padding=0, show_edge=False)
        widths = []
        for i, heading in enumerate(shown.heading):
            # Headings are broken between words, numbers and names never.
            cells = [*heading.split(), *(row[i] for row in shown.rows)]
            widths.append(max(map(len, cells)))
            justify: Literal["right", "left"] = "right" if i else "left"
            printed.add_column(escape(heading), justify=justify, width=widths[-1])
        for row in shown.rows:
            printed.add_row(*map(escape, row))
        console.width = max(console.width, sum(widths) + 2 * len(widths))
        console.print(f"\n{escape(shown.caption)}", highlight=False)
        console.print(printed)


def markdown(results: Results) -> str:
    """The tables as Markdown."""
    parts = ["# Evaluation"]
    for shown in tables(results):
        cells = [shown.heading, ["---", *("---:" for _ in shown.heading[1:])], *shown.rows]
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
        parts += [f"**{shown.caption}**", "\n".join(lines)]
    return "\n\n".join([*parts, f"Settings: `{json.dumps(results['settings'])}`", ""])


def html(results: Results) -> str:
    """The tables as one page that opens offline."""
    sections: dict[str, str] = {}
    for shown in tables(results):
        title = next((t for t in _titles(results) if shown.caption.startswith(f"{t} (%)")), "")
        section = title or ("Models" if shown.caption.startswith("All") else "Tests and records")
        sections[section] = sections.get(section, "") + table(*shown)
    settings = json.dumps(results["settings"], indent=1)
    sections["Settings"] = f"<pre>{text(settings)}</pre>"
    return page("Evaluation", "<h1>Evaluation</h1>", sections)


def _titles(results: Results) -> list[str]:
    return [TASKS[name].title for name in results["tasks"]]


def write_files(results: Results, folder: Path) -> list[Path]:
    """Write evaluation.json, .md and .html into the folder; returns their paths."""
    contents = (json.dumps(results, indent=1) + "\n", markdown(results), html(results))
    paths = [folder / name for name in FILES]
    for path, content in zip(paths, contents):
        write_text(path, content)
    return paths
