"""What is refused before the first stage, so that no later one fails on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdfast_kernels import available_backends

from cdfast.config import EMBEDDED_SCENES, EMBEDDED_TEACHERS, ConfigError, Recipe
from cdfast.matching import MATCHINGS, layers_in_range
from cdfast.models import check_models, load_config
from cdfast.stages.arguments import evaluates, stage_arguments
from cdfast.stages.data import held_out, stage_dataset, uses_scenes
from cdfast.stages.run import STAGE_FILE, Run, user_errors
from cdfast.stored_targets.plan import check_storable, open_targets


def check_stages(run: Run) -> None:
    """Refuse before the first stage what would otherwise show when a later one begins.

    Files of preference stages are opened here: most data have no rejected answers.

    Raises:
        ConfigError: a stage's data file or image root does not exist, its options are no
            `DistillationConfig`, or attention cannot be aligned as asked.
        DataError: a record of a preference stage's files is no pair of answers.
    """
    for number, stage in enumerate(run.recipe.stages, 1):
        where = f"stage {number} ({stage.stage})"
        for path in stage.data or run.recipe.data:
            if path not in EMBEDDED_SCENES and not Path(path).exists():
                raise ConfigError(
                    f"data: {where}: expected an existing file; got {path!r}. Give --data FILE."
                )
        for path in stage.image_root or run.recipe.image_root:
            if not Path(path).is_dir():
                raise ConfigError(
                    f"image_root: {where}: expected a folder; got {path!r}. Give --image-root."
                )
    for path in run.recipe.eval_data:
        if not Path(path).exists():
            raise ConfigError(
                f"eval_data: expected an existing file; got {path!r}. Give --eval-data FILE."
            )
    check_options(run)
    reason = available_backends().get(run.recipe.backend)
    used = run.recipe.packing or any(stage.alignment_weight for stage in run.recipe.stages)
    if reason and used:
        raise ConfigError(f"backend: {run.recipe.backend!r} cannot run here: {reason}")
    for number, stage in enumerate(run.recipe.stages, 1):
        if stage.pairs and not (run.stage_folder(number) / STAGE_FILE).exists():
            stage_dataset(run, number)
            if evaluates(stage_arguments(run, number)):
                held_out(run, pairs=True)
        elif stage.needs_teacher and run.recipe.teacher_targets:
            open_targets(run.recipe, number, stage_dataset(run, number), run.processor)


def check_options(run: Run) -> None:
    """Refuse what is wrong on any machine: models of the wrong kind, options that do not exist.

    Raises:
        ConfigError: see `check_stages`.
    """
    check_models(run.recipe)
    _check_streaming(run.recipe)
    if run.recipe.teacher_targets is not None:
        check_storable(run.recipe)
    with user_errors():
        for number in range(1, len(run.recipe.stages) + 1):
            _check_evaluation(run, number, stage_arguments(run, number))
        if any(stage.alignment_weight for stage in run.recipe.stages):
            _check_alignment(run.recipe)


def _check_streaming(recipe: Recipe) -> None:
    if recipe.streaming and all(uses_scenes(recipe, n + 1) for n in range(len(recipe.stages))):
        raise ConfigError(
            "streaming: expected data files, because embedded scenes are generated; got "
            f"{recipe.data}. Give --data FILE, or leave --streaming out."
        )
    for number, stage in enumerate(recipe.stages, 1):
        if recipe.streaming and stage.max_steps < 1 and not uses_scenes(recipe, number):
            raise ConfigError(
                f"max_steps: stage {number} ({stage.stage}): expected at least 1, because streamed "
                f"data have no known length; got {stage.max_steps}. Give --max-steps N or "
                f"--{stage.stage}.max-steps N, or leave --streaming out."
            )


def _check_evaluation(run: Run, number: int, arguments: Any) -> None:
    recipe = run.recipe
    if evaluates(arguments) and not (recipe.eval_data or uses_scenes(recipe, len(recipe.stages))):
        raise ConfigError(
            f"eval_data: stage {number} ({recipe.stages[number - 1].stage}) evaluates during "
            "training, so files that it does not train on are expected; got none. Give "
            "--eval-data FILE, or leave --eval-steps, --eval-strategy and --eval-on-start out."
        )


def _check_alignment(recipe: Recipe) -> None:
    from cdfast.aligner import OBJECTIVES

    for name, allowed in (
        ("objective", OBJECTIVES),
        ("matching", MATCHINGS),
        ("layer_reduction", ("mean", "sum")),
        ("backend", ("auto", *available_backends())),
    ):
        value = getattr(recipe, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}.")
    for source in (recipe.teacher, recipe.student):
        if source and source not in EMBEDDED_TEACHERS:
            config = load_config(source, recipe.trust_remote_code).get_text_config(decoder=True)
            layers_in_range(config.num_hidden_layers, recipe.layers or "intermediate")
