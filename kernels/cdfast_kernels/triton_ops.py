"""The Triton backend: its operators for torch (eager, autograd, torch.compile), and its host side.

Each operator takes the tables of a layout as a list of tensors and its host numbers as a list of
integers, so that a traced graph holds nothing else. A backward is an operator of its own. Saved for
backward are q, k, v, out, lse, G and the row scale, nothing else.

A target map is given as [its data], or as the q, k and lse of each map of its window one after the
other (see VisualMap.inputs) with their scales. No list is ever empty: the autograd of torch.library
takes an empty list for one of tensors.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from cdfast_kernels.alignment import alignment_fwd, g_dtype
from cdfast_kernels.attn_bwd import Alignment, alignment_bwd, attn_bwd
from cdfast_kernels.attn_fwd import attn_fwd
from cdfast_kernels.launch import Axis
from cdfast_kernels.layout import MAP_TILE, VisualLayout
from cdfast_kernels.map_fwd import Target, visual_map_fwd
from cdfast_kernels.reference import reduce_losses
from cdfast_kernels.visual_map import MAP_DTYPE, VisualMap


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# attention


@custom_op("cdfast::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tables: list[Tensor], host: list[int]
) -> tuple[Tensor, Tensor]:
    return attn_fwd(q, k, v, Axis.join(tables, host), scale)


@attention.register_fake
def _(q, k, v, scale, tables, host):
    return _empty(q), Axis.join(tables, host).empty_lse(q)


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
    host: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    d_out = torch.zeros_like(out) if d_out is None else d_out
    return attn_bwd(d_out, d_lse, q, k, v, out, lse, Axis.join(tables, host), scale)


@attention_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, scale, tables, host):
    return _empty(q), _empty(k), _empty(v)


def _attention_setup(ctx, inputs, output):
    q, k, v, ctx.scale, tables, ctx.host = inputs
    ctx.n_tables = len(tables)
    ctx.save_for_backward(q, k, v, *output, *tables)
    ctx.set_materialize_grads(False)


def _attention_vjp(ctx, d_out, d_lse):
    q, k, v, out, lse, *tables = ctx.saved_tensors
    none = None, [None] * ctx.n_tables, None
    if d_out is None and d_lse is None:
        return None, None, None, *none
    grads = attention_backward(d_out, d_lse, q, k, v, out, lse, ctx.scale, tables, ctx.host)
    return *grads, *none


attention.register_autograd(_attention_vjp, setup_context=_attention_setup)


# the map, and the modular loss


@custom_op("cdfast::visual_map", mutates_args=())
def visual_map(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, tables: list[Tensor], host: list[int]
) -> Tensor:
    """The stored map (map rows, 64)."""
    return visual_map_fwd(q, k, lse, Axis.join(tables, host), scale)


@visual_map.register_fake
def _(q, k, lse, scale, tables, host):
    return q.new_empty(Axis.join(tables, host).map_rows, MAP_TILE, dtype=MAP_DTYPE[q.dtype])


@custom_op("cdfast::alignment", mutates_args=())
def alignment(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: list[Tensor],
    target_scales: list[float],
    objective: str,
    scale: float,
    tables: list[Tensor],
    host: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample, G, row scale."""
    axis = Axis.join(tables, host)
    return alignment_fwd(q, k, lse, Target(target, target_scales), axis, scale, objective)


def _empty_alignment(q, objective, axis):
    return (
        q.new_empty(axis.n_samples, dtype=torch.float32),
        q.new_empty(axis.map_rows, MAP_TILE, dtype=g_dtype(q.dtype, objective)),
        q.new_empty(axis.n_tokens, dtype=torch.float32),
    )


@alignment.register_fake
def _(q, k, lse, target, target_scales, objective, scale, tables, host):
    return _empty_alignment(q, objective, Axis.join(tables, host))


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
    host: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    term = Alignment(g, row_scale, d_loss.contiguous())
    return alignment_bwd(term, q, k, lse, Axis.join(tables, host), scale)


@alignment_backward.register_fake
def _(d_loss, q, k, lse, g, row_scale, scale, tables, host):
    return _empty(q), _empty(k), Axis.join(tables, host).empty_lse(q)


def _alignment_setup(ctx, inputs, output):
    q, k, lse, target, _, _, ctx.scale, tables, ctx.host = inputs
    _, g, row_scale = output
    ctx.n_target, ctx.n_tables = len(target), len(tables)
    ctx.save_for_backward(q, k, lse, g, row_scale, *tables)
    ctx.mark_non_differentiable(g, row_scale)
    ctx.set_materialize_grads(False)


def _no_gradients(ctx):
    """Of target, target_scales, objective, scale, tables and host."""
    return [None] * ctx.n_target, None, None, None, [None] * ctx.n_tables, None


def _alignment_vjp(ctx, d_loss, _d_g, _d_row_scale):
    q, k, lse, g, row_scale, *tables = ctx.saved_tensors
    if d_loss is None:
        return None, None, None, *_no_gradients(ctx)
    grads = alignment_backward(d_loss, q, k, lse, g, row_scale, ctx.scale, tables, ctx.host)
    return *grads, *_no_gradients(ctx)


alignment.register_autograd(_alignment_vjp, setup_context=_alignment_setup)


# attention with the loss


@custom_op("cdfast::attention_with_alignment", mutates_args=())
def attention_with_alignment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: list[Tensor],
    target_scales: list[float],
    objective: str,
    scale: float,
    tables: list[Tensor],
    host: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, loss per sample, lse, G, row scale."""
    axis = Axis.join(tables, host)
    out, lse = attn_fwd(q, k, v, axis, scale)
    aligned = alignment_fwd(q, k, lse, Target(target, target_scales), axis, scale, objective)
    loss, g, row_scale = aligned
    return out, loss, lse, g, row_scale


@attention_with_alignment.register_fake
def _(q, k, v, target, target_scales, objective, scale, tables, host):
    axis = Axis.join(tables, host)
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
    host: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    d_out = torch.zeros_like(out) if d_out is None else d_out
    axis = Axis.join(tables, host)
    term = None
    if d_loss is not None and axis.n_slots:
        term = Alignment(g, row_scale, d_loss.contiguous())
    return attn_bwd(d_out, None, q, k, v, out, lse, axis, scale, term)


@attention_with_alignment_backward.register_fake
def _(d_out, d_loss, q, k, v, out, lse, g, row_scale, scale, tables, host):
    return _empty(q), _empty(k), _empty(v)


def _fused_setup(ctx, inputs, output):
    q, k, v, target, _, _, ctx.scale, tables, ctx.host = inputs
    out, _, lse, g, row_scale = output
    ctx.n_target, ctx.n_tables = len(target), len(tables)
    ctx.save_for_backward(q, k, v, out, lse, g, row_scale, *tables)
    ctx.mark_non_differentiable(lse, g, row_scale)
    ctx.set_materialize_grads(False)


def _fused_vjp(ctx, d_out, d_loss, _d_lse, _d_g, _d_row_scale):
    # Read once: activation checkpointing recomputes them for that, and refuses a second reading.
    saved = list(ctx.saved_tensors)
    saved, tables = saved[:7], saved[7:]
    if d_out is None and d_loss is None:
        return None, None, None, *_no_gradients(ctx)
    grads = attention_with_alignment_backward(d_out, d_loss, *saved, ctx.scale, tables, ctx.host)
    return *grads, *_no_gradients(ctx)


attention_with_alignment.register_autograd(_fused_vjp, setup_context=_fused_setup)


# What ops.py calls; the arguments of reference.py


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: VisualLayout, scale: float
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, scale, *Axis.of(layout).split())


@torch.no_grad()
def visual_attention_map_triton(
    q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, scale: float
) -> VisualMap:
    return VisualMap(visual_map(q, k, lse, scale, *Axis.of(layout).split()), layout)


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
    tensors, scales = _target_arguments(target)
    loss, _, _ = alignment(q, k, lse, tensors, scales, objective, scale, *Axis.of(layout).split())
    return reduce_losses(loss, layout, reduction)


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
    tensors, scales = _target_arguments(target)
    out, loss, _, _, _ = attention_with_alignment(
        q, k, v, tensors, scales, objective, scale, *Axis.of(layout).split()
    )
    return out, reduce_losses(loss, layout, reduction)


def _target_arguments(target: VisualMap) -> tuple[list[Tensor], list[float]]:
    if not target.inputs:
        return [target.data], [1.0]
    return [x for item in target.inputs for x in item[:3]], [x.scale for x in target.inputs]
