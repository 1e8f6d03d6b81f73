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

from cdfast.adapters import is_adapter
from cdfast.aligner import AlignmentTargets, VisualAttentionAligner
from cdfast.attention import AlignmentContext
from cdfast.engine import gathered
from cdfast.losses import answer_rows, kl_loss_sum, lm_loss_sum, next_labels, unshifted_rows

LOSS_NAMES = ("lm", "kl", "alignment")


@dataclass(frozen=True)
class TeacherOutput:
    """What a student's step needs from the teacher; no gradient."""

    targets: AlignmentTargets | None
    hidden: Tensor | None  # (R, d_t) on KL rows
    weight: Tensor | None  # (V_t, d_t) output embedding


@dataclass
class TeacherTask:
    """What the teacher's forward is asked for, beside its inputs; it puts the answer here."""

    labels: Tensor
    layout: VisualLayout
    aligner: VisualAttentionAligner | None
    logits: bool
    unshifted_kl_mask: bool = False
    blank_image: bool = False  # run the vision modules in a batch without images too
    output: TeacherOutput | None = None

    def run(self, teacher: PreTrainedModel, inputs: dict[str, Any]) -> None:
        # Not returned: ZeRO's hooks look for tensors in what a forward returns.
        self.output = teacher_step(teacher, inputs, self)


@dataclass(frozen=True)
class StudentTask:
    """What the student's forward is asked for, beside its inputs: see `student_step`."""

    labels: Tensor
    layout: VisualLayout
    teacher: TeacherOutput | None
    aligner: VisualAttentionAligner | None
    unshifted_kl_mask: bool = False
    blank_image: bool = False  # run the vision modules in a batch without images too

    def run(self, student: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return student_step(student, inputs, self)


def kl_rows(labels: Tensor, unshifted: bool) -> Tensor:
    """(B, N) bool: rows on which the logits are distilled."""
    return unshifted_rows(labels) if unshifted else answer_rows(labels)


@torch.no_grad()
def teacher_step(
    teacher: PreTrainedModel, inputs: dict[str, Any], task: TeacherTask
) -> TeacherOutput:
    """Run the teacher and keep answer rows and alignment targets only."""
    aligner = task.aligner
    context = aligner.teacher_context(task.layout) if aligner else AlignmentContext(task.layout)
    hidden = _hidden_states(teacher, inputs, context, task.blank_image)
    return TeacherOutput(
        targets=aligner.targets(context) if aligner else None,
        hidden=hidden[kl_rows(task.labels, task.unshifted_kl_mask)] if task.logits else None,
        weight=_output_embedding(teacher).weight if task.logits else None,
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
    hidden = _hidden_states(student, inputs, context, task.blank_image)
    sums = _answer_losses(student, hidden, task)
    if task.aligner and targets:
        sums["alignment"] = task.aligner.alignment(context).sum
    if "pixel_values" not in inputs and not task.blank_image:
        # DDP waits for a gradient of every trainable parameter, the unused projector's too.
        sums["lm"] = sums["lm"] + 0.0 * sum(
            p.sum() for n, p in student.named_parameters() if p.requires_grad and is_adapter(n)
        )
    return sums


def _answer_losses(
    student: PreTrainedModel, hidden: Tensor, task: StudentTask
) -> dict[str, Tensor]:
    """The sums "lm" and "kl", computed as the forward of the output embedding.

    ZeRO-3 has a weight whole only around the forward and the backward of the module that owns it.
    """
    rows = answer_rows(task.labels)
    labels = next_labels(task.labels, rows)
    head, teacher = _output_embedding(student), task.teacher

    def losses(hidden: Tensor) -> dict[str, Tensor]:
        sums = {"lm": lm_loss_sum(hidden[rows], head.weight, labels)}
        if teacher and teacher.hidden is not None and teacher.weight is not None:
            chosen = hidden[kl_rows(task.labels, task.unshifted_kl_mask)]
            with gathered([teacher.weight]):
                sums["kl"] = kl_loss_sum(chosen, head.weight, teacher.hidden, teacher.weight)
        return sums

    stock = head.__dict__.get("forward")
    head.forward = losses
    try:
        return head(hidden)
    finally:
        del head.forward
        if stock is not None:
            head.forward = stock


def _hidden_states(
    model: PreTrainedModel, inputs: dict[str, Any], context: AlignmentContext, blank_image: bool
) -> Tensor:
    """(B, N, d) last hidden states; attention of the layers is handed on to `context`."""
    handle = None
    if blank_image and "pixel_values" not in inputs:
        handle = _run_vision_on_a_blank_image(model)
    try:
        output = model.base_model(**inputs, alignment=context, use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
    return output.last_hidden_state


def _run_vision_on_a_blank_image(model: PreTrainedModel) -> Any:
    """Let the next forward, of a batch without images, run the modules of one with images.

    ZeRO-3 gathers a module's parameters on all ranks together when its turn comes, and ZeRO-2 sums
    gradients in the order in which they appear: a rank that passes over the projector, or runs it
    earlier or later than the others, hangs them all or, worse, adds its gradients to those of other
    parameters. So it runs where LLaVA models run it, between token embeddings and decoder, and
    counts nothing.
    """
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    # Other families want sizes or masks of pictures beside the pixels.
    known = model.config.model_type in ("llava", "cdfast_llava")
    if not known or not isinstance(size, int):
        raise ValueError(
            f"{model.config.model_type}: expected an image in every batch, because under ZeRO "
            "all ranks must run its vision modules and no blank image is known for this family; "
            "got a batch without. Mix text-only samples with others, or use zero_stage 0 and a "
            "replicated teacher."
        )

    def add_nothing(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        pixels = embeds.new_zeros(1, getattr(vision, "num_channels", 3), size, size)
        base: Any = model.base_model
        features = base.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        nothing = 0.0 * torch.cat([part.flatten() for part in features]).sum()
        return args, {**kwargs, "inputs_embeds": embeds + nothing}

    return model.get_decoder().register_forward_pre_hook(
        add_nothing, with_kwargs=True, prepend=True
    )


def add_task(model: PreTrainedModel) -> None:
    """Make `model(..., task=task)` return `task.run(model, inputs)`; other calls stay as they are.

    Wrappers (DDP, ZeRO-3, PEFT) then see a distillation step as a forward of their module.
    """
    if hasattr(model.forward, "cdfast_task"):
        return
    stock: Any = model.forward
    function = getattr(stock, "__func__", lambda _, *args, **inputs: stock(*args, **inputs))

    @functools.wraps(function)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        task: TeacherTask | StudentTask | None = None,
        **inputs: Any,
    ) -> Any:
        return function(self, *args, **inputs) if task is None else task.run(self, inputs)

    forward.cdfast_task = True  # type: ignore[attr-defined]
    # A method, not a closure over the model: copy.deepcopy binds it to the copy.
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def _output_embedding(model: PreTrainedModel) -> Any:
    """The module whose weight (V, d) makes logits.

    Raises:
        ValueError: it has a bias, which the chunked losses do not take.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"{model.config.model_type}: expected an output embedding without bias; got one with."
        )
    return head
