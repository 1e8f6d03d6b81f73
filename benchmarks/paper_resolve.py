"""Arms as they are run: the recipe that each resolves to, and the key of its runs."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

import cdfast
from benchmarks.paper_arms import ARMS, CURVE_QUESTIONS, EVALUATION, Arm
from benchmarks.paper_compute import recipe_flops
from cdfast.config import (
    EMBEDDED_SCENES,
    ConfigError,
    Recipe,
    StageRecipe,
    load_recipe,
    override,
    recipe_files,
)
from cdfast.miniature.suites import miniature_suite
from cdfast.miniature.worlds import WORLDS
from cdfast.models import teacher_source
from cdfast.stages.data import stage_dataset
from cdfast.stages.run import Run
from cdfast.synthetic import teacher_path

QUICK_STEPS = 2
QUICK: dict[str, Any] = {"evaluate_per_kind": 3, "evaluate_vqa_per_kind": 3}
# What a run does not depend on, or what is recorded beside the key.
_NOT_IN_KEY = (
    *("name", "description", "output_dir", "seed", "workers", "compare", "architecture"),
    "analyze_questions",
)


@dataclass(frozen=True)
class Resolved:
    """An arm as it is run.

    Args:
        name: of the arm.
        arm: what it was made from.
        recipe: with everything set but the seed.
        options: behind the arm's recipe they make `recipe`, where the factor is 1. Other steps
            differ by stage, which options cannot say, so such a run needs a recipe file.
        factor: of the recipe's steps; None: each stage has steps of its own.
        key: of the runs; see `key_of`.
    """

    name: str
    arm: Arm
    recipe: Recipe
    options: dict[str, Any]
    factor: float | None
    key: str

    @property
    def steps(self) -> int:
        return sum(stage.max_steps for stage in self.recipe.stages)


class Absent(ValueError):
    """An arm whose recipe or teacher is not in this package; the message says which."""


def resolve(name: str, quick: bool = False) -> Resolved:
    """An arm's recipe.

    Raises:
        Absent: there is no such recipe or teacher, or it does not know an option.
    """
    arm = ARMS[name]
    recipe = _base(arm)
    factor = None
    if isinstance(arm.steps, tuple):
        recipe = with_steps(recipe, arm.steps)
    else:
        # Quick runs have few steps whatever the factor: nothing to count.
        factor = 1.0 if quick and arm.compute_of else _factor(arm, recipe)
        if factor != 1.0:
            recipe = with_steps(recipe, [max(1, round(factor * n)) for n in _steps(recipe)])
    options: dict[str, Any] = {**EVALUATION, "name": name}
    if quick:
        options |= {**QUICK, "max_steps": QUICK_STEPS}
    if arm.curve:
        # At the end of every stage too, the last above all: what divides the steps of all.
        options["eval_steps"] = QUICK_STEPS if quick else math.gcd(*_steps(recipe))
        options["eval_questions"] = 2 if quick else CURVE_QUESTIONS
    recipe = override(recipe, options)
    return Resolved(name, arm, recipe, {**arm.options, **options}, factor, key_of(recipe))


def _base(arm: Arm) -> Recipe:
    if arm.recipe not in recipe_files() and not Path(arm.recipe).is_file():
        raise Absent(f"recipe: {arm.recipe!r} is not in this package.")
    try:
        recipe = override(load_recipe(arm.recipe), dict(arm.options))
        recipe.check_runnable()
    except ConfigError as error:
        # It goes into committed tables: not where this checkout is, nor every option there is.
        reason = str(error).partition(" Known: ")[0]
        raise Absent(reason.replace(f"{Path(cdfast.__file__).parent}/", "")) from error
    # Not load_config, which would ask the hub for a name that is no folder.
    if recipe.teacher and not Path(teacher_source(recipe)).is_dir():
        raise Absent(f"teacher: expected a shipped one; {recipe.teacher!r} is not in this package.")
    return recipe


def _factor(arm: Arm, recipe: Recipe) -> float:
    if isinstance(arm.steps, float):
        return arm.steps
    return _compute(arm.compute_of) / recipe_flops(recipe)


@functools.cache
def _compute(name: str) -> float:
    return recipe_flops(_base(ARMS[name]))


def _steps(recipe: Recipe) -> list[int]:
    return [stage.max_steps for stage in recipe.stages]


def with_steps(recipe: Recipe, steps: Sequence[int]) -> Recipe:
    """The recipe with these steps of its stages."""
    stages = [replace(s, max_steps=n) for s, n in zip(recipe.stages, steps, strict=True)]
    return replace(recipe, stages=stages)


def key_of(recipe: Recipe) -> str:
    """12 hexadecimal digits of what a run's numbers depend on besides its seed.

    These are the options that are not at their default (so that a new option changes no key), the
    package's version, the weights that are shipped, the first scenes of the embedded data, and all
    questions that the student answers. A change of other code is not seen: records have the commit
    they were made at.
    """
    changed = _changed(recipe, type(recipe)())
    content = {name: value for name, value in changed.items() if name not in _NOT_IN_KEY}
    content["stages"] = [_changed(s, StageRecipe(stage=s.stage)) for s in recipe.stages]
    content["kinds"] = [stage.stage for stage in recipe.stages]
    content["version"] = cdfast.__version__
    sources = [teacher_source(recipe)] if recipe.teacher else []
    sources += [teacher_path(recipe.student)] if recipe.student in EMBEDDED_SCENES else []
    content["weights"] = [_weights_hash(str(source)) for source in sources]
    content["scenes"] = _scenes_hash(recipe)
    content["questions"] = _questions_hash(
        recipe.evaluate,
        recipe.evaluate_split,
        recipe.evaluate_per_kind,
        recipe.evaluate_vqa_per_kind,
        recipe.evaluate_seed,
    )
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _changed(options: Any, default: Any) -> dict[str, Any]:
    values, defaults = asdict(options), asdict(default)
    return {name: value for name, value in values.items() if value != defaults[name]}


@functools.cache
def _weights_hash(folder: str) -> str:
    found = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _scenes_hash(recipe: Recipe) -> str:
    """Of the first scenes of every stage, with their questions: another world has another key."""
    found = hashlib.sha256()
    run = Run(replace(recipe, seed=0), Path("unused"), None, PartialState(cpu=True))
    for number in range(1, len(recipe.stages) + 1):
        scenes = stage_dataset(run, number).scenes
        for sample in (scenes[0], scenes[1]):
            found.update(repr(sample.messages).encode())
            for image in sample.images:
                found.update(np.asarray(image).tobytes())
    return found.hexdigest()


@functools.cache
def _questions_hash(suite: str | None, split: str, pairs: int, vqa: int, seed: int) -> str:
    """Of every question at the end of a run, with its choices and image."""
    found = hashlib.sha256()
    for question in miniature_suite(split, pairs, vqa, seed, WORLDS[suite]) if suite else ():
        asked = question.kind, question.messages, question.choices, question.answer
        found.update(repr(asked).encode())
        found.update(np.asarray(question.image).tobytes())
    return found.hexdigest()
