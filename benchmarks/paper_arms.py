"""The tables of the paper in miniature: which runs each has, as recipes and options.

An arm is a recipe, the options that a user would type behind it, and a factor of its steps. Runs
are keyed by what the arm resolves to, so that one run serves every table it belongs to.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

import cdfast
from benchmarks.paper_compute import recipe_flops
from cdfast.config import (
    MINIATURE,
    ConfigError,
    Recipe,
    StageRecipe,
    load_recipe,
    override,
    recipe_files,
)
from cdfast.models import teacher_source
from cdfast.stages import Run, stage_dataset
from cdfast.synthetic import teacher_path

# Test scenes that no setting was chosen on and no earlier number is of: those are of seed 0.
EVALUATION = {"evaluate_split": "test", "evaluate_seed": 20261123}
# Steps of the runs to convergence, as a multiple of the recipe's.
CURVE_FACTOR = 5.0
CURVE_POINTS = 20
CURVE_QUESTIONS = 50
EQUAL_COMPUTE = "equal compute"
QUICK_STEPS = 2
QUICK: dict[str, Any] = {"evaluate_per_kind": 3, "evaluate_vqa_per_kind": 3}
# What a run does not depend on, or what is recorded beside the key.
_NOT_IN_KEY = ("name", "description", "output_dir", "seed", "workers", "compare", "architecture")
_KD = {"taf": False, "alignment_weight": 0}
_LM = {**_KD, "kl_weight": 0}


@dataclass(frozen=True)
class Arm:
    """One system or setting.

    Args:
        label: in tables.
        recipe: name of a shipped recipe.
        options: as on the command line of cdfast.train.
        steps: factor of every stage's steps, or EQUAL_COMPUTE: as many as cost the counted
            operations of the arm `compute_of`.
        curve: whether it is measured during training as well.
    """

    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: float | str = 1.0
    compute_of: str = ""
    curve: bool = False


@dataclass(frozen=True)
class Table:
    """Arms side by side.

    Args:
        letter: of the issue.
        title: above it.
        arms: their names, in the order of the rows.
        reference: arm that differences are against.
        note: what this table's rows do not say themselves.
        teacher: whether the teacher of the last arm has a row.
        curve: whether it is drawn over training steps.
    """

    letter: str
    title: str
    arms: tuple[str, ...]
    reference: str
    note: str = ""
    teacher: bool = False
    curve: bool = False


ARMS: dict[str, Arm] = {
    "sft": Arm("SFT", "miniature-sft"),
    "sft-equal-compute": Arm(
        "SFT at equal compute", "miniature-sft", steps=EQUAL_COMPUTE, compute_of="compodistill"
    ),
    "llavadi": Arm("LLaVADI", "miniature-llavadi"),
    "llava-kd": Arm("LLaVA-KD", "miniature-llava-kd"),
    "llava-mod": Arm("LLaVA-MoD dense", "miniature-llava-mod"),
    "compodistill": Arm("CompoDistill, paper", "miniature"),
    "official": Arm("CompoDistill, official", "miniature-official"),
    "kd": Arm("KD: neither VAT nor TAF", "miniature", _KD),
    "vat": Arm("VAT", "miniature", {"taf": False}),
    "taf": Arm("TAF, no alignment", "miniature", {"alignment_weight": 0}),
    "mse": Arm("MSE", "miniature", {"objective": "mse"}),
    "kl": Arm("KL", "miniature", {"objective": "kl"}),
    "early": Arm("early", "miniature", {"layers": "early"}),
    "later": Arm("later", "miniature", {"layers": "later"}),
    "all": Arm("all", "miniature", {"layers": "all"}),
    "simple": Arm("simple", "miniature", {"matching": "simple"}),
    "adaptive": Arm("adaptive", "miniature", {"matching": "adaptive"}),
    "sft-long": Arm("SFT", "miniature-sft", steps=CURVE_FACTOR, curve=True),
    "kd-long": Arm("KD", "miniature", _KD, CURVE_FACTOR, curve=True),
    "compodistill-long": Arm("CompoDistill, paper", "miniature", {}, CURVE_FACTOR, curve=True),
    "kd-unprivileged": Arm("KD", "miniature", {**_KD, "teacher": "miniature-unprivileged"}),
    "compodistill-unprivileged": Arm(
        "CompoDistill, paper", "miniature", {"teacher": "miniature-unprivileged"}
    ),
    "sft-photos": Arm("SFT", "miniature-photos", _LM),
    "kd-photos": Arm("KD", "miniature-photos", _KD),
    "compodistill-photos": Arm("CompoDistill, paper", "miniature-photos"),
}
TABLES: dict[str, Table] = {
    "main": Table(
        "a",
        "The systems",
        (
            "sft",
            "sft-equal-compute",
            "llavadi",
            "llava-kd",
            "llava-mod",
            "compodistill",
            "official",
        ),
        "sft",
        teacher=True,
    ),
    "vat-taf": Table("b", "VAT and TAF", ("kd", "vat", "taf", "compodistill"), "kd"),
    "objective": Table(
        "c",
        "Alignment objective",
        ("taf", "mse", "kl", "compodistill"),
        "taf",
        "All objectives have the weight that was chosen for the cosine.",
    ),
    "layers": Table(
        "d",
        "Aligned layers",
        ("early", "compodistill", "later", "all"),
        "compodistill",
        "Similarity is that of the layers which the row aligns: it is not of the same layers in "
        "all rows.",
    ),
    "matching": Table(
        "e",
        "Layer matching",
        ("simple", "adaptive", "compodistill"),
        "compodistill",
        "Similarity is that of each row's own matches.",
    ),
    "steps": Table(
        "f",
        f"{CURVE_FACTOR:g} times the steps",
        ("sft-long", "kd-long", "compodistill-long"),
        "sft-long",
        f"Every stage has {CURVE_FACTOR:g} times its steps. The rows are the end, on the test "
        "scenes; the curves are of validation scenes, during training.",
        curve=True,
    ),
    "unprivileged": Table(
        "g1",
        "Teacher without privileged attention supervision",
        ("sft", "kd-unprivileged", "compodistill-unprivileged"),
        "sft",
        teacher=True,
    ),
    "photos": Table(
        "g2",
        "Scenes of real picture content",
        ("sft-photos", "kd-photos", "compodistill-photos"),
        "sft-photos",
        "SFT has the stages of the recipe with the LM loss alone.",
        teacher=True,
    ),
}
# Names of rows whose arm has another name in its table.
ROW_LABELS = {
    ("vat-taf", "kd"): "neither",
    ("vat-taf", "taf"): "TAF",
    ("vat-taf", "compodistill"): "VAT + TAF",
    ("objective", "taf"): "none",
    ("objective", "compodistill"): "cosine",
    ("layers", "compodistill"): "intermediate",
    ("matching", "compodistill"): "group",
}


@dataclass(frozen=True)
class Resolved:
    """An arm as it is run.

    Args:
        name: of the arm.
        arm: what it was made from.
        recipe: with everything set but the seed.
        options: behind the arm's recipe they make `recipe`, where the factor is 1. Other steps
            differ by stage, which options cannot say, so such a run needs a recipe file.
        factor: of the recipe's steps.
        key: of the runs; see `key_of`.
    """

    name: str
    arm: Arm
    recipe: Recipe
    options: dict[str, Any]
    factor: float
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
    factor = _factor(arm, recipe)
    if factor != 1.0:
        recipe = with_steps(recipe, factor)
    options: dict[str, Any] = {**EVALUATION, "name": name}
    if quick:
        options |= {**QUICK, "max_steps": QUICK_STEPS}
    if arm.curve:
        steps = QUICK_STEPS * len(recipe.stages) if quick else sum(_steps(recipe))
        options["eval_steps"] = max(1, round(steps / CURVE_POINTS))
        options["eval_questions"] = 2 if quick else CURVE_QUESTIONS
    recipe = override(recipe, options)
    return Resolved(name, arm, recipe, {**arm.options, **options}, factor, key_of(recipe))


def _base(arm: Arm) -> Recipe:
    if arm.recipe not in recipe_files():
        raise Absent(f"recipe: {arm.recipe!r} is not in this package.")
    try:
        recipe = override(load_recipe(arm.recipe), dict(arm.options))
        recipe.check_runnable()
    except ConfigError as error:
        raise Absent(str(error)) from error
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


def with_steps(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with every stage's steps multiplied, at least one each."""
    stages = [replace(s, max_steps=max(1, round(factor * s.max_steps))) for s in recipe.stages]
    return replace(recipe, stages=stages)


def key_of(recipe: Recipe) -> str:
    """12 hexadecimal digits of what a run's numbers depend on besides its seed.

    These are the options that are not at their default (so that a new option changes no key), the
    package's version, the weights that are shipped, and the first scenes of the embedded data. A
    change of the package's code alone is not seen: records have the commit they were made at.
    """
    changed = _changed(recipe, Recipe())
    content = {name: value for name, value in changed.items() if name not in _NOT_IN_KEY}
    content["stages"] = [_changed(s, StageRecipe(stage=s.stage)) for s in recipe.stages]
    content["kinds"] = [stage.stage for stage in recipe.stages]
    content["version"] = cdfast.__version__
    sources = [teacher_source(recipe)] if recipe.teacher else []
    sources += [teacher_path()] if recipe.student == MINIATURE else []
    content["weights"] = [_weights_hash(str(source)) for source in sources]
    content["scenes"] = _scenes_hash(recipe)
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
