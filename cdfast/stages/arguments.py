"""Trainer's arguments of a stage."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from cdfast.config import HUB_ARGUMENTS
from cdfast.stages.run import Run
from cdfast.terms import WEIGHTS

# Trainer settings that a recipe's `arguments` may change.
_DEFAULT_ARGUMENTS: dict[str, Any] = {
    "save_total_limit": 2,
    "report_to": "none",
}


def stage_arguments(run: Run, number: int) -> Any:
    """`DistillationConfig` of a stage."""
    from cdfast.trainer import DistillationConfig

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    cuda = torch.cuda.is_available()
    given = {**recipe.arguments, **stage.arguments}
    # Trainer would upload its checkpoints: the command uploads the student, when it is finished.
    given = {name: value for name, value in given.items() if name not in HUB_ARGUMENTS}
    if given.get("eval_steps"):  # which Trainer would ignore
        given.setdefault("eval_strategy", "steps")
    # transformers 5.23 renames gradient_ to activation_checkpointing; 5.17 has the old name.
    names = {f.name for f in fields(DistillationConfig)}
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    values: dict[str, Any] = {
        **_DEFAULT_ARGUMENTS,
        "output_dir": str(run.stage_folder(number)),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not cuda,
        # A stage shorter than this would end without a logged loss.
        "logging_steps": min(10, stage.max_steps) if stage.max_steps > 0 else 10,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "dataloader_num_workers": recipe.workers,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "learning_rate": stage.learning_rate,
        "muon_learning_rate": stage.muon_learning_rate,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "warmup_steps": stage.warmup,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        **{name: getattr(stage, name) for name in WEIGHTS},
        "preference_beta": stage.preference_beta,
        **{
            name: getattr(recipe, name)
            for name in (
                "preset",
                "objective",
                "matching",
                "layers",
                "layer_reduction",
                "backend",
                "unshifted_kl_mask",
                "kl_objective",
                "hidden_objective",
                "zero_stage",
                "teacher_placement",
                "offload_optimizer",
                "max_skipped_steps",
                "packing",
            )
        },
        "pack_tokens": recipe.pack_tokens or recipe.max_length,
        "keep_alignment": stage.keep_alignment,
        f"{prefix}_checkpointing": stage.gradient_checkpointing,
        **given,
    }
    return DistillationConfig(**values)


def evaluates(arguments: Any) -> bool:
    """Whether a trainer with these arguments evaluates while it trains."""
    return arguments.eval_strategy != "no" or arguments.eval_on_start
