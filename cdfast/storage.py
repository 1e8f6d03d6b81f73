"""Writing folders whole or not at all, alone or by many ranks on shared storage.

`exchange`, `together` and `prepare_run_folder` are collective: every rank calls them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from cdfast.manifest import checkpoints, is_complete

T = TypeVar("T")

# Not dots: an upload to the hub leaves out names that start with an underscore.
STAGING, REPLACED, TRASH = "_staging-", "_replaced-", "_trash-"
# A file that another machine has made may take this long to show on network storage.
_SHARED_STORAGE_SECONDS = 60.0
_PROBE = bytes(1 << 20)
# torch.save does not say why it failed.
_TORCH_WRITER = r"PytorchStreamWriter|inline_container|unexpected pos"
_REMEDIES = {
    errno.ENOSPC: "Free space or keep fewer checkpoints (--save-total-limit)",
    errno.EDQUOT: "Free space of your quota or keep fewer checkpoints (--save-total-limit)",
    errno.EROFS: "Make the disk writable or move the run folder to one that is",
    errno.EACCES: "Make the folder writable for this user",
    errno.EPERM: "Make the folder writable for this user",
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; says where, why, what is whole, what to do."""


# -- ranks -----------------------------------------------------------------------------------------


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that there is."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def rank_and_world() -> tuple[int, int]:
    """This process among those that train: (rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def exchange(value: T) -> list[T]:
    """The value of every rank, in order of ranks. Collective."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T], where: Path) -> T:
    """Run `action` on every rank; if it fails on one, fail on all, so that none waits for ever.

    Args:
        action: what this rank does; no collective inside after something that can fail.
        where: the folder that is written, for the message.

    Raises:
        CheckpointError: with the first failing rank's reason. What is not about storage is raised
            as it is on the rank where it happened.
    """
    result: Any = None
    failure: str | None = None
    cause: Exception | None = None
    is_ours = True
    try:
        result = action()
    except CheckpointError as error:
        failure = str(error)
    except Exception as error:
        failure, cause = _storage_failure(error, where), error
        is_ours = failure is not None
        failure = failure or f"rank {rank_and_world()[0]} failed: {type(error).__name__}: {error}"
    failures = [text for text in exchange(failure) if text is not None]
    if cause is not None and not is_ours:
        raise cause
    if failures:
        raise CheckpointError(failures[0]) from cause
    return result


def _storage_failure(error: Exception, where: Path) -> str | None:
    """Path, reason, what is whole and the remedy of a write that failed; None for other errors."""
    existing = nearest_existing(where)
    code = _errno(error) or _errno_of_a_write(existing)
    if code is None and not re.search(_TORCH_WRITER, str(error)):
        return None
    free = shutil.disk_usage(existing).free
    reason = os.strerror(code) if code else str(error).split("\n")[0]
    run = next((p.parent for p in (where, *where.parents) if p.name.startswith(STAGING)), where)
    older = next((p for p in checkpoints(run) if is_complete(p)), None)
    remedy = _REMEDIES.get(code or 0, "Remove the cause")
    rank, world = rank_and_world()
    return (
        (f"rank {rank}: " if world > 1 else "")
        + f"{where}: cannot be written: {reason} ({free / 2**30:.2f} GiB free on its disk). "
        + (f"{older} is whole. " if older else "There is no whole checkpoint in this folder yet. ")
        + f"{remedy}, then go on with --resume."
    )


def _errno(error: BaseException | None) -> int | None:
    """The operating system's reason; safetensors has it in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        if hidden:
            return int(hidden.group(1))
        error = error.__cause__ or error.__context__
    return None


def _errno_of_a_write(folder: Path) -> int | None:
    """Why a megabyte cannot be written there now, if it cannot."""
    probe = folder / f"{STAGING}probe"
    try:
        with open(probe, "wb") as file:
            file.write(_PROBE)
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        discard(probe)
    return None


# -- writing ---------------------------------------------------------------------------------------


def fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or, after a crash, as it was before."""
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, complete or not at all; what is not finite as null, as JSON asks."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` by one rename; one process.

    After a crash `path` is whole, or as it was before.
    """
    partial = path.with_name(STAGING + path.name)
    yield partial
    fsync(partial)
    partial.replace(path)
    fsync(path.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` by one rename; one process.

    After a crash `target` is whole, or as it was before.
    """
    staging = target.with_name(STAGING + target.name)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in (*files_in(staging), *folders_in(staging)):
            fsync(path)
        put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a folder that is on disk to its name; what has the name gives way."""
    replaced = target.with_name(REPLACED + target.name)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    folder.rename(target)
    fsync(folder.parent)
    fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folders_in(folder: Path) -> list[Path]:
    """The folder and those in it, the innermost first."""
    return [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]


def prepare_run_folder(folder: Path) -> None:
    """Make the run folder, remove what a crash has left in it, and check that all ranks see it.

    Raises:
        CheckpointError: it cannot be written, or a rank does not see what rank 0 writes.
    """
    rank, _ = rank_and_world()

    def clear() -> str | None:
        if rank:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{REPLACED}*"):
            name = path.with_name(path.name.removeprefix(REPLACED))
            # Between the two renames of a replacement the old folder is the only one.
            shutil.rmtree(path) if name.exists() else path.rename(name)
        for kind in (STAGING, TRASH):
            for path in folder.glob(f"{kind}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        token = f"{STAGING}{secrets.token_hex(8)}"
        (folder / token).touch()
        return token

    token = exchange(together(clear, folder))[0]
    assert token is not None
    together(lambda: _require_visible(folder, token), folder)
    if rank == 0:
        (folder / token).unlink()


def _require_visible(folder: Path, name: str) -> None:
    deadline = time.monotonic() + _SHARED_STORAGE_SECONDS
    # Listed, not asked for by name: network storage remembers for a while that a name was missing.
    while not (folder.is_dir() and name in os.listdir(folder)):
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder} on {socket.gethostname()}: expected to see what rank 0 has written "
                f"there within {_SHARED_STORAGE_SECONDS:.0f} s; it is not there. The run folder "
                "must be on storage that all machines share: choose another --output-dir."
            )
        time.sleep(0.2)


def discard(path: Path) -> None:
    """Remove what a failed save has left, as far as that is possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
