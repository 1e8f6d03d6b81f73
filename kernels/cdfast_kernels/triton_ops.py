"""The Triton backend: its operators for torch (eager, autograd, torch.compile), and its host side.

Each operator takes the tables of a layout as a list of tensors, so that a traced graph holds
tensors and numbers only. A backward is an operator of its own. Saved for backward are q, k, v, out,
lse, G and the row scale, nothing else.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from cdfast_kernels.alignment import alignment_bwd, alignment_fwd
from cdfast_kernels.attn_bwd import Alignment, attn_bwd
from cdfast_kernels.attn_fwd import attn_fwd
from cdfast_kernels.launch import Axis
from cdfast_kernels.layout import VisualLayout
from cdfast_kernels.map_fwd import visual_map_fwd
from cdfast_kernels.visual_map import MAP_DTYPE, VisualMap


def _axis(tables: list[Tensor], length: int, packed: bool, contiguous: bool) -> Axis:
    return Axis._make((*tables, length, packed, contiguous))


def _axis_arguments(layout: VisualLayout) -> tuple[list[Tensor], int, bool, bool]:
    axis = Axis.of(layout)
    return list(axis[:-3]), axis.length, axis.packed, axis.contiguous


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# attention


@custom_op("cdfast::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor]:
    return attn_fwd(q, k, v, _axis(tables, length, packed, contiguous), scale)


@attention.register_fake
def _(q, k, v, scale, tables, length, packed, contiguous):
    return _empty(q), _axis(tables, length, packed, contiguous).empty_lse(q)


@custom_op("cdfast::attention_backward", mutates_args=())
def attention_backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_out = torch.zeros_like(out) if d_out is None else d_out
    axis = _axis(tables, length, packed, contiguous)
    return attn_bwd(d_out, d_lse, q, k, v, out, lse, axis, scale)


@attention_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, scale, tables, length, packed, contiguous):
    return _empty(q), _empty(k), _empty(v)


def _attention_setup(ctx, inputs, output):
    q, k, v, scale, tables, *ctx.host = inputs
    ctx.scale, ctx.n_tables = scale, len(tables)
    ctx.save_for_backward(q, k, v, *output, *tables)
    ctx.set_materialize_grads(False)


def _attention_vjp(ctx, d_out, d_lse):
    q, k, v, out, lse, *tables = ctx.saved_tensors
    none = [None] * ctx.n_tables, None, None, None
    if d_out is None and d_lse is None:
        return None, None, None, None, *none
    grads = attention_backward(d_out, d_lse, q, k, v, out, lse, ctx.scale, tables, *ctx.host)
    return *grads, None, *none


attention.register_autograd(_attention_vjp, setup_context=_attention_setup)


# the map, and the modular loss


@custom_op("cdfast::visual_map", mutates_args=())
def visual_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> Tensor:
    """The stored map (tokens, slots * 64)."""
    return visual_map_fwd(q, k, lse, _axis(tables, length, packed, contiguous), scale)[0]


@visual_map.register_fake
def _(q, k, lse, scale, tables, length, packed, contiguous):
    axis = _axis(tables, length, packed, contiguous)
    return q.new_empty(axis.n_tokens, axis.n_slots * 64, dtype=MAP_DTYPE[q.dtype])


@custom_op("cdfast::alignment", mutates_args=())
def alignment(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: Tensor,
    objective: str,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample, G, row scale."""
    axis = _axis(tables, length, packed, contiguous)
    return alignment_fwd(q, k, lse, target, axis, scale, objective)


def _empty_alignment(q, objective, axis):
    half = q.dtype != torch.float32 and objective != "kl"
    dtype = torch.float16 if half else torch.float32
    return (
        q.new_empty(axis.n_samples, dtype=torch.float32),
        q.new_empty(axis.n_tokens, axis.n_slots * 64, dtype=dtype),
        q.new_empty(axis.n_tokens, dtype=torch.float32),
    )


@alignment.register_fake
def _(q, k, lse, target, objective, scale, tables, length, packed, contiguous):
    return _empty_alignment(q, objective, _axis(tables, length, packed, contiguous))


@custom_op("cdfast::alignment_backward", mutates_args=())
def alignment_backward(
    d_loss: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    g: Tensor,
    row_scale: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    axis = _axis(tables, length, packed, contiguous)
    return alignment_bwd(d_loss.contiguous(), q, k, lse, g, row_scale, axis, scale)


@alignment_backward.register_fake
def _(d_loss, q, k, lse, g, row_scale, scale, tables, length, packed, contiguous):
    return _empty(q), _empty(k), _axis(tables, length, packed, contiguous).empty_lse(q)


def _alignment_setup(ctx, inputs, output):
    q, k, lse, _, _, scale, tables, *ctx.host = inputs
    _, g, row_scale = output
    ctx.scale, ctx.n_tables = scale, len(tables)
    ctx.save_for_backward(q, k, lse, g, row_scale, *tables)
    ctx.mark_non_differentiable(g, row_scale)
    ctx.set_materialize_grads(False)


def _alignment_vjp(ctx, d_loss, _d_g, _d_row_scale):
    q, k, lse, g, row_scale, *tables = ctx.saved_tensors
    none = None, None, None, [None] * ctx.n_tables, None, None, None
    if d_loss is None:
        return None, None, None, *none
    grads = alignment_backward(d_loss, q, k, lse, g, row_scale, ctx.scale, tables, *ctx.host)
    return *grads, *none


alignment.register_autograd(_alignment_vjp, setup_context=_alignment_setup)


# attention with the loss


@custom_op("cdfast::attention_with_alignment", mutates_args=())
def attention_with_alignment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: Tensor,
    objective: str,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, loss per sample, lse, G, row scale."""
    axis = _axis(tables, length, packed, contiguous)
    out, lse = attn_fwd(q, k, v, axis, scale)
    loss, g, row_scale = alignment_fwd(q, k, lse, target, axis, scale, objective)
    return out, loss, lse, g, row_scale


@attention_with_alignment.register_fake
def _(q, k, v, target, objective, scale, tables, length, packed, contiguous):
    axis = _axis(tables, length, packed, contiguous)
    loss, g, row_scale = _empty_alignment(q, objective, axis)
    return _empty(q), loss, axis.empty_lse(q), g, row_scale


@custom_op("cdfast::attention_with_alignment_backward", mutates_args=())
def attention_with_alignment_backward(
    d_out: Tensor | None,
    d_loss: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    row_scale: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    packed: bool,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_out = torch.zeros_like(out) if d_out is None else d_out
    axis = _axis(tables, length, packed, contiguous)
    term = None
    if d_loss is not None and axis.n_slots:
        term = Alignment(g, row_scale, d_loss.contiguous())
    return attn_bwd(d_out, None, q, k, v, out, lse, axis, scale, term)


@attention_with_alignment_backward.register_fake
def _(d_out, d_loss, q, k, v, out, lse, g, row_scale, scale, tables, length, packed, contiguous):
    return _empty(q), _empty(k), _empty(v)


def _fused_setup(ctx, inputs, output):
    q, k, v, _, _, scale, tables, *ctx.host = inputs
    out, _, lse, g, row_scale = output
    ctx.scale, ctx.n_tables = scale, len(tables)
    ctx.save_for_backward(q, k, v, out, lse, g, row_scale, *tables)
    ctx.mark_non_differentiable(lse, g, row_scale)
    ctx.set_materialize_grads(False)


def _fused_vjp(ctx, d_out, d_loss, _d_lse, _d_g, _d_row_scale):
    # Read once: activation checkpointing recomputes them for that, and refuses a second reading.
    saved = list(ctx.saved_tensors)
    saved, tables, scale = saved[:7], saved[7:], ctx.scale
    none = None, None, None, [None] * ctx.n_tables, None, None, None
    if d_out is None and d_loss is None:
        return None, None, None, *none
    grads = attention_with_alignment_backward(d_out, d_loss, *saved, scale, tables, *ctx.host)
    return *grads, *none


attention_with_alignment.register_autograd(_fused_vjp, setup_context=_fused_setup)


# What ops.py calls; the arguments of reference.py


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: VisualLayout, scale: float
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, scale, *_axis_arguments(layout))


@torch.no_grad()
def visual_attention_map_triton(
    q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, scale: float
) -> VisualMap:
    data = visual_map(q, k, lse, scale, *_axis_arguments(layout))
    return VisualMap(data.reshape(*layout.shape, data.shape[1]), layout)


def visual_alignment_loss_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    scale: float,
    objective: str,
    reduction: str,
) -> Tensor:
    loss, _, _ = alignment(q, k, lse, target.data, objective, scale, *_axis_arguments(layout))
    return _reduce(loss, layout, reduction)


def flash_attention_with_alignment_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    scale: float,
    objective: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    out, loss, _, _, _ = attention_with_alignment(
        q, k, v, target.data, objective, scale, *_axis_arguments(layout)
    )
    return out, _reduce(loss, layout, reduction)


def _reduce(loss: Tensor, layout: VisualLayout, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / max(layout.num_image_samples, 1)
