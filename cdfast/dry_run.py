"""`--dry-run`: build a recipe's models without weights, print what the run would do, and check its
data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from cdfast.adapters import set_trainable
from cdfast.aligner import VisualAttentionAligner
from cdfast.arguments import check_zero_options
from cdfast.config import EMBEDDED_SCENES, PROJECTOR_ONLY, ConfigError, Recipe
from cdfast.data_check.run import check_recipe_data
from cdfast.hidden_projector import hidden_projector_size
from cdfast.images import DataError
from cdfast.modeling_cdfast_llava import CdfastLlavaConfig
from cdfast.models import load_config, load_processor, teacher_source
from cdfast.packing import check_packable
from cdfast.progress import is_first_rank
from cdfast.stages.checks import check_options
from cdfast.stages.data import stage_dataset
from cdfast.stages.run import Run, user_errors
from cdfast.stored_targets.files import read_index
from cdfast.stored_targets.plan import check_storable, open_targets, recipe_aligner
from cdfast.terms import weighted_terms


def _sized_config(sizes: dict[str, Any]) -> PreTrainedConfig:
    if not isinstance(sizes, dict):
        raise ConfigError(f"architecture: expected a mapping of sizes; got {sizes!r}. Correct it.")
    options = dict(sizes)
    kind = options.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"architecture: expected a model_type of transformers; got {kind!r}.")
    try:
        return CONFIG_MAPPING[kind](**options)
    # transformers checks its fields with a class of errors for each kind of mistake.
    except Exception as error:
        raise ConfigError(
            f"architecture: expected fields of {kind!r}; got {sizes}: {error} Correct them."
        ) from error


def model_configs(recipe: Recipe) -> tuple[PreTrainedConfig | None, PreTrainedConfig]:
    """Configurations of teacher (None without one) and student.

    From the recipe's `architecture` where it has one, else from the checkpoints it names.
    """
    sizes = recipe.architecture
    teacher: Any = None
    unknown = set(sizes) - {"vision", "student", "teacher"}
    if sizes and (unknown or not {"vision", "student"} <= set(sizes)):
        raise ConfigError(
            "architecture: expected sizes of 'vision' and 'student', and of 'teacher' where there "
            f"is one; got {sorted(sizes)}. Correct the recipe."
        )
    if "vision" in sizes:
        vision = _sized_config(sizes["vision"])
        text = _sized_config(sizes["student"])
        if "teacher" in sizes:
            teacher = _llava(vision, _sized_config(sizes["teacher"]))
    else:
        if recipe.teacher:
            teacher = load_config(teacher_source(recipe), recipe.trust_remote_code)
        if recipe.student in EMBEDDED_SCENES:
            from cdfast.miniature.worlds import WORLDS
            from cdfast.synthetic import miniature_configs

            text = miniature_configs(WORLDS[recipe.student])[1]
        else:
            student = load_config(recipe.student, recipe.trust_remote_code)
            if teacher is None or (not recipe.taf and hasattr(student, "vision_config")):
                return teacher, student
            text = student.get_text_config(decoder=True)
        vision = teacher.vision_config
    if not recipe.taf or teacher is None:
        return teacher, _llava(vision, text, teacher)
    return teacher, _llava(
        vision,
        text,
        teacher,
        teacher_hidden_size=teacher.text_config.hidden_size,
        student_projector=recipe.student_projector,
    )


def _llava(
    vision: PreTrainedConfig, text: PreTrainedConfig, like: Any = None, **taf: Any
) -> LlavaConfig:
    return (CdfastLlavaConfig if taf else LlavaConfig)(
        vision_config=vision,
        text_config=text,
        image_token_index=like.image_token_id if like else text.vocab_size - 1,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        tie_word_embeddings=text.tie_word_embeddings,
        **taf,
    )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def dry_run(recipe: Recipe, *, samples: int | None = None, json_path: Path | None = None) -> bool:
    """Print sizes, matched layers and stages of a recipe, and what it still needs to run; check
    its data.

    Args:
        recipe: what would be run.
        samples, json_path: see `check_recipe_data`.

    Returns:
        Whether a run would go through its data, and find the stored targets that it reads.

    Raises:
        ConfigError: there is too little to build models from, or an option that cannot be used.
    """
    if not (recipe.student and recipe.stages):
        recipe.check_runnable()
    if recipe.teacher_targets is not None:
        check_storable(recipe)
    if not recipe.architecture:
        # With sizes of its own a recipe may name models that are not here.
        check_options(Run(_unsharded(recipe), Path("unused"), None, PartialState(cpu=True)))
    console = Console()
    teacher_config, student_config = model_configs(recipe)
    student = meta_model(student_config)
    teacher = None if teacher_config is None else meta_model(teacher_config)
    if recipe.packing:
        check_packable(student)
        if teacher is not None and any(stage.needs_teacher for stage in recipe.stages):
            check_packable(teacher)
    console.print(f"[bold]{recipe.name}[/bold]: {recipe.description}")
    for role, model in (("teacher", teacher), ("student", student)):
        if model is not None:
            text = model.config.get_text_config(decoder=True)
            # Families that cut pictures into tiles, or take them as large as they are, have none.
            per_image = getattr(model.config, "image_seq_length", "any number of")
            console.print(
                f"{role}: {model.config.model_type}, {_count(model):,} parameters; "
                f"{text.num_hidden_layers} layers, {text.num_attention_heads} heads, "
                f"width {text.hidden_size}, vocabulary {text.vocab_size:,}; "
                f"{per_image} visual tokens per image"
            )
    aligner = None
    if teacher is not None and any(s.alignment_weight for s in recipe.stages):
        aligner = recipe_aligner(recipe, teacher, student)
        chosen = aligner.matches or {}
        pairs = "; ".join(f"{s} <- {t[0]}..{t[-1]}" for s, t in chosen.items())
        console.print(
            f"alignment: {aligner.objective}, {aligner.layers} layers, "
            f"{aligner.matching} matching, {aligner.layer_reduction} over layers; "
            f"student <- teacher: {pairs or 'by calibration'}"
        )
    table = Table(title="stages")
    for name in ("stage", "trained parameters", "losses", "batch", "rate", "data"):
        table.add_column(name)
    for stage in recipe.stages:
        full = stage.stage not in PROJECTOR_ONLY
        set_trainable(student, projector=True, language_model=full and not stage.lora)
        trained = f"{_count(student, trained=True):,}"
        files = stage.data or recipe.data
        if full and stage.lora:
            trained += f" + LoRA r{recipe.lora_r}"
        if stage.hidden_weight and teacher is not None:
            texts = [m.config.get_text_config(decoder=True) for m in (student, teacher)]
            trained += f" + MLP {hidden_projector_size(*(t.hidden_size for t in texts)):,}"
        table.add_row(
            stage.stage,
            trained,
            weighted_terms(stage),
            f"{stage.batch_size} x {stage.gradient_accumulation_steps} per process",
            f"{stage.learning_rate:g}",
            ", ".join(
                f + ("" if f in EMBEDDED_SCENES or Path(f).exists() else " (absent)") for f in files
            )
            or "none given",
        )
    console.print(table)
    ready = True
    try:
        recipe.check_runnable()
        if recipe.teacher_targets is not None and is_first_rank():
            _check_targets(recipe, aligner)
    except (ConfigError, DataError) as error:
        console.print(f"not ready to run: {error}", markup=False)
        ready = False
    if not is_first_rank():
        return ready  # one rank looks at the data
    fits = check_recipe_data(recipe, console, samples=samples, path=json_path)
    if not ready:
        console.print("not ready to run: the reason stands above the data")
    return fits and ready


def _check_targets(recipe: Recipe, aligner: VisualAttentionAligner | None) -> None:
    """Open the stored targets of every stage, as the run does before it trains.

    Raises:
        ConfigError: targets that are missing, not whole or of something else.
        DataError: data that cannot be opened.
    """
    assert recipe.teacher_targets is not None
    read_index(Path(recipe.teacher_targets))  # before data are looked through
    with user_errors():
        run = Run(recipe, Path("unused"), load_processor(recipe), PartialState(cpu=True))
        for number, stage in enumerate(recipe.stages, 1):
            if stage.needs_teacher:
                samples = stage_dataset(run, number)
                open_targets(recipe, number, samples, run.processor, aligner=aligner)


def _unsharded(recipe: Recipe) -> Recipe:
    """The recipe without ZeRO, which would ask for a launcher; its options are checked."""
    for stage in recipe.stages:
        check_zero_options(
            recipe.zero_stage,
            recipe.teacher_placement,
            recipe.offload_optimizer,
            stage.muon_learning_rate,
        )
    return replace(recipe, zero_stage=0, teacher_placement="replicated", offload_optimizer=False)


def _count(model: PreTrainedModel, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
