"""The distillation step: one teacher forward, one student forward, one sum per loss.

Losses are computed inside the student's own `forward`, because DDP and ZeRO-3 only prepare
gradients and gather parameters around the forward of the module they wrap.

Source: CompoDistill: L = L_LM + w_KL L_KL + w_A L_alignment; the other terms are of the systems it
is compared with, see losses.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from cdfast_kernels import VisualLayout
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.adapters import LLAVA, is_adapter
from cdfast.aligner import AlignmentTargets, VisualAttentionAligner
from cdfast.attention import AlignmentContext
from cdfast.engine import gathered
from cdfast.hidden_projector import hidden_projector
from cdfast.logits import logit_transforms
from cdfast.losses import (
    answer_rows,
    gram_matrix,
    hidden_loss_sum,
    kl_loss_sum,
    lm_loss_sum,
    next_labels,
    relation_loss_sum,
    soft_cross_entropy_sum,
    unshifted_rows,
)
from cdfast.packing import check_packable
from cdfast.preference import answer_log_probs
from cdfast.stored_targets.top_k import TopK, top_k_kl_sum

# Terms that compare last hidden states, or logits made of them, and the rows they are over.
_ROWS = {"kl": "answer", "hidden": "answer", "visual_kl": "visual", "relation": "visual"}
_ON_LOGITS = _ROWS.keys() - {"hidden"}


@dataclass(frozen=True)
class LossOptions:
    """Which terms on hidden states and logits a step has beside LM, and how they are computed.

    Attributes:
        used: of "kl", "hidden", "visual_kl", "relation".
        kl_objective: "kl", or "soft_ce": soft cross-entropy, the same gradient.
        hidden_objective: "cosine" or "mse".
        unshifted_kl_mask: the authors' rows for "kl".
        lm: whether LM has a gradient; where it has no weight it is computed for the log alone.
    """

    used: frozenset[str] = frozenset()
    kl_objective: str = "kl"
    hidden_objective: str = "cosine"
    unshifted_kl_mask: bool = False
    lm: bool = True

    def rows(self, name: str) -> str:
        """The rows of a term: answer, unshifted or visual."""
        return "unshifted" if name == "kl" and self.unshifted_kl_mask else _ROWS[name]


@dataclass(frozen=True)
class TeacherOutput:
    """What a student's step needs from the teacher; no gradient."""

    targets: AlignmentTargets | None
    hidden: dict[str, Tensor]  # rows -> (R, d_t) last hidden states on them
    weight: Tensor | None  # (V_t, d_t) output embedding
    log_probs: Tensor | None = None  # (2B,) of the answers, in a batch of pairs
    top_k: TopK | None = None  # in place of hidden and weight, where targets are stored


@dataclass
class TeacherTask:
    """What the teacher's forward is asked for, beside its inputs; it puts the answer here."""

    labels: Tensor
    layout: VisualLayout
    aligner: VisualAttentionAligner | None
    losses: LossOptions
    blank_image: bool = False  # run the vision modules in a batch without images too
    pairs: int = 0  # of answers, in a batch of chosen and then rejected ones
    backend: str = "auto"  # of packed layers in a step without an aligner
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
    losses: LossOptions
    blank_image: bool = False  # run the vision modules in a batch without images too
    # Gram matrices of frozen output embeddings, by role: kept from step to step by the caller.
    grams: dict[str, Tensor] = field(default_factory=dict)
    pairs: int = 0  # of answers, in a batch of chosen and then rejected ones
    backend: str = "auto"  # of packed layers in a step without an aligner

    def run(self, student: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return student_step(student, inputs, self)


def loss_rows(rows: str, labels: Tensor, layout: VisualLayout) -> Tensor:
    """(B, N) bool, of a packed batch (1, total): the rows called answer, unshifted or visual."""
    if rows == "visual":
        return layout.visual_mask.view_as(labels)
    return unshifted_rows(labels) if rows == "unshifted" else answer_rows(labels)


@torch.no_grad()
def teacher_step(
    teacher: PreTrainedModel, inputs: dict[str, Any], task: TeacherTask
) -> TeacherOutput:
    """Run the teacher and keep the rows that losses are over and alignment targets only."""
    aligner = task.aligner
    plain = AlignmentContext(task.layout, backend=task.backend)
    context = aligner.teacher_context(task.layout) if aligner else plain
    hidden = _hidden_states(teacher, inputs, context, task.blank_image)
    kinds = sorted({task.losses.rows(name) for name in task.losses.used})
    logits = task.losses.used & _ON_LOGITS
    log_probs = None
    if task.pairs:
        head = _output_embedding(teacher)
        log_probs = _as_forward(head, lambda h: answer_log_probs(h, head.weight, task.labels))(
            hidden
        )
    return TeacherOutput(
        targets=aligner.targets(context) if aligner else None,
        hidden={kind: hidden[loss_rows(kind, task.labels, task.layout)] for kind in kinds},
        weight=_output_embedding(teacher).weight if logits else None,
        log_probs=log_probs,
    )


def student_step(
    student: PreTrainedModel, inputs: dict[str, Any], task: StudentTask
) -> dict[str, Tensor]:
    """Run the student and return the sums over this batch by name of the term (terms.py).

    Each is divided by its own global count in the trainer. In a batch of pairs "lm" is over the
    chosen answers, and "log_ratios" (2B,) are log pi_student - log pi_teacher of all, of which the
    trainer makes the preference loss: it takes the means of all ranks.
    """
    teacher = task.teacher
    targets = teacher.targets if teacher else None
    if task.aligner and targets:
        context = task.aligner.student_context(targets)
    else:
        context = AlignmentContext(task.layout, backend=task.backend)
    hidden = _hidden_states(student, inputs, context, task.blank_image)
    sums = _logit_losses(student, hidden, task)
    if task.pairs and teacher and teacher.log_probs is not None:
        sums["log_ratios"] = sums.pop("log_probs") - teacher.log_probs
    if task.aligner and targets:
        sums["alignment"] = task.aligner.alignment(context).sum
    if teacher and "hidden" in task.losses.used:
        rows = loss_rows("answer", task.labels, task.layout)
        projected = hidden_projector(student)(hidden[rows])
        objective = task.losses.hidden_objective
        sums["hidden"] = hidden_loss_sum(projected, teacher.hidden["answer"], objective)
    if "pixel_values" not in inputs and not task.blank_image:
        # DDP waits for a gradient of every trainable parameter, the unused projector's too.
        sums["lm"] = sums["lm"] + 0.0 * sum(
            p.sum() for n, p in student.named_parameters() if p.requires_grad and is_adapter(n)
        )
    return sums


def _logit_losses(student: PreTrainedModel, hidden: Tensor, task: StudentTask) -> dict[str, Tensor]:
    """The sums over logits, and "log_probs" of pairs: the forward of the output embedding."""
    rows = answer_rows(task.labels)
    labels = next_labels(task.labels, rows)
    head, teacher = _output_embedding(student), task.teacher

    def losses(hidden: Tensor) -> dict[str, Tensor]:
        if task.pairs:
            log_probs = answer_log_probs(hidden, head.weight, task.labels)
            return {"lm": -log_probs[: task.pairs].sum(), "log_probs": log_probs}
        # DDP waits for a gradient of the output embedding: another loss on logits has one.
        other = teacher is not None and bool(task.losses.used & _ON_LOGITS)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (task.losses.lm or not other)):
            sums = {"lm": lm_loss_sum(hidden[rows], head.weight, labels)}
        if teacher and teacher.weight is not None:
            with gathered([teacher.weight]):
                sums |= _teacher_logit_losses(hidden, head.weight, teacher, teacher.weight, task)
        elif teacher and teacher.top_k is not None:
            chosen = hidden[loss_rows(task.losses.rows("kl"), task.labels, task.layout)]
            objective = task.losses.kl_objective
            sums["kl"] = top_k_kl_sum(chosen, head.weight, teacher.top_k, objective)
        return sums

    return _as_forward(head, losses)(hidden)


def _as_forward(head: Any, function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """`function`, run as the forward of the output embedding `head`.

    ZeRO-3 has a weight whole only around the forward and the backward of the module that owns it.
    """

    def run(hidden: Tensor) -> Any:
        stock = head.__dict__.get("forward")
        head.forward = function
        try:
            return head(hidden)
        finally:
            del head.forward
            if stock is not None:
                head.forward = stock

    return run


def _teacher_logit_losses(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherOutput,
    teacher_weight: Tensor,
    task: StudentTask,
) -> dict[str, Tensor]:
    """The sums "kl", "visual_kl" and "relation", as far as they are used; both weights whole."""
    losses, sums = task.losses, dict[str, Tensor]()
    for name in ("kl", "visual_kl"):
        if name in losses.used:
            soft = name == "kl" and losses.kl_objective == "soft_ce"
            divergence = soft_cross_entropy_sum if soft else kl_loss_sum
            kind = losses.rows(name)
            chosen = hidden[loss_rows(kind, task.labels, task.layout)]
            sums[name] = divergence(chosen, weight, teacher.hidden[kind], teacher_weight)
    if "relation" in losses.used:
        shared = min(len(weight), len(teacher_weight))
        sums["relation"] = relation_loss_sum(
            hidden[loss_rows("visual", task.labels, task.layout)],
            _gram("student", weight, shared, task.grams),
            teacher.hidden["visual"],
            _gram("teacher", teacher_weight, shared, task.grams),
            task.layout.visual.sum(1).tolist(),
        )
    return sums


def _gram(role: str, weight: Tensor, vocabulary: int, kept: dict[str, Tensor]) -> Tensor:
    """W^T W, made once if W is frozen."""
    if weight.requires_grad:
        return gram_matrix(weight, vocabulary)
    if role not in kept:
        kept[role] = gram_matrix(weight.detach(), vocabulary)
    return kept[role]


def _hidden_states(
    model: PreTrainedModel, inputs: dict[str, Any], context: AlignmentContext, blank_image: bool
) -> Tensor:
    """(B, N, d) last hidden states; attention of the layers is handed on to `context`."""
    # Whoever packed the batch: a collator of the user's own may, without the option `packing`.
    if context.layout.is_packed:
        check_packable(model)
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
    known = model.config.model_type in LLAVA
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
        ValueError: it has a bias or an adapter, or the model scales or caps its logits: the chunked
            losses multiply by the weight alone.
    """
    head = model.get_output_embeddings()
    found = [f"{name} {value}" for name, value in logit_transforms(model.config).items()]
    if getattr(head, "bias", None) is not None:
        found.append("a bias")
    if hasattr(head, "base_layer"):
        found.append("a PEFT adapter, whose part would be left out")
    if found:
        raise ValueError(
            f"{model.config.model_type}: expected logits that are hidden states times the output "
            f"embedding; got {' and '.join(found)}. Use another model, or take the adapter out of "
            "target_modules."
        )
    return head
