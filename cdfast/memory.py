"""`python -m cdfast.memory [RECIPE|FILE.yaml] --world-size N [--gpu-memory 80GB] [--option value]`

Prints the bytes that each GPU needs, for every ZeRO stage and placement of the teacher, and the
cheapest combination that fits. Options are those of `cdfast.train`: `--max-length`, `--batch-size`
and the like. Models are built without weights, from the recipe's `architecture` or from the
configurations of its checkpoints. The formulas are in footprint.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
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
    parse_command_line,
)
from cdfast.data import DataError
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
    logits_chunk,
    model_states,
    one_image_layout,
    parameter_sizes,
    sharded,
    tower_features,
)
from cdfast.stages import user_errors, with_lora

# Of the GPU's memory: what the CUDA context, NCCL and fragmentation leave to tensors.
USABLE, CONTEXT = 0.95, 1.5 * 2**30
# What a choice costs beside plain DDP, as shares of a step: an ordering, not a measurement.
_PRICE_STAGE = {0: 0.0, 1: 0.02, 2: 0.03, 3: 0.15}
_PRICE_PLACEMENT = {"none": 0.0, "replicated": 0.0, "sharded": 0.1, "offloaded": 0.5}
_PRICE_CHECKPOINTING, _PRICE_OFFLOAD = 0.3, 1.0
_UNITS = {"": 2**30, "g": 2**30, "m": 2**20, "t": 2**40}
ASSUMPTIONS = """\
Assumed: full micro-batches (every sample max_length tokens, one image, all other tokens answers);
bfloat16 compute, AdamW; ZeRO with DeepSpeed's default buckets (5e8 elements; ZeRO-3 keeps up to 1e9
gathered); alignment on the triton backend, maps stored; DDP without gradient views. ZeRO 0 is DDP
without DeepSpeed, so its teacher is replicated. Columns are those of the student's forward and
backward; the total is that of the phase that needs most. Host memory is per GPU. Fits: total +
1.5 GiB (CUDA context, NCCL) <= 95% of the memory.
Compared with real allocations on CPUs: model states under ZeRO 1-3 (equal), activations and the KL
chunk (within 10%), maps (equal). Nothing was measured on a GPU."""


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
    if stage.needs_teacher and teacher_config is not None:
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
    shared = teacher is not None and recipe.share_vision_tower
    return StageModels(recipe, stage, student, teacher, shared, matches)


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
    tokens = stage.batch_size * recipe.max_length
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
    features = tower_features(config.vision_config, stage.batch_size, tower_size)
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
    logits = logits_chunk(
        shape,
        teacher_shape if stage.kl_weight else None,
        rows=stage.batch_size * (recipe.max_length - visual),
        itemsize=held if autocast else compute,
        teacher_itemsize=teacher_size,
        head_trained=models.training.what == "all",
    )
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
    layout = one_image_layout(stage.batch_size, recipe.max_length, visual)
    objective = recipe.objective or ("row" if recipe.preset == "paper" else "pooled")
    repeated = checkpointing and not stage.keep_alignment
    kept = min(1, len(models.matches)) if repeated else len(models.matches)
    return alignment_maps(layout, models.matches, objective, kept_layers=kept)


# -- the command -----------------------------------------------------------------------------------


def parse_size(text: str, name: str) -> float:
    """Bytes of "80GB", "80GiB", "80" (GiB) or "81920MB"; units are powers of 1024.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gmt]?)(?:i?b)?\s*", text.lower())
    if match is None or not float(match[1]):
        raise ConfigError(
            f"{name}: expected a size greater than 0, such as 80GB, 40GiB or 81920MB; got {text!r}."
        )
    return float(match[1]) * _UNITS[match[2]]


def _flags(argv: Sequence[str]) -> tuple[int, float | None, str, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m cdfast.memory",
        usage="%(prog)s [RECIPE|FILE.yaml] --world-size N [--gpu-memory 80GB] [--stage NAME] ...",
        description="Bytes per GPU of a recipe's stages. Further options: those of cdfast.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", help="number of GPUs")
    parser.add_argument("--gpu-memory", help="memory of one GPU, such as 80GB")
    parser.add_argument(
        "--stage", default="worst", help="worst (default), all, or a stage's name, such as dft"
    )
    own, rest = parser.parse_known_args(list(argv))
    if own.world_size is None:
        raise ConfigError("--world-size: expected the number of GPUs; got none. Give --world-size.")
    if not re.fullmatch(r"[1-9]\d*", own.world_size):
        raise ConfigError(
            f"--world-size: expected a whole number of GPUs, at least 1; got {own.world_size!r}."
        )
    memory = None if own.gpu_memory is None else parse_size(own.gpu_memory, "--gpu-memory")
    return int(own.world_size), memory, own.stage, rest


def chosen_stages(recipe: Recipe, which: str, world_size: int) -> list[StageModels]:
    """The stages to print: the one that needs most as the recipe is, all, or those of a name."""
    if which not in ("worst", "all", *(s.stage for s in recipe.stages)):
        known = ", ".join(dict.fromkeys(s.stage for s in recipe.stages))
        raise ConfigError(f"--stage: expected worst, all, or one of {known}; got {which!r}.")
    stages = [s for s in recipe.stages if which in ("worst", "all", s.stage)]
    models = [stage_models(recipe, stage) for stage in stages]
    if which != "worst":
        return models

    def need(m: StageModels) -> float:
        placement = recipe.teacher_placement if m.teacher is not None else "none"
        checkpointing = m.stage.gradient_checkpointing
        stage = recipe.zero_stage
        return footprint(m, world_size, stage, placement, checkpointing=checkpointing).total

    return [max(models, key=need)]


def print_stage(models: StageModels, world_size: int, gpu_memory: float | None) -> None:
    """One table: ZeRO stage and placement down, bytes across; then the combination that fits."""
    stage, recipe = models.stage, models.recipe
    title = (
        f"{recipe.name}, {stage.stage}: GiB per GPU of {world_size}; batch {stage.batch_size} x "
        f"{recipe.max_length} tokens"
    )
    found = combinations(models, world_size, recipe.offload_optimizer)
    if recipe.offload_optimizer:
        title += "; optimizer in host memory"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    by = {(f.zero_stage, f.placement, f.checkpointing): f for f in found}
    names = list(found[0].columns)
    names.insert(names.index("activations") + 1, "recomputed")
    for heading in ("ZeRO", "teacher is", *names, "total", "recomputed", "host"):
        table.add_column(heading, justify="left" if heading == "teacher is" else "right")
    for zero_stage, placement, _ in sorted(
        (k for k in by if not k[2]), key=lambda k: (k[0], [*_PRICE_PLACEMENT].index(k[1]))
    ):
        kept, repeated = (by[zero_stage, placement, c] for c in (False, True))
        cells = {name: gib(value) for name, value in kept.columns.items()}
        cells["recomputed"] = gib(repeated.columns["activations"])
        totals = [gib(kept.total), gib(repeated.total), gib(kept.host)]
        table.add_row(str(zero_stage), placement, *(cells[name] for name in names), *totals)
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    if gpu_memory is not None:
        print(_advice(combinations(models, world_size), gpu_memory))


def gib(value: float) -> str:
    return f"{value / 2**30:.2f}"


def _advice(found: list[Footprint], gpu_memory: float) -> str:
    """The cheapest combination that fits, as options; else the smallest, and what to change."""
    fitting = [f for f in found if fits(f, gpu_memory)]
    if fitting:
        f = fitting[0]
        options = f"--zero-stage {f.zero_stage}"
        if f.placement != "none":
            options += f" --teacher-placement {f.placement}"
        options += f" --gradient-checkpointing {str(f.checkpointing).lower()}"
        options += " --offload-optimizer true" * f.offload_optimizer
        return f"fits {gib(gpu_memory)} GiB: {options} ({gib(f.total)} GiB)\n"
    least = min(found, key=lambda f: f.total)
    return (
        f"nothing fits {gib(gpu_memory)} GiB: the least is {gib(least.total)} GiB, with ZeRO "
        f"{least.zero_stage}, teacher {least.placement}. Give a smaller --batch-size or "
        "--max-length, or more GPUs.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m cdfast.memory`."""
    try:
        world_size, memory, which, rest = _flags(sys.argv[1:] if argv is None else argv)
        recipe, _ = parse_command_line(rest)
        if recipe is None:
            raise ConfigError("--list: is an option of cdfast.train. Give a recipe.")
        if not (recipe.student and recipe.stages):
            recipe.check_runnable()
        with user_errors():
            chosen = chosen_stages(recipe, which, world_size)
            for models in chosen:
                if models.stage.batch_size < 1:
                    raise ConfigError(
                        f"batch_size: expected at least 1; got {models.stage.batch_size}."
                    )
        for models in chosen:
            print_stage(models, world_size, memory)
        print(ASSUMPTIONS)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
