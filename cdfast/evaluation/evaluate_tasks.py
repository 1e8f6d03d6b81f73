"""`python -m cdfast.evaluate MODEL ... --tasks ...`: every model on every task, and the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cdfast.evaluation.delegated import load_lmms_eval, run_delegated
from cdfast.evaluation.files import LeftOut
from cdfast.evaluation.measures import MODES, Scored, compare, measure, score, unparsed
from cdfast.evaluation.report import averages, print_tables, write_files
from cdfast.evaluation.run import FORMAT, model_identity, results_file, run_task
from cdfast.evaluation.tasks import Task, chosen_tasks, load_items
from cdfast.miniature.suites import Item

Loader = Callable[[str], tuple[Any, Any]]


def evaluate_tasks(options: argparse.Namespace, load: Loader) -> dict[str, Any]:
    """Evaluate models on tasks, write the results and the report, and print the tables.

    Args:
        options: of `cdfast.evaluate`'s command line.
        load: from a model's name to the model (on its device) and its processor.

    Returns:
        The content of evaluation.json.

    Raises:
        ValueError: an option, file, record or results file that cannot be used.
    """
    tasks = chosen_tasks(options.tasks)
    names = list(dict.fromkeys(options.models))
    delegated = [task for task in tasks if task.family == "delegated"]
    if delegated:
        _check_delegated(delegated, options)
    left_out = {task.name: LeftOut(options.on_error) for task in tasks}
    ours = [task for task in tasks if task not in delegated]
    items = {task.name: _load(task, left_out[task.name], options) for task in ours}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "settings": _settings(options),
        "tasks": {task.name: {"title": task.title} for task in tasks},
        "models": {},
        "comparisons": {},
        "left_out": {},
    }
    first: dict[tuple[str, str], Scored] = {}
    for name in names:
        model, processor = load(name)
        entry: dict[str, Any] = {"tasks": {}}
        tests: dict[str, Any] = {}
        for task in tasks:
            if task in delegated:
                entry["tasks"][task.name] = _delegate(name, model, processor, task, options)
                continue
            said = _run(name, model, processor, task, items[task.name], left_out, options)
            entry["tasks"][task.name], scored = _measure(task, items[task.name], said, options)
            for mode, of_mode in scored.items():
                baseline = first.setdefault((task.name, mode), of_mode)
                if name != names[0]:
                    test = compare(baseline, of_mode)
                    tests.setdefault(task.name, {}).update({mode: test} if test else {})
        entry["averages"] = {mode: averages(entry["tasks"], mode) for mode in MODES}
        results["models"][name] = entry
        if name != names[0]:
            results["comparisons"][name] = tests
        del model, processor
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        results["left_out"] = {
            task: {"counts": dict(out.counts), "names": out.names}
            for task, out in left_out.items()
            if out.counts
        }
        # After every model: a report of those that are done survives an interruption.
        paths = write_files(results, options.output_dir)
    print_tables(results)
    for path in paths:
        print(path)
    return results


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ["tasks", "scoring", "length_normalise", "max_new_tokens", "limit", "on_error", "split"]
    names += ["per_kind", "vqa_per_kind", "seed", "dtype", "batch_size"]
    given = {name: getattr(options, name) for name in names}
    return {**given, "data": str(options.data) if options.data else None}


def _load(task: Task, left_out: LeftOut, options: argparse.Namespace) -> list[Item]:
    return load_items(
        task,
        options.data,
        left_out,
        limit=options.limit,
        split=options.split,
        per_kind=options.per_kind,
        vqa_per_kind=options.vqa_per_kind,
        seed=options.seed,
    )


def _header(name: str, model: Any, task: Task) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "task": task.name,
        "model": model_identity(name, model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _check_delegated(tasks: list[Task], options: argparse.Namespace) -> None:
    """Before any model is loaded: what delegated tasks need."""
    names = ", ".join(task.name for task in tasks)
    if options.scoring == "likelihood":
        raise ValueError(
            f"--scoring: expected both or generation for {names}, which have no choices; got "
            "likelihood"
        )
    load_lmms_eval()


def _delegate(
    name: str, model: Any, processor: Any, task: Task, options: argparse.Namespace
) -> dict[str, Any]:
    path = results_file(options.output_dir, name, task.name).with_suffix(".json")
    header = _header(name, model, task)
    size = options.batch_size
    measured = run_delegated(
        task.name, model, processor, path, header, batch_size=size, limit=options.limit
    )
    print(f"{name}: {task.title}: {measured['n']} records: {path}", file=sys.stderr, flush=True)
    return {"generation": measured}


def _run(
    name: str,
    model: Any,
    processor: Any,
    task: Task,
    items: list[Item],
    left_out: dict[str, LeftOut],
    options: argparse.Namespace,
) -> dict[str, Any]:
    header = _header(name, model, task)
    header |= {"scoring": options.scoring, "max_new_tokens": options.max_new_tokens}
    path = results_file(options.output_dir, name, task.name)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("questions"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        total = sum(len(item.questions) for item in items)
        number = bar.add_task(f"{name}: {task.title}", total=total)
        said = run_task(
            model,
            processor,
            items,
            path,
            header,
            left_out[task.name],
            batch_size=options.batch_size,
            advance=lambda n: bar.advance(number, n),
        )
    print(f"{name}: {task.title}: {len(said)} records: {path}", file=sys.stderr, flush=True)
    return said


def _measure(
    task: Task, items: list[Item], said: dict[str, Any], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Scored]]:
    if not said:
        raise ValueError(
            f"{task.title}: expected at least one record with a readable image, got none. Without "
            "--on-error skip the first error is shown."
        )
    modes = MODES if options.scoring == "both" else (options.scoring,)
    scored = {m: score(task, items, said, m, options.length_normalise) for m in modes}
    entry: dict[str, Any] = {mode: measure(of_mode) for mode, of_mode in scored.items()}
    if "generation" in scored:
        entry["unparsed"] = unparsed(scored["generation"], said)
    return entry, scored
