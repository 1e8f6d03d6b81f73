"""The analysis of attention after training: of a run, or of a recipe and its variants.

    <run>/analysis/analysis.json, cases.jsonl   teacher and student of the run
    <main run>/analysis/explorer.json           teacher, main student, baseline

All runs are asked the same questions. What is there already is not measured again.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from cdfast import __version__
from cdfast.analysis.cases import Case, cases_of_file, cases_of_questions
from cdfast.analysis.explorer import explorer_data
from cdfast.analysis.output import explorer_cases
from cdfast.analysis.report import EXPLORER_FILE, TEACHER, UNAVAILABLE
from cdfast.analysis.run import (
    ANALYSIS_FILE,
    MATCHED,
    Settings,
    analyze_cases,
    as_json,
    make_plan,
    write_analysis,
)
from cdfast.config import Recipe
from cdfast.matching import Matches
from cdfast.miniature.suites import miniature_suite
from cdfast.miniature.worlds import WORLDS
from cdfast.models import load_model, load_processor, teacher_source
from cdfast.probes import matched_layers
from cdfast.stages.training import trained_matches
from cdfast.storage import write_text

ANALYSIS_FOLDER = "analysis"
QUESTIONS_PER_KIND = 20
# Half the draws of the command, so that a default run stays short.
RESAMPLES = 1000


class TrainedRun(NamedTuple):
    """A run whose results are written."""

    recipe: Recipe
    folder: Path
    results: Mapping[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def analysis(self) -> Path:
        return self.folder / ANALYSIS_FOLDER


@dataclass
class _Loaded:
    """What several runs share, loaded when the first of them needs it."""

    main: Recipe
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    asked: list[Case] | None = None
    teachers: dict[str, PreTrainedModel] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        if self.asked is None:
            self.asked = _cases(self.main)
        return self.asked

    def model(self, source: str | Path, recipe: Recipe) -> PreTrainedModel:
        loaded: Any = load_model(source, "float32", recipe.trust_remote_code)
        return loaded.to(self.device).eval()

    def teacher(self, recipe: Recipe) -> PreTrainedModel:
        source = str(teacher_source(recipe))
        if source not in self.teachers:
            self.teachers.clear()  # of variants with other teachers, one at a time is in memory
            self.teachers[source] = self.model(source, recipe)
        return self.teachers[source]


def analyze_runs(
    runs: Mapping[str, TrainedRun],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Analyse every run that is not analysed yet, and make the explorer of the main one.

    Whatever goes wrong here must not cost a trained run its report: an error becomes the reason
    that the report and the terminal give, and the next run is tried. One process calls this, after
    all training; the others need not wait.

    Args:
        runs: name -> run; the first is the main one, whose recipe chooses the questions.

    Returns:
        For each run the contents of its analysis.json, or {"unavailable": reason}; and the data of
        the explorer, or {"unavailable": reason}.
    """
    gc.collect()  # models of the last stage: their callbacks refer to them, and they to those
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    main = next(iter(runs.values()))
    loaded = _Loaded(main.recipe)
    analyses = {}
    for name, run in runs.items():
        if reason := unavailable(main.recipe, run.recipe):
            analyses[name] = {UNAVAILABLE: reason}
        else:
            analyses[name] = _or_reason(name, partial(_analysis, run, loaded))
    first = next(iter(analyses.values()))
    if UNAVAILABLE in first:
        return analyses, {}
    return analyses, _or_reason("explorer", partial(_explorer, runs, loaded, first))


def unavailable(main: Recipe, recipe: Recipe) -> str | None:
    """Why attention of a run is not analysed, a sentence; None where it is."""
    if questions_per_kind(main) == 0:
        if main.analyze_questions == 0:
            return "it is switched off (--analyze-questions 0)."
        return "there are no questions to ask: give --evaluate miniature, or --eval-data FILE."
    if recipe.teacher is None:
        return "there is no teacher to compare with."
    if recipe.teacher_targets:
        return "the run had a teacher's stored targets (cdfast.analyze compares with a teacher)."
    return None


def questions_per_kind(recipe: Recipe) -> int:
    """Of the analysis after training; 0 is none."""
    if recipe.analyze_questions is not None:
        return recipe.analyze_questions
    return QUESTIONS_PER_KIND if recipe.evaluate or recipe.eval_data else 0


def baseline_of(runs: Mapping[str, TrainedRun]) -> str | None:
    """The first variant that is trained without a teacher's losses; None where there is none."""
    for name, run in list(runs.items())[1:]:
        if not any(stage.needs_teacher for stage in run.recipe.stages):
            return name
    return None


def _or_reason(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, or the reason why it could not."""
    try:
        return work()
    # Models of any kind and records of any kind come here: the run is done, and is to stay so.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"attention analysis, {name}: not done: {reason}", flush=True)
        return {UNAVAILABLE: reason}


# -- analyses --------------------------------------------------------------------------------------


def _analysis(run: TrainedRun, loaded: _Loaded) -> dict[str, Any]:
    settings = Settings(
        matching="simple" if run.recipe.matching == "simple" else "group",
        layers=run.recipe.layers or "intermediate",
        resamples=RESAMPLES,
        backend=run.recipe.backend,
    )
    wanted = {**_source(loaded.main), **settings.as_json()}
    if done := _finished(run.analysis / ANALYSIS_FILE, wanted):
        return done
    start = time.perf_counter()
    run.analysis.mkdir(parents=True, exist_ok=True)
    models = {
        TEACHER: loaded.teacher(run.recipe),
        "student": loaded.model(run.model, run.recipe),
    }
    processor = load_processor(run.recipe)
    # Of a run that aligned none: those that it would have aligned.
    matched = trained_matches(run.results["stages"]) or matched_layers(run.recipe, **models)
    settings = replace(settings, matched=matched)
    plan = make_plan(models, settings)
    cases = loaded.cases()
    content = analyze_cases(models, processor, cases, plan, settings, run.analysis)
    if content is None or content["interrupted"]:
        raise KeyboardInterrupt
    sources = {TEACHER: str(run.recipe.teacher), "student": str(run.model)}
    content = {"models": sources, "questions": _described(loaded.main), **content}
    content["settings"] = {**_source(loaded.main), **content["settings"]}
    content["seconds"] = round(time.perf_counter() - start, 1)
    print(f"attention analysis  {write_analysis(content, run.analysis)}", flush=True)
    return content


def _source(recipe: Recipe) -> dict[str, Any]:
    """Where questions come from, as analysis.json has it."""
    data = [recipe.evaluate] if recipe.evaluate else list(recipe.eval_data)
    return {"data": data, "split": "test", "per_kind": questions_per_kind(recipe)}


def _described(recipe: Recipe) -> str:
    number = questions_per_kind(recipe)
    if recipe.evaluate:
        return (
            f"Questions: of every kind the first {number} recognition questions, or pairs of "
            f"captions (asked in both orders), about the {recipe.evaluate}'s test scenes, which no "
            "stage trains on."
        )
    return (
        f"Questions: the first {number} records with an image of each file of eval_data, which no "
        "stage trains on; right is an answer whose first token greedy decoding gives."
    )


def _cases(recipe: Recipe) -> list[Case]:
    """The first questions of the suite's test scenes, or of the held-out records."""
    number = questions_per_kind(recipe)
    if recipe.evaluate:
        return cases_of_questions(
            miniature_suite("test", number, number, seed=0, world=WORLDS[recipe.evaluate])
        )
    roots = recipe.eval_image_root or recipe.image_root
    return [
        case
        for path in recipe.eval_data
        for case in cases_of_file(Path(path), roots or [str(Path(path).parent)], number)
    ]


def _finished(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of a finished analysis of these settings; None where there is none."""
    try:
        content = json.loads(path.read_text())
        settings = content["settings"]
        same = all(name in settings and settings[name] == wanted[name] for name in wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if same and not content.get("interrupted") else None


# -- the explorer ----------------------------------------------------------------------------------


def _explorer(
    runs: Mapping[str, TrainedRun], loaded: _Loaded, content: Mapping[str, Any]
) -> dict[str, Any]:
    """Of the first question of every kind: teacher, main student, and the baseline of the runs.

    Args:
        content: of the main run's analysis.json.
    """
    main = next(iter(runs.values()))
    baseline = baseline_of(runs)
    shown = {"student" if len(runs) == 1 else f"student ({main.recipe.name})": main}
    if baseline is not None:
        shown[f"baseline ({baseline})"] = runs[baseline]
    matched: Matches = {int(s): tuple(w) for s, w in content["settings"][MATCHED].items()}
    # The script of a page reads what its own version has written.
    wanted = {"cdfast": __version__, **_source(main.recipe), "models": [TEACHER, *shown]}
    wanted[MATCHED] = as_json(matched)
    path = main.analysis / EXPLORER_FILE
    if done := _finished(path, wanted):
        return done["explorer"]
    models = {
        TEACHER: loaded.teacher(main.recipe),
        **{name: loaded.model(run.model, run.recipe) for name, run in shown.items()},
    }
    data = explorer_data(
        models,
        load_processor(main.recipe),
        explorer_cases(loaded.cases()),
        matches=matched,
        backend=main.recipe.backend,
    )
    write_text(path, json.dumps({"settings": wanted, "explorer": data}, allow_nan=False) + "\n")
    return data
