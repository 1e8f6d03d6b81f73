"""Counted operations of a recipe's training, so that equal compute does not depend on a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cdfast.adapters import set_trainable, vision_tower
from cdfast.aligner import build_layout
from cdfast.collator import VisionTextCollator
from cdfast.config import PROJECTOR_ONLY, Recipe
from cdfast.dry_run import meta_model, model_configs
from cdfast.flops import COUNTS, patch_size, step_counts, step_flops
from cdfast.losses import answer_rows, unshifted_rows
from cdfast.models import load_processor
from cdfast.stages.data import stage_dataset
from cdfast.stages.run import Run
from cdfast.terms import TERMS

# Batches whose mean stands for all of a stage: tokens per scene vary by a few percent.
COUNTED_BATCHES = 8


def recipe_flops(recipe: Recipe) -> float:
    """Floating-point operations of all stages of a recipe on embedded data, as `cdfast.flops` has
    them: student forward and backward, the teacher's forward, the vision encoder.

    Args:
        recipe: whose stages have a number of steps. The first batches of its seed are counted.
    """
    run = Run(recipe, Path("unused"), load_processor(recipe), PartialState(cpu=True))
    return sum(stage_flops(run, number) for number in range(1, len(recipe.stages) + 1))


def stage_flops(run: Run, number: int) -> float:
    """Operations of one stage: per token, pair, ... times their number per step times steps."""
    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    teacher_config, student_config = model_configs(recipe)
    student = meta_model(student_config)
    teacher = None
    if teacher_config is not None and stage.needs_teacher:
        teacher = meta_model(teacher_config)
        if recipe.share_vision_tower:
            parent, name, _ = vision_tower(student)
            setattr(parent, name, vision_tower(teacher)[2])
    set_trainable(student, projector=True, language_model=stage.stage not in PROJECTOR_ONLY)
    losses = [term.name for term in TERMS if getattr(stage, term.weight)]
    per = step_flops(student, teacher, bool(stage.kl_weight), losses)
    counts = _counts_per_step(run, number, student)
    return stage.max_steps * sum(per[name] * counts[name] for name in COUNTS)


def _counts_per_step(run: Run, number: int, student: Any) -> dict[str, float]:
    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    data = stage_dataset(run, number)
    collate = VisionTextCollator(run.processor.tokenizer.pad_token_id)
    size = stage.batch_size * stage.gradient_accumulation_steps
    batches = min(COUNTED_BATCHES, len(data) // size)
    total = torch.zeros(len(COUNTS), dtype=torch.int64)
    for first in range(0, batches * size, size):
        batch = collate([data[i] for i in range(first, first + size)])
        labels = batch["labels"]
        batch["layout"] = build_layout(batch, student.config.image_token_id)
        lm = answer_rows(labels)
        kl = unshifted_rows(labels) if recipe.unshifted_kl_mask else lm
        total += step_counts(batch, lm.sum(), kl.sum(), patch_size(student))
    return dict(zip(COUNTS, (total / batches).tolist()))
