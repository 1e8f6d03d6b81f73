"""Steps whose loss, gradient or teacher is not finite: skipped on all ranks, named, and counted.

One number decides: the norm of the global gradient, which is the same on all ranks. A loss that is
not finite is given a NaN gradient on the device, so that it cannot miss the norm. DeepSpeed skips
such a step by itself (ZeRO 1 to 3); without it the gradients are dropped here. Either way the
weights, the optimizer and the learning-rate schedule stay as if the step had not been taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from cdfast.distill import TeacherOutput
from cdfast.manifest import checkpoints, is_complete
from cdfast.stored_targets.pooled_vectors import PooledVectors

if TYPE_CHECKING:  # importing it takes a second, and cdfast.train needs the error alone
    from transformers import Trainer

logger = logging.getLogger(__name__)

LOG_KEY = "skipped_steps"
_SHOWN_SAMPLES = 16


class NonFiniteError(RuntimeError):
    """Too many steps in a row were not finite; the message has their terms, ranks and samples."""


@dataclass(frozen=True)
class _Checked:
    """One micro-batch of one rank: what was looked at, what of it was not finite, its samples."""

    rank: int
    terms: tuple[str, ...]
    samples: tuple[str, ...]

    def __str__(self) -> str:
        shown = "; ".join(self.samples[:_SHOWN_SAMPLES])
        more = len(self.samples) - _SHOWN_SAMPLES
        shown += f" and {more} more" if more > 0 else ""
        shown = shown or "unknown, the batch has no sample_ids"
        return f"{' and '.join(self.terms)} on rank {self.rank} (samples: {shown})"


class NonFiniteSteps(TrainerCallback):
    """Finds, skips and counts steps that are not finite.

    Attributes:
        total: skipped steps of the run, those before a resume included.
        since_log: those that no log entry has counted yet.
        in_a_row: the latest of them, "step N: which term of which samples".
    """

    def __init__(self, rank: int, limit: int) -> None:
        self.rank, self.limit = rank, limit
        self.total = self.since_log = 0
        self.in_a_row: list[str] = []
        self._micro_batches: list[tuple[list[str], Tensor, Sequence[Any]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run has its log; every skipped step is in it.
        self.total = max((entry.get(LOG_KEY, 0) for entry in state.log_history), default=0)
        self.since_log, self.in_a_row = 0, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._micro_batches.clear()

    def check(
        self,
        loss: Tensor,
        means: dict[str, Tensor],
        teacher: TeacherOutput | None,
        sample_ids: Sequence[Any] | None,
    ) -> Tensor:
        """`loss`, with a NaN gradient (and the value 0) if anything behind it is not finite.

        Nothing is read back from the device here.

        Args:
            loss: what backward will be called on.
            means: the terms that `loss` is made of, by name.
            teacher: what the teacher has handed over.
            sample_ids: of the micro-batch, for the report.
        """
        values = {name: value.detach() for name, value in means.items()}
        if teacher is not None:
            values["teacher"] = _total(_teacher_tensors(teacher), loss)
        finite = torch.stack([value.isfinite() for value in (*values.values(), loss.detach())])
        self._micro_batches.append(([*values, "loss"], finite, sample_ids or ()))
        return _NanGradient.apply(loss, finite.all())

    def skip(self, trainer: Trainer, model: nn.Module, norm: Tensor | float | None) -> bool:
        """Skip the optimizer step that is due if the gradient's norm is not finite.

        Called between backward and `optimizer.step`, on all ranks. Reads one number from the
        device.

        Returns:
            Whether the step is skipped.

        Raises:
            NonFiniteError: it is the `limit`-th in a row.
        """
        optimizer: Any = trainer.optimizer
        if trainer.is_deepspeed_enabled:
            skipped = bool(trainer.accelerator.optimizer_step_was_skipped)
        else:
            skipped = norm is not None and not math.isfinite(norm)
            if trainer.accelerator.scaler is None:  # it drops the gradients itself
                # Without gradients optimizer.step() changes nothing, decay and moments included.
                # Trainer asks accelerate whether to advance the schedule, which asks this.
                optimizer._is_overflow = skipped
                if skipped:
                    model.zero_grad(set_to_none=True)
        if skipped:
            self._count(trainer)
        else:
            self.in_a_row.clear()
        return skipped

    def _count(self, trainer: Trainer) -> None:
        step = trainer.state.global_step + 1
        checked: list[_Checked] = gather_object([*self._checked()])
        bad = [micro for micro in checked if micro.terms]
        self.total += 1
        self.since_log += 1
        if not bad and _searches_scale(trainer):
            return
        text = "; ".join(map(str, bad or _gradient(checked)))
        self.in_a_row.append(f"step {step}: {text}")
        if trainer.is_world_process_zero():
            logger.warning(
                "step %d skipped, not finite: %s. Skipped in a row: %d of at most %d; in this run: "
                "%d.",
                *(step, text, len(self.in_a_row), self.limit, self.total),
            )
        # The count must be in the log, and so in a checkpoint, as soon as this step ends.
        trainer.control.should_log = True
        if len(self.in_a_row) >= self.limit:
            raise NonFiniteError(self._verdict(trainer))

    def _checked(self) -> Iterable[_Checked]:
        for names, finite, samples in self._micro_batches:
            terms = [name for name, good in zip(names, finite.tolist()) if not good]
            # The loss is named where none of its terms is: their sum has overflowed.
            named = [term for term in terms if term != "loss"] or terms
            yield _Checked(self.rank, tuple(named), tuple(map(str, samples)))

    def _verdict(self, trainer: Trainer) -> str:
        folder = trainer.args.output_dir
        whole = (path for path in checkpoints(Path(str(folder))) if is_complete(path))
        checkpoint = next(whole, None)
        where = f"The last checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint."
        steps = "\n  ".join(self.in_a_row)
        return (
            f"{len(self.in_a_row)} steps in a row were not finite, so the run stops "
            f"(max_skipped_steps):\n  {steps}\n{where} The weights are those before these steps. "
            "Look at the samples named; where the teacher is named, give it more range "
            "(--teacher-dtype bfloat16 or float32); else lower --learning-rate or lengthen "
            "--warmup, and use bf16 in place of fp16."
        )


class _NanGradient(torch.autograd.Function):
    """loss where it is finite; else 0, so that no logged mean is lost, with a NaN gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, finite: Tensor) -> Tensor:
        ctx.save_for_backward(finite)
        return torch.where(finite, loss, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (finite,) = ctx.saved_tensors
        return torch.where(finite, grad, math.nan), None


def _teacher_tensors(teacher: TeacherOutput) -> Iterable[Tensor]:
    yield from teacher.hidden.values()
    if teacher.log_probs is not None:
        yield teacher.log_probs
    if teacher.top_k is not None:
        # Without the last, which is -inf where all tokens are stored.
        yield teacher.top_k.log_probs[:, :-1]
    if teacher.targets is not None:
        # A map that keeps its inputs would be made anew; the alignment loss shows its NaN.
        maps = teacher.targets.maps.values()
        yield from (m.data for m in maps if isinstance(m, PooledVectors) or not m.inputs)


def _total(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """A number that is finite if all entries are: sums need no memory, unlike isfinite().all()."""
    zero = like.new_zeros((), dtype=torch.float32)
    return sum((tensor.sum(dtype=torch.float32) for tensor in tensors), zero)


def _gradient(checked: Sequence[_Checked]) -> Iterable[_Checked]:
    """All samples of the step by rank: the norm does not tell whose gradient it was."""
    for rank in sorted({micro.rank for micro in checked}):
        samples = [s for micro in checked if micro.rank == rank for s in micro.samples]
        yield _Checked(rank, ("gradient",), tuple(samples))


def _searches_scale(trainer: Trainer) -> bool:
    """Whether fp16 still looks for a loss scale: overflows of scaled gradients belong to that."""
    scaler = trainer.accelerator.scaler
    return trainer.args.fp16 and (scaler is None or scaler.get_scale() > 1)
