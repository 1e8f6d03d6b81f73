"""Dense and chunked losses on logits, side by side: python -m benchmarks.bench_logits

LM + KL on answer rows, forward and backward to the hidden states and the output embedding. Before a
case is timed each variant is checked: at a small size against float64 with the error budget of the
tests, at full size against `dense`. A variant that fails is named and not timed.

    dense                  logits of the answer rows in float32, log_softmax, kl_div: what users do
    dense, all rows        logits of all tokens first, as a model's forward makes them; the way the
                           paper's authors train
    torch.compile(dense)   the first of them, compiled for its shapes
    chunked                cdfast.losses, as the trainer calls it

Variants take turns in every round; ratios compare medians of one case. Peak memory is that of one
forward and backward: torch's allocator on a GPU, resident memory of a fresh process on a CPU.
Results are written after every case: stop it at any time.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import logits_report
from benchmarks.logit_losses import (
    OURS,
    Case,
    Problem,
    Variant,
    cpu_cases,
    eager_in_dtype,
    gpu_cases,
    rows_at_once,
    variants,
    whole,
)
from benchmarks.measure import Clock
from benchmarks.memory import in_child, kept_bytes, peak_bytes
from benchmarks.result_files import RESULTS, result_path, start, write_json
from benchmarks.variants import attempt, free
from tests.numerics import FLOOR, FORWARD, GRADIENT, assert_within_budget, max_error

RESULT_NAMES = ("lm", "kl", "d_hidden", "d_weight")
# At full size, of the largest value of `dense`, in units of the budget's floor.
AGREEMENT = 10.0
SMALL = {"rows": 64, "tokens": 96, "vocabulary": 2048}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextmanager
def caches_of_their_own() -> Iterator[None]:
    """Compiled code goes to a folder that is gone afterwards, unless the user has chosen one."""
    chosen = {name: os.environ[name] for name in CACHES if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: chosen.get(name, f"{folder}/{name}") for name in CACHES})
        try:
            yield
        finally:
            for name in set(CACHES) - set(chosen):
                del os.environ[name]


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error over the largest exact value."""
    return max_error(got, exact) / float(exact.detach().abs().max())


def check_small(case: Case, device: str) -> dict[str, dict[str, Any]]:
    """Variant -> {"reason": None or why it is wrong, "errors": of each result against float64}."""
    sizes = {name: min(getattr(case, name), most) for name, most in SMALL.items()}
    small = replace(case, **sizes)
    problem = Problem(small, device)
    exact = whole(eager_in_dtype, problem.exact())
    eager = whole(eager_in_dtype, problem.tensors())
    kl_exact = kl_gradient(eager_in_dtype, problem.exact())
    found: dict[str, dict[str, Any]] = {}
    for name, run in variants().items():
        got, reason = attempt(lambda run=run: whole(run, problem.tensors()))
        errors = {}
        if reason is None:
            reason = over_budget(got, eager, exact, problem.dtype)
            reason = reason and f"wrong at {small.rows} rows x {small.vocabulary}: {reason}"
            # A wrong result may be anything, NaN too, which has no error.
            if reason is None:
                errors = {n: relative(a, b) for n, a, b in zip(RESULT_NAMES, got, exact)}
                gradient = kl_gradient(run, problem.tensors())
                errors["d_hidden of kl alone"] = relative(gradient, kl_exact)
        found[name] = {"reason": reason, "errors": errors}
    return found


def kl_gradient(run: Variant, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The gradient of the KL alone, which that of the LM loss hides in the sum."""
    return torch.autograd.grad(run(*tensors)[1], tensors[0])[0]


def over_budget(got: tuple, eager: tuple, exact: tuple, dtype: torch.dtype) -> str | None:
    """Which result is over the error budget of the tests, if one is."""
    for name, a, b, c in zip(RESULT_NAMES, got, eager, exact):
        factor = GRADIENT if name.startswith("d_") else FORWARD
        try:
            assert_within_budget(name, a, b, c, dtype, factor)
        except AssertionError as error:
            # That some entries are not finite is said without the name.
            return f"{name}: {str(error).removeprefix(f'{name}: ')}"
    return None


def usable_runs(
    problem: Problem, checks: dict[str, dict[str, Any]]
) -> tuple[dict[str, Variant], dict[str, dict[str, Any]]]:
    """The variants that passed both checks, and a row with the reason for each of the others."""
    runs: dict[str, Variant] = {}
    rows: dict[str, dict[str, Any]] = {}
    wanted: tuple[torch.Tensor, ...] | None = None
    for name, run in variants().items():
        got, reason = None, checks[name]["reason"]
        if reason is None:
            got, reason = attempt(lambda run=run: whole(run, problem.tensors()))
        if got is not None:
            got = tuple(x.detach() for x in got)
            wanted = wanted or got
            errors = {n: relative(a, b) for n, a, b in zip(RESULT_NAMES, got, wanted)}
            worst = max(errors, key=lambda n: errors[n])
            if not errors[worst] <= AGREEMENT * FLOOR[problem.dtype]:
                reason = f"wrong at full size: {worst} is off by {errors[worst]:.1e} of its largest"
        if reason is None:
            runs[name] = run
        else:
            rows[name] = {"absent": reason}
    return runs, rows


def memory_of(problem: Problem, run: Variant, device: str) -> dict[str, int | None]:
    """Peak of a forward and backward, and what waits for backward in between.

    Runs it once before: that compiles, and makes what libraries keep.
    """
    whole(run, problem.tensors())
    return {
        "peak_bytes": peak_bytes(lambda: whole(run, problem.tensors()), device),
        "kept_bytes": kept_bytes(lambda: run(*problem.tensors()), device),
    }


def memory_by_name(case: Case, device: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """`memory_of` each variant, or why not."""
    problem, found = Problem(case, device), {}
    for name in names:
        memory, reason = attempt(lambda name=name: memory_of(problem, variants()[name], device))
        found[name] = memory or {"peak_bytes": None, "kept_bytes": None, "no_memory": reason}
    return found


def measure(case: Case, device: str, clock: Clock, options: Any) -> dict[str, Any]:
    """Everything about one case."""
    checks = check_small(case, device)
    free()
    problem = Problem(case, device)
    runs, rows = usable_runs(problem, checks)
    tensors = problem.tensors()
    calls = {name: functools.partial(whole, run, tensors) for name, run in runs.items()}
    timed = clock.interleaved(calls, options.rounds, options.case_seconds) if calls else {}
    del problem, tensors, calls
    free()
    names = list(runs)
    if clock.cuda:
        memory = memory_by_name(case, device, names)
    else:
        # Resident memory: a fresh process, which has not the leftovers of this one.
        threads = torch.get_num_threads()
        memory = in_child(memory_by_name, case, device, names, threads=threads)
    rows |= {name: {**timed[name], **memory[name]} for name in runs}
    ordered = {name: rows[name] for name in checks}
    return {
        **asdict(case),
        "name": case.name,
        "rows_at_once": rows_at_once(case),
        "checked": {n: {**c, "reason": c["reason"] or "ok"} for n, c in checks.items()},
        "variants": ordered,
        "ratios": logits_report.ratios(ordered, OURS),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_logits", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one case, few rounds")
    parser.add_argument("--budget-minutes", type=float, default=4.0, help="no case begins later")
    parser.add_argument("--rounds", type=int, help="at most; 10, --quick 5; at least 3")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device: expected cpu, because torch finds no CUDA device; got {options.device!r}."
        )
    options.rounds = options.rounds or (5 if options.quick else 10)
    options.case_seconds = 2.0 if options.quick else 4.0
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    begin = time.monotonic()
    cuda = options.device.startswith("cuda")
    cases = (gpu_cases if cuda else cpu_cases)(options.quick)
    clock = Clock(options.device)
    path = result_path("logits", options.device, options.output)
    arguments = sys.argv[1:] if argv is None else argv
    found: dict[str, Any] = {
        **start("logits", options.device, "benchmarks.bench_logits", arguments),
        "cases": [],
        "not_measured": [case.name for case in cases],
    }
    write_json(path, found)
    with caches_of_their_own():
        for case in cases:
            if time.monotonic() - begin > 60 * options.budget_minutes:
                break
            result, reason = attempt(
                lambda case=case: measure(case, options.device, clock, options)
            )
            found["cases"].append(result or {**asdict(case), "name": case.name, "failed": reason})
            found["not_measured"].remove(case.name)
            found["seconds"] = round(time.monotonic() - begin, 1)
            found["headline"] = logits_report.headlines(found["cases"])
            logits_report.write(path, found)
            free()
            print(logits_report.line(found["cases"][-1]), flush=True)
    print(f"{path}: {len(found['cases'])} cases, {len(found['not_measured'])} not measured")


if __name__ == "__main__":
    main()
