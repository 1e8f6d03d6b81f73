"""What is compared: every way to run a problem, and the checks that each passes before it is timed.

A variant is a function(problem, leaves) -> (out,) or (out, loss), leaves being q, k, v. One that
cannot run here is a string in its place: the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from cdfast_kernels import (
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    visual_alignment_loss,
)

from benchmarks import peers
from benchmarks.cases import Case, Problem
from benchmarks.eager import eager
from benchmarks.memory import available_bytes, out_of_memory
from tests.numerics import FLOOR, FORWARD, GRADIENT, assert_within_budget, max_error

OWN = ("triton", "cpu", "reference")
ADAPTERS = ("sdpa", "flash_attn", "xformers")
# Results in the dtype of the inputs, all within the budget of the small check, may differ by this
# many FLOORs of tests/numerics.py: outputs and losses, and gradients, which sum over more terms.
AGREEMENT, GRADIENT_AGREEMENT = 4.0, 40.0
# The sink filter compares with a threshold, which a rounding crosses in some entry of a large map.
POOLED_AGREEMENT = 0.05
CHECKED_TOKENS = 512
MOST_OF_MEMORY = 0.6
Run = Callable[[], Any]
Variant = Callable[..., tuple]


def own_backend() -> str:
    """The backend of this project that is measured here: the first that can run."""
    usable = available_backends()
    return next(b for b in OWN if usable.get(b, "unknown") is None)


def variants(problem: Problem, compiled: bool = False) -> dict[str, Variant | str]:
    """name -> variant, or why it is absent.

    Args:
        compiled: with those that torch.compile makes, which takes tens of seconds per size.
    """
    return {
        **_own(problem),
        **_modular(problem),
        **_peers(problem),
        **_compiled(problem, compiled),
        "eager": lambda p, leaves: eager(*leaves, p.eager),
    }


def _own(problem: Problem) -> dict[str, Variant | str]:
    usable = available_backends()
    device = problem.q.device.type
    found: dict[str, Variant | str] = {}
    for backend in OWN:
        reason = usable.get(backend, "unknown")
        if device == "cuda" and backend != "triton":
            # The reference materialises several float32 maps: `eager` stands for that.
            reason = reason or "not measured on cuda"

        def plain(p, leaves, backend=backend):
            return (flash_attention(*leaves, layout=p.layout, backend=backend)[0],)

        def student(p, leaves, backend=backend):
            options = {"objective": p.case.objective, "backend": backend}
            return flash_attention_with_alignment(*leaves, p.target, p.layout, **options)

        found[f"plain[{backend}]"] = reason or plain
        found[f"student[{backend}]"] = reason or student
    return found


def _modular(problem: Problem) -> dict[str, Variant | str]:
    usable = available_backends()
    backend = problem.backend
    found: dict[str, Variant | str] = {}
    for adapter in ADAPTERS:

        def modular(p, leaves, adapter=adapter):
            out, lse = flash_attention(*leaves, layout=p.layout, backend=adapter)
            return out, loss_beside(p, leaves, lse)

        found[f"modular[{adapter}+{backend}]"] = usable.get(adapter, "unknown") or modular
    return found


def loss_beside(problem: Problem, leaves: list[torch.Tensor], lse: torch.Tensor) -> torch.Tensor:
    q, k, _ = leaves
    options = {"objective": problem.case.objective, "backend": problem.backend}
    return visual_alignment_loss(q, k, lse, problem.target, problem.layout, **options)


def _peers(problem: Problem) -> dict[str, Variant | str]:
    found: dict[str, Variant | str] = {}
    for name, attention in peers.attentions().items():
        if problem.case.layout != "causal" and not isinstance(attention, str):
            attention = "plain causal attention only"
        found[name] = (
            attention
            if isinstance(attention, str)
            else lambda p, leaves, run=attention: (run(*leaves),)
        )
    return found


def _compiled(problem: Problem, compiled: bool) -> dict[str, Variant | str]:
    names = "flex", f"modular[flex+{problem.backend}]", "eager, compiled"
    if not compiled:
        return dict.fromkeys(names, "compiled in the first cases only (--compiled)")
    attention, reason = attempt(lambda: peers.Flex(problem))
    if reason:
        return dict.fromkeys(names[:2], reason) | {names[2]: _compiled_eager()}

    def flex(p, leaves):
        return (attention(*leaves)[0],)

    def modular(p, leaves):
        out, lse = attention(*leaves)
        return out, loss_beside(p, leaves, lse)

    return dict(zip(names, (flex, modular, _compiled_eager())))


def _compiled_eager() -> Variant:
    run = torch.compile(eager, dynamic=False)
    return lambda p, leaves: run(*leaves, p.eager)


def takes_loss(name: str) -> bool:
    return name.startswith(("student", "modular", "eager"))


def needs_compiling(name: str) -> bool:
    return name.startswith("flex") or "flex+" in name or name.endswith("compiled")


def whole(problem: Problem, run: Variant) -> tuple:
    """Outputs and gradients of one forward and backward."""
    outputs = run(problem, problem.leaves)
    seeds = (problem.d_out, problem.one)[: len(outputs)]
    return (*outputs, *torch.autograd.grad(outputs, problem.leaves, seeds))


def reason_of(error: Exception) -> str:
    if out_of_memory(error):
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
    """Variant -> None if it is within the error budget of the tests at a small size, else why.

    Those that would have to be compiled for it are left to check_full.
    """
    problem = Problem(small_case(case), device, backend)
    problem.prepare_eager()
    exact_leaves = [x.detach().double().requires_grad_() for x in problem.leaves]
    exact = both_gradients(problem, exact_leaves)
    runs = variants(problem)
    low = both_gradients(problem, problem.leaves)
    found: dict[str, str | None] = {}
    for name, run in runs.items():
        if isinstance(run, str):
            continue
        got, reason = attempt(lambda run=run: whole(problem, run))
        if reason is None:
            # Others are not held to the budget of this project: a peer is not lost for a rounding.
            slack = 1 if takes_loss(name) or name.startswith("plain") else 2
            aligned = takes_loss(name)
            reason = over_budget(problem, got, low[aligned], exact[aligned], slack)
            reason = reason and f"wrong at {problem.case.tokens} tokens: {reason}"
        found[name] = reason
    return found


def small_case(case: Case) -> Case:
    """The same at a size that float64 takes, in float32 where rounding crosses a threshold."""
    n = min(case.tokens, CHECKED_TOKENS)
    dtype = "fp32" if case.objective == "pooled" else case.dtype
    visual = max(2, case.visual * n // case.tokens)
    return replace(case, tokens=n, visual=visual, batch=min(case.batch, 2), dtype=dtype)


def both_gradients(problem: Problem, leaves: list[torch.Tensor]) -> tuple[tuple, tuple]:
    """Eager's (out, dq, dk, dv) of attention alone, and (out, loss, dq, dk, dv) with the loss."""
    outputs = eager(*leaves, problem.eager)
    seeds = (problem.d_out.to(outputs[0].dtype), problem.one.to(outputs[1].dtype))
    plain = torch.autograd.grad(outputs[0], leaves, seeds[0], retain_graph=True)
    return (outputs[0], *plain), (*outputs, *torch.autograd.grad(outputs, leaves, seeds))


def over_budget(problem: Problem, got: tuple, low: tuple, exact: tuple, slack: int) -> str | None:
    """Which result is over the error budget of the tests, if one is."""
    try:
        for name, a, b, c in zip(result_names(problem, got), got, low, exact):
            if name == "out":
                a, b, c = (problem.live_rows(x) for x in (a, b, c))
            factor = GRADIENT if name.startswith("d") else FORWARD
            assert_within_budget(name, a, b, c, problem.dtype, factor * slack)
    except AssertionError as error:
        return str(error)
    return None


def result_names(problem: Problem, got: tuple) -> tuple[str, ...]:
    gradients = tuple(f"d{leaf}" for leaf in problem.leaf_names)
    return ("out", "loss")[: len(got) - len(gradients)] + gradients


def check_full(problem: Problem, runs: dict[str, Variant]) -> dict[str, str | None]:
    """At full size the results agree with the first of their kind; None, or the difference."""
    found: dict[str, str | None] = {}
    first: dict[bool, tuple] = {}
    for name, run in runs.items():
        got, reason = attempt(lambda run=run: whole(problem, run))
        if reason is None:
            got = tuple(x.detach() for x in got)
            reason = difference(problem, got, first.setdefault(takes_loss(name), got))
        found[name] = reason
    return found


def difference(problem: Problem, got: tuple, want: tuple) -> str | None:
    """Which result differs from another variant's by more than rounding, if one does."""
    pooled = problem.case.objective == "pooled"
    names = result_names(problem, got)
    for name, a, b in zip(names, got, want):
        if name == "out":
            a, b = problem.live_rows(a), problem.live_rows(b)
        factor = GRADIENT_AGREEMENT if name.startswith("d") else AGREEMENT
        tolerance = factor * FLOOR[problem.dtype]
        if pooled and "loss" in names and name != "out":
            tolerance = max(tolerance, POOLED_AGREEMENT)
        error, size = max_error(a, b), float(b.detach().abs().max())
        if not error <= tolerance * size:
            of = "" if name == "loss" else "of its largest value"
            return f"wrong at full size: {name} is off by {error / size:.1e} {of}".strip()
    return None


def usable_runs(
    problem: Problem,
    checks: dict[str, str | None],
    compiled: bool = False,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Variant], dict[str, dict]]:
    """The variants that passed both checks, and a row with the reason for each of the others.

    Args:
        checks: what check_small found.
        only: leave out all but these.
    """
    no_room = too_large(problem)
    no_eager = no_room or attempt(problem.prepare_eager)[1]
    rows: dict[str, dict] = {}
    runs: dict[str, Variant] = {}
    for name, run in variants(problem, compiled).items():
        if only is not None and name not in only:
            continue
        reason = run if isinstance(run, str) else checks.get(name)
        if name.startswith("eager"):
            reason = reason or no_eager
        elif name.endswith("[reference]"):
            reason = reason or no_room
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


def too_large(problem: Problem) -> str | None:
    """Why maps of all heads must not be tried here: on a CPU they would take the machine down."""
    if problem.q.is_cuda:
        return None
    case = problem.case
    # Scores, probabilities and their gradients, in float32.
    need = 4 * 4 * case.batch * case.heads * case.tokens**2
    free_bytes = available_bytes("cpu")
    if need < MOST_OF_MEMORY * free_bytes:
        return None
    return f"needs about {need / 2**30:.0f} GiB, {free_bytes / 2**30:.0f} GiB are free"
