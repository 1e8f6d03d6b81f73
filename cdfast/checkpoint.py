"""Checkpoints: committed by all ranks in one rename, verified before they are read.

A checkpoint is a folder `checkpoint-<step>` with a manifest. What is public here is collective:
every rank calls it, and all get the same answer.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdfast.manifest import (
    MANIFEST_FILE,
    checkpoints,
    describe,
    manifest_text,
    read_manifest,
    step_of,
)
from cdfast.storage import (
    TRASH,
    CheckpointError,
    exchange,
    files_in,
    folders_in,
    fsync,
    put_in_place,
    rank_and_world,
    together,
    write_text,
)

_PICKLES = (".pt", ".pth", ".bin", ".pkl")


def commit(staging: Path, target: Path, *, step: int, zero_stage: int) -> None:
    """Make the filled folder `staging` the checkpoint `target`. Collective.

    Everything is brought to disk by the machine that may hold it in memory, hashed in shares, and
    listed in the manifest; then one rename by rank 0.

    Raises:
        CheckpointError: on all ranks, if something cannot be written.
    """
    rank, world = rank_and_world()
    names = exchange([str(p.relative_to(staging)) for p in files_in(staging)] if rank == 0 else [])[
        0
    ]
    hosts = exchange(socket.gethostname())
    mine = [r for r in range(world) if hosts[r] == hosts[rank]]

    def share() -> dict[str, dict[str, Any]]:
        for name in names[mine.index(rank) :: len(mine)]:
            fsync(staging / name)
        with safe_pickles(zero_stage):
            for name in names[rank::world]:
                problem = _pickle_problem(staging / name, name)
                if problem:  # now, not when the run wants to resume
                    raise CheckpointError(f"{staging}: cannot be read back: {problem}.")
        return {name: describe(staging / name) for name in names[rank::world]}

    described = exchange(together(share, staging.parent))

    def write_manifest() -> None:
        if rank == 0:
            files = {name: entry for part in described for name, entry in part.items()}
            content = {"step": step, "world_size": world, "zero_stage": zero_stage, "files": files}
            write_text(staging / MANIFEST_FILE, manifest_text(content))
        if rank == mine[0]:
            for path in folders_in(staging):
                fsync(path)

    together(write_manifest, staging.parent)
    together(lambda: put_in_place(staging, target) if rank == 0 else None, staging.parent)


def rotate(saved: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the best or the one just saved.

    Later ones than `saved` are left alone and not counted: resume has skipped them as broken.

    Raises:
        OSError: one cannot be deleted.
    """
    if not limit or limit < 1:
        return
    kept = {saved.name, Path(best).name if best else saved.name}
    existing = [p for p in checkpoints(saved.parent) if step_of(p) <= step_of(saved)]
    surplus = len(existing) - max(limit, len(kept))
    doomed = [p for p in reversed(existing) if p.name not in kept][: max(surplus, 0)]
    for path in doomed:
        # Renamed first: what is half deleted must not look like a checkpoint.
        trash = path.with_name(TRASH + path.name)
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash)


def newest_checkpoint(
    folder: Path, zero_stage: int, say: Callable[[str], None] = print
) -> Path | None:
    """The newest whole checkpoint of a run folder; None if there is none. Collective.

    Args:
        folder: run folder with `checkpoint-<step>` folders.
        zero_stage: ZeRO stage of the run that wants to resume.
        say: rank 0 tells by it what is skipped and why, and what is resumed.

    Raises:
        CheckpointError: the checkpoint is whole, but of another number of processes or ZeRO stage.
    """
    rank, _ = rank_and_world()
    tell = say if rank == 0 else lambda text: None
    names = exchange([path.name for path in checkpoints(folder)] if rank == 0 else [])[0]
    for name in names:
        problem = verify(folder / name, zero_stage)
        if problem is None:
            require_same_layout(folder / name, zero_stage)
            tell(f"resuming from {folder / name}")
            return folder / name
        tell(f"skipping {folder / name}: {problem}")
    skipped = "no whole checkpoint" if names else "no checkpoint"
    tell(f"{skipped} in {folder}: starting afresh")
    return None


def verify(checkpoint: Path, zero_stage: int | None) -> str | None:
    """Why a checkpoint must not be used, or None. Collective: every rank reads a share of it.

    Args:
        checkpoint: folder.
        zero_stage: of the run that wants to resume from it; None: only its weights are wanted.

    Sizes and hashes of all files are those of the manifest. For a run that resumes, no part of the
    state is missing, and the pickles, if it would load them, hold nothing but data.
    """
    rank, world = rank_and_world()
    manifest, problem = exchange(read_manifest(checkpoint) if rank == 0 else ({}, None))[0]
    if problem:
        return problem
    files = manifest["files"]
    mine = sorted(files)[rank::world]
    found = [_file_problem(checkpoint, name, files[name]) for name in mine]
    # A checkpoint of another stage is refused for that, here perhaps without DeepSpeed.
    if zero_stage is not None and zero_stage == manifest["zero_stage"] and not any(found):
        with safe_pickles(zero_stage):
            found = [_pickle_problem(checkpoint / name, name) for name in mine]
    problems = [text for part in exchange(found) for text in part if text is not None]
    problems += _missing_parts(manifest) if zero_stage is not None else []
    if not problems:
        return None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more


def _file_problem(checkpoint: Path, name: str, expected: dict[str, Any]) -> str | None:
    path = checkpoint / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name} lies outside"
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if describe(path) != expected:
            return f"{name} is damaged (its SHA-256 is not that of the manifest)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _pickle_problem(path: Path, name: str) -> str | None:
    """The unpickler that resume uses decides, by its own list; tensors are mapped, not read."""
    if path.suffix not in _PICKLES:
        return None
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = found.group(1) if found else str(error).split("\n")[0]
        return f"{name} holds more than data, or none: {reason}"
    return None


def _missing_parts(manifest: dict[str, Any]) -> list[str]:
    """Parts of a resumable state that the save itself has not written."""
    names, world, stage = set(manifest["files"]), manifest["world_size"], manifest["zero_stage"]
    rng = [f"rng_state_{rank}.pth" for rank in range(world)] if world > 1 else ["rng_state.pth"]
    wanted = ["trainer_state.json", *rng]
    wanted += ["latest"] if stage else ["optimizer.pt", "scheduler.pt"]
    missing = [f"{name} is missing from the save" for name in wanted if name not in names]
    shards = [name for name in names if name.endswith("optim_states.pt")]
    if stage and len(shards) != world:
        missing.append(f"it has {len(shards)} optimizer shards instead of {world}")
    return missing


def require_same_layout(checkpoint: Path, zero_stage: int) -> None:
    """Refuse a checkpoint that was written by another number of processes or ZeRO stage.

    Raises:
        CheckpointError: both numbers, and what can be done.
    """
    manifest, _ = exchange(read_manifest(checkpoint))[0]
    _, world = rank_and_world()
    for what, then, now in (
        ("processes", manifest["world_size"], world),
        ("ZeRO stage", manifest["zero_stage"], zero_stage),
    ):
        if then != now:
            raise CheckpointError(
                f"{checkpoint}: {what}: it was saved with {then}; this run has {now}. Resume with "
                f"{then}, or take its weights (python -m cdfast.export {checkpoint} FOLDER) and "
                "start a new run from them (--student FOLDER) in another --output-dir."
            )


@contextmanager
def safe_pickles(zero_stage: int) -> Iterator[None]:
    """Inside, every torch.load, DeepSpeed's own too, loads data and a few named classes only."""
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    allowed.append(np.zeros(1).__reduce__()[0])  # numpy's constructor, wherever this version has it
    if zero_stage:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        # Plain records and numbers; stage 3 has the first two, stages 1 and 2 the last one too.
        allowed += [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
    # DeepSpeed asks for weights_only=False, and this is torch's own way to overrule that.
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextmanager
def deferred_errors(engine: Any) -> Iterator[None]:
    """A rank that fails inside DeepSpeed's save goes on to its last barrier, and raises after it.

    `latest` is left to the caller: rank 0 writes it just before that barrier.
    """
    failures: list[Exception] = []

    def deferred(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                failures.append(error)

        return call

    writer = engine.checkpoint_engine
    # DeepSpeed's methods, hidden by instance attributes until the save is over.
    guarded = [(writer, "save"), (writer, "makedirs"), (engine, "_copy_recovery_script")]
    for owner, name in guarded:
        setattr(owner, name, deferred(getattr(owner, name)))
    engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)
    try:
        yield
    finally:
        for owner, name in (*guarded, (engine, "save_checkpoint")):
            delattr(owner, name)
    if failures:
        raise failures[0]
