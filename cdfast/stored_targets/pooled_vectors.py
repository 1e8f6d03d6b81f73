"""Pooled attention vectors: one number per visual token in place of a visual attention map.

For a sample with n visual tokens and S (n, n), the head-mean attention that its visual queries give
to its visual keys (0 where a query does not see a key),

    keep[i, v] = S[i, v] <= mean(S) + std(S)  and  S[i, v] != 0     (unbiased std, zeros included)
    s[v]       = sum_i keep[i, v] S[i, v] / max(1, sum_i keep[i, v])

This is the vector that the op's objective `pooled` compares, with one difference: `pooled` keeps an
entry that survives in the teacher's map *and* in the student's, and here each map is filtered by
itself alone. So a teacher's vector does not depend on the student and can be stored; the objective
made of it, `pooled_stored`, is close to `pooled` and not equal to it.

Source: the authors' code (sink filter, mean over query rows); the filter by each map alone is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cdfast_kernels import VisualLayout, VisualMap
from torch import Tensor

# The objective made of these vectors.
STORED_OBJECTIVE = "pooled_stored"
# Entries of (heads, n, n) that exist at once: one head of an image of 729 tokens, all of a small
# one.
_ENTRIES = 1 << 19


@dataclass(frozen=True)
class PooledVectors:
    """A teacher's vectors of one batch and one student layer; no gradient.

    Attributes:
        data: (M,) the visual tokens of the batch, sample by sample; of any scale.
    """

    data: Tensor


def pool_map(visual_map: VisualMap) -> PooledVectors:
    """The vectors of a stored map, each divided by its largest entry; no gradient.

    The cosine does not see the scale, and in float16 small probabilities would lose their digits.
    """
    dense = visual_map.to_batch(torch.promote_types(visual_map.dtype, torch.float32))
    vectors = []
    for sample, at in _visual_tokens(visual_map.layout):
        square = dense[sample][at][:, at]
        pooled = (square * _weights(square)).sum(0)
        largest = pooled.amax() if len(pooled) else pooled.sum()
        vectors.append(pooled / largest.masked_fill(largest == 0, 1))
    return PooledVectors(torch.cat(vectors) if vectors else dense.new_zeros(0))


def pooled_vectors(
    q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, softmax_scale: float
) -> Tensor:
    """s of every sample of a batch, from attention's inputs; differentiable in q, k and lse.

    Head by head and sample by sample, again in the backward: besides S itself no more than one
    (n, n) matrix of one head exists at a time (of several heads, where n is small). The filter is
    constant for the gradient: with w[i, v] = keep[i, v] / (H max(1, sum_i keep[i, v])) and
    P_h = exp(x_h - lse_h), x_h = softmax_scale q_h k^T,

        dx_h = P_h w ds[v],  dq_h = softmax_scale dx_h k,  dk = softmax_scale sum_h dx_h^T q_h,
        dlse_h[i] = -sum_v dx_h[i, v].

    Args:
        q: (B, N, H, d); k: (B, N, Hk, d); any floating dtype.
        lse: (B, H, N), natural log over all visible keys, from `flash_attention`.
        layout: of the batch, padded.
        softmax_scale: the one of the attention.

    Returns:
        (M,) for the M visual tokens of the batch, sample by sample; float32, or float64 for
        float64.

    Raises:
        ValueError: a packed layout.
    """
    if layout.is_packed:
        raise ValueError(
            "pooled_stored: expected a padded batch; got a packed one. Leave packing out, or take "
            "the objective 'pooled'."
        )
    with torch.autocast(q.device.type, enabled=False):
        return _PooledVectors.apply(q, k, lse, layout, softmax_scale)


def pooled_vector_loss(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: PooledVectors,
    layout: VisualLayout,
    softmax_scale: float,
) -> Tensor:
    """1 - cos(s, t) of each sample: (B,), 0 with fewer than two visual tokens.

    Where s or t is all zero, because nothing survives the filter, the loss is 1 without a gradient,
    as in `pooled`.

    Args:
        target: t, the teacher's vectors of the same batch.
        Others: see `pooled_vectors`.

    Raises:
        ValueError: the target is of another number of visual tokens.
    """
    student = pooled_vectors(q, k, lse, layout, softmax_scale)
    teacher = target.data.to(student)
    if teacher.shape != student.shape:
        raise ValueError(
            f"target: expected one number for each of the {len(student)} visual tokens of the "
            f"batch; got {len(teacher)}. Make the targets from the same samples."
        )
    rows = student.new_zeros(layout.visual.shape)
    s, t = (rows.masked_scatter(layout.visual, vector) for vector in (student, teacher))
    return torch.where(layout.visual.sum(1) > 1, _one_minus_cos(s, t), 0)


def _one_minus_cos(s: Tensor, t: Tensor) -> Tensor:
    """|s/|s| - t/|t||^2 / 2 over the last dim, which keeps its digits where s and t are parallel.

    Divided by their largest entries first: squares of small probabilities would underflow.
    """
    tiny = torch.finfo(s.dtype).tiny
    largest = [x.detach().amax(-1, keepdim=True) for x in (s, t)]
    zero = torch.minimum(*largest) < tiny  # False where one of them is NaN: it must show
    s, t = (x / top.masked_fill(zero, 1) for x, top in zip((s, t), largest))
    s, t = (x / x.square().sum(-1, keepdim=True).masked_fill(zero, 1).sqrt() for x in (s, t))
    loss = (s - t).square().sum(-1, keepdim=True) / 2
    return torch.where(zero, 1.0, loss).squeeze(-1)


def _visual_tokens(layout: VisualLayout) -> Iterator[tuple[int, Tensor]]:
    """(sample, (n,) places of its visual tokens) of every sample."""
    places = layout.visual.nonzero()[:, 1]
    return enumerate(places.split(layout.visual.sum(1).tolist()))


def _weights(square: Tensor) -> Tensor:
    """keep[i, v] / max(1, sum_i keep[i, v]) of one sample's S."""
    n = square.numel()
    mean = square.sum() / max(n, 1)
    threshold = mean + ((square - mean).square().sum() / max(n - 1, 1)).sqrt()
    keep = (square <= threshold) & (square != 0)
    return keep.to(square.dtype) / keep.sum(0).clamp(min=1)


class _Sample:
    """Probabilities of one sample's visual square, some heads at a time."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        layout: VisualLayout,
        sample: int,
        at: Tensor,
        scale: float,
    ) -> None:
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        # [H, n, d], [Hk, n, d], [H, n]
        self.q, self.k = (x[sample, at].transpose(0, 1).to(wide) for x in tensors[:2])
        self.lse = tensors[2][sample][:, at].to(wide)
        self.group, self.scale = len(self.q) // len(self.k), scale
        segment = layout.segment[sample, at]
        same = (segment[:, None] == segment) | (segment == 0)
        self.hidden = ~same.tril()

    def heads(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which heads, their keys (h, n, d), their probabilities (h, n, n))."""
        heads, n, _ = self.q.shape
        step = max(1, _ENTRIES // max(n * n, 1))
        for first in range(0, heads, step):
            which = slice(first, min(first + step, heads))
            of = torch.arange(which.start, which.stop, device=self.q.device) // self.group
            keys = self.k[of]
            scores = self.scale * self.q[which] @ keys.transpose(1, 2) - self.lse[which, :, None]
            yield which, keys, scores.masked_fill_(self.hidden, -torch.inf).exp_()

    def head_mean(self) -> Tensor:
        """S (n, n)."""
        n = self.q.shape[1]
        total = self.q.new_zeros(n, n)
        for _, _, probs in self.heads():
            total += probs.sum(0)
        return total / len(self.q)


class _PooledVectors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, lse)
        ctx.layout, ctx.scale = layout, scale
        vectors = [q.new_zeros(0, dtype=torch.promote_types(q.dtype, torch.float32))]
        for sample, at in _visual_tokens(layout):
            square = _Sample((q, k, lse), layout, sample, at, scale).head_mean()
            # Multiplied, not selected: a NaN fails every comparison and must still reach the loss.
            vectors.append((square * _weights(square)).sum(0))
        return torch.cat(vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse = tensors = ctx.saved_tensors
        dq, dk, dlse = (torch.zeros_like(x) for x in tensors)
        used = 0
        for sample, at in _visual_tokens(ctx.layout):
            parts = _Sample(tensors, ctx.layout, sample, at, ctx.scale)
            w = _weights(parts.head_mean()) * grad[used : used + len(at)] / len(parts.q)
            used += len(at)
            dk_sample = torch.zeros_like(parts.k)
            for which, keys, probs in parts.heads():
                dx = probs.mul_(w)
                dq[sample, at, which] = (ctx.scale * dx @ keys).transpose(0, 1).to(q.dtype)
                dlse[sample, which, at] = -dx.sum(-1).to(lse.dtype)
                by_head = ctx.scale * dx.transpose(1, 2) @ parts.q[which]
                # One after the other: adding with an index is in no fixed order on a GPU.
                for head, part in enumerate(by_head, which.start):
                    dk_sample[head // parts.group] += part
            dk[sample, at] = dk_sample.transpose(0, 1).to(k.dtype)
        return dq, dk, dlse, None, None
