"""Memory of a call: peak, bytes kept for backward, and a process of its own to measure it in.

On CUDA the peak is that of torch's allocator. On a CPU it is the resident size of the process
(Linux), which counts what any library allocates; it is measured in a process of its own, in which
freed memory goes back to the system, as it would hide what comes later.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SMALL_BYTES = 2**16  # larger allocations go back to the system when they are freed


def peak_bytes(run: Callable[[], Any], device: str = "cuda") -> int | None:
    """Largest number of bytes during run() beyond those before it, its results included.

    None on a CPU outside of Linux. On a CPU, warm up with a smaller problem (libraries, threads)
    and call it in a process of its own: `in_child`.
    """
    peak = watch_peak(device)
    result = run()
    found = peak()
    del result
    return found


def watch_peak(device: str) -> Callable[[], int | None]:
    """From now on: a function that says how many bytes the largest use was beyond the present one.

    See `peak_bytes`; this is for what is no call of one function, such as a trainer's step.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def peak_on_device() -> int:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

        return peak_on_device
    if not STATUS.exists():
        return lambda: None
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    return lambda: max(_status("VmHWM") - before, 0)


def kept_bytes(forward: Callable[[], Any], device: str) -> int | None:
    """Bytes that are held after forward() and were not before: what waits for backward.

    As `saved_bytes`, but without what was there before, such as parameters, and for operations
    that refuse saved-tensor hooks (torch.func inside). None on a CPU outside of Linux.
    """
    cuda = device.startswith("cuda")
    if not cuda and not STATUS.exists():
        return None
    held = torch.cuda.memory_allocated if cuda else _resident_bytes
    before = held()
    result = forward()
    found = held() - before
    del result
    return max(found, 0)


def _resident_bytes() -> int:
    gc.collect()
    # What was freed must not be counted as there already.
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps from forward() for backward, each storage once.

    Inputs that a backward needs are among them, as are parameters.
    """
    storages: dict[int, int] = {}
    kept = []  # alive until the end, so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept.append(forward())
    return sum(storages.values())


def in_child(
    function: Callable[..., T], *arguments: Any, threads: int = 1, limit: int | None = None
) -> T:
    """function(*arguments) in a fresh process; the function must be importable.

    Args:
        threads: of torch, in that process.
        limit: bytes of memory that the process may allocate beyond those it starts with; more
            raises in it as any failed allocation does, instead of taking the machine down.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed.
        Exception: whatever the function raised.
    """
    # Forked from a process that imported what it needs (custom operators load torch._dynamo at
    # their first call) and computed nothing: as good as new, in a tenth of the time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", function.__module__])
    with ProcessPoolExecutor(1, context, _prepare, (threads, limit)) as pool:
        return pool.submit(function, *arguments).result()


def _prepare(threads: int, limit: int | None) -> None:
    torch.set_num_threads(threads)
    if STATUS.exists():
        # glibc would keep freed tensors of up to 32 MiB, at some sizes and not at others.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL_BYTES)
    if limit is not None:
        most = _status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        part in text for part in ("out of memory", "alloc_failed", "can't allocate memory")
    )


def available_bytes(device: str) -> int:
    """Memory that a new process could take: of the GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo: expected a line MemAvailable; found none.")


def _status(field: str) -> int:
    """Bytes of a field of this process's status, such as VmRSS (Linux)."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
