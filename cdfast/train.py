"""The command: `torchrun [--nproc-per-node N] -m cdfast.train [RECIPE|FILE.yaml] [--option value]`.

A run is a list of stages. Each stage loads the student that the one before has written, trains it
with `DistillationTrainer`, and writes the next: the same path whether the run is new or resumed.

    <output_dir>/recipe.yaml              the resolved recipe
    <output_dir>/student-init/            the student before training
    <output_dir>/stages/1-dpt/            checkpoints, logs and the student after the stage
    <output_dir>/model/                   the trained student, for from_pretrained, and its card
    <output_dir>/results.json, report.html
    <output_dir>/analysis/                attention of teacher and student; data of the explorer
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from cdfast.command_line import parse_command_line
from cdfast.config import (
    HUB_ARGUMENTS,
    ConfigError,
    Recipe,
    load_recipe,
    override,
    recipe_files,
    to_dict,
)
from cdfast.data import DataError
from cdfast.models import load_processor, make_initial_student
from cdfast.nonfinite import NonFiniteError
from cdfast.push import HubError, hub_target, prepare_upload, push_run
from cdfast.records import printable
from cdfast.report import print_summary, write_report
from cdfast.results import measure, run_environment
from cdfast.sharing.model_card import RESULTS_FILE, write_model_card
from cdfast.stages.checks import check_stages
from cdfast.stages.data import probe_samples, trained_scenes
from cdfast.stages.run import Run, user_errors
from cdfast.stages.training import run_stage, trained_matches
from cdfast.storage import (
    CheckpointError,
    nearest_existing,
    prepare_run_folder,
    staged_folder,
    together,
    write_json,
    write_text,
)
from cdfast.watch import watch_ranks

RECIPE_FILE = "recipe.yaml"
# What may change when a run is resumed: nothing that the trained weights depend on.
_FREE_ON_RESUME = (
    "output_dir",
    "description",
    "license",
    "workers",
    "compare",
    "evaluate",
    "evaluate_split",
    "evaluate_seed",
    "eval_data",
    "eval_image_root",
    "eval_samples",
    "eval_questions",
    "analyze_questions",
    "rank_timeout",
    "max_skipped_steps",
)


def run_recipe(recipe: Recipe, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Run all stages of a recipe in `folder`, evaluate, and write results.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: a stage that cannot run, or a run that was started with other options.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    results_path = folder / RESULTS_FILE
    if resume:
        check_same_recipe(recipe, folder)
        if results_path.exists():
            found = json.loads(results_path.read_text())
            if _same_questions(found["recipe"], recipe):
                return found
    processor = load_processor(recipe)
    run = Run(recipe, folder, processor, state)
    check_stages(run)
    start = time.monotonic()
    prepare_run_folder(folder)

    def write_start() -> None:
        if not (folder / RECIPE_FILE).exists():  # other ranks may be reading it to resume
            write_text(folder / RECIPE_FILE, yaml.safe_dump(to_dict(recipe), sort_keys=False))
        if not (run.initial_student / "config.json").exists():
            run.say("preparing the student")
            with user_errors(), staged_folder(run.initial_student) as partial:
                make_initial_student(recipe, processor, partial)

    together(lambda: write_start() if state.is_main_process else None, folder)
    stages = [run_stage(run, n, resume) for n in range(1, len(recipe.stages) + 1)]
    results: dict[str, Any] = {}
    if state.is_main_process:
        results = {
            "name": recipe.name,
            "recipe": to_dict(recipe),
            "environment": run_environment(state.num_processes, stages),
            "stages": stages,
            **measure(
                recipe,
                processor,
                run.initial_student,
                run.model,
                probe_samples(run),
                trained_matches(stages),
                trained_scenes(run),
            ),
            "seconds": round(time.monotonic() - start, 1),
        }
        write_json(results_path, results)
    state.wait_for_everyone()
    return results


def check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse to continue a run with other options than it was started with.

    Raises:
        ConfigError: an option that the weights depend on differs; it is named.
    """
    path = folder / RECIPE_FILE
    if not path.exists():
        return
    then = _options(load_recipe(str(path)))
    now = _options(recipe)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise ConfigError(
                f"--resume: {name} was {then.get(name)!r} when the run in {folder} was started; "
                f"got {now.get(name)!r}. Give the same options, or start a new run in another "
                "--output-dir."
            )


def _same_questions(measured: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run's results are of the evaluation scenes that are asked for now."""
    # Results written before there were these options are of their defaults.
    now, default = to_dict(recipe), Recipe()
    names = ("evaluate_split", "evaluate_seed")
    return all(measured.get(name, getattr(default, name)) == now[name] for name in names)


def _options(recipe: Recipe) -> dict[str, Any]:
    """Every option that the weights depend on, by name; those of stages as stages[n].name."""
    values = {k: v for k, v in to_dict(recipe).items() if k not in _FREE_ON_RESUME}
    values["arguments"] = {k: v for k, v in recipe.arguments.items() if k not in HUB_ARGUMENTS}
    for number, stage in enumerate(values.pop("stages"), 1):
        values |= {f"stages[{number}].{name}": value for name, value in stage.items()}
    return values


def run_compare(recipe: Recipe, names: Sequence[str], folder: Path, resume: bool) -> None:
    """The recipe and its variants, each in a folder of its own, and one table over all."""
    if not recipe.compare:
        raise ConfigError(f"--compare: the recipe {recipe.name!r} names no variants under compare.")
    unknown = sorted(set(names) - set(recipe.compare))
    if unknown:
        raise ConfigError(
            f"--compare: {unknown[0]!r} is no variant of the recipe {recipe.name!r}. "
            f"Known: {', '.join(recipe.compare)}."
        )
    # All of them before the first run: a mistake in a variant must not show hours later.
    variants = {
        name: override(recipe, {**recipe.compare[name], "name": name})
        for name in names or recipe.compare
    }
    for variant in variants.values():
        variant.check_runnable()
    places = {recipe.name: (recipe, folder)}
    places |= {name: (variant, folder / "compare" / name) for name, variant in variants.items()}
    results = {name: run_recipe(*place, resume) for name, place in places.items()}
    if PartialState().is_main_process:
        write_json(folder / "compare.json", results)
        report(places, results)


def report(places: Mapping[str, tuple[Recipe, Path]], results: Mapping[str, Any]) -> None:
    """Write and print what there is, then analyse attention and write the page with that too.

    Args:
        places: run name -> recipe and folder; the first is the main run.
        results: run name -> what its results.json holds.
    """
    # One rank writes the page: the others need no matplotlib.
    from cdfast.analysis.of_runs import TrainedRun, analyze_runs

    _, folder = next(iter(places.values()))
    write_report(folder, results)
    print_summary(results, folder)
    runs = {name: TrainedRun(*places[name], results[name]) for name in results}
    for name, (recipe, place) in places.items():
        write_model_card(place / "model", results[name], license=recipe.license)
    write_report(folder, results, *analyze_runs(runs))


def output_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """Where the run goes: --output-dir, or the first free runs/<name>[-n] (newest on resume).

    Raises:
        ConfigError: the folder has a run already and neither --resume nor --overwrite is given.
    """
    if recipe.output_dir is None:
        slug = re.sub(r"[^\w.-]+", "-", recipe.name)
        taken = [Path("runs") / (slug if n == 1 else f"{slug}-{n}") for n in range(1, 10_000)]
        existing = [path for path in taken if path.exists()]
        if resume:
            if existing:
                return max(existing, key=lambda path: path.stat().st_mtime)
            print(f"--resume: no run of {recipe.name!r} in runs/ yet: starting afresh", flush=True)
        return next(path for path in taken if not path.exists())
    if not recipe.output_dir.strip() or "\0" in recipe.output_dir:
        raise ConfigError(
            f"output_dir: expected a folder; got {recipe.output_dir!r}. Give another --output-dir."
        )
    folder = Path(recipe.output_dir)
    check_writable(folder)
    if resume and not (folder / RECIPE_FILE).exists():
        print(f"--resume: no run in {folder} yet: starting afresh", flush=True)
    if overwrite and (folder / RECIPE_FILE).exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()) and not resume:
        raise ConfigError(
            f"output_dir: {folder} is not empty. Give --resume to continue the run in it, "
            "--overwrite to delete it, or another --output-dir."
        )
    return folder


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written in, now and not when the first stage ends.

    Raises:
        ConfigError: it, or the folder that is to hold it, is a file or takes no files.
    """
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"output_dir: expected a folder that can be written; got {str(folder)!r}: {error}. "
            "Give another --output-dir."
        ) from error


def list_recipes() -> None:
    """Print the shipped recipes."""
    for name in recipe_files():
        recipe = load_recipe(name)
        print(f"{name:24} {recipe.description}")


def run_command(recipe: Recipe, flags: argparse.Namespace, state: PartialState) -> None:
    """Choose the folder, run the recipe and its variants there, write the report."""
    # Rank 0 decides, because all ranks look at a folder that it is about to fill.
    chosen: list[Any] = [None]
    if state.is_main_process:
        try:
            prepare_upload(recipe)
            chosen = [output_folder(recipe, resume=flags.resume, overwrite=flags.overwrite)]
        except (ConfigError, HubError) as error:
            chosen = [error]
    chosen = broadcast_object_list(chosen)
    if isinstance(chosen[0], Exception):
        raise chosen[0]
    folder = chosen[0]
    if flags.compare is not None:
        run_compare(recipe, flags.compare, folder, flags.resume)
    else:
        results = run_recipe(recipe, folder, flags.resume)
        if state.is_main_process:
            report({recipe.name: (recipe, folder)}, {recipe.name: results})
    if state.is_main_process:
        push_run(recipe, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m cdfast.train`."""
    try:
        recipe, flags = parse_command_line(sys.argv[1:] if argv is None else argv)
        if recipe is None:
            return list_recipes()
        hub_target(recipe)  # refuses what contradicts itself, in a dry run too
        if flags.dry_run:
            from cdfast.dry_run import dry_run

            with user_errors():
                fits = dry_run(recipe, samples=flags.dry_run_samples, json_path=flags.dry_run_json)
            if not fits:
                sys.exit(1)
            return
        recipe.check_runnable()
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            # torchrun --max-restarts runs the same command again: --overwrite has been done.
            flags.resume, flags.overwrite = True, False
        state = PartialState(cpu=not torch.cuda.is_available())
        with watch_ranks(recipe.rank_timeout):
            run_command(recipe, flags, state)
    except (ConfigError, DataError, CheckpointError, NonFiniteError, HubError) as error:
        print(f"error: {_without_traceback(error)}", file=sys.stderr)
        sys.exit(2)


def _without_traceback(error: Exception) -> str:
    """The message alone, in one line: a data loader's worker adds its traceback to it."""
    raised = f"{DataError.__module__}.{DataError.__qualname__}: "
    return printable(" ".join(str(error).rpartition(raised)[2].split()))


if __name__ == "__main__":
    main()
