"""Throughput of training: tokens and samples per second, MFU, peak memory, shares of the time.

A step's time runs from asking for its batches to the end of the optimizer's step, so logging,
evaluation and saving are no part of it. Between the two, marks say what begins:

    data       waiting for the batches of the step, and moving them to the device
    teacher    the teacher's forward; with it the vision tower, which the student then reads
    student    forward and backward, with the reduction of gradients that overlaps it
    optimizer  clipping, the optimizer's step, zeroing gradients. Under DeepSpeed it is
               `engine.step`, which also gathers updated parameters; what ZeRO does to gradients
               before that is in `student`
    other      counting tokens over ranks, calibration, callbacks

On CUDA marks are events on the device's stream, read when something is logged, where Trainer waits
for the device anyway: `time_data` is then the time in which the device had nothing to do. On other
devices they are host times.
"""

from __future__ import annotations

import itertools
import platform
import resource
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback

from cdfast.flops import COUNTS, device_peak, patch_size, step_counts, step_flops

PHASES = ("data", "teacher", "student", "optimizer", "other")
THROUGHPUT_FIELDS = (
    "tokens_per_second",
    "samples_per_second",
    "mfu",
    "peak_memory_bytes",
    *(f"time_{phase}" for phase in PHASES),
)
# Too many for a line of progress; log_history, trackers and results.json have all of them.
_NOT_PRINTED = (
    "row_fill",  # of packed rows; said at the start
    *(n for n in THROUGHPUT_FIELDS if n not in ("tokens_per_second", "mfu")),
)


class Throughput:
    """Measures the steps of one training run on this rank.

    Args:
        student, teacher: as they are trained; the teacher is None where there is none.
        teacher_logits: whether the teacher's logits of answer rows are computed.
        losses: names of the other terms, see `step_flops`.
        device: that trains.
        dtype: of the matrix products: autocast's, or the student's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        teacher_logits: bool,
        device: torch.device,
        dtype: torch.dtype,
        losses: Collection[str] = (),
    ):
        self.device, self.dtype = device, dtype
        self._flops: dict[str, float] | None = None
        self._not_counted = ""
        try:
            self._flops = step_flops(student, teacher, teacher_logits, losses)
        except ValueError as error:
            self._not_counted = f"not counted: {error}"
        self._patch = patch_size(student)
        self._cuda = device.type == "cuda"
        # (phase that begins, or None after the end of a step; when)
        self._marks: list[tuple[str | None, Any]] = []
        self._counts: Tensor | None = None
        self._peak = self._peak_before_step = 0
        self._totals = torch.zeros(len(COUNTS) + len(PHASES), dtype=torch.float64)

    # -- during a step -------------------------------------------------------------------------

    def begin(self) -> None:
        """At the start of training: peak memory is that of the steps from here on."""
        self._marks.clear()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def begin_step(self) -> None:
        """Before the batches of a step are asked for."""
        if self._cuda:
            self._peak_before_step = torch.cuda.max_memory_allocated(self.device)
        self.mark("data")

    def mark(self, phase: str) -> None:
        """`phase` begins here, and what was marked before ends."""
        self._marks.append((phase, self._now()))

    def end_step(self) -> None:
        """After the optimizer's step; nothing if no step has begun."""
        if self._marks and self._marks[-1][0] is not None:
            self._marks.append((None, self._now()))
            self._read_peak()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def count(self, batch: Mapping[str, Any], lm_rows: Tensor, kl_rows: Tensor) -> None:
        """Add a batch of the step; its numbers stay on the device until something is logged."""
        counts = step_counts(batch, lm_rows, kl_rows, self._patch)
        self._counts = counts if self._counts is None else self._counts + counts

    def _read_peak(self) -> None:
        if not self._cuda:
            # Linux reports KiB, macOS bytes.
            unit = 1 if platform.system() == "Darwin" else 1024
            self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return
        # The allocator's own number, read on the host. Evaluation may have raised it between
        # steps: what counts is a rise during a step.
        peak = torch.cuda.max_memory_allocated(self.device)
        if peak > self._peak_before_step:
            self._peak = max(self._peak, peak)

    # -- between steps -------------------------------------------------------------------------

    def read(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Throughput of the steps since the last call; empty if there was none.

        Args:
            gather: of accelerate: (1, n) of every rank -> (ranks, n). All ranks call this.
        """
        own = torch.zeros(len(COUNTS) + len(PHASES) + 1, dtype=torch.float64)
        if self._counts is not None:
            own[: len(COUNTS)] = self._counts.cpu()
        own[len(COUNTS) : -1] = torch.tensor(self._seconds(), dtype=torch.float64)
        own[-1] = self._peak
        self._counts = None
        ranks = gather(own[None].to(self.device)).view(-1, len(own)).cpu()
        self._peak = int(ranks[:, -1].max())
        numbers = ranks[:, :-1].sum(0)
        # Seconds are a mean: ranks wait for each other in every step.
        numbers[len(COUNTS) :] /= len(ranks)
        self._totals += numbers
        return self._report(numbers, len(ranks))

    def summary(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Throughput over all steps, with `mfu_of`: what MFU is a share of. All ranks call this."""
        ranks = len(gather(torch.zeros(1, 1, device=self.device)))
        self.read(gather)
        report = dict.fromkeys(THROUGHPUT_FIELDS) | self._report(self._totals, ranks)
        return {**report, "mfu_of": self._not_counted or device_peak(self.device, self.dtype)[1]}

    def _seconds(self) -> list[float]:
        """Seconds of each phase in the marks since the last call, which are forgotten."""
        marks, self._marks = self._marks, []
        found = dict.fromkeys(PHASES, 0.0)
        if marks and self._cuda:
            marks[-1][1].synchronize()
        for (phase, start), (_, end) in itertools.pairwise(marks):
            if phase is not None:
                found[phase] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        return list(found.values())

    def _report(self, numbers: Tensor, ranks: int) -> dict[str, float]:
        counts = dict(zip(COUNTS, numbers.tolist()))
        seconds = dict(zip(PHASES, numbers[len(COUNTS) :].tolist()))
        total = sum(seconds.values())
        if not total:
            return {}
        report = {
            "tokens_per_second": counts["tokens"] / total,
            "samples_per_second": counts["samples"] / total,
            "peak_memory_bytes": self._peak,
        }
        if self._flops is not None:
            flops = sum(per * counts[name] for name, per in self._flops.items())
            report["mfu"] = flops / total / (ranks * device_peak(self.device, self.dtype)[0])
        return report | {f"time_{name}": value / total for name, value in seconds.items()}


class ThroughputCallback(TrainerCallback):
    """Ends steps, and finds DeepSpeed's optimizer step, which is inside `accelerator.backward`."""

    def __init__(self, throughput: Throughput, accelerator: Any):
        self.throughput, self.accelerator = throughput, accelerator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.begin()
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if wrapped is not None:
            mark_engine_step(wrapped.engine, self.throughput)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.end_step()


def mark_engine_step(engine: Any, throughput: Throughput) -> None:
    """Attribute the step of a DeepSpeed engine to the optimizer."""
    step = engine.step

    def marked_step(*args: Any, **kwargs: Any) -> Any:
        throughput.mark("optimizer")
        try:
            return step(*args, **kwargs)
        finally:
            throughput.mark("other")

    engine.step = marked_step


class ShortProgress(ProgressCallback):
    """Trainer's progress bar, with the two numbers of throughput that fit into its line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=printed(logs or {}), **kwargs)


class ShortPrinter(PrinterCallback):
    """Trainer's printed log entries, with the two numbers of throughput that fit into a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=printed(logs or {}), **kwargs)


def printed(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a log entry that is printed."""
    return {n: value for n, value in logs.items() if n not in _NOT_PRINTED and "/layer_" not in n}


def shorten_progress(handler: Any) -> None:
    """Replace Trainer's progress callbacks in a CallbackHandler, in their places."""
    short: Sequence[tuple[type, type]] = (
        (ProgressCallback, ShortProgress),
        (PrinterCallback, ShortPrinter),
    )
    for place, callback in enumerate(handler.callbacks):
        for stock, ours in short:
            if type(callback) is stock:
                handler.callbacks[place] = ours()
