"""The student of a stage: read from the stage before, written for the next."""

from __future__ import annotations

import re
from typing import Any

import torch

from cdfast.adapters import is_adapter, set_trainable, share_vision_tower
from cdfast.config import PROJECTOR_ONLY, Recipe
from cdfast.engine import full_state_dict
from cdfast.export import write_student
from cdfast.hidden_projector import save_hidden_projector, split_state
from cdfast.models import load_model
from cdfast.stages.run import Run
from cdfast.storage import staged_folder, together


def load_stage_student(run: Run, number: int) -> Any:
    """The student of the stage before, with what this stage trains set, LoRA around it if asked."""
    from cdfast.trainer import unwrap_model

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    student = load_model(run.student_after(number - 1), recipe.dtype, recipe.trust_remote_code)
    if run.teacher is not None and recipe.share_vision_tower:
        share_vision_tower(unwrap_model(run.teacher), student)
    full = stage.stage not in PROJECTOR_ONLY
    set_trainable(student, projector=True, language_model=full and not stage.lora)
    if not (full and stage.lora):
        return student
    # New adapters are random: the same in a run that is resumed as in one that is not.
    torch.manual_seed(recipe.seed + number)
    return with_lora(student, recipe)


def with_lora(student: Any, recipe: Recipe) -> Any:
    """The student with LoRA adapters in its decoder, and its own projector trained in full."""
    from peft import LoraConfig, get_peft_model

    decoder = student.get_decoder()
    within = next(name for name, module in student.named_modules() if module is decoder)
    # P_s trains in full beside the adapters and belongs to their checkpoints; P_t stays frozen.
    trained = [
        name
        for name, module in student.named_modules()
        if is_adapter(name) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=rf"{re.escape(within)}\..*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=trained,
    )
    return get_peft_model(student, config)


def export_student(run: Run, trainer: Any, number: int) -> None:
    """Write the student after a stage: plain weights, LoRA merged; complete or not there at all.

    The MLP of the hidden-state loss, no part of the student, goes into the stage's folder.
    """
    target, recipe = run.student_after(number), run.recipe
    state = full_state_dict(trainer.model)

    def write() -> None:
        if state is None or not run.state.is_main_process:
            return
        save_hidden_projector(split_state(state)[1], run.stage_folder(number))
        with staged_folder(target) as folder:
            write_student(
                trainer.model,
                state,
                folder,
                base=run.student_after(number - 1),
                dtype=getattr(torch, recipe.dtype),
                trust_remote_code=recipe.trust_remote_code,
            )
            run.processor.save_pretrained(folder)

    together(write, target)
