"""Language-model and logit losses on answer rows, as sums: the trainer divides by global counts.

All take the hidden states of answer rows only, gathered before the vocabulary projection, so no
logits of prompt or padding rows are ever computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


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
    if hidden.is_cuda:  # chunked, in Triton: logits of all rows are never held
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def kl_loss_sum(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    """Sum over rows of KL(teacher || student) of the next-token distributions.

    Vocabularies of unequal size are compared on their shared leading part: both distributions are
    renormalised over its tokens.

    Args:
        student_hidden: (R, d_s); student_weight: (V_s, d_s).
        teacher_hidden: (R, d_t); teacher_weight: (V_t, d_t), both without gradient.

    Returns:
        Scalar, 0 for R = 0 but connected to the graph.

    Source: paper, logit distillation on answer tokens; the chunked loss is Liger's.
    """
    rows = student_hidden.shape[0]
    if rows == 0:
        return student_hidden.sum() * 0.0 + student_weight.sum() * 0.0
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    shared = min(student_weight.shape[0], teacher_weight.shape[0])
    # Its defaults mix in half a cross-entropy and a symmetric divergence; beta = 0 is the forward
    # KL.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )
    no_labels = torch.zeros(rows, dtype=torch.long, device=student_hidden.device)
    mean = loss(
        student_hidden,
        student_weight[:shared],
        teacher_hidden.to(student_hidden.dtype),
        teacher_weight[:shared].to(student_hidden.dtype),
        no_labels,
    )
    return mean * rows  # it divides by the local row count; the trainer divides by the global one
