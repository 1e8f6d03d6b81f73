"""What the benchmarks measure with: clocks and the ceilings of the machine."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 2**28  # several times the L2 cache of any GPU
# The device waits this long before a timed region, so that the host has queued all of it by then:
# about 2 ms at 2 GHz.
HEAD_START_CYCLES = 4_000_000
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Clock:
    """Times one call after another, on CUDA by events behind a flush of the L2 cache."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None
        )

    def start(self) -> Any:
        if self.flush is None:
            return time.perf_counter()
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Any:
        if self.flush is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        if self.flush is None:
            return (end - begin) * 1e3
        end.synchronize()
        return begin.elapsed_time(end)

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of one call on the device, and of the host until it had queued it."""
        begin = self.start()
        host = time.perf_counter()
        run()
        host = (time.perf_counter() - host) * 1e3
        end = self.stop()
        return self.milliseconds(begin, end), host

    def interleaved(
        self, variants: dict[str, Callable[[], Any]], rounds: int, seconds: float
    ) -> dict[str, dict[str, float]]:
        """All variants in turn in every round: median, spread and number of rounds of each.

        At least 3 rounds; then until `rounds` are done or `seconds` have passed.
        """
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        begin = time.monotonic()
        for i in range(rounds):
            if i >= 3 and time.monotonic() - begin > seconds:
                break
            for name, run in variants.items():
                times[name].append(self.time(run))
        return {name: summary(pairs) for name, pairs in times.items()}


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Median, half of the distance between the quartiles over the median, fastest, host median,
    count."""
    values = [a for a, _ in pairs]
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return {
        "ms": median,
        "spread": (high - low) / 2 / median,
        "fastest_ms": min(values),
        "host_ms": statistics.median(b for _, b in pairs),
        "rounds": len(pairs),
    }


def graph_ms(run: Callable[[], Any], clock: Clock, rounds: int, seconds: float) -> float | None:
    """Median milliseconds of a replay of run(), captured as a CUDA graph; None without CUDA."""
    if not clock.cuda:
        return None
    # Autograd and the allocator warm up beside the stream that is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return clock.interleaved({"replay": graph.replay}, rounds, seconds)["replay"]["ms"]


def copy_bytes() -> int:
    """Bytes of one side of a copy that no cache of this CPU holds; 1 GiB at most.

    Twice the last-level cache, which Linux tells; 256 MiB where it does not.
    """
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    largest = max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=2**27)
    return min(max(2 * largest, 2**26), 2**30)


def ceilings(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """Measured rates of a large matrix product (on random data) and of a large copy.

    Large: the product is not bound by its launch, and neither side of the copy fits a cache. The
    fastest of five rounds: what else the machine does lowers a ceiling, nothing raises it.
    """
    device = "cuda" if clock.cuda else "cpu"
    n, size = (8192, 2**30) if clock.cuda else (1024, copy_bytes())
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, device=device, dtype=torch.int8)
    target = torch.zeros_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "matmul": lambda: a @ b,
        "copy": lambda: target.copy_(source),
    }
    for run in runs.values():
        run()
    found = clock.interleaved(runs, 5, 5)
    return {
        "matmul_tflops": 2 * n**3 / found["matmul"]["fastest_ms"] / 1e9,
        "copy_gb_per_s": 2 * size / found["copy"]["fastest_ms"] / 1e6,
    }


class KernelClock:
    """Times every launch of every Triton kernel of cdfast_kernels while it is active."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.launches: dict[str, list[tuple[Any, Any]]] = {}
        self.compiled: dict[str, Any] = {}

    @contextmanager
    def active(self):
        replaced = list(kernels().items())
        for (module, name), kernel in replaced:
            setattr(module, name, _Timed(name, kernel, self))
        try:
            yield self
        finally:
            for (module, name), kernel in replaced:
                setattr(module, name, kernel)

    def milliseconds(self) -> dict[str, list[float]]:
        """Per kernel, one number per launch since the last call."""
        found = {
            name: [self.clock.milliseconds(*pair) for pair in pairs]
            for name, pairs in self.launches.items()
        }
        self.launches = {}
        return found


class _Timed:
    def __init__(self, name: str, kernel: Any, owner: KernelClock):
        self.name, self.kernel, self.owner = name, kernel, owner

    def __getattr__(self, attribute):
        return getattr(self.kernel, attribute)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            begin = self.owner.clock.start()
            compiled = self.kernel[grid](*args, **kwargs)
            pair = begin, self.owner.clock.stop()
            self.owner.launches.setdefault(self.name, []).append(pair)
            self.owner.compiled[self.name] = compiled
            return compiled

        return launch


def kernels() -> dict[tuple[Any, str], Any]:
    """(module, name) -> kernel, of every Triton kernel that cdfast_kernels launches."""
    from cdfast_kernels import triton_ops  # noqa: F401  (loads them all)

    return {
        (module, name): value
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("cdfast_kernels.")
        for name, value in list(vars(module).items())
        if name.endswith("_kernel") and hasattr(value, "run") and hasattr(value, "__getitem__")
    }
