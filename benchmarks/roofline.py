"""How close each kernel comes to what this machine can do: python -m benchmarks.roofline

The roof of a kernel is the smaller of two ceilings measured in the same run, at its start and after
every case: the rate of a large matrix product, and the kernel's arithmetic intensity (operations
per byte) times the rate of a large copy.
Operations and bytes are the ideal ones of benchmarks/work.py: what a kernel computes or reads
beyond them lowers its share.

    share = max(operations / product rate, bytes / copy rate) / time

On CUDA every launch of every Triton kernel is timed by events, behind a flush of the L2 cache; an
operation that takes the host longer to launch than its kernels take is also replayed as a CUDA
graph. On a CPU the phases that are calls of their own are timed: forward and backward of attention,
of attention with the loss, of the loss alone, and the map; the two passes of a backward are one
call. Results are checked before anything is timed, as in bench_kernels; what is measured is written
after each case.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import (
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    visual_alignment_loss,
    visual_attention_map,
)

from benchmarks import roofline_report, tile_work, work
from benchmarks.cases import Case, Problem
from benchmarks.measure import Clock, KernelClock, ceilings, graph_ms
from benchmarks.result_files import RESULTS, headline, result_path, start, write_json
from benchmarks.variants import attempt, check_full, check_small, free, variants, whole

Run = Callable[[], Any]
FOLLOWED_TOKENS = 4096  # the headline's size


def cases(device: str, quick: bool) -> list[Case]:
    """In order of value. The ones of one short sequence are those that a GPU is launch-bound on."""
    shares = {256: 182, 512: 360, 1024: 729, 2048: 1458, 4096: 2880, 16384: 15000}
    if not device.startswith("cuda"):
        shape = {"heads": 8, "kv_heads": 8, "head_dim": 128, "dtype": "fp32"}
        sizes = (256, 512) if quick else (4096, 1024, 2048, 512)
        return [Case(n, shares[n], 1, **shape) for n in sizes]
    found = [Case(4096, 2880, 4), Case(1024, 729, 1)]
    if quick:
        return found
    grouped = {"heads": 28, "kv_heads": 4}
    found += [Case(n, shares[n], 16384 // n) for n in (1024, 2048, 16384)]
    return [*found, Case(4096, 2880, 4, **grouped), Case(512, 360, 1)]


def row(name: str, timed: dict[str, float], ideal: work.Ideal) -> dict[str, Any]:
    """One kernel or phase; `timed` has ms and spread. `set_roofs` puts it beside its roof."""
    ms = timed["ms"]
    return {
        "name": name,
        "ms": ms,
        "spread": timed["spread"],
        "operations": ideal.flops,
        "bytes": ideal.bytes,
        "intensity": ideal.flops / ideal.bytes,
        "tflops": ideal.flops / ms / 1e9,
        "gb_per_s": ideal.bytes / ms / 1e6,
    }


def set_roofs(measured: list[dict[str, Any]], ceiling: dict[str, float]) -> None:
    """The time at the roof, and its share of the time measured, of every row."""
    for found in (r for case in measured for r in case.get("rows", [])):
        products = found["operations"] / ceiling["matmul_tflops"] / 1e9
        found["roof_ms"] = max(products, found["bytes"] / ceiling["copy_gb_per_s"] / 1e6)
        found["share"] = found["roof_ms"] / found["ms"]


def higher(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(value, other[name]) for name, value in one.items()}


# A CPU


def cpu_phases(problem: Problem) -> dict[str, Run]:
    """Phase -> a call of it alone. A backward runs again on the graph of one forward."""
    inputs, options = problem.inputs(), {"layout": problem.layout, "backend": "cpu"}
    q, k, _ = leaves = problem.leaves
    lse = problem.lse.detach().requires_grad_()
    of_map = problem.target, problem.layout

    def forward(run: Run) -> Run:
        def call() -> None:
            with torch.no_grad():
                run()

        return call

    def backward(outputs: tuple, inputs: list, seeds: tuple) -> Run:
        return lambda: torch.autograd.grad(outputs, inputs, seeds, retain_graph=True)

    out = flash_attention(*leaves, **options)[:1]
    aligned = flash_attention_with_alignment(*leaves, problem.target, **options)
    loss = visual_alignment_loss(q, k, lse, *of_map, backend="cpu")
    one, d_out = problem.one, problem.d_out
    loss_inputs = (*inputs[:2], problem.lse)
    return {
        "forward": forward(lambda: flash_attention(*inputs, **options)),
        "aligned forward": forward(
            lambda: flash_attention_with_alignment(*inputs, problem.target, **options)
        ),
        "map": forward(lambda: visual_attention_map(*loss_inputs, storage="map", **options)),
        "loss forward": forward(
            lambda: visual_alignment_loss(*loss_inputs, *of_map, backend="cpu")
        ),
        "backward": backward(out, leaves, (d_out,)),
        "aligned backward": backward(aligned, leaves, (d_out, one)),
        "loss backward": backward((loss,), [q, k, lse], (one,)),
    }


def cpu_rows(problem: Problem, clock: Clock, options: Any) -> list[dict[str, Any]]:
    phases = cpu_phases(problem)
    for run in phases.values():
        run()
    timed = clock.interleaved(phases, options.rounds, options.case_seconds)
    ideal, tiles = work.cpu_phases(problem.shape), tile_work.cpu_tile_flops(problem.shape)
    found = []
    for name, times in timed.items():
        found.append(row(name, times, ideal[name]))
        found[-1]["launches"] = None
        found[-1]["tile_operations"] = tiles.get(name)
        found[-1]["operation"] = "student" if name.startswith("aligned") else name
    return found


# Triton kernels: on a GPU, or in the interpreter (tests)


def operations(problem: Problem) -> dict[str, Run]:
    """Operation of work.OPERATIONS -> one forward and backward of it."""
    runs, layout = variants(problem), problem.layout
    q, k, _ = problem.leaves
    lse = problem.lse.detach().requires_grad_()

    def target() -> None:
        with torch.no_grad():
            visual_attention_map(q, k, lse, layout, storage="map", backend="triton")

    def modular() -> None:
        loss = visual_alignment_loss(q, k, lse, problem.target, layout, backend="triton")
        torch.autograd.grad(loss, (q, k, lse), problem.one)

    return {
        "student": lambda: whole(problem, runs["student[triton]"]),  # type: ignore[arg-type]
        "target": target,
        "plain": lambda: whole(problem, runs["plain[triton]"]),  # type: ignore[arg-type]
        "modular": modular,
    }


def triton_rows(
    problem: Problem, clock: Clock, options: Any
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """A row per kernel of each operation, and the times of whole operations."""
    from cdfast_kernels.launch import architecture, settings_for

    shape = problem.shape

    def settings(name: str) -> tile_work.Settings:
        size = shape.dtype.itemsize
        found = settings_for(name, architecture(problem.q), shape.head_dim, size)
        return tile_work.Settings(found.BLOCK_M, found.BLOCK_N)

    rows, whole_steps = [], {}
    for operation, run in operations(problem).items():
        ideal = work.ideal(shape, operation)
        tiles = tile_work.tiles(shape, operation, settings)
        times = kernel_times(run, clock, options)
        for name, launches in times.items():
            found = row(name, launches, ideal[name])
            found["launches"] = launches["launches"]
            found["tile_operations"] = tiles[name].flops if name in tiles else None
            rows.append({**found, "operation": operation})
        kernels_ms = sum(times[name]["ms"] for name in times)
        whole_steps[operation] = step_times(run, clock, kernels_ms, options)
    return rows, whole_steps


def kernel_times(run: Run, clock: Clock, options: Any) -> dict[str, dict[str, float]]:
    """Kernel -> median and spread of the time of all its launches in one run, and their number."""
    timed = KernelClock(clock)
    found: dict[str, list[float]] = {}
    launches: dict[str, int] = {}
    begin = time.monotonic()
    with timed.active():
        run()
        timed.milliseconds()
        for i in range(options.rounds):
            if i >= 3 and time.monotonic() - begin > options.case_seconds / 4:
                break
            run()
            for name, ms in timed.milliseconds().items():
                found.setdefault(name, []).append(sum(ms))
                launches[name] = len(ms)
    rows: dict[str, dict[str, float]] = {}
    for name, values in found.items():
        low, median, high = statistics.quantiles(values, n=4)
        spread = (high - low) / 2 / median
        rows[name] = {"ms": median, "spread": spread, "launches": launches[name]}
    return rows


def step_times(run: Run, clock: Clock, kernels_ms: float, options: Any) -> dict[str, Any]:
    """A whole operation: on the device, on the host, and as a graph where the host is slower."""
    found = clock.interleaved({"step": run}, options.rounds, options.case_seconds / 4)["step"]
    # On a CPU nothing is launched: the host is the device.
    bound = found["host_ms"] > kernels_ms if clock.cuda else None
    graph = graph_ms(run, clock, options.rounds, options.case_seconds / 4) if bound else None
    return {
        "kernels_ms": kernels_ms,
        "ms": found["ms"],
        "host_ms": found["host_ms"] if clock.cuda else None,
        "launch_bound": bound,
        "graph_ms": graph,
    }


# The command


def check(case: Case, problem: Problem, backend: str) -> dict[str, str]:
    """Variant -> why its results are wrong: against float64 at a small size, and at full size the
    loss's attention against the plain one. Empty where all is well."""
    small = check_small(case, problem.q.device.type, backend)
    names = (f"plain[{backend}]", f"student[{backend}]", f"modular[sdpa+{backend}]")
    wrong = {name: small[name] for name in names if small.get(name)}
    runs = variants(problem)
    full = check_full(problem, {name: runs[name] for name in names[:2]})  # type: ignore[misc]
    return {name: reason for name, reason in (wrong | full).items() if reason}  # type: ignore[misc]


def measure(case: Case, backend: str, clock: Clock, options: Any) -> dict[str, Any]:
    problem = Problem(case, options.device, backend)
    wrong = check(case, problem, backend)
    free()
    if wrong:
        raise RuntimeError(f"not timed, as its results are wrong: {wrong}")
    steps: dict[str, dict[str, Any]] = {}
    if backend == "cpu":
        rows = cpu_rows(problem, clock, options)
    else:
        rows, steps = triton_rows(problem, clock, options)
    return {**asdict(case), "name": case.name, "backend": backend, "rows": rows, "steps": steps}


def direction(found: dict[str, Any]) -> str:
    """Whether a kernel or phase belongs to the forward or the backward pass."""
    return "backward" if "bwd" in found["name"] or "backward" in found["name"] else "forward"


def shares(case: dict[str, Any]) -> dict[str, float]:
    """Share of the roof of the student operation's forward and backward: sums over its kernels."""
    found = {}
    for part in ("forward", "backward"):
        rows = [r for r in case["rows"] if r["operation"] == "student" and direction(r) == part]
        if rows:
            found[part] = sum(r["roof_ms"] for r in rows) / sum(r["ms"] for r in rows)
    return found


def headlines(measured: list[dict[str, Any]]) -> dict[str, Any]:
    case = next((c for c in measured if c["tokens"] == FOLLOWED_TOKENS and "rows" in c), None)
    found = shares(case) if case else {}
    return {
        f"share of the roof, {part} of attention with the loss, {FOLLOWED_TOKENS} tokens": headline(
            found.get(part), "share", "more"
        )
        for part in ("forward", "backward")
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--budget-minutes", type=float, default=2.0, help="no case begins later")
    parser.add_argument("--rounds", type=int, help="at most; 15, --quick 5")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (5 if options.quick else 15)
    if options.rounds < 3:
        parser.error(f"--rounds: expected at least 3, for a median; got {options.rounds}.")
    options.case_seconds = 3.0 if options.quick else 12.0
    options.backend = "triton" if options.device.startswith("cuda") else "cpu"
    reason = available_backends()[options.backend]
    if reason is not None:
        parser.error(
            f"--device {options.device}: the {options.backend} backend is absent: {reason}"
        )
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    begin = time.monotonic()
    torch.manual_seed(0)
    clock = Clock(options.device)
    listed = cases(options.device, options.quick)
    path = result_path("roofline", options.device, options.output)
    arguments = sys.argv[1:] if argv is None else argv
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    found: dict[str, Any] = {
        **start("roofline", options.device, "benchmarks.roofline", arguments),
        "ceilings": ceilings(clock, dtype),
        "cases": [],
        "not_measured": [case.name for case in listed],
    }
    found["headline"] = headlines([])
    print(roofline_report.ceilings_line(found["ceilings"]), flush=True)
    write_json(path, found)
    for case in listed:
        if time.monotonic() - begin > 60 * options.budget_minutes:
            break
        result, reason = attempt(lambda case=case: measure(case, options.backend, clock, options))
        found["cases"].append(result or {**asdict(case), "name": case.name, "failed": reason})
        # Again, as a busy machine may have been slower at the start than it was just now.
        found["ceilings"] = higher(found["ceilings"], ceilings(clock, dtype))
        set_roofs(found["cases"], found["ceilings"])
        found["not_measured"].remove(case.name)
        found["headline"] = headlines(found["cases"])
        found["seconds"] = round(time.monotonic() - begin, 1)
        roofline_report.write(path, found)
        free()
        print(roofline_report.line(found["cases"][-1]), flush=True)
    print(f"{path}: {len(found['cases'])} cases, {len(found['not_measured'])} not measured")


if __name__ == "__main__":
    main()
