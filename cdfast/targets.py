"""`python -m cdfast.targets RECIPE --targets-dir DIR [--top-k 64] [--estimate] [--option value]`

Runs the teacher once over every sample that a run's stages would show it and writes what their
losses need of it, so that `cdfast.train ... --teacher-targets DIR` trains without the teacher. The
other options are those of `cdfast.train`, and the same ones are needed there.

It prints first how large the targets will be, and does not begin if they do not fit the disk. It
can be stopped: given again, it compares what is there with its hashes and goes on. Under torchrun
the processes share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from cdfast.aligner import VisualAttentionAligner, image_token_id
from cdfast.attention import use_cdfast_attention
from cdfast.collator import VisionTextCollator
from cdfast.command_line import parse_command_line
from cdfast.config import ConfigError, Recipe
from cdfast.data import DataError
from cdfast.distill import LossOptions
from cdfast.dry_run import meta_model, model_configs
from cdfast.models import load_model, load_processor, teacher_source
from cdfast.stages.arguments import stage_arguments
from cdfast.stages.checks import check_stages
from cdfast.stages.data import stage_dataset
from cdfast.stages.run import Run, user_errors
from cdfast.storage import CheckpointError, write_text
from cdfast.stored_targets.files import (
    ALIGNMENT,
    FORMAT,
    INDEX_FILE,
    KL,
    ShardPlan,
    read_index,
    shard_path,
    shard_problem,
    write_shard,
)
from cdfast.stored_targets.maker import TargetMaker
from cdfast.stored_targets.plan import (
    check_storable,
    common_facts,
    data_facts,
    differences,
    kl_rows,
    matches_as_json,
    parts_of,
    recipe_aligner,
    require_length,
    shared_vocabulary,
)
from cdfast.stored_targets.sizes import (
    Measured,
    check_space,
    free_bytes,
    measure_samples,
    shown_bytes,
    stored_bytes,
)
from cdfast.trainer import LayoutCollator

DTYPES = ("float16", "float32")
SAMPLES_PER_SHARD = 1024


@dataclass(frozen=True)
class TargetOptions:
    """Of the command itself."""

    folder: Path
    top_k: int
    dtype: str
    per_shard: int
    estimate: bool


@dataclass
class TargetData:
    """Samples that the teacher sees, for all stages that train on them."""

    plan: ShardPlan
    samples: Any
    facts: dict[str, Any]
    stages: list[int]
    parts: set[str]
    measured: Measured
    batch_size: int

    def bytes(self, layers: int, options: TargetOptions) -> dict[str, float]:
        """Bytes on disk by what they are for, see `stored_bytes`."""
        return stored_bytes(
            self.measured.samples,
            self.measured.answer_rows if KL in self.parts else 0,
            self.measured.visual_tokens if ALIGNMENT in self.parts else 0,
            layers=layers,
            top_k=options.top_k,
            itemsize=getattr(torch, options.dtype).itemsize,
        )


# -- what there is to do ---------------------------------------------------------------------------


def data_sets(run: Run, per_shard: int, token_id: int) -> list[TargetData]:
    """The data of the stages with a teacher, each once, and how many tokens its samples have.

    Raises:
        ConfigError: no stage has a teacher, or data of no known length.
    """
    found: list[TargetData] = []
    for number, stage in enumerate(run.recipe.stages, 1):
        if not stage.needs_teacher:
            continue
        samples = stage_dataset(run, number)
        require_length(samples, number)
        facts = data_facts(run.recipe, number, samples)
        same = next((d for d in found if d.facts == facts), None)
        if same is None:
            measured = measure_samples(samples, token_id, kl_rows(run.recipe))
            plan = ShardPlan(len(found), len(samples), per_shard)
            same = TargetData(plan, samples, facts, [], set(), measured, stage.batch_size)
            found.append(same)
        same.stages.append(number)
        same.parts |= parts_of(stage)
    if not found:
        raise ConfigError(
            f"stages: expected one with a teacher's losses; the recipe {run.recipe.name!r} has "
            "none. There are no targets to compute."
        )
    return found


def print_estimate(
    run: Run, sets: Sequence[TargetData], layers: int, options: TargetOptions
) -> float:
    """Sizes by data set and part; returns the bytes of all."""
    names = list(sets[0].bytes(layers, options))
    table = Table(
        title=f"estimated size on disk: top {options.top_k}, {options.dtype}, {layers} layers",
        box=SIMPLE_HEAD,
    )
    for heading in ("stages", "samples", "answer rows", "visual tokens", *names, "total"):
        justify: Any = "left" if heading == "stages" else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == "stages")
    total = 0.0
    for one in sets:
        size = one.bytes(layers, options)
        total += sum(size.values())
        m = one.measured
        table.add_row(
            ", ".join(f"{n} ({run.recipe.stages[n - 1].stage})" for n in one.stages),
            *(f"{m.samples:,}", f"{m.answer_rows:.1f}", f"{m.visual_tokens:.1f}"),
            *(shown_bytes(size[name]) for name in names),
            shown_bytes(sum(size.values())),
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    print(
        "answer rows and visual tokens are means of "
        f"{', '.join(str(d.measured.looked_at) for d in sets)} samples, evenly spread"
    )
    print(f"in all: {shown_bytes(total)}; free: {shown_bytes(free_bytes(options.folder))}")
    return total


def index_of(
    run: Run,
    sets: Sequence[TargetData],
    aligner: VisualAttentionAligner | None,
    options: TargetOptions,
) -> dict[str, Any]:
    """What index.json is to hold: everything that a run compares before it reads the targets."""
    student = model_configs(run.recipe)[1]
    rows = student.get_text_config(decoder=True).vocab_size
    # A language model that has no image token is given one when it is put behind an encoder.
    token = student.image_token_id if hasattr(student, "image_token_id") else -1
    vocabulary = shared_vocabulary(run.recipe, max(rows, token + 1))
    if options.top_k > vocabulary:
        raise ConfigError(
            f"--top-k: expected at most {vocabulary}, the tokens that teacher and student share; "
            f"got {options.top_k}."
        )
    facts = {
        **common_facts(run.recipe, run.processor),
        "vocabulary": vocabulary,
        "kl rows": kl_rows(run.recipe),
        "matched layers": matches_as_json(aligner),
        "top k": options.top_k,
        "dtype": options.dtype,
        "samples per shard": options.per_shard,
    }
    data = [
        {
            "number": one.plan.data_set,
            "samples": one.plan.samples,
            "parts": sorted(one.parts),
            "facts": one.facts,
        }
        for one in sets
    ]
    index: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "facts": facts, "data": data}))
    return index


def check_same_index(index: dict[str, Any], folder: Path) -> None:
    """Refuse a folder that holds targets of something else.

    Raises:
        ConfigError: what differs.
    """
    there = read_index(folder)
    found = differences(there["facts"], index["facts"])
    for number, one in enumerate(index["data"]):
        stored = there["data"][number] if number < len(there["data"]) else {}
        found += [f"data set {number}, {text}" for text in differences(stored, one)]
    if found or len(there["data"]) != len(index["data"]):
        raise ConfigError(
            f"--targets-dir: {folder} holds targets of something else: "
            f"{'; '.join(found) or 'fewer data sets here'}. Give another --targets-dir, or delete "
            "this one."
        )


# -- the teacher -----------------------------------------------------------------------------------


def make_teacher(
    run: Run,
    sets: Sequence[TargetData],
    vocabulary: int,
    student: PreTrainedModel,
    options: TargetOptions,
) -> TargetMaker:
    """Load the teacher onto this process's device."""
    recipe, arguments = run.recipe, stage_arguments(run, sets[0].stages[0])
    source = teacher_source(recipe)
    teacher = load_model(source, recipe.teacher_dtype, recipe.trust_remote_code).eval()
    teacher.requires_grad_(False).to(run.state.device)  # type: ignore[arg-type]
    use_cdfast_attention(teacher)
    used = frozenset({"kl"} if any(KL in one.parts for one in sets) else ())
    aligned = any(ALIGNMENT in one.parts for one in sets)
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return TargetMaker(
        teacher,
        recipe_aligner(recipe, teacher, student) if aligned else None,
        LossOptions(used, unshifted_kl_mask=recipe.unshifted_kl_mask),
        vocabulary,
        options.top_k,
        options.dtype,
        run.state.device,
        half,
    )


# -- writing ---------------------------------------------------------------------------------------


def make_shard(
    run: Run, maker: TargetMaker, one: TargetData, shard: int, folder: Path, progress: Any
) -> None:
    """Run the teacher over the samples of a shard and write it."""
    loader = DataLoader(
        Subset(one.samples, one.plan.indices(shard)),
        batch_size=one.batch_size,
        num_workers=run.recipe.workers,
        collate_fn=LayoutCollator(
            VisionTextCollator(run.processor.tokenizer.pad_token_id), image_token_id(maker.teacher)
        ),
    )
    parts = []
    for batch in loader:
        parts.append(maker.batch(batch, one.parts))
        progress(len(batch["sample_ids"]))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    path = shard_path(folder, one.plan.data_set, shard)
    try:
        write_shard(path, tensors)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error} ({shown_bytes(free_bytes(path))} free). Free "
            "space and give the same command again: finished shards are kept."
        ) from error


def write_targets(run: Run, options: TargetOptions) -> None:
    """Estimate, compare with what is there, and make what is missing.

    Raises:
        ConfigError: what cannot be stored, does not fit, or is there already of something else.
        CheckpointError: a shard that cannot be written.
    """
    recipe, state = run.recipe, run.state
    teacher_config, student_config = model_configs(recipe)
    assert teacher_config is not None  # a stage has a teacher's losses: checked with the recipe
    student = meta_model(student_config)
    teacher = meta_model(teacher_config)
    sets = data_sets(run, options.per_shard, image_token_id(teacher))
    aligned = any(ALIGNMENT in one.parts for one in sets)
    aligner = recipe_aligner(recipe, teacher, student) if aligned else None
    index = index_of(run, sets, aligner, options)
    layers = len(index["facts"]["matched layers"])
    if state.is_main_process:
        total = print_estimate(run, sets, layers, options)
    if options.estimate:
        return
    if (options.folder / INDEX_FILE).exists():
        check_same_index(index, options.folder)
    state.wait_for_everyone()
    shards = [(one, shard) for one in sets for shard in one.plan.shards]
    looked_at = range(state.process_index, len(shards), state.num_processes)
    own = [n for n in looked_at if not _is_whole(*shards[n], options)]
    missing = [shards[n] for n in sorted(gather_object(own))]
    if state.is_main_process:
        check_space(total * len(missing) / len(shards), options.folder)
        (options.folder / "shards").mkdir(parents=True, exist_ok=True)
        write_text(options.folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        maker = make_teacher(run, sets, index["facts"]["vocabulary"], student, options)
        with _progress(run, sum(len(one.plan.indices(s)) for one, s in mine)) as advance:
            for one, shard in mine:
                make_shard(run, maker, one, shard, options.folder, advance)
    state.wait_for_everyone()
    size = sum(p.stat().st_size for p in (options.folder / "shards").glob("*.safetensors"))
    kept = len(shards) - len(missing)
    run.say(f"{len(shards)} shards in {options.folder}, {shown_bytes(size)}; {kept} kept")
    run.say(f"train with the same options and --teacher-targets {options.folder}")


def _is_whole(one: TargetData, shard: int, options: TargetOptions) -> bool:
    """Whether a finished shard can be kept; says why not."""
    path = shard_path(options.folder, one.plan.data_set, shard)
    if not path.exists():
        return False
    problem = shard_problem(path, len(one.plan.indices(shard)), content=True)
    if problem:
        print(f"{path}: {problem}: made again", flush=True)
    return problem is None


@contextmanager
def _progress(run: Run, samples: int) -> Iterator[Any]:
    """A function that advances a bar by a number of samples; on rank 0, for its own share."""
    columns = (TextColumn("teacher"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"))
    console = Console(stderr=True, quiet=not run.state.is_main_process)
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("teacher", total=samples)
        yield lambda n: bar.advance(task, n)


# -- command ---------------------------------------------------------------------------------------


def _options(argv: Sequence[str]) -> tuple[TargetOptions, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m cdfast.targets",
        usage="%(prog)s [RECIPE|FILE.yaml] --targets-dir DIR [--estimate] [--option value ...]",
        description="Store what a run needs of its teacher. Further options: of cdfast.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--targets-dir", help="folder of the targets")
    parser.add_argument("--top-k", default="64", help="tokens kept per answer row (64)")
    parser.add_argument(
        "--targets-dtype", default=DTYPES[0], help="float16 (default) or float32, on disk"
    )
    parser.add_argument(
        "--shard-samples",
        default=str(SAMPLES_PER_SHARD),
        help=f"samples per file, the most that an interruption loses ({SAMPLES_PER_SHARD})",
    )
    parser.add_argument("--estimate", action="store_true", help="print the size and stop")
    own, rest = parser.parse_known_args(list(argv))
    if not own.targets_dir:
        raise ConfigError("--targets-dir: expected a folder; got none. Give --targets-dir DIR.")
    for name in ("top_k", "shard_samples"):
        text = getattr(own, name)
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected a whole number, at least 1; got {text!r}."
            )
    if own.targets_dtype not in DTYPES:
        raise ConfigError(
            f"--targets-dtype: expected {' or '.join(DTYPES)}; got {own.targets_dtype!r}."
        )
    numbers = int(own.top_k), own.targets_dtype, int(own.shard_samples)
    return TargetOptions(Path(own.targets_dir), *numbers, own.estimate), rest


def _recipe(argv: Sequence[str]) -> Recipe:
    recipe, flags = parse_command_line(argv)
    for name in ("list", "resume", "overwrite", "dry_run", "compare"):
        if getattr(flags, name) not in (False, None):
            raise ConfigError(
                f"--{name.replace('_', '-')}: is an option of cdfast.train; leave it out. Targets "
                "are always continued where they stopped."
            )
    assert recipe is not None
    recipe.check_runnable()
    check_storable(recipe)
    # What concerns the student's training would ask for a launcher, or for these very targets.
    return replace(recipe, teacher_targets=None, zero_stage=0, offload_optimizer=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m cdfast.targets`."""
    try:
        options, rest = _options(sys.argv[1:] if argv is None else argv)
        recipe = _recipe(rest)
        state = PartialState(cpu=not torch.cuda.is_available())
        run = Run(recipe, options.folder, load_processor(recipe), state)
        check_stages(run)
        with user_errors():
            write_targets(run, options)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: finished shards are kept; give the same command to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
