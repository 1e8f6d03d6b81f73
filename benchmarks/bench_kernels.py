"""Speed and memory of the operations beside their peers: python -m benchmarks.bench_kernels

One run, variants in turn in every round, medians; every ratio is taken inside one case of one run.
Before a case is timed, each variant's results are checked: at a small size against float64 with the
error budget of the tests, at full size against each other. A variant that fails is not timed.

    plain[B]       attention, forward and backward, on backend B
    student[B]     attention with the alignment loss, forward and backward
    modular[A+B]   attention of adapter A, then visual_alignment_loss on B
    target[B]      the teacher's map from q, k and lse; no gradient
    sdpa_*, flash_attn, xformers     plain attention of others
    eager          attention and the same loss with every map materialised

Results are written after every case: stop it at any time. Sizes that run out of memory are said to.
"""

from __future__ import annotations

import argparse
import gc
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

from benchmarks import peers, report, work
from benchmarks.cases import Case, Problem, cpu_cases, gpu_cases
from benchmarks.measure import Clock, KernelClock, ceilings
from benchmarks.memory import peak_bytes
from benchmarks.result_files import RESULTS, result_path, start, write_json
from tests.numerics import FLOOR, FORWARD, GRADIENT, assert_within_budget, max_error

OWN = ("triton", "cpu", "reference")
ADAPTERS = ("sdpa", "flash_attn", "xformers")
# Two results in the dtype of the inputs, both within the budget of the small check.
AGREEMENT = 4.0
CHECKED_TOKENS = 512
Run = Callable[[], Any]


def attention_only(run: Callable[..., torch.Tensor]) -> Callable[..., tuple]:
    return lambda p, leaves: (run(*leaves),)


def variants(problem: Problem) -> dict[str, Callable[..., tuple] | str]:
    """name -> function(problem, leaves) -> outputs (out or out and loss), or why it is absent."""
    found: dict[str, Callable[..., tuple] | str] = {}
    usable = available_backends()
    device = problem.q.device.type
    aligning = [b for b in OWN if usable.get(b, "unknown") is None]
    if device == "cuda":
        # The reference materialises several float32 maps: `eager` stands for that.
        aligning = [b for b in aligning if b == "triton"]
    for backend in OWN:
        if backend not in aligning:
            reason = usable.get(backend) or f"not measured on {device}"
            found[f"plain[{backend}]"] = found[f"student[{backend}]"] = reason
            continue
        options = {"layout": problem.layout, "backend": backend}

        def plain(p, leaves, options=options):
            return (flash_attention(*leaves, **options)[0],)

        def student(p, leaves, options=options):
            return flash_attention_with_alignment(*leaves, p.target, **options)

        found[f"plain[{backend}]"], found[f"student[{backend}]"] = plain, student
    for adapter in ADAPTERS:
        for backend in aligning:
            name = f"modular[{adapter}+{backend}]"

            def modular(p, leaves, adapter=adapter, backend=backend):
                out, lse = flash_attention(*leaves, layout=p.layout, backend=adapter)
                q, k, _ = leaves
                return out, visual_alignment_loss(q, k, lse, p.target, p.layout, backend=backend)

            found[name] = usable.get(adapter, "unknown") or modular
    for name, attention in peers.attentions().items():
        found[name] = attention if isinstance(attention, str) else attention_only(attention)
    found["eager"] = lambda p, leaves: peers.eager(*leaves, p.eager)
    return found


def whole(problem: Problem, run: Callable[..., tuple]) -> tuple:
    """Outputs and gradients of one forward and backward."""
    outputs = run(problem, problem.leaves)
    seeds = (problem.d_out, problem.one)[: len(outputs)]
    return (*outputs, *torch.autograd.grad(outputs, problem.leaves, seeds))


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def attempt(run: Run) -> tuple[Any, str | None]:
    """The result, or why there is none. Memory of a failed attempt is given back."""
    try:
        return run(), None
    except Exception as error:
        reason = reason_of(error)
    # Outside the handler: the traceback holds the tensors of every frame.
    free()
    return None, reason


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_small(case: Case, device: str, backend: str) -> dict[str, str | None]:
    """Variant -> None if it is within the error budget of the tests at a small size, else why."""
    n = min(case.tokens, CHECKED_TOKENS)
    visual = max(2, case.visual * n // case.tokens)
    small = Case(n, visual, 1, case.heads, case.kv_heads, case.head_dim, case.dtype)
    problem = Problem(small, device, backend)
    problem.prepare_eager()
    exact_leaves = [x.detach().double().requires_grad_() for x in problem.leaves]
    outputs = peers.eager(*exact_leaves, problem.eager)
    seeds = (problem.d_out.double(), problem.one.double())
    exact = (*outputs, *torch.autograd.grad(outputs, exact_leaves, seeds, retain_graph=True))
    plain = (outputs[0], *torch.autograd.grad(outputs[0], exact_leaves, seeds[0]))
    found: dict[str, str | None] = {}
    runs = variants(problem)
    eager = whole(problem, runs["eager"])
    eager_out = peers.eager(*problem.leaves, problem.eager)[0]
    eager_plain = (
        eager_out,
        *torch.autograd.grad(eager_out, problem.leaves, problem.d_out),
    )
    for name, run in runs.items():
        if isinstance(run, str):
            continue
        got, reason = attempt(lambda run=run: whole(problem, run))
        if reason is None:
            aligned = len(got) == 5
            want, low = (exact, eager) if aligned else (plain, eager_plain)
            # Others are not held to the budget of this project: a peer is not lost for a rounding.
            slack = 1 if takes_loss(name) or name.startswith("plain") else 2
            reason = over_budget(got, low, want, problem.dtype, slack)
            reason = reason and f"wrong at {n} tokens: {reason}"
        found[name] = reason
    return found


def over_budget(
    got: tuple, eager: tuple, exact: tuple, dtype: torch.dtype, slack: int
) -> str | None:
    """Which result is over the error budget of the tests, if one is."""
    loss = ("loss",) if len(got) == 5 else ()
    names = ("out", *loss, "dq", "dk", "dv")
    try:
        for name, a, b, c in zip(names, got, eager, exact):
            factor = GRADIENT if name.startswith("d") else FORWARD
            assert_within_budget(name, a, b, c, dtype, factor * slack)
    except AssertionError as error:
        return str(error)
    return None


def check_full(problem: Problem, runs: dict[str, Callable[..., tuple]]) -> dict[str, str | None]:
    """At full size the outputs agree, those of `plain` first; None, or the difference."""
    found: dict[str, str | None] = {}
    out, loss = None, None
    tolerance = AGREEMENT * FLOOR[problem.dtype]
    for name, run in runs.items():
        count = 2 if takes_loss(name) else 1
        got, reason = attempt(lambda run=run, count=count: whole(problem, run)[:count])
        if reason is None:
            got = [x.detach() for x in got]
            out = got[0] if out is None else out
            error = max_error(got[0], out) / float(out.abs().max())
            if error > tolerance:
                reason = f"wrong at full size: out is off by {error:.1e} of its largest value"
            if len(got) == 2 and reason is None:
                loss = got[1] if loss is None else loss
                error = float((got[1].double() - loss.double()).abs() / loss.double())
                if not error <= tolerance:
                    reason = f"wrong at full size: the loss is off by {error:.1e}"
        found[name] = reason
    return found


def takes_loss(name: str) -> bool:
    return name.startswith(("student", "modular", "eager"))


def forward_only(problem: Problem, runs: dict[str, Callable[..., tuple]], backend: str) -> dict:
    """Passes without a gradient: attention alone, and the teacher's map."""
    inputs = problem.inputs()

    def target() -> None:
        with torch.no_grad():
            q, k, _ = inputs
            visual_attention_map(q, k, problem.lse, problem.layout, backend=backend)

    def forward(run: Callable[..., tuple]) -> Run:
        def call() -> None:
            with torch.no_grad():
                run(problem, inputs)

        return call

    found: dict[str, Run] = {f"target[{backend}]": target}
    for name, run in runs.items():
        if not name.startswith("modular"):
            found[f"{name} forward"] = forward(run)
    return found


def ratios(variants: dict[str, dict], backend: str) -> dict[str, Any]:
    """The ratios of issue 3, each from the medians of this case; None where one side is missing."""

    def ms(name: str) -> float | None:
        return variants.get(name, {}).get("ms")

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    plain, student = ms(f"plain[{backend}]"), ms(f"student[{backend}]")
    others = [name for name in (*peers.SDPA, "flash_attn", "xformers") if ms(name) is not None]
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


def usable_runs(
    problem: Problem, checks: dict[str, str | None]
) -> tuple[dict[str, Callable[..., tuple]], dict[str, dict]]:
    """The variants that passed both checks, and a row with the reason for each of the others."""
    _, no_eager = attempt(problem.prepare_eager)
    rows: dict[str, dict] = {}
    runs: dict[str, Callable[..., tuple]] = {}
    for name, run in variants(problem).items():
        reason = run if isinstance(run, str) else checks[name]
        if name == "eager":
            reason = reason or no_eager
        if reason is None:
            runs[name] = run  # type: ignore[assignment]
        else:
            rows[name] = {"absent": reason}
    for name, reason in check_full(problem, runs).items():
        if reason is not None:
            rows[name] = {"absent": reason}
            del runs[name]
    free()
    return runs, rows


def measure(case: Case, device: str, clock: Clock, options: Any, ceiling: dict) -> dict[str, Any]:
    """Everything about one case."""
    usable = available_backends()
    backend = next(b for b in OWN if usable.get(b, "unknown") is None)
    checks = check_small(case, device, backend)
    free()
    problem = Problem(case, device, backend)
    runs, rows = usable_runs(problem, checks)
    calls: dict[str, Run] = {n: (lambda r=r: whole(problem, r)) for n, r in runs.items()}
    timed = clock.interleaved(calls, options.rounds, options.case_seconds)
    forward = forward_only(problem, runs, backend)
    for call in forward.values():
        call()
    forward_timed = clock.interleaved(forward, options.rounds, options.case_seconds)
    for name, call in calls.items():
        free()
        rows[name] = {**timed[name], "peak_bytes": peak_bytes(call) if clock.cuda else None}
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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the main cases, few rounds")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="no case begins later")
    parser.add_argument("--rounds", type=int, help="at most; 20, --quick 8")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--theme", default="kernels", help="first word of the file names")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (8 if options.quick else 20)
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
    for case in cases:
        if time.monotonic() - begin > 60 * options.budget_minutes:
            break
        result, reason = attempt(
            lambda case=case: measure(case, options.device, clock, options, found["ceilings"])
        )
        found["cases"].append(result or {**asdict(case), "name": case.name, "failed": reason})
        found["not_measured"].remove(case.name)
        found["seconds"] = round(time.monotonic() - begin, 1)
        report.write(path, found)
        free()
        print(report.line(found["cases"][-1]), flush=True)
    print(f"{path}: {len(found['cases'])} cases, {len(found['not_measured'])} not measured")


if __name__ == "__main__":
    main()
