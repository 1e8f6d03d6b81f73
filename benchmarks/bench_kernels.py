"""Speed and memory of the operations beside their peers: python -m benchmarks.bench_kernels

One run, variants in turn in every round, medians; every ratio is taken inside one case of one run.
Before a case is timed, each variant's results are checked: at a small size against float64 with the
error budget of the tests, at full size against each other. A variant that fails is not timed.

    plain[B]       attention, forward and backward, on backend B
    student[B]     attention with the alignment loss, forward and backward
    modular[A+B]   attention of adapter A, then visual_alignment_loss on B
    target[B]      the teacher's map from q, k and lse; no gradient
    sdpa_*, flash_attn*, xformers, flex     plain attention of others
    eager          attention and the same loss with every map materialised, as is or compiled

Memory is the peak of one forward and backward beyond its inputs, on a CPU in a process of its own.
Results are written after every case: stop it at any time. Sizes that run out of memory are said to.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import visual_attention_map

from benchmarks import peers, report, work
from benchmarks.cases import Case, Problem, cpu_cases, gpu_cases
from benchmarks.measure import Clock, KernelClock, ceilings
from benchmarks.memory import in_child, peak_bytes, saved_bytes
from benchmarks.result_files import RESULTS, headline, result_path, start, write_json
from benchmarks.variants import (
    Run,
    Variant,
    attempt,
    check_small,
    free,
    needs_compiling,
    own_backend,
    usable_runs,
    variants,
    whole,
)


def forward_only(problem: Problem, runs: dict[str, Variant]) -> dict[str, Run]:
    """Passes without a gradient: attention alone, and the teacher's map."""
    inputs, backend = problem.inputs(), problem.backend

    def target() -> None:
        with torch.no_grad():
            q, k, _ = inputs
            visual_attention_map(q, k, problem.lse, problem.layout, backend=backend)

    def forward(run: Variant) -> Run:
        def call() -> None:
            with torch.no_grad():
                run(problem, inputs)

        return call

    found: dict[str, Run] = {f"target[{backend}]": target}
    for name, run in runs.items():
        # A compiled variant would be compiled again.
        if not name.startswith("modular") and not needs_compiling(name):
            found[f"{name} forward"] = forward(run)
    return found


def ratios(variants: dict[str, dict], backend: str) -> dict[str, Any]:
    """The ratios of issue 3, each from the medians of this case; None where one side is missing."""

    def ms(name: str) -> float | None:
        return variants.get(name, {}).get("ms")

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    plain, student = ms(f"plain[{backend}]"), ms(f"student[{backend}]")
    others = [name for name in (*peers.SDPA, *peers.LIBRARIES, "flex") if ms(name) is not None]
    fastest = min(others, key=lambda name: variants[name]["ms"], default=None)
    peaks = [
        variants.get(name, {}).get("peak_bytes")
        for name in (f"plain[{backend}]", f"student[{backend}]", "eager")
    ]
    share = None
    if None not in peaks and peaks[2] > peaks[0]:
        share = (peaks[1] - peaks[0]) / (peaks[2] - peaks[0])
    return {
        "student_over_plain": over(student, plain),
        "fastest_peer": fastest,
        "plain_speed_over_fastest_peer": over(fastest and ms(fastest), plain),
        "eager_over_student": over(ms("eager"), student),
        "target_over_plain_forward": over(
            ms(f"target[{backend}]"), ms(f"plain[{backend}] forward")
        ),
        "extra_memory_over_eagers_extra": share,
    }


def kernel_rows(problem: Problem, run: Run, clock: Clock, ceiling: dict) -> list[dict]:
    """Median time of each kernel in one forward and backward, and its rate."""
    timed = KernelClock(clock)
    with timed.active():
        run()
        timed.milliseconds()
        steps = []
        for _ in range(5):
            run()
            steps.append(timed.milliseconds())
    ideal = work.ideal(problem.shape, "student")
    rows = []
    for name in sorted(steps[0]):
        # A kernel may be launched once per chunk of rows: all launches of a step count.
        ms = statistics.median(sum(step[name]) for step in steps)
        row: dict[str, Any] = {"kernel": name, "ms": ms, "launches": len(steps[0][name])}
        if name in ideal and ideal[name].flops:
            row["tflops"] = ideal[name].flops / ms / 1e9
            row["share_of_matmul"] = row["tflops"] / ceiling["matmul_tflops"]
        compiled = timed.compiled.get(name)
        for key, source in (("registers", "n_regs"), ("spills", "n_spills")):
            row[key] = getattr(compiled, source, None)
        rows.append(row)
    return rows


def measure(
    case: Case, device: str, clock: Clock, options: Any, ceiling: dict, compiled: bool = False
) -> dict[str, Any]:
    """Everything about one case."""
    backend = own_backend()
    checks = check_small(case, device, backend)
    free()
    problem = Problem(case, device, backend)
    runs, rows = usable_runs(problem, checks, compiled)
    calls: dict[str, Run] = {n: (lambda r=r: whole(problem, r)) for n, r in runs.items()}
    timed = clock.interleaved(calls, options.rounds, options.case_seconds)
    forward = forward_only(problem, runs)
    for call in forward.values():
        call()
    forward_timed = clock.interleaved(forward, options.rounds, options.case_seconds)
    kept = {n: saved_bytes(lambda r=r: r(problem, problem.leaves)) for n, r in runs.items()}
    peaks = peaks_of(case, device, backend, calls)
    for name in calls:
        rows[name] = {**timed[name], "peak_bytes": peaks.get(name), "saved_bytes": kept[name]}
    rows |= forward_timed
    found = {
        **asdict(case),
        "name": case.name,
        "backend": backend,
        "checked": {name: reason or "ok" for name, reason in checks.items()},
        "variants": rows,
        "ratios": ratios(rows, backend),
        "kernels": [],
    }
    if backend == "triton" and "student[triton]" in calls:
        found["kernels"] = kernel_rows(problem, calls["student[triton]"], clock, ceiling)
    return found


def peaks_of(case: Case, device: str, backend: str, calls: dict[str, Run]) -> dict[str, int]:
    """Variant -> peak bytes; those that are compiled are left out on a CPU."""
    peaks: dict[str, int] = {}
    if device.startswith("cuda"):
        for name, call in calls.items():
            free()
            peaks[name] = peak_bytes(call, device) or 0
    elif sys.platform == "linux":
        names = [name for name in calls if not needs_compiling(name)]
        peaks = in_child(resident_peaks, case, backend, names, threads=torch.get_num_threads())
    return peaks


def resident_peaks(case: Case, backend: str, names: list[str]) -> dict[str, int]:
    """The peak of each variant in this process, after a small run of it that loads libraries."""
    small = Problem(replace(case, tokens=128, visual=64), "cpu", backend)
    problem = Problem(case, "cpu", backend)
    for one in (small, problem):
        one.prepare_eager()
    runs, found = variants(problem), {}
    for name in names:
        run = runs[name]
        whole(small, run)  # type: ignore[arg-type]
        found[name] = peak_bytes(lambda run=run: whole(problem, run), "cpu") or 0
    return found


def headlines(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the longest case of the first one's kind: what to follow over months."""
    kind = ("heads", "kv_heads", "head_dim", "dtype", "layout", "objective")
    measured = [case for case in cases if "failed" not in case]
    alike = [case for case in measured if all(case[k] == measured[0][k] for k in kind)]
    if not alike:
        return {}
    case = max(alike, key=lambda c: c["tokens"])
    at = f"{case['tokens']} tokens"
    return {
        f"{title}, {at}": headline(case["ratios"][name], "x", report.GOALS[name][0])
        for name, title in {
            "student_over_plain": "time with alignment over without",
            "eager_over_student": "eager's time over ours",
            "extra_memory_over_eagers_extra": "extra memory over eager's extra",
            "plain_speed_over_fastest_peer": "speed of plain attention over the fastest peer's",
        }.items()
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the main cases, few rounds")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="no case begins later")
    parser.add_argument("--rounds", type=int, help="at most; 20, --quick 8")
    parser.add_argument(
        "--compiled",
        type=int,
        metavar="CASES",
        help="compile eager and FlexAttention in this many of the first cases (1; --quick 0)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--theme", default="kernels", help="first word of the file names")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (8 if options.quick else 20)
    if options.compiled is None:
        options.compiled = 0 if options.quick else 1
    options.case_seconds = 3.0 if options.quick else 8.0
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    begin = time.monotonic()
    torch.manual_seed(0)
    cuda = options.device.startswith("cuda")
    cases = (gpu_cases if cuda else cpu_cases)(options.quick)
    clock = Clock(options.device)
    path = result_path(options.theme, options.device, options.output)
    arguments = sys.argv[1:] if argv is None else argv
    found: dict[str, Any] = {
        **start(options.theme, options.device, "benchmarks.bench_kernels", arguments),
        "ceilings": ceilings(clock, torch.bfloat16 if cuda else torch.float32),
        "goals": report.GOALS,
        "cases": [],
        "not_measured": [case.name for case in cases],
    }
    write_json(path, found)
    for index, case in enumerate(cases):
        if time.monotonic() - begin > 60 * options.budget_minutes:
            break
        result, reason = attempt(
            lambda case=case, compiled=index < options.compiled: measure(
                case, options.device, clock, options, found["ceilings"], compiled
            )
        )
        found["cases"].append(result or {**asdict(case), "name": case.name, "failed": reason})
        found["not_measured"].remove(case.name)
        found["headline"] = headlines(found["cases"])
        found["seconds"] = round(time.monotonic() - begin, 1)
        report.write(path, found)
        free()
        print(report.line(found["cases"][-1]), flush=True)
    print(f"{path}: {len(found['cases'])} cases, {len(found['not_measured'])} not measured")


if __name__ == "__main__":
    main()
