"""The data sets of a recipe, each checked once, with a progress bar: a part of `--dry-run`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cdfast.config import ConfigError, Recipe
from cdfast.data_check.check import (
    DataCheck,
    EncodingOptions,
    check_masks,
    evenly_spaced,
    findings,
)
from cdfast.data_check.report import print_data
from cdfast.data_check.samples import FileSamples, StreamSamples
from cdfast.encoding import Sample
from cdfast.models import load_config, load_processor, teacher_source
from cdfast.stages.data import stage_dataset, uses_scenes
from cdfast.stages.run import Run, user_errors
from cdfast.storage import write_json

# Scenes that are generated cannot be broken: a few show lengths and answers.
GENERATED = 64
# Of a stream, which may have no end, its beginning: records of all its files together.
STREAMED = 2000


@dataclass(frozen=True)
class CheckedData:
    """Data that one or several stages train on, or `held out` data.

    Args:
        used_by: such as "1 (dpt)".
        names: files, or the name of an embedded set of scenes.
        roots: image roots.
        options: how it is encoded.
        stage: the number of its first stage where it is generated, else 0.
        streamed: read from the front by the run.
    """

    used_by: list[str]
    names: list[str]
    roots: list[str]
    options: EncodingOptions
    stage: int = 0
    streamed: bool = False


@dataclass
class _Scenes:
    """Generated samples before they are encoded."""

    scenes: Any
    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int) -> Sample:
        if hasattr(self.scenes, "sample"):
            return self.scenes.sample(index)
        return self.scenes.scenes[index]


def data_sets(recipe: Recipe) -> list[CheckedData]:
    """What the stages of a recipe read, each data set once, then held-out files."""
    found: dict[Any, CheckedData] = {}
    for number, stage in enumerate(recipe.stages, 1):
        names = stage.data or recipe.data
        roots = stage.image_root or recipe.image_root
        used_by = f"{number} ({stage.stage})"
        if not names:
            continue
        if uses_scenes(recipe, number):
            # Pairs are single questions; see PreferenceScenes.
            options = EncodingOptions(
                turns="dialogue" if stage.pairs else "independent", pairs=stage.pairs
            )
            found[number] = CheckedData([used_by], names, [], options, number)
            continue
        key = (*names, stage.pairs, *roots)
        if key not in found:
            options = _file_options(recipe, stage.pairs)
            found[key] = CheckedData([], names, roots, options, streamed=recipe.streaming)
        found[key].used_by.append(used_by)
    if recipe.eval_data:
        roots = recipe.eval_image_root or recipe.image_root
        for pairs in sorted({stage.pairs for stage in recipe.stages}):
            options = _file_options(recipe, pairs)
            used_by = "held out, as pairs" if pairs else "held out"
            found["eval", pairs] = CheckedData([used_by], recipe.eval_data, roots, options)
    return list(found.values())


def _file_options(recipe: Recipe, pairs: bool) -> EncodingOptions:
    return EncodingOptions(
        recipe.max_length, recipe.turns, recipe.on_error, recipe.max_pixels, pairs
    )


def check_recipe_data(
    recipe: Recipe, console: Console, *, samples: int | None = None, path: Path | None = None
) -> bool:
    """Check and print every data set of a recipe.

    Args:
        recipe: its `workers` processes decode.
        console: where tables go; progress goes to the standard error.
        samples: how many records of each data set to look at; None: all, 0: no check.
        path: a JSON file that is written after each data set.

    Returns:
        Whether all was looked at, and a run would go through it.

    Raises:
        ConfigError: `path` cannot be written.
    """
    found = data_sets(recipe)
    if samples == 0 or not found:
        return True
    processor, reason, stops = _processor(recipe)
    content: dict[str, Any] = {
        "recipe": recipe.name,
        "not_checked": reason,
        "stops": stops,
        "data_sets": [],
    }
    for data in found:
        result = check_data_set(recipe, data, processor, samples)
        content["data_sets"].append(result)
        sets = content["data_sets"]
        content["would_run"] = not stops and all(r["complete"] and not r["stops"] for r in sets)
        if path is not None:
            _write(path, content)
        if not result["complete"]:
            break
    print_data(content, console)
    if path is not None:
        console.print(f"written to {path}", markup=False)
    return content["would_run"]


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise ConfigError(
            f"dry_run_json: expected a file that can be written; got {str(path)!r}: {error}. Give "
            "another --dry-run-json."
        ) from error


def _processor(recipe: Recipe) -> tuple[Any, str | None, list[str]]:
    """The run's processor, or None, what cannot be checked without it, and why a run would stop.

    A run would not where a model is not here yet: it may be a name of a hub.
    """
    try:
        return load_processor(recipe), None, []
    except ConfigError as error:
        unchecked = "tokens, truncation and answer masks, because there is no processor"
        if _models_are_here(recipe):
            return None, unchecked, [str(error)]
        return None, f"{unchecked}: {error}", []


def _models_are_here(recipe: Recipe) -> bool:
    """Whether there are the checkpoints that a processor is loaded from."""
    try:
        first = teacher_source(recipe) if recipe.teacher else recipe.student
        for source in (first, None if recipe.teacher else recipe.vision_tower):
            if source and not Path(source).is_dir():
                load_config(source, recipe.trust_remote_code)
    except ConfigError:
        return False
    return True


def check_data_set(
    recipe: Recipe, data: CheckedData, processor: Any, samples: int | None
) -> dict[str, Any]:
    """Look at the records of one data set; Ctrl-C ends it with what was found until then.

    Returns:
        What `DataCheck.summary` returns, and which data it is of, how many records it has, which
        of them were looked at, and why a run would stop.
    """
    start = time.monotonic()
    opened = _opened(recipe, data, processor, samples)
    wanted = min(GENERATED, samples or GENERATED) if data.stage else samples
    indices = evenly_spaced(len(opened), None if data.streamed else wanted)
    check = DataCheck(data.options, indices, processor)
    _look(opened, check, recipe.workers, _title(data))
    if check.checked == len(indices):
        check_masks(opened, check)
    part = "all" if len(indices) == len(opened) else "evenly spaced"
    if data.streamed:
        part = "the first of each file"
    return {
        "data": data.names,
        "used_by": data.used_by,
        "generated": bool(data.stage),
        "pairs": data.options.pairs,
        "records": None if data.streamed else len(opened),
        "selection": part,
        **check.summary(),
        "stops": check.stops(opened.faults),
        "on_error": data.options.on_error,
        "seconds": round(time.monotonic() - start, 2),
    }


def _title(data: CheckedData) -> str:
    names = [Path(name).name for name in data.names]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _opened(recipe: Recipe, data: CheckedData, processor: Any, samples: int | None) -> Any:
    if not data.stage:
        given = (data.names, data.roots, data.options.pairs)
        with Console(stderr=True).status(f"Reading {_title(data)}"):
            if data.streamed:
                number = STREAMED if samples is None else samples
                processes = int(os.environ.get("WORLD_SIZE", "1"))  # as the launcher sets it
                return StreamSamples(*given, number, processes, recipe.workers)
            return FileSamples(*given)
    with user_errors():
        run = Run(recipe, Path("unused"), processor, PartialState(cpu=True))
        return _Scenes(stage_dataset(run, data.stage))


def _look(opened: Any, check: DataCheck, workers: int, title: str) -> None:
    columns = (
        TextColumn("Checking {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[broken]} broken"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=len(check.indices), broken=0)
        try:
            for found in findings(opened, check, workers):
                check.add(found)
                bar.update(task, advance=1, broken=check.broken.total())
        except KeyboardInterrupt:
            bar.console.print(f"stopped after {check.checked} of {len(check.indices)} records")
