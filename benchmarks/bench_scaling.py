"""Time and memory against N, V, layers and batch: python -m benchmarks.bench_scaling

Forward and backward of attention layers whose activations all live until one backward:

    plain      flash_attention, no alignment
    student    flash_attention_with_alignment
    eager      the same loss with every map materialised, the way the paper's authors train

Each goes on to the next size until it runs out of memory, until one call would take too long, or
until the budget ends; the results say which. Memory first: on a GPU the allocator's peak, on a CPU
(Linux) the resident size of a process of its own with a limit, so that nothing takes the machine
down. Then the outputs and losses of those that fitted are compared, and they are timed in turn.
What was not measured but follows from a fit is called extrapolated. Results are written after every
point: stop it at any time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import available_backends

from benchmarks import memory, scaling_plot, scaling_report
from benchmarks.measure import Clock
from benchmarks.result_files import RESULTS, result_path, start
from benchmarks.scaling_cases import RUNS, Axis, Layers, Size, axes, memory_of
from benchmarks.scaling_fit import predicted
from benchmarks.variants import OWN, attempt, check_full, free, whole

THEME = "scaling"
# Of the budget: no call that is predicted to take longer is made.
CALL_SHARE = 1 / 6
MEMORY_SHARE = 0.6  # of what is available, on a CPU
# Calls that a point costs: memory takes one and a forward, and the inputs are made (a teacher's
# forward); timing takes one to compare, three to time, and the inputs again.
MEMORY_CALLS, TIMED_CALLS = 2.5, 4.5
CHILD_SECONDS = 0.5
OUT_OF_MEMORY = "out of memory"


class Session:
    """What a run measures with, and its clock."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.begin = options.device, time.monotonic()
        self.budget = 60.0 * options.budget_minutes
        self.call_limit = CALL_SHARE * self.budget
        self.rounds, self.seconds = options.rounds, options.case_seconds
        self.clock = Clock(self.device)
        self.cuda = self.device.startswith("cuda")
        self.memory_limit = memory_limit(self.device, options.memory_limit)
        self.memory_rows: dict[tuple[Size, str], tuple[dict | None, str | None]] = {}

    def elapsed(self) -> float:
        return time.monotonic() - self.begin


def memory_limit(device: str, asked: float | None) -> int:
    """Bytes that one call with its inputs may take; on a GPU also told to the allocator."""
    if not device.startswith("cuda"):
        available = memory.available_bytes(device)
        return int(MEMORY_SHARE * available if asked is None else asked * 2**30)
    available, total = memory.available_bytes(device), torch.cuda.mem_get_info()[1]
    if asked is None:
        return available
    torch.cuda.set_per_process_memory_fraction(min(1.0, asked * 2**30 / total))
    return min(available, int(asked * 2**30))


def memory_row(size: Size, variant: str, session: Session) -> tuple[dict | None, str | None]:
    """Peak and kept bytes, or why there are none; measured once where axes meet."""
    key = size, variant
    if key not in session.memory_rows:
        free()
        session.memory_rows[key] = attempt(lambda: measured_memory(size, variant, session))
    row, reason = session.memory_rows[key]
    return row and dict(row), reason


def measured_memory(size: Size, variant: str, session: Session) -> dict:
    if session.cuda:
        return memory_of(size, variant, session.device)
    limits = {"threads": torch.get_num_threads(), "limit": session.memory_limit}
    return memory.in_child(memory_of, size, variant, session.device, **limits)


def timed_rows(size: Size, names: Sequence[str], session: Session) -> dict[str, dict]:
    """Compares the variants, then times those that agree in turn; name -> numbers, or `wrong`."""
    problem = Layers(size, session.device, names)
    # In this order eager's loss, which owes nothing to this project's code, is what is compared to.
    runs = {name: RUNS[name] for name in ("plain", "eager", "student") if name in names}
    rows: dict[str, dict] = {}
    for name, reason in check_full(problem, runs).items():  # type: ignore[arg-type]
        if reason is not None:
            rows[name] = {"wrong": reason}
            del runs[name]
    calls = {name: lambda run=run: whole(problem, run) for name, run in runs.items()}  # type: ignore
    return rows | session.clock.interleaved(calls, session.rounds, session.seconds)


def forecast(axis: Axis, points: list[dict], variant: str, size: Size) -> tuple[float, float]:
    """Seconds and bytes of a call from the last two sizes; 0 where nothing is known yet."""
    sizes = [point["size"] for point in points]
    rows = [point["variants"].get(variant, {}) for point in points]
    ms, peak = (
        predicted(sizes, [row.get(key) for row in rows], axis.value(size)) or 0.0
        for key in ("ms", "peak_bytes")
    )
    return ms / 1e3, peak


def cost_of_memory(
    axis: Axis, points: list[dict], variant: str, size: Size, session: Session
) -> tuple[float, float]:
    """Seconds that one call is forecast to take before it ends, and its memory to be measured."""
    seconds, peak = forecast(axis, points, variant, size)
    child = 0.0 if session.cuda or not points else CHILD_SECONDS
    if peak > session.memory_limit:
        # It runs out of memory on its way.
        seconds *= session.memory_limit / peak
        return seconds, seconds + child
    return seconds, MEMORY_CALLS * seconds + child


def reserve(axis: Axis, points: list[dict], size: Size, session: Session, deadline: float) -> float:
    """Seconds to be kept for eager's next size, if that is where its memory will run out."""
    later = [other for other in axis.sizes if axis.value(other) > axis.value(size)]
    if not later or forecast(axis, points, "eager", later[0])[1] <= session.memory_limit:
        return 0.0
    seconds, cost = cost_of_memory(axis, points, "eager", later[0], session)
    reachable = seconds <= session.call_limit and session.elapsed() + cost < deadline
    return cost if reachable else 0.0


def end_before(
    axis: Axis, points: list[dict], variant: str, size: Size, session: Session, deadline: float
) -> dict | None:
    """Why a variant does not go on to a size, if so."""
    seconds, cost = cost_of_memory(axis, points, variant, size, session)
    at = f"{axis.symbol} = {axis.value(size)}"
    if session.elapsed() + cost >= deadline:
        return {"kind": "budget", "at": None, "text": f"stopped: the budget ended before {at}"}
    if seconds > session.call_limit:
        text = f"stopped: at {at} one call would take about {seconds:.0f} s"
        text += f" (limit {session.call_limit:.0f} s)"
        return {"kind": "time", "at": None, "text": text}
    return None


def end_at(axis: Axis, size: Size, reason: str, session: Session) -> dict:
    at = f"{axis.symbol} = {axis.value(size)}"
    if reason == OUT_OF_MEMORY:
        limit = session.memory_limit / 2**30
        text = f"out of memory at {at} (limit {limit:.3g} GiB)"
        return {"kind": "memory", "at": axis.value(size), "text": text}
    return {"kind": "failed", "at": axis.value(size), "text": f"failed at {at}: {reason}"}


def measure_point(
    axis: Axis, size: Size, found: dict[str, Any], session: Session, deadline: float
) -> dict[str, dict]:
    """Rows of the variants that go on to this size; the others' ends are noted."""
    points, ends = found["points"], found["ends"]
    alive = [name for name in RUNS if name not in ends]
    rows: dict[str, dict] = {}
    # Eager first: where it runs out of memory must not be lost to the others' time.
    for name in reversed(alive):
        end = end_before(axis, points, name, size, session, deadline)
        if end is None:
            row, reason = memory_row(size, name, session)
            if row is not None:
                rows[name] = row
                continue
            end = end_at(axis, size, str(reason), session)
        ends[name] = end
    rows = {name: rows[name] for name in RUNS if name in rows}
    # The forecast of a machine that has become busy is too short: its last call says so.
    seconds = {
        name: max(forecast(axis, points, name, size)[0], row.get("memory_call_seconds", 0.0))
        for name, row in rows.items()
    }
    if "eager" in rows:
        deadline -= reserve(axis, points, size, session, deadline)
    for name, timed in timings(size, seconds, session, deadline).items():
        if "wrong" in timed:
            ends[name] = end_at(axis, size, timed["wrong"], session)
            del rows[name]
        else:
            rows[name] |= timed
    free()
    return rows


def timings(
    size: Size, seconds: dict[str, float], session: Session, deadline: float
) -> dict[str, dict]:
    """Times of the variants for which there is time, each given its forecast of one call."""
    left = deadline - session.elapsed()
    found: dict[str, dict] = {}
    names = []
    for name in seconds:
        left -= TIMED_CALLS * seconds[name]
        if left >= 0:
            names.append(name)
        else:
            left += TIMED_CALLS * seconds[name]
            found[name] = {"not_timed": "the budget of this axis ended"}
    if not names:
        return found
    timed, reason = attempt(lambda: timed_rows(size, names, session))
    # On a GPU the inputs of all lie beside each other here, and may not fit.
    return found | (timed or {name: {"not_timed": reason} for name in names})


def empty(axis: Axis) -> dict[str, Any]:
    """The part of a report that an axis fills."""
    fields = ("field", "symbol", "title", "fixed", "bounded")
    return {name: getattr(axis, name) for name in fields} | {"points": [], "ends": {}}


def measure_axis(
    axis: Axis, found: dict[str, Any], session: Session, deadline: float, write: Any
) -> None:
    for size in axis.sizes:
        rows = measure_point(axis, size, found, session, deadline)
        if rows:
            found["points"].append({"size": axis.value(size), **asdict(size), "variants": rows})
            write()
            print(scaling_report.line(axis.symbol, found["points"][-1]), flush=True)
        if len(found["ends"]) == len(RUNS):
            break
    for name in RUNS:
        found["ends"].setdefault(
            name, {"kind": "measured", "at": None, "text": "every size measured"}
        )
    write()
    for name in RUNS:
        print(f"{axis.title}, {name}: {found['ends'][name]['text']}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="half a minute, smaller sizes")
    parser.add_argument(
        "--budget-minutes", type=float, help="8 on a CPU, 2.5 on a GPU, 0.5 with --quick"
    )
    parser.add_argument("--memory-limit", type=float, metavar="GiB", help=limit_help())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.memory_limit is not None and not options.memory_limit > 0:
        parser.error(f"--memory-limit: expected a positive number; got {options.memory_limit}.")
    if options.budget_minutes is None:
        full = 2.5 if options.device.startswith("cuda") else 8.0
        options.budget_minutes = 0.5 if options.quick else full
    options.rounds = 5 if options.quick else 9
    options.case_seconds = 0.3 if options.quick else 2.0
    return options


def limit_help() -> str:
    share = f"{100 * MEMORY_SHARE:.0f}%%"
    return f"of a call with its inputs; {share} of what is available by default, on a GPU all"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(0)
    session = Session(options)
    listed = axes(options.device, options.quick)
    path = result_path(THEME, options.device, options.output)
    arguments = sys.argv[1:] if argv is None else argv
    usable = available_backends()
    report: dict[str, Any] = {
        **start(THEME, options.device, "benchmarks.bench_scaling", arguments),
        "backend": next(b for b in OWN if usable.get(b, "unknown") is None),
        "memory_limit_bytes": session.memory_limit,
        "call_limit_seconds": session.call_limit,
        "budget_seconds": session.budget,
        "load": os.getloadavg()[0],
        "axes": [empty(axis) for axis in listed],
    }

    def write() -> None:
        report["seconds"] = round(session.elapsed(), 1)
        scaling_report.write(path, report)

    write()
    try:
        for i, axis in enumerate(listed):
            share = axis.share / sum(later.share for later in listed[i:])
            deadline = session.elapsed() + share * (session.budget - session.elapsed())
            measure_axis(axis, report["axes"][i], session, deadline, write)
    except KeyboardInterrupt:
        print("interrupted: what was measured is written")
    for found in report["axes"]:
        for name in RUNS:
            end = {"kind": "interrupted", "at": None, "text": "stopped: interrupted"}
            found["ends"].setdefault(name, end)
    write()
    scaling_plot.draw(path.with_suffix(".png"), report)
    print(f"{path}: {sum(len(found['points']) for found in report['axes'])} points")


if __name__ == "__main__":
    main()
