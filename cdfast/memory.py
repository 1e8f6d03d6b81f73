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

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cdfast.command_line import parse_command_line
from cdfast.config import TEACHER_PLACEMENTS, ConfigError, Recipe
from cdfast.data import DataError
from cdfast.footprint import Footprint
from cdfast.stage_memory import StageModels, combinations, fits, footprint, stage_models
from cdfast.stages.run import user_errors

_UNITS = {"": 2**30, "g": 2**30, "m": 2**20, "t": 2**40}
ASSUMPTIONS = """\
Assumed: full micro-batches (every sample max_length tokens, one image, all other tokens answers);
bfloat16 compute, AdamW; ZeRO with DeepSpeed's default buckets (5e8 elements; ZeRO-3 keeps up to 1e9
gathered); alignment on the triton backend, maps stored; DDP without gradient views. ZeRO 0 is DDP
without DeepSpeed, so its teacher is replicated. Columns are those of the student's forward and
backward; the total is that of the phase that needs most. Host memory is per GPU. Fits: total +
1.5 GiB (CUDA context, NCCL) <= 95% of the memory.
Compared with real allocations on CPUs: model states under ZeRO 1-3 (equal), activations and the KL
chunk (within 10%), teacher maps (equal). Nothing was measured on a GPU."""


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
        (k for k in by if not k[2]), key=lambda k: (k[0], ("none", *TEACHER_PLACEMENTS).index(k[1]))
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
            print_stage(models, world_size, memory)
        print(ASSUMPTIONS)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
