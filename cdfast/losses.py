"""Language-model, logit, hidden-state and relation losses, as sums: the trainer divides by counts.

All take the hidden states of the rows they are over, gathered before the vocabulary projection, so
no logits of other rows are ever computed. Those that are computed in float32 take float64 as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
# Rows of logits, and of the output embedding in float32, that are held at once.
KL_ROWS = 512
_GRAM_ROWS = 8192
# In float16: entries of q - p, which are at most 1, are held in the first unit; their sums over
# KL_ROWS rows, times hidden states of up to 2,000, in the second.
_ENTRY_UNIT, _SUM_UNIT = 2.0**-15, 2.0**4


def answer_rows(labels: Tensor) -> Tensor:
    """(B, N) bool: rows whose *next* token is an answer token, so whose logits are supervised."""
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return rows


def unshifted_rows(labels: Tensor) -> Tensor:
    """(B, N) bool: rows that *are* answer tokens: the mask of the authors' logit loss.

    It leaves out the row that predicts the first answer token and takes in the row after the last.
    Kept for comparison with their runs only. Source: the authors' code.
    """
    return labels != IGNORE_INDEX


def next_labels(labels: Tensor, rows: Tensor) -> Tensor:
    """(R,) label of the token after each chosen row."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return shifted[rows]


def lm_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden W^T)[label].

    Args:
        hidden: (R, d) student hidden states on answer rows.
        weight: (V, d) output embedding.
        labels: (R,) int64 next tokens.

    Returns:
        Scalar, 0 for R = 0 but connected to the graph.
    """
    if hidden.shape[0] == 0:  # which Liger's division into chunks does not take
        return _no_rows(hidden, weight)
    if hidden.is_cuda:  # chunked, in Triton: logits of all rows are never held
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # Chunks are a few rows each: added in half precision, every addition would round.
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        return loss(weight, hidden, labels)
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def _no_rows(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.sum() * 0.0 + weight.sum() * 0.0


def kl_loss_sum(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    """Sum over rows of KL(teacher || student) of the next-token distributions.

    Vocabularies of unequal size are compared on their shared leading part: both distributions are
    renormalised over its tokens. Logits are matrix products in the student's dtype (under autocast
    in its dtype); softmax, divergence and the gradient of the logits are in float32, the rows a
    chunk of KL_ROWS at a time. Gradients are made in the forward, so no logits are kept.

    Args:
        student_hidden: (R, d_s); student_weight: (V_s, d_s).
        teacher_hidden: (R, d_t); teacher_weight: (V_t, d_t), both without gradient.

    Returns:
        Scalar, float32 (float64 of float64), 0 for R = 0 but connected to the graph.

    Source: paper, logit distillation on answer tokens.
    """
    return _chunked(student_hidden, student_weight, teacher_hidden, teacher_weight, False)


def _chunked(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    cross_entropy: bool,
) -> Tensor:
    if student_hidden.shape[0] == 0:
        return _no_rows(student_hidden, student_weight)
    shared = min(student_weight.shape[0], teacher_weight.shape[0])
    device, dtype = student_hidden.device.type, student_hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    loss: Tensor = _ChunkedKL.apply(
        student_hidden.to(dtype),
        student_weight[:shared].to(dtype),
        teacher_hidden.detach().to(dtype),
        teacher_weight[:shared].detach().to(dtype),
        cross_entropy,
        torch.is_grad_enabled(),
    )
    return loss


class _ChunkedKL(torch.autograd.Function):
    """Sum of KL(softmax(h_t W_t^T) || softmax(h_s W_s^T)), or of the cross-entropy, in one dtype.

    d/d logits_s = softmax(logits_s) - softmax(logits_t), because the teacher's sum to 1. Gradients
    are kept divided by the number of rows; in float16, whose range holds neither such shares nor
    sums over thousands of rows, in units of their own, and that of the weight in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        cross_entropy: bool,
        with_grad: bool,
    ) -> Tensor:
        of_hidden, of_weight = (needed and with_grad for needed in ctx.needs_input_grad[:2])
        half = hidden.dtype == torch.float16
        unit = _ENTRY_UNIT if half else len(hidden)
        alphas = (_ENTRY_UNIT, _ENTRY_UNIT / _SUM_UNIT) if half else (1, 1)
        ctx.units = [unit / alpha for alpha in alphas]  # of what is kept for the backward
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight: Tensor | None = None
        total = torch.zeros((), dtype=_wide(hidden).dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), KL_ROWS):
                rows = slice(begin, begin + KL_ROWS)
                tensors = hidden[rows], weight, teacher_hidden[rows], teacher_weight
                loss, gradient = _loss_of_chunk(*tensors, cross_entropy)
                total += loss
                gradient = gradient.div_(unit).to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[rows] = _product(gradient, weight, alphas[0])
                if of_weight:
                    part = _product(gradient.T, hidden[rows], alphas[1])
                    # Chunks are added in float32: in half precision each addition would round.
                    d_weight = part if d_weight is None else _wide(d_weight).add_(part)
                del gradient  # before the next chunk is made
        if d_weight is not None:
            d_weight = _wide(d_weight) if half else d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # A scaled loss may have a d_total beyond float16: products with it are made in float32.
        d_hidden, d_weight = (
            d if d is None else (_wide(d) if d.dtype == torch.float16 else d) * (d_total * unit)
            for d, unit in zip(ctx.saved_tensors, ctx.units)
        )
        return d_hidden, d_weight, None, None, None, None


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha a b, scaled before it is rounded to the dtype."""
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=alpha)


def _loss_of_chunk(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    cross_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """The loss summed over rows, and its gradient in the student's logits, float32."""
    # One expression each, so that no more than three float32 tensors of (rows, V) exist.
    log_p = _wide(F.linear(teacher_hidden, teacher_weight)).log_softmax(-1)
    log_q = _wide(F.linear(hidden, weight)).log_softmax(-1)
    p = log_p.exp()
    compared = log_p.zero_() if cross_entropy else log_p
    loss = compared.sub_(log_q).mul_(p).sum()
    return loss, log_q.exp_().sub_(p)


def soft_cross_entropy_sum(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    """Sum over rows of -sum_v p_teacher(v) log p_student(v) = KL(teacher || student) + H(teacher).

    The teacher's entropy H is a constant, so the gradient is that of `kl_loss_sum`; only the value
    differs.

    Args and Returns: see `kl_loss_sum`.

    Source: LLaVA-MoD, mimic distillation.
    """
    return _chunked(student_hidden, student_weight, teacher_hidden, teacher_weight, True)


def hidden_loss_sum(projected: Tensor, teacher_hidden: Tensor, objective: str = "cosine") -> Tensor:
    """Sum over rows of 1 - cos(f(h_s), h_t), or of the mean over the width of (f(h_s) - h_t)^2.

    Args:
        projected: (R, d_t) f(h_s), the student's last hidden states after a student-to-teacher MLP.
        teacher_hidden: (R, d_t), without gradient.
        objective: "cosine" or "mse".

    Returns:
        Scalar, float32 at least; 0 for R = 0 but connected to the graph.

    Source: LLaVADI (arXiv 2407.19409), alignment of the last hidden state.
    """
    student, teacher = _wide(projected), _wide(teacher_hidden)
    if objective == "mse":
        return (student - teacher).square().mean(-1).sum()
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()


def gram_matrix(weight: Tensor, vocabulary: int) -> Tensor:
    """G = W^T W over the first `vocabulary` rows of W, summed in float32 at least.

    Args:
        weight: (V, d) output embedding, any floating dtype.
        vocabulary: rows that count: those that student and teacher share.

    Returns:
        (d, d), float32, or float64 if `weight` is.
    """
    return _Gram.apply(weight, vocabulary)


class _Gram(torch.autograd.Function):
    """W^T W with dL/dW = W (dL/dG + dL/dG^T).

    Autograd would make one product of V d^2 for each of the two factors, and keep a float32 copy of
    W for them (1.2 GiB for 151,936 x 2048); here it is one, a chunk of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, vocabulary: int) -> Tensor:
        # The parameter itself, not a slice of it: ZeRO-3 has it whole again in the backward.
        ctx.save_for_backward(weight)
        ctx.vocabulary = vocabulary
        width = weight.shape[1]
        gram = weight.new_zeros(width, width, dtype=_wide(weight[:0]).dtype)
        with torch.autocast(weight.device.type, enabled=False):
            for rows in map(_wide, weight[:vocabulary].split(_GRAM_ROWS)):
                gram += rows.T @ rows
        return gram

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        grad, out = grad + grad.T, torch.zeros_like(weight)
        with torch.autocast(weight.device.type, enabled=False):
            for rows, filled in zip(weight.split(_GRAM_ROWS), out.split(_GRAM_ROWS)):
                filled.copy_(_wide(rows) @ grad)
        out[ctx.vocabulary :] = 0
        return out, None


def relation_loss_sum(
    student_hidden: Tensor,
    student_gram: Tensor,
    teacher_hidden: Tensor,
    teacher_gram: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """Sum over samples with an image of 1 - cos(R_s, R_t), R = Y Y^T over visual logits.

    Y = H W^T (N_v, V) are the logits at the visual tokens of one sample, so R (N_v, N_v) says how
    alike two visual tokens are; the cosine is that of all N_v^2 entries. No logit is computed:

        R = H W^T W H^T = H G H^T,  G = W^T W  (see `gram_matrix`)

    Multiply-adds for B samples, forward: V d^2 + B (N_v d^2 + N_v^2 d), against B (N_v V d +
    N_v^2 V) through the logits, in vocabulary chunks or not. For N_v = 729, V = 151,936, d = 2048
    and B = 16: 0.70e12 against 4.9e12; the backward about as much again, against twice as much and
    the logits once more. At B = 2 they are about equal. G of a frozen output embedding (the
    teacher's; the student's with LoRA) is the same in every step, so that its V d^2 are paid once.
    Memory: d^2 for G and 2 N_v^2 + N_v d numbers per sample, against N_v times a vocabulary chunk.

    Everything is in float32: with half-precision H and W the error is theirs from rounding, while
    logits and R in bfloat16 would be off by 2^-9 each.

    Args:
        student_hidden: (R, d_s) at visual tokens, sample by sample.
        student_gram: (d_s, d_s).
        teacher_hidden: (R, d_t); teacher_gram: (d_t, d_t), both without gradient. Both Gram
            matrices are over the vocabulary's shared leading part.
        sizes: visual tokens of each sample, their sum is R; samples without any count nothing.

    Returns:
        Scalar, float32 at least; 0 where there is no image but connected to the graph.

    Source: LLaVA-KD (arXiv 2410.16236), relation distillation.
    """
    total = 0.0 * (_wide(student_hidden[:0]).sum() + student_gram[:0].sum())
    with torch.autocast(student_hidden.device.type, enabled=False):
        for h_s, h_t in zip(student_hidden.split(list(sizes)), teacher_hidden.split(list(sizes))):
            if len(h_s):
                r_s, r_t = (_relation(h, g) for h, g in ((h_s, student_gram), (h_t, teacher_gram)))
                total = total + 1 - F.cosine_similarity(r_s, r_t, dim=0)
    return total


def _relation(hidden: Tensor, gram: Tensor) -> Tensor:
    """(N_v^2,) entries of H G H^T."""
    hidden = _wide(hidden)
    return (hidden @ gram @ hidden.T).flatten()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
