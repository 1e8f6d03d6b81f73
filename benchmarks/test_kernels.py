"""Microbenchmarks under pytest-benchmark: python -m pytest benchmarks/test_kernels.py

One factor at a time around a main size: tokens, visual share, query and key heads, head sizes,
objectives, layouts; the passes map (the teacher's), forward, backward, and both. Choose with -k:

    python -m pytest benchmarks/test_kernels.py -k "N1024 and student"
    python -m pytest benchmarks/test_kernels.py -k "objective" --benchmark-compare

Each round of a benchmark follows one of its baseline, so `over_baseline` (median over rounds of the
ratio) holds on a machine whose speed drifts; it and the bytes are in `extra_info`
(--benchmark-json). All variants are checked before one is timed: a wrong one fails, an absent one
is skipped by name. On CUDA a round includes the host: bench_kernels.py has device time.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import replace

import pytest
import torch
from cdfast_kernels import visual_attention_map

from benchmarks.cases import LAYOUTS, OBJECTIVES, Case, Problem
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.variants import Run, check_small, free, own_backend, small_case, usable_runs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = own_backend()
MAIN = Case(1024, 728, 2, 8, 8, 64, "fp32")
if DEVICE == "cuda":
    MAIN = Case(4096, 2880, 4)
# Of each variant, what runs before each of its rounds.
BASELINES = {
    f"plain[{OWN}]": "sdpa_flash",
    f"student[{OWN}]": f"plain[{OWN}]",
    "eager": f"student[{OWN}]",
}
NAMES = {f"plain[{OWN}]": "plain", f"student[{OWN}]": "student", "eager": "eager"}
PASSES = ("forward", "backward", "both")
ROUNDS = 7


def grid() -> dict[str, Case]:
    """id -> case."""
    share = MAIN.share
    found = {"main": MAIN}
    for n in (512, 1024, 2048, 4096, 8192, 16384):
        batch = max(1, MAIN.batch * MAIN.tokens // n)
        found[f"N{n}"] = replace(MAIN, tokens=n, visual=round(share * n), batch=batch)
    for percent in (25, 50, 75, 95):
        found[f"visual{percent}%"] = replace(MAIN, visual=MAIN.tokens * percent // 100)
    for heads, kv_heads in ((16, 16), (16, 4), (28, 4)):
        found[f"H{heads}/{kv_heads}"] = replace(MAIN, heads=heads, kv_heads=kv_heads)
    for dim in (32, 64, 80, 96, 128, 256):
        found[f"d{dim}"] = replace(MAIN, head_dim=dim)
    for name in OBJECTIVES[1:]:
        found[f"objective-{name}"] = replace(MAIN, objective=name)
    for name in LAYOUTS[1:]:
        found[f"layout-{name}"] = replace(MAIN, layout=name)
    return found


GRID = grid()


@functools.lru_cache
def checked(case: Case) -> dict[str, str | None]:
    return check_small(case, DEVICE, OWN)


@pytest.fixture(scope="module", params=GRID.values(), ids=GRID)
def prepared(request):
    """A problem, its usable variants, and the reasons of the others."""
    free()
    checks = checked(small_case(request.param))
    problem = Problem(request.param, DEVICE, OWN)
    only = {*BASELINES, *BASELINES.values()}
    return problem, *usable_runs(problem, checks, only=only)


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("variant", BASELINES, ids=NAMES.values())
def test_attention(benchmark, prepared, variant, step):
    problem, runs, rows = prepared
    reason = rows.get(variant, {}).get("absent")
    if reason is not None:
        (pytest.fail if "wrong" in reason else pytest.skip)(f"{variant}: {reason}")
    baseline = BASELINES[variant]
    if baseline not in runs:  # others take plain causal attention only
        baseline = f"plain[{OWN}]"
    benchmark.group = f"{problem.case.name}, {step}"

    def alone():
        return runs[variant](problem, problem.leaves)

    benchmark.extra_info["saved_bytes"] = saved_bytes(alone)
    if DEVICE == "cuda":
        benchmark.extra_info["peak_bytes"] = peak_bytes(alone, DEVICE)
    in_turns(benchmark, passes(problem, runs[variant], step), passes(problem, runs[baseline], step))
    benchmark.extra_info["baseline"] = baseline


def test_map(benchmark, prepared):
    """The teacher's map from q, k and lse, after a forward of attention."""
    problem, runs, _ = prepared
    benchmark.group = f"{problem.case.name}, map"
    q, k, _ = problem.inputs()

    def target() -> None:
        with torch.no_grad():
            visual_attention_map(q, k, problem.lse, problem.layout, backend=OWN)
        finish()

    baseline = f"plain[{OWN}]"
    forward = passes(problem, runs[baseline], "forward")
    in_turns(benchmark, (lambda: (), lambda *_: target()), forward)
    benchmark.extra_info["baseline"] = f"{baseline} forward"


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def passes(problem: Problem, run, step: str) -> tuple[Run, Run]:
    """What has to happen before the timed part, and the timed part, which takes its result."""
    seeds = problem.d_out, problem.one

    def forward(*_):
        with torch.set_grad_enabled(step != "forward"):
            outputs = run(problem, problem.leaves)
        finish()
        return outputs

    def backward(*outputs):
        torch.autograd.grad(outputs, problem.leaves, seeds[: len(outputs)])
        finish()

    if step == "forward":
        return lambda: (), forward
    if step == "backward":
        return forward, backward
    return lambda: (), lambda *_: backward(*forward())


def in_turns(benchmark, measured: tuple[Run, Run], baseline: tuple[Run, Run]) -> None:
    """Rounds of `measured`, each after one of `baseline`; the ratio goes into extra_info."""
    seconds = []

    def setup():
        given = baseline[0]()
        begin = time.perf_counter()
        baseline[1](*given)
        seconds.append(time.perf_counter() - begin)
        del given
        return measured[0](), {}

    benchmark.pedantic(measured[1], setup=setup, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:
        own = benchmark.stats.stats.data
        ratios = [a / b for a, b in zip(own, seconds[-len(own) :])]
        benchmark.extra_info["over_baseline"] = statistics.median(ratios)
