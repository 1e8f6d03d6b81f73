"""Runs of the trainers that bench_text_step compares, each in a process of its own."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.memory import watch_peak
from benchmarks.text_trainers import (
    LEARNING_RATE,
    TRAINERS,
    collate,
    language_model,
    samples,
    stay_alone,
    text_parameters,
)

WARM_UP = 2  # steps: the first allocates the optimizer's states, in the second memory is measured
SAMPLED = 4096  # entries of every parameter that are compared between trainers


def sampled(parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Up to SAMPLED entries of each, as arrays, which travel between processes."""
    found = {}
    for name, p in parameters.items():
        flat = p.detach().flatten()
        found[name] = flat[:: -(-len(flat) // SAMPLED)].float().cpu().numpy().copy()
    return found


@dataclass
class Watched:
    """What is written down about the steps of a run."""

    device: str
    parameters: dict[str, torch.Tensor]
    ends: list[float] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    updates: dict[str, Any] = field(default_factory=dict)
    peak: Callable[[], int | None] | None = None
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        self.before = sampled(self.parameters)

    def before_optimizer(self, step: int) -> None:
        """Gradients of the first step, after clipping."""
        if step == 0:
            grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            self.gradients = sampled(grads)

    def end_of_step(self, step: int) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        if step == 1:
            after = sampled(self.parameters)
            self.updates = {name: after[name] - self.before[name] for name in after}
            self.peak = watch_peak(self.device)
        if step == WARM_UP and self.peak is not None:
            self.peak_bytes = self.peak()
        self.ends.append(time.perf_counter())


def watch(trainer: Any, watched: Watched) -> None:
    """Keep the loss of every step, and see the end of each."""
    from transformers import PrinterCallback, TrainerCallback

    class SeeSteps(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watched.before_optimizer(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watched.end_of_step(state.global_step)

    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        watched.losses.append(loss.detach())  # read at the end: no waiting for the device here
        return loss

    trainer.training_step = training_step
    trainer.add_callback(SeeSteps())
    trainer.remove_callback(PrinterCallback)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train `options.steps` steps after the warm-up, in a process of its own.

    Returns:
        losses of all steps; gradients and update of the first (some entries of each parameter);
        seconds of each counted step, from the end of one to the end of the next; peak bytes of a
        step beyond what was held before it.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stay_alone(folder)
        trainer, parameters = TRAINERS[name](options, folder, WARM_UP + options.steps)
        watched = Watched(options.device, parameters)
        watch(trainer, watched)
        trainer.train()
    ends = watched.ends[WARM_UP - 1 :]
    return {
        "losses": [float(loss) for loss in watched.losses],
        "gradients": watched.gradients,
        "updates": watched.updates,
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "peak_bytes": watched.peak_bytes,
    }


def plain_run(options: argparse.Namespace) -> dict[str, Any]:
    """The warm-up steps of the same task written out with no trainer, in a process of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stay_alone(folder)
        student, teacher = (language_model(options, role) for role in ("student", "teacher"))
        watched = Watched(options.device, text_parameters(student.model, student.lm_head))
        optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0.0)
        rows = samples(options, WARM_UP)
        for step in range(WARM_UP):
            batch = collate(rows[step * options.batch : (step + 1) * options.batch])
            batch = {name: x.to(options.device) for name, x in batch.items()}
            ids, answers = batch["input_ids"], batch["labels"][:, 1:] != -100
            log_s = student(input_ids=ids).logits[:, :-1][answers].float().log_softmax(-1)
            with torch.no_grad():
                log_t = teacher(input_ids=ids).logits[:, :-1][answers].float().log_softmax(-1)
            loss = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            watched.losses.append(float(loss))
            watched.before_optimizer(step)
            optimizer.step()
            optimizer.zero_grad()
            watched.end_of_step(step + 1)
    fields = ("losses", "gradients", "updates")
    return {name: getattr(watched, name) for name in fields}
