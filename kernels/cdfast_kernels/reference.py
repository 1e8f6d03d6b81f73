"""The reference backend: eager maths on materialised tensors, any device, up to float64.

Every other backend is tested against this file, so it is written to be read, not to be fast. It
works in float64 for float64 input and in float32 otherwise (reduced-precision matmul settings of
the process apply to it as to any torch.matmul). All tensors here are in the layout's batch view:

    q (B, N, H, d)    k, v (B, N, Hk, d)    lse (B, H, N)    S, T, visible (B, N, N)

Gradients come from autograd. Padding is removed from the *inputs* with torch.where, whose backward
writes zeros there, and from the *outputs* in the same way, so that a NaN stored at padding, in an
input or in an incoming gradient, meets no arithmetic.
"""

import torch
from torch import Tensor

from cdfast_kernels.layout import VisualLayout
from cdfast_kernels.visual_map import MAP_DTYPE, VisualMap

# Smallest normal float32: the floor of S in `kl`.
KL_FLOOR = torch.finfo(torch.float32).tiny


def flash_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, layout: VisualLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """out_h = softmax(scale q_h k^T) v and the natural-log LSE; see ops.flash_attention."""
    scores = _masked_scores(q, k, layout, scale)
    lse = torch.where(layout.live[:, None, :], scores.logsumexp(-1), -torch.inf)
    out = _weighted_values(scores.softmax(-1), v, layout)
    return out, _store_lse(lse, layout)


@torch.no_grad()
def visual_attention_map_ref(
    q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, scale: float
) -> VisualMap:
    """S on the visible visual columns; see ops.visual_attention_map."""
    head_mean = _head_mean(q, k, lse, layout, scale, _visible_visual(layout))
    return VisualMap.from_batch(head_mean, layout, MAP_DTYPE[q.dtype])


def visual_alignment_loss_ref(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    scale: float,
    objective: str,
    reduction: str,
) -> Tensor:
    """Alignment of S(q, k, lse) with the target map; see ops.visual_alignment_loss."""
    entries = _visible_visual(layout)
    student = _head_mean(q, k, lse, layout, scale, entries)
    return _alignment_loss(student, target, entries, layout, objective, reduction)


def flash_attention_with_alignment_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    scale: float,
    objective: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Both from one set of probabilities; see ops.flash_attention_with_alignment."""
    probs = _masked_scores(q, k, layout, scale).softmax(-1)
    entries = _visible_visual(layout)
    student = torch.where(entries, probs.mean(1), 0)
    loss = _alignment_loss(student, target, entries, layout, objective, reduction)
    return _weighted_values(probs, v, layout), loss


def _alignment_loss(
    student: Tensor,
    target: VisualMap,
    entries: Tensor,
    layout: VisualLayout,
    objective: str,
    reduction: str,
) -> Tensor:
    if student.numel() == 0:
        per_sample = student.sum((1, 2))
    else:
        teacher = torch.where(entries, target.to_batch(student.dtype), 0)
        per_sample = _OBJECTIVES[objective](student, teacher, entries, layout)
    return reduce_losses(per_sample, layout, reduction)


def reduce_losses(per_sample: Tensor, layout: VisualLayout, reduction: str) -> Tensor:
    """ "none": as they are; "sum"; "mean": the sum over the number of samples with an image."""
    if reduction == "none":
        return per_sample
    total = per_sample.sum()
    return total if reduction == "sum" else total / max(layout.num_image_samples, 1)


def _load(x: Tensor, layout: VisualLayout) -> Tensor:
    """Batch view in the compute dtype, zero at padding."""
    x = layout.to_batch(x)
    x = torch.where(layout.live[:, :, None, None], x, 0)
    return x if x.dtype == torch.float64 else x.float()


def _load_lse(lse: Tensor, layout: VisualLayout) -> Tensor:
    """Batch view (B, H, N) of an lse, finite at padding."""
    if layout.is_packed:
        lse = layout.to_batch(lse.transpose(0, 1)).transpose(1, 2)
    return torch.where(layout.live[:, None, :], lse, 0)


def _store_lse(lse: Tensor, layout: VisualLayout) -> Tensor:
    """(B, H, N), packed: (H, total)."""
    if not layout.is_packed:
        return lse
    return layout.from_batch(lse.transpose(1, 2)).transpose(0, 1).contiguous()


def _group_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x_h @ y_g for x (B, H, N, m), y (B, Hk, m, n), where query head h uses g = h // (H / Hk)."""
    batch, heads, rows, inner = x.shape
    groups = y.shape[1]
    # The heads of a group are stacked as rows: one matmul per key head, no copies of y.
    stacked = x.reshape(batch, groups, heads // groups * rows, inner) @ y
    return stacked.reshape(batch, heads, rows, y.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T, (B, H, N, N)."""
    return _group_matmul(q.transpose(1, 2) * scale, k.permute(0, 2, 3, 1))


def _masked_scores(q: Tensor, k: Tensor, layout: VisualLayout, scale: float) -> Tensor:
    """Scores with -inf at invisible keys; 0 in rows at padding, which see nothing."""
    scores = _scores(_load(q, layout), _load(k, layout), scale)
    hidden = torch.where(layout.live[:, None, :, None], -torch.inf, 0.0).to(scores.dtype)
    return torch.where(layout.visible()[:, None], scores, hidden)


def _weighted_values(probs: Tensor, v: Tensor, layout: VisualLayout) -> Tensor:
    """P v in the layout and dtype of v, 0 in rows at padding."""
    out = _group_matmul(probs, _load(v, layout).transpose(1, 2)).transpose(1, 2)
    out = torch.where(layout.live[:, :, None, None], out, 0).to(v.dtype)
    return layout.from_batch(out).contiguous()


def _visible_visual(layout: VisualLayout) -> Tensor:
    """bool (B, N, N): key j is visual and row i sees it."""
    return layout.visible() & layout.visual[:, None, :]


def _head_mean(
    q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, scale: float, entries: Tensor
) -> Tensor:
    """S = (1/H) sum_h exp(s_h - lse_h) on `entries`, 0 elsewhere; differentiable in q, k, lse."""
    scores = _scores(_load(q, layout), _load(k, layout), scale)
    log_probs = scores - _load_lse(lse, layout)[..., None]
    return torch.where(entries[:, None], log_probs, -torch.inf).exp().mean(1)


# Objectives: (S, T, entries, layout) -> loss per sample (B,), 0 for samples without an image.
# S and T are 0 outside `entries`. Tests for a degenerate case are written so that NaN fails them:
# a NaN at a live position must show in the loss.


def _one_minus_cos(s: Tensor, t: Tensor, dim: tuple[int, ...], if_zero: float = 0.0) -> Tensor:
    """1 - cos(s, t) over `dim`; `if_zero` without a gradient where s or t is all zero.

    Computed as |s/|s| - t/|t||^2 / 2, which keeps its digits when s and t are nearly parallel. Both
    are first divided by their largest entry, so that squares of small probabilities do not
    underflow. Vectors with no entry above the smallest normal number are taken for zero.
    """
    tiny = torch.finfo(s.dtype).tiny
    largest_s = s.detach().amax(dim, keepdim=True)
    largest_t = t.amax(dim, keepdim=True)
    zero = torch.minimum(largest_s, largest_t) < tiny  # False where one of them is NaN
    s = s / largest_s.masked_fill(zero, 1)
    t = t / largest_t.masked_fill(zero, 1)
    unit_s = s / s.square().sum(dim, keepdim=True).masked_fill(zero, 1).sqrt()
    unit_t = t / t.square().sum(dim, keepdim=True).masked_fill(zero, 1).sqrt()
    loss = (unit_s - unit_t).square().sum(dim, keepdim=True) / 2
    return torch.where(zero, if_zero, loss).squeeze(dim)


def _mean_over_rows(row_loss: Tensor, entries: Tensor) -> Tensor:
    """Mean over the rows that see a visual key; those that see exactly one contribute 0."""
    n_visible = entries.sum(-1)
    n_rows = (n_visible > 0).sum(-1)
    return torch.where(n_visible > 1, row_loss, 0).sum(-1) / n_rows.clamp(min=1)


def _row(s: Tensor, t: Tensor, entries: Tensor, layout: VisualLayout) -> Tensor:
    return _mean_over_rows(_one_minus_cos(s, t, (-1,)), entries)


def _map(s: Tensor, t: Tensor, entries: Tensor, layout: VisualLayout) -> Tensor:
    return _one_minus_cos(s, t, (-2, -1))


def _mse(s: Tensor, t: Tensor, entries: Tensor, layout: VisualLayout) -> Tensor:
    return (s - t).square().sum((-2, -1)) / entries.sum((-2, -1)).clamp(min=1)


def _kl(s: Tensor, t: Tensor, entries: Tensor, layout: VisualLayout) -> Tensor:
    s = torch.where(entries, s.clamp(min=KL_FLOOR), 0)
    sum_s = s.sum(-1, keepdim=True)
    sum_t = t.sum(-1, keepdim=True)
    zero_t = sum_t == 0
    t = t / sum_t.masked_fill(zero_t, 1)
    # log of 1 where the term is absent: neither the value nor the gradient meets log(0).
    log_s = torch.where(entries, s, 1).log() - torch.where(sum_s == 0, 1, sum_s).log()
    log_t = torch.where(t == 0, 1, t).log()
    divergence = torch.where(entries, t * (log_t - log_s), 0).sum(-1)
    return _mean_over_rows(torch.where(zero_t.squeeze(-1), 0, divergence), entries)


def _pooled(s: Tensor, t: Tensor, entries: Tensor, layout: VisualLayout) -> Tensor:
    visual = layout.visual
    square = visual[:, :, None] & visual[:, None, :]
    n_visual = visual.sum(-1)
    s, t = torch.where(square, s, 0), torch.where(square, t, 0)
    keep_s = s.detach() <= _sink_threshold(s.detach(), square, n_visual)
    keep = square & keep_s & (t <= _sink_threshold(t, square, n_visual)) & (t != 0)
    # Multiplied, not selected: a NaN fails every comparison and must still reach the loss.
    count = keep.sum(1).clamp(min=1)
    pooled_s, pooled_t = (s * keep).sum(1) / count, (t * keep).sum(1) / count
    # The authors' cosine is 0 where nothing survives the filter: loss 1, without a gradient.
    loss = _one_minus_cos(pooled_s, pooled_t, (-1,), if_zero=1.0)
    return torch.where(n_visual > 1, loss, 0)


def _sink_threshold(x: Tensor, square: Tensor, n_visual: Tensor) -> Tensor:
    """mean + unbiased std over the visual square, causal zeros included: (B, 1, 1)."""
    n = n_visual.square()[:, None, None]
    mean = x.sum((1, 2), keepdim=True) / n.clamp(min=1)
    deviation = torch.where(square, x - mean, 0).square().sum((1, 2), keepdim=True)
    return mean + (deviation / (n - 1).clamp(min=1)).sqrt()


_OBJECTIVES = {"row": _row, "map": _map, "pooled": _pooled, "mse": _mse, "kl": _kl}
