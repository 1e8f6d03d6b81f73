"""Bytes per GPU of a recipe's stage for every ZeRO stage and placement of the teacher.

The models are built without weights; the formulas are in footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cdfast.adapters import set_trainable, vision_tower
from cdfast.aligner import VisualAttentionAligner
from cdfast.config import (
    PROJECTOR_ONLY,
    TEACHER_PLACEMENTS,
    ZERO_STAGES,
    ConfigError,
    Recipe,
    StageRecipe,
)
from cdfast.dry_run import meta_model, model_configs
from cdfast.footprint import (
    MAX_LIVE,
    AlignmentMaps,
    Footprint,
    States,
    TextShape,
    Training,
    activations,
    alignment_maps,
    forward_working_set,
    hidden_loss,
    logits_chunk,
    model_states,
    one_image_layout,
    parameter_sizes,
    relation_loss,
    sharded,
    tower_features,
)
from cdfast.hidden_projector import add_hidden_projector
from cdfast.stages.student import with_lora

# Of the GPU's memory: what the CUDA context, NCCL and fragmentation leave to tensors.
USABLE, CONTEXT = 0.95, 1.5 * 2**30
# What a choice costs beside plain DDP, as shares of a step: an ordering, not a measurement.
_PRICE_STAGE = {0: 0.0, 1: 0.02, 2: 0.03, 3: 0.15}
_PRICE_PLACEMENT = {"none": 0.0, "replicated": 0.0, "sharded": 0.1, "offloaded": 0.5}
_PRICE_CHECKPOINTING, _PRICE_OFFLOAD = 0.3, 1.0


@dataclass(frozen=True)
class StageModels:
    """What a stage holds, without weights."""

    recipe: Recipe
    stage: StageRecipe
    student: Any
    teacher: Any
    shared_tower: bool
    matches: dict[int, tuple[int, ...]]

    @property
    def training(self) -> Training:
        if self.stage.stage in PROJECTOR_ONLY:
            return Training("none")
        if self.stage.lora:
            return Training("lora", self.recipe.lora_r, self.recipe.lora_dropout)
        return Training("all")

    @property
    def bf16(self) -> bool:
        given = {**self.recipe.arguments, **self.stage.arguments}
        return bool(given.get("bf16", True))


def stage_models(recipe: Recipe, stage: StageRecipe) -> StageModels:
    """Models of a stage on the meta device, with what the stage trains set.

    Raises:
        ConfigError: the recipe says too little to build models from.
    """
    teacher_config, student_config = model_configs(recipe)
    if stage.needs_teacher and teacher_config is None:
        raise ConfigError(
            f"teacher: {stage.stage} distils, so a teacher is expected; got none. Give --teacher."
        )
    if getattr(student_config, "image_seq_length", None) is None:
        raise ConfigError(
            f"student: expected a LLaVA model, whose visual tokens per image are known; got "
            f"{student_config.model_type!r}."
        )
    student = meta_model(student_config)
    teacher = None
    if stage.needs_teacher and teacher_config is not None and not recipe.teacher_targets:
        teacher = meta_model(teacher_config)
    matches: dict[int, tuple[int, ...]] = {}
    if teacher is not None and stage.alignment_weight:
        # Adaptive matching chooses one teacher layer each; a window is the larger estimate.
        matching = None if recipe.matching == "adaptive" else recipe.matching
        aligner = VisualAttentionAligner(
            teacher, student, preset=recipe.preset, matching=matching, layers=recipe.layers
        )
        matches = {k: tuple(v) for k, v in (aligner.matches or {}).items()}
    full = stage.stage not in PROJECTOR_ONLY
    set_trainable(student, projector=True, language_model=full and not stage.lora)
    if full and stage.lora:
        student = with_lora(student, recipe)
    if teacher is not None and stage.hidden_weight:
        adapted: Any = student
        inner = adapted.get_base_model() if hasattr(student, "get_base_model") else adapted
        add_hidden_projector(inner, TextShape.of(teacher.config).width, seed=0)
    shared = teacher is not None and recipe.share_vision_tower
    return StageModels(recipe, stage, student, teacher, shared, matches)


def _micro_batch(recipe: Recipe, stage: StageRecipe) -> int:
    """Samples of a forward pass; of a packed row as many as fill it, each max_length long."""
    packed = (recipe.pack_tokens or recipe.max_length) if recipe.packing else recipe.max_length
    return stage.batch_size * packed // recipe.max_length


def footprint(
    models: StageModels,
    world_size: int,
    zero_stage: int,
    placement: str,
    *,
    checkpointing: bool,
    offload_optimizer: bool = False,
) -> Footprint:
    """Bytes per GPU of one combination; see footprint.py."""
    recipe, stage = models.recipe, models.stage
    wide = _itemsize(recipe.dtype)
    compute = 2 if models.bf16 else wide
    held = wide if zero_stage == 0 else compute
    autocast = zero_stage == 0 and held > compute
    config = models.student.config
    shape = TextShape.of(config)
    samples = _micro_batch(recipe, stage)
    rows = samples * (2 if stage.pairs else 1)
    tokens = rows * recipe.max_length
    visual = min(config.image_seq_length, recipe.max_length)
    tower = _tower(models.student) if models.shared_tower else None
    states = model_states(
        *parameter_sizes(models.student, tower=tower),
        zero_stage=zero_stage,
        world_size=world_size,
        itemsize=held,
        offload_optimizer=offload_optimizer,
    )
    teacher, gathered_teacher, teacher_host = _teacher(models, world_size, placement)
    # The shared tower keeps the wider of both dtypes; one of its own is part of its model.
    teacher_size = _itemsize(recipe.teacher_dtype)
    tower_size = max(wide, teacher_size) if models.shared_tower else held
    tower_bytes = 0 if tower is None else tower_size * sum(p.numel() for p in tower.parameters())
    features = tower_features(config.vision_config, rows, tower_size)
    kept = activations(
        shape,
        models.training,
        tokens=tokens,
        itemsize=compute,
        checkpointing=checkpointing,
        autocast=autocast,
    )
    if autocast:
        kept += compute * sum(p.numel() for p in _matrices(models.student, tower))
    maps = _maps(models, visual, checkpointing)
    teacher_shape = TextShape.of(models.teacher.config) if models.teacher is not None else None
    answers = rows * (recipe.max_length - visual)
    sizes: dict[str, Any] = {
        "itemsize": held if autocast else compute,
        "teacher_itemsize": teacher_size,
        "head_trained": models.training.what == "all",
    }
    both = stage.kl_weight or stage.pairs  # what makes logits of the teacher's answers too
    logits = logits_chunk(shape, teacher_shape if both else None, rows=answers, **sizes)
    if teacher_shape is not None and stage.visual_kl_weight:
        # What the losses before it have left and its own chunk: their sum is the upper bound.
        logits += logits_chunk(shape, teacher_shape, rows=samples * visual, **sizes)
    if teacher_shape is not None and stage.relation_weight:
        logits += relation_loss(shape, teacher_shape, samples, visual, **sizes)
    if teacher_shape is not None and stage.hidden_weight:
        logits += hidden_loss(shape, teacher_shape, rows=answers, itemsize=compute)
    gathered = _gathered(states, models.student, tower, zero_stage, held)
    columns = {
        "student": states.parameters,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "teacher": teacher,
        "tower": tower_bytes,
        "activations": kept + features,
        "maps": maps.student,
        "logits": logits,
        "gathered, buckets": gathered,
    }
    resident = sum(columns[n] for n in ("student", "gradients", "optimizer", "teacher", "tower"))
    student_phase = sum(columns.values()) - resident
    teacher_phase = features + maps.teacher + gathered_teacher
    if teacher_shape is not None:
        teacher_phase += forward_working_set(teacher_shape, tokens, teacher_size)
    total = resident + max(student_phase, teacher_phase, states.step)
    host = states.host + teacher_host
    return Footprint(zero_stage, placement, checkpointing, offload_optimizer, columns, total, host)


def combinations(
    models: StageModels, world_size: int, offload_optimizer: bool | None = None
) -> list[Footprint]:
    """All combinations, cheapest first: ZeRO stage, placement, checkpointing, offload.

    Args:
        offload_optimizer: only with or without; None: both.
    """
    found = []
    offloads = (False, True) if offload_optimizer is None else (offload_optimizer,)
    for zero_stage in ZERO_STAGES:
        placements = TEACHER_PLACEMENTS if zero_stage else ("replicated",)
        for placement in placements if models.teacher is not None else ("none",):
            for checkpointing in (False, True):
                found += [
                    footprint(
                        models,
                        world_size,
                        zero_stage,
                        placement,
                        checkpointing=checkpointing,
                        offload_optimizer=offload,
                    )
                    for offload in offloads
                    if zero_stage or not offload
                ]
    return sorted(found, key=_price)


def _price(f: Footprint) -> float:
    price = _PRICE_STAGE[f.zero_stage] + _PRICE_PLACEMENT[f.placement]
    return price + _PRICE_CHECKPOINTING * f.checkpointing + _PRICE_OFFLOAD * f.offload_optimizer


def fits(f: Footprint, gpu_memory: float) -> bool:
    return f.total + CONTEXT <= USABLE * gpu_memory


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _tower(model: Any) -> nn.Module:
    return vision_tower(model.get_base_model() if hasattr(model, "get_base_model") else model)[2]


def _matrices(student: nn.Module, tower: nn.Module | None) -> list[torch.Tensor]:
    apart = set() if tower is None else {id(m) for m in tower.modules()}
    linears = [m for m in student.modules() if isinstance(m, nn.Linear) and id(m) not in apart]
    return [m.weight for m in linears]


def _teacher(models: StageModels, world_size: int, placement: str) -> tuple[float, float, float]:
    """Bytes of the teacher on a GPU, gathered during its forward, and in host memory."""
    if models.teacher is None:
        return 0.0, 0.0, 0.0
    size = _itemsize(models.recipe.teacher_dtype)
    tower = _tower(models.teacher) if models.shared_tower else None
    sizes = parameter_sizes(models.teacher, tower=tower)[1]
    sizes += parameter_sizes(models.teacher, tower=tower)[0]
    if placement == "replicated":
        return float(size * sum(sizes)), 0.0, 0.0
    share = float(size * sharded(sizes, world_size))
    gathered = float(size * min(sum(sizes), MAX_LIVE + max(sizes)))
    return (share, gathered, 0.0) if placement == "sharded" else (0.0, gathered, share)


def _gathered(
    states: States, student: nn.Module, tower: nn.Module | None, zero_stage: int, itemsize: int
) -> float:
    if zero_stage < 3:
        return states.buckets
    trained, frozen = parameter_sizes(student, tower=tower)
    live = min(sum(trained) + sum(frozen), MAX_LIVE + max([*trained, *frozen]))
    return states.buckets + itemsize * live


def _maps(models: StageModels, visual: int, checkpointing: bool) -> AlignmentMaps:
    recipe, stage = models.recipe, models.stage
    layout = one_image_layout(_micro_batch(recipe, stage), recipe.max_length, visual)
    objective = recipe.objective or ("row" if recipe.preset == "paper" else "pooled")
    repeated = checkpointing and not stage.keep_alignment
    kept = min(1, len(models.matches)) if repeated else len(models.matches)
    return alignment_maps(layout, models.matches, objective, kept_layers=kept)
