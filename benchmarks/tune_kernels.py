"""Measures launch settings for the table of launch.py: python -m benchmarks.tune_kernels

For each head size and dtype, and each kernel of the table, candidate tile shapes, warps and stages
are compiled (in several processes), checked against the results of the present settings, and timed
in turn. Settings that do not compile, exceed the shared memory, spill or change the result are
recorded with the reason and left out. The best rows are printed as they stand in launch.py, and
everything is written as it goes: stop it at any time. --table FILE writes them for
CDFAST_LAUNCH_TABLE=FILE, which puts them before the table.

    python -m benchmarks.tune_kernels --list --arch 90      the candidates; no GPU needed
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import flash_attention, flash_attention_with_alignment, visual_alignment_loss

from benchmarks.candidates import SPECS, Spec, candidates, table_row, table_rows, variations
from benchmarks.cases import DTYPES, Case, Problem
from benchmarks.measure import Clock, kernels, summary
from benchmarks.result_files import RESULTS, result_path, start, write_json
from tests.numerics import FLOOR, max_error

ROUNDS = 12
# Largest difference of a result from that of the present settings, in FLOORs of tests/numerics.py.
AGREEMENT = 4.0


class Workload:
    """One training step's tensors, and a call per kernel of the table that launches it."""

    def __init__(self, spec: Spec, device: str):
        if device == "cpu":
            self.case = Case(40, 25, 1, 2, 1, spec.head_dim, spec.dtype)
        else:
            self.case = Case(4096, 2880, 2, 16, 16, spec.head_dim, spec.dtype)
        self.problem = Problem(self.case, device, "triton")
        self.graphs: dict[str, tuple] = {}

    def run(self, kernel: str) -> tuple:
        """The results that the kernel has a part in."""
        p = self.problem
        options: dict[str, Any] = {"layout": p.layout, "backend": "triton"}
        if kernel == "fwd":
            with torch.no_grad():
                return flash_attention(*p.inputs(), **options)
        if kernel == "map":
            with torch.no_grad():
                return flash_attention_with_alignment(*p.inputs(), p.target, **options)
        modular = kernel.startswith("align_")
        outputs = self._graph(modular)
        seeds = (p.one,) if modular else (p.d_out, p.one)
        leaves = p.leaves[:2] if modular else p.leaves
        return torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)

    def _graph(self, modular: bool) -> tuple:
        """Outputs with their graph, made once with the present settings."""
        name = "modular" if modular else "fused"
        if name not in self.graphs:
            p = self.problem
            if modular:
                lse = p.lse.detach().requires_grad_()
                loss = visual_alignment_loss(
                    *p.leaves[:2], lse, p.target, p.layout, backend="triton"
                )
                self.graphs[name] = (loss,)
            else:
                self.graphs[name] = flash_attention_with_alignment(
                    *p.leaves, p.target, p.layout, backend="triton"
                )
        return self.graphs[name]


class Override:
    """Replaces the settings of one kernel of the table, and watches the launches that use them."""

    def __init__(self, clock: Clock | None):
        self.clock = clock
        self.kernel = ""
        self.settings: Any = None
        self.asked = ""
        self.pairs: list[tuple[Any, Any]] = []
        self.compiled: Any = None
        self.compile_only = False

    @contextmanager
    def active(self):
        from cdfast_kernels import launch

        original = launch.settings_for

        def settings_for(kernel: str, *arguments: Any) -> Any:
            self.asked = kernel
            chosen = kernel == self.kernel and self.settings is not None
            return self.settings if chosen else original(kernel, *arguments)

        replaced = list(kernels().items())
        launch.settings_for = settings_for
        for (module, name), kernel in replaced:
            setattr(module, name, _Watched(kernel, self))
        try:
            yield self
        finally:
            launch.settings_for = original
            for (module, name), kernel in replaced:
                setattr(module, name, kernel)


class _Watched:
    def __init__(self, kernel: Any, owner: Override):
        self.kernel, self.owner = kernel, owner

    def __getattr__(self, attribute):
        return getattr(self.kernel, attribute)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            owner = self.owner
            mine, owner.asked = owner.asked == owner.kernel, ""
            if not mine:
                return self.kernel[grid](*args, **kwargs)
            if owner.compile_only:
                return self.kernel.warmup(*args, grid=grid, **kwargs)
            begin = owner.clock.start()
            owner.compiled = self.kernel[grid](*args, **kwargs)
            owner.pairs.append((begin, owner.clock.stop()))
            return owner.compiled

        return launch


# One per process of the pool.
_worker: dict[str, Any] = {}


def compile_one(spec: Spec, kernel: str, settings: Any) -> str | None:
    """Compile without launching, into Triton's cache on disk; the reason if that fails."""
    try:
        if _worker.get("spec") != spec:
            _worker.clear()
            _worker["load"] = Workload(spec, "cuda")
            _worker["spec"] = spec
        override = Override(None)
        override.kernel, override.settings, override.compile_only = kernel, settings, True
        with override.active():
            _worker["load"].run(kernel)
    except Exception as error:
        return reason_of(error)
    return None


def reason_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


class Compiler:
    """Compiles candidates in other processes, several at a time; one that crashes does no harm."""

    def __init__(self, workers: int):
        self.workers = workers
        self.pool = self._new()

    def _new(self) -> futures.ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return futures.ProcessPoolExecutor(self.workers, mp_context=spawn)

    def ahead(self, spec: Spec, kernel: str, tried: list[Any], deadline: float) -> list[str | None]:
        """Fills Triton's cache. None for those that compiled, else why they are not to be run."""
        try:
            waiting = [self.pool.submit(compile_one, spec, kernel, settings) for settings in tried]
        except futures.BrokenExecutor:
            self.close()
            self.pool = self._new()
            return ["the compiler crashed on another one"] * len(tried)
        with suppress(futures.TimeoutError):
            for _ in futures.as_completed(waiting, timeout=max(deadline - time.monotonic(), 1)):
                pass
        reasons: list[str | None] = []
        broken = False
        for future in waiting:
            if not future.done():
                future.cancel()
                reasons.append("not compiled in time")
            elif future.exception() is not None:
                broken = True
                reasons.append(f"the compiler crashed on it or beside it: {future.exception()}")
            else:
                reasons.append(future.result())
        if broken:
            self.close()
            self.pool = self._new()
        return reasons

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def try_settings(
    load: Workload, override: Override, kernel: str, settings: Any, want: tuple
) -> dict[str, Any]:
    """One candidate, run once: its resources, and why it is left out, if it is."""
    override.kernel, override.settings, override.pairs = kernel, settings, []
    row: dict[str, Any] = {"kernel": kernel, "settings": list(settings), "left_out": None}
    try:
        got = load.run(kernel)
        for a, b in zip(got, want):
            largest = float(b.abs().nan_to_num(posinf=0).max())
            limit = AGREEMENT * FLOOR[load.problem.dtype] * largest
            error = max_error(a, b)
            if not error <= limit:
                row["left_out"] = f"changes a result by {error / max(largest, 1e-30):.1e}"
        row["registers"] = getattr(override.compiled, "n_regs", None)
        row["spills"] = getattr(override.compiled, "n_spills", None)
        row["shared"] = getattr(getattr(override.compiled, "metadata", None), "shared", None)
        if row["spills"]:
            row["left_out"] = row["left_out"] or f"spills {row['spills']}"
    except AssertionError as error:
        row["left_out"] = f"wrong: {error}"
    except Exception as error:
        row["left_out"] = reason_of(error)
    return row


def time_rows(load: Workload, override: Override, rows: list[dict], rounds: int) -> None:
    """Adds the median time of the kernel alone to each row; rows in turn in every round."""
    from cdfast_kernels.launch import Settings

    clock = override.clock
    assert clock is not None
    times: list[list[tuple[float, float]]] = [[] for _ in rows]
    for _ in range(rounds):
        for row, found in zip(rows, times):
            override.settings, override.pairs = Settings(*row["settings"]), []
            load.run(row["kernel"])
            found.append((sum(clock.milliseconds(*pair) for pair in override.pairs), 0.0))
    for row, found in zip(rows, times):
        row |= {key: summary(found)[key] for key in ("ms", "spread")}


def best_of(rows: list[dict]) -> dict | None:
    """The fastest that is not left out; the present settings unless it is faster by its spread."""
    timed = [row for row in rows if row.get("ms") is not None and row["left_out"] is None]
    if not timed:
        return None
    best = min(timed, key=lambda row: row["ms"])
    present = rows[0]
    if present.get("ms") is None or present["left_out"] is not None:
        return best
    gain = 1 - best["ms"] / present["ms"]
    return best if gain > max(best["spread"], present["spread"], 0.01) else present


def tune(
    spec: Spec,
    names: list[str],
    options: Any,
    arch: int,
    compiler: Compiler | None,
    deadline: float,
    save: Any,
) -> None:
    """All kernels of one row of the table. `save(rows of a kernel)` is called after each."""
    from cdfast_kernels.launch import Settings

    load = Workload(spec, options.device)
    override = Override(Clock(options.device))
    with override.active():
        for kernel in names:
            if time.monotonic() > deadline:
                return
            override.settings = None
            want = tuple(x.detach().clone() for x in load.run(kernel))
            tried = candidates(kernel, spec, arch)[: options.limit]
            reasons: list[str | None] = [None] * len(tried)
            if compiler is not None:
                reasons[1:] = compiler.ahead(spec, kernel, tried[1:], deadline)
            rows: list[dict] = []
            for settings, reason in zip(tried, reasons):
                if reason is None and not (rows and time.monotonic() > deadline):
                    rows.append(try_settings(load, override, kernel, settings, want))
                else:
                    reason = reason or "not run in time"
                    row = {"kernel": kernel, "settings": list(settings), "left_out": reason}
                    rows.append(row)
            # The present settings are timed even where they spill.
            usable = [row for row in rows if row["left_out"] is None or row is rows[0]]
            time_rows(load, override, usable, options.rounds)
            best = best_of(rows) or rows[0]
            for settings in variations(kernel, Settings(*best["settings"])):
                row = try_settings(load, override, kernel, settings, want)
                rows.append(row)
                if row["left_out"] is None:
                    time_rows(load, override, [best, row], options.rounds)
            save(kernel, rows, best_of(rows) or rows[0])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from cdfast_kernels.launch import KERNELS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--head-size", type=int, nargs="+", help="of the rows to measure")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--limit", type=int, help="candidates per kernel")
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, help="also a file for CDFAST_LAUNCH_TABLE")
    parser.add_argument("--list", action="store_true", help="print the candidates and stop")
    parser.add_argument("--arch", type=int, help="for --list")
    return parser.parse_args(argv)


def specs_of(options: argparse.Namespace) -> list[Spec]:
    if options.head_size is None and options.dtype is None:
        return list(SPECS)
    pairs = itertools.product(options.head_size or [128], options.dtype or ["bf16"])
    return [Spec(*pair) for pair in pairs]


def main(argv: list[str] | None = None) -> None:
    from cdfast_kernels.launch import KERNELS, architecture

    options = parse(argv)
    if options.list:
        for spec in specs_of(options):
            for kernel in options.kernel:
                for settings in candidates(kernel, spec, options.arch or 90):
                    print(spec, kernel, settings)
        return
    arch = architecture(torch.empty(0, device=options.device))
    deadline = time.monotonic() + 60 * options.budget_minutes
    path = result_path("launch", options.device, options.output)
    arguments = sys.argv[1:] if argv is None else argv
    report: dict[str, Any] = {
        **start("launch", options.device, "benchmarks.tune_kernels", arguments),
        "arch": arch,
        "rows": [],
    }
    measured: dict[tuple[Spec, str], list[dict[str, Any]]] = {}
    compiler = Compiler(options.workers) if options.device.startswith("cuda") else None
    try:
        for spec in specs_of(options):
            if time.monotonic() > deadline:
                break
            entry: dict[str, Any] = {
                "head_dim": spec.head_dim,
                "dtype": spec.dtype,
                "best": {},
                "kernels": {},
            }
            report["rows"].append(entry)

            def save(
                kernel: str, rows: list[dict], best: dict, entry: dict = entry, spec: Spec = spec
            ) -> None:
                entry["kernels"][kernel] = rows
                entry["best"][kernel] = best["settings"]
                write_json(path, report)
                measured[spec, kernel] = table_rows(arch, spec, {kernel: best["settings"]})
                if options.table:
                    write_json(options.table, list(itertools.chain(*measured.values())))
                first = rows[0].get("ms")
                print(kernel, best["settings"], best.get("ms"), "ms; present:", first, flush=True)

            try:
                tune(spec, options.kernel, options, arch, compiler, deadline, save)
            except Exception as error:
                # The present settings do not run: the next row may.
                entry["failed"] = reason_of(error)
                print(spec, "failed:", entry["failed"], flush=True)
            entry["table"] = table_row(arch, spec, entry["best"], KERNELS)
            write_json(path, report)
            print(entry["table"], flush=True)
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
    finally:
        if compiler is not None:
            compiler.close()
    print(path)


if __name__ == "__main__":
    main()
