"""The k most likely tokens of a teacher, and the logit loss over them.

Stored are, of each row, the k largest log-probabilities over the vocabulary that teacher and
student share, their tokens, and the log-probability of one more outcome, "any other token". With
p_0 = 1 - sum_{i in K} p_i and q_0 likewise, the loss is the divergence over these k + 1 outcomes:

    KL_k = sum_{i in K} p_i log(p_i / q_i) + p_0 log(p_0 / q_0)  <=  KL(p || q)

It is a lower bound of the full KL by the data-processing inequality, because the k + 1 outcomes are
a function of the token, and equal to it where k is the whole vocabulary. Its gradient in the
student's logits z is

    dKL_k / dz_v = q_v - p_v for v in K;  q_v - p_0 q_v / q_0 else:

the student learns how much is left over, and keeps its own distribution of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of logits that are held at once.
_ROWS = 256


@dataclass(frozen=True)
class TopK:
    """A teacher's k most likely next tokens on R rows; no gradient.

    Attributes:
        indices: (R, k) integer, tokens.
        log_probs: (R, k + 1) theirs, and last that of any other token (-inf where k is the whole
            vocabulary).
        vocabulary: the number of tokens that teacher and student share, the first of both.
    """

    indices: Tensor
    log_probs: Tensor
    vocabulary: int


@torch.no_grad()
def top_k_of(hidden: Tensor, weight: Tensor, vocabulary: int, k: int) -> TopK:
    """The k most likely tokens of softmax(hidden W^T), over the first `vocabulary` tokens.

    Args:
        hidden: (R, d) last hidden states.
        weight: (V, d) output embedding, V >= vocabulary.
        vocabulary: tokens that are compared; the distribution is renormalised over them.
        k: at most `vocabulary`.

    Returns:
        Log-probabilities in float32 (float64 for float64), sorted, the largest first.
    """
    weight = weight[:vocabulary]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    indices, log_probs = [], []
    for rows in hidden.split(_ROWS):
        log_p = F.linear(rows, weight.to(rows.dtype)).to(wide).log_softmax(-1)
        values, tokens = log_p.topk(k)
        rest = log_p.scatter_(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        indices.append(tokens)
        log_probs.append(torch.cat([values, rest], dim=1))
    return TopK(
        torch.cat(indices) if indices else torch.zeros(0, k, dtype=torch.int64),
        torch.cat(log_probs) if log_probs else hidden.new_zeros(0, k + 1, dtype=wide),
        vocabulary,
    )


def top_k_kl_sum(hidden: Tensor, weight: Tensor, teacher: TopK, objective: str = "kl") -> Tensor:
    """Sum over rows of KL_k, see above; logits are computed a chunk of rows at a time.

    Log-probabilities that were rounded when they were stored are renormalised over the k + 1
    outcomes, so that the loss stays >= 0.

    Args:
        hidden: (R, d) student hidden states.
        weight: (V, d) student output embedding, V >= teacher.vocabulary.
        teacher: of the same R rows.
        objective: "kl", or "soft_ce": -sum p log q, the KL plus the teacher's entropy over the
            k + 1 outcomes, of the same gradient.

    Returns:
        Scalar, float32 at least; 0 for R = 0 but connected to the graph.

    Raises:
        ValueError: another number of rows, or a smaller vocabulary.
    """
    if len(hidden) != len(teacher.indices) or len(weight) < teacher.vocabulary:
        raise ValueError(
            f"teacher: expected targets of {len(hidden)} rows over at most {len(weight)} tokens; "
            f"got {len(teacher.indices)} rows over {teacher.vocabulary}. Make the targets from the "
            "same samples, for this student."
        )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = teacher.log_probs.to(hidden.device, wide).log_softmax(-1)
    indices, device = teacher.indices.to(hidden.device, torch.int64), hidden.device.type
    under_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if under_autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        loss = _TopKKl.apply(hidden, weight, indices, log_p, teacher.vocabulary, dtype)
    if objective == "kl":
        return loss
    return loss - torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0).sum()


class _TopKKl(torch.autograd.Function):
    """Chunked over rows in both directions; autograd would keep the logits of all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        indices: Tensor,
        log_p: Tensor,
        vocabulary: int,
        dtype: torch.dtype,
    ) -> Tensor:
        # The parameter itself, not a slice of it: ZeRO-3 has it whole again in the backward.
        ctx.save_for_backward(hidden, weight, indices, log_p)
        ctx.vocabulary, ctx.dtype = vocabulary, dtype
        loss = log_p.new_zeros(())
        shared = weight[:vocabulary].to(dtype)
        for rows, log_q, rest in _log_probs(hidden, shared, indices, log_p.dtype):
            q = torch.cat([log_q.gather(1, indices[rows]), rest], dim=1)
            p = log_p[rows]
            # An outcome that the teacher gives nothing adds nothing, whatever the student gives it.
            loss += torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum()
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, indices, log_p = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden)
        # Chunks are added in float32: in half precision each addition would round.
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        shared = weight[: ctx.vocabulary].to(ctx.dtype)
        for rows, log_q, rest in _log_probs(hidden, shared, indices, log_p.dtype):
            tokens, p = indices[rows], log_p[rows].exp()
            dz = log_q.exp()
            at_tokens = dz.gather(1, tokens) - p[:, :-1]
            if tokens.shape[1] < ctx.vocabulary:
                dz -= p[:, -1:] * (log_q - rest).exp()
            dz = (dz.scatter_(1, tokens, at_tokens) * grad).to(ctx.dtype)
            d_hidden[rows] = (dz @ shared).to(hidden.dtype)
            if d_weight is not None:
                d_weight[: ctx.vocabulary] += dz.T @ hidden[rows].to(ctx.dtype)
        d_weight = d_weight if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def _log_probs(
    hidden: Tensor, shared: Tensor, indices: Tensor, wide: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, the student's log q (r, V) on them, log of what is left beside the tokens (r, 1))."""
    for first in range(0, len(hidden), _ROWS):
        rows = slice(first, first + _ROWS)
        logits = F.linear(hidden[rows].to(shared.dtype), shared)
        log_q = logits.to(wide).log_softmax(-1)
        rest = log_q.scatter(1, indices[rows], -torch.inf).logsumexp(-1, keepdim=True)
        yield rows, log_q, rest
