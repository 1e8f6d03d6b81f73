"""The distillation step: one teacher forward, one student forward, three sums.

Losses are computed inside the student's own `forward`, because DDP and ZeRO-3 only prepare
gradients and gather parameters around the forward of the module they wrap.

Source: CompoDistill: L = L_LM + w_KL L_KL + w_A L_alignment.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from cdfast_kernels import VisualLayout
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.aligner import AlignmentTargets, VisualAttentionAligner
from cdfast.attention import AlignmentContext
from cdfast.losses import answer_rows, kl_loss_sum, lm_loss_sum, next_labels, unshifted_rows
from cdfast.similarity import model_inputs

LOSS_NAMES = ("lm", "kl", "alignment")


@dataclass(frozen=True)
class TeacherOutput:
    """What a student's step needs from the teacher; no gradient."""

    targets: AlignmentTargets | None
    hidden: Tensor | None  # (R, d_t) on KL rows
    weight: Tensor | None  # (V_t, d_t) output embedding


@dataclass(frozen=True)
class StudentTask:
    """What the student's forward is asked for, beside its inputs."""

    labels: Tensor
    layout: VisualLayout
    teacher: TeacherOutput | None
    aligner: VisualAttentionAligner | None
    unshifted_kl_mask: bool


def kl_rows(labels: Tensor, unshifted: bool) -> Tensor:
    """(B, N) bool: rows on which the logits are distilled."""
    return unshifted_rows(labels) if unshifted else answer_rows(labels)


@torch.no_grad()
def teacher_step(
    teacher: PreTrainedModel,
    batch: dict[str, Any],
    aligner: VisualAttentionAligner | None,
    *,
    logits: bool,
    unshifted_kl_mask: bool = False,
) -> TeacherOutput:
    """Run the teacher on a batch with `layout` and `labels`; keep answer rows and targets only."""
    layout: VisualLayout = batch["layout"]
    context = aligner.teacher_context(layout) if aligner else AlignmentContext(layout)
    inputs = {k: v for k, v in model_inputs(batch).items() if k != "labels"}
    hidden = teacher.base_model(**inputs, alignment=context, use_cache=False).last_hidden_state
    return TeacherOutput(
        targets=aligner.targets(context) if aligner else None,
        hidden=hidden[kl_rows(batch["labels"], unshifted_kl_mask)] if logits else None,
        weight=output_weight(teacher) if logits else None,
    )


def student_step(
    student: PreTrainedModel, inputs: dict[str, Any], task: StudentTask
) -> dict[str, Tensor]:
    """Run the student and return the sums {"lm", "kl", "alignment"} over this batch.

    `lm` and `kl` are sums over answer tokens, `alignment` over samples with an image; each is
    divided by its own global count in the trainer.
    """
    teacher = task.teacher
    targets = teacher.targets if teacher else None
    if task.aligner and targets:
        context = task.aligner.student_context(targets)
    else:
        context = AlignmentContext(task.layout)
    hidden = student.base_model(**inputs, alignment=context, use_cache=False).last_hidden_state
    weight = output_weight(student)
    rows = answer_rows(task.labels)
    sums = {"lm": lm_loss_sum(hidden[rows], weight, next_labels(task.labels, rows))}
    if teacher and teacher.hidden is not None and teacher.weight is not None:
        chosen = hidden[kl_rows(task.labels, task.unshifted_kl_mask)]
        sums["kl"] = kl_loss_sum(chosen, weight, teacher.hidden, teacher.weight)
    if task.aligner and targets:
        sums["alignment"] = task.aligner.alignment(context).sum
    if "pixel_values" not in inputs:
        # DDP waits for a gradient of every trainable parameter, the unused projector's too.
        sums["lm"] = sums["lm"] + 0.0 * sum(
            p.sum() for n, p in student.named_parameters() if p.requires_grad and "projector" in n
        )
    return sums


def add_student_step(student: PreTrainedModel) -> None:
    """Make `student(..., task=StudentTask(...))` return `student_step`; other calls stay as is."""
    if hasattr(student.forward, "cdfast_student_step"):
        return
    stock: Any = student.forward
    function = getattr(stock, "__func__", lambda _, *args, **inputs: stock(*args, **inputs))

    @functools.wraps(function)
    def forward(
        self: PreTrainedModel, *args: Any, task: StudentTask | None = None, **inputs: Any
    ) -> Any:
        if task is None:
            return function(self, *args, **inputs)
        return student_step(self, inputs, task)

    forward.cdfast_student_step = True  # type: ignore[attr-defined]
    # A method, not a closure over the student: copy.deepcopy binds it to the copy.
    student.forward = MethodType(forward, student)  # type: ignore[method-assign]


def output_weight(model: PreTrainedModel) -> Tensor:
    """(V, d) weight of the output embedding.

    Raises:
        ValueError: the output embedding has a bias, which the chunked losses do not take.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"{model.config.model_type}: expected an output embedding without bias; got one with."
        )
    return head.weight
