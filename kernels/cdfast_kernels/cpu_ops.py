"""The CPU backend: operators for torch (eager, autograd, torch.compile) over csrc/.

As in triton_ops.py, an operator takes the tables of a layout as a list of tensors and its backward
is an operator of its own. Saved for backward are q, k, v, lse and G, which is float32 and stored
like a map. Inside, everything is float32 with double sums; maps of half-precision inputs are
float16.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from cdfast_kernels import native
from cdfast_kernels.layout import MAP_TILE, VisualLayout
from cdfast_kernels.reference import reduce_losses
from cdfast_kernels.visual_map import FP16_SCALE, MAP_DTYPE, VisualMap

# As csrc/problem.h and csrc/alignment.h number them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OBJECTIVES = {"row": 0, "map": 1, "pooled": 2, "mse": 3, "kl": 4}


class Host(NamedTuple):
    """Sizes of a layout that its tables do not show."""

    length: int  # tokens of a sample, 0 for a packed batch
    map_rows: int


def _axis_arguments(layout: VisualLayout) -> tuple[list[Tensor], int, int]:
    tables = layout.schedule
    tensors = [tables.samples, tables.codes, tables.bounds, tables.tiles, tables.entries]
    tensors += [tables.counts, layout.slot_tiles, tables.panels]
    return tensors, 0 if layout.is_packed else layout.length, layout.map_rows


def _axis(tables: list[Tensor], host: Host) -> Any:
    samples, codes, _, tiles, _, _, slot_tiles, _ = tables
    sizes = (samples.shape[0], codes.shape[0], slot_tiles.shape[1], tiles.shape[1])
    addresses = [table.data_ptr() for table in tables]
    return native.EXTENSION.Axis([*sizes, host.map_rows, host.length], addresses)


def _problem(q: Tensor, k: Tensor, scale: float, tables: list[Tensor], host: Host) -> Any:
    axis = _axis(tables, host)
    threads = torch.get_num_threads()
    heads, dim = q.shape[-2:]
    problem = native.EXTENSION.Problem(axis, heads, k.shape[-2], dim, scale, threads)
    problem.view("q", _view(q))
    problem.view("k", _view(k))
    return problem


def _view(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address, strides of sample, token and head, dtype; the last dimension is contiguous."""
    assert x.device.type == "cpu", x.device
    assert x.stride(-1) == 1 or x.shape[-1] <= 1 or not x.numel(), x.stride()
    sample, token, head = x.stride()[:3] if x.ndim == 4 else (0, *x.stride()[:2])
    return x.data_ptr(), sample, token, head, DTYPES[x.dtype]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_lse(q: Tensor) -> Tensor:
    tokens, heads = q.shape[:-2], q.shape[-2]
    shape = (heads, *tokens) if q.ndim == 3 else (tokens[0], heads, tokens[1])
    return q.new_empty(shape, dtype=torch.float32)


def _empty_map(q: Tensor, map_rows: int) -> Tensor:
    return q.new_empty(map_rows, MAP_TILE, dtype=torch.float32)


def _float_map(data: Tensor) -> Tensor:
    """Stored probabilities as float32."""
    if data.dtype == torch.float16:
        return data.float() / FP16_SCALE
    return data.float().contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tables: list[Tensor],
    host: Host,
    s: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and lse; S into `s`, zeros, where it is given."""
    out, lse = _empty(q), _empty_lse(q)
    problem = _problem(q, k, scale, tables, host)
    problem.view("v", _view(v))
    problem.view("out", _view(out))
    problem.rows("lse", lse.data_ptr())
    if s is not None:
        problem.rows("map", s.data_ptr())
    native.EXTENSION.attention_forward(problem)
    return out, lse


def _student_map(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, tables: list[Tensor], host: Host
) -> Tensor:
    s = torch.zeros(host.map_rows, MAP_TILE)
    lse = lse.contiguous()
    problem = _problem(q, k, scale, tables, host)
    problem.rows("lse", lse.data_ptr())
    problem.rows("map", s.data_ptr())
    problem.modular = True
    native.EXTENSION.map_forward(problem)
    return s


def _loss_and_g(
    s: Tensor, target: Tensor, objective: str, tables: list[Tensor], host: Host
) -> tuple[Tensor, Tensor]:
    """Loss per sample, and G in place of S."""
    t = _float_map(target)
    assert t.shape == s.shape, (t.shape, s.shape)
    loss = torch.zeros(tables[0].shape[0])
    native.EXTENSION.alignment(
        _axis(tables, host),
        OBJECTIVES[objective],
        s.data_ptr(),
        t.data_ptr(),
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, s


# attention


@custom_op("cdfast::cpu_attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tables: list[Tensor], length: int, map_rows: int
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, scale, tables, Host(length, map_rows), None)


@attention.register_fake
def _(q, k, v, scale, tables, length, map_rows):
    return _empty(q), _empty_lse(q)


@custom_op("cdfast::cpu_attention_backward", mutates_args=())
def attention_backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_loss: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    g: Tensor | None,
    scale: float,
    tables: list[Tensor],
    length: int,
    map_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of attention and, where g and d_loss are given, of the loss with it."""
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    problem = _problem(q, k, scale, tables, Host(length, map_rows))
    # Names keep what they point to until the call has returned.
    views = {"v": v, "dq": dq, "dk": dk, "dv": dv}
    rows = {"lse": lse.contiguous(), "delta": _empty_lse(q), "norm": _empty_lse(q)}
    if d_out is not None:
        views["d_out"] = _last_contiguous(d_out)
    if d_lse is not None:
        rows["d_lse"] = d_lse.contiguous()
    if g is not None and d_loss is not None:
        rows |= {"map": g.contiguous(), "d_loss": d_loss.contiguous()}
    for name, x in views.items():
        problem.view(name, _view(x))
    for name, x in rows.items():
        problem.rows(name, x.data_ptr())
    native.EXTENSION.attention_backward(problem)
    return dq, dk, dv


@attention_backward.register_fake
def _(d_out, d_lse, d_loss, q, k, v, lse, g, scale, tables, length, map_rows):
    return _empty(q), _empty(k), _empty(v)


def _attention_setup(ctx, inputs, output):
    q, k, v, scale, tables, *ctx.host = inputs
    ctx.scale, ctx.n_tables = scale, len(tables)
    ctx.save_for_backward(q, k, v, output[1], *tables)
    ctx.set_materialize_grads(False)


def _attention_vjp(ctx, d_out, d_lse):
    q, k, v, lse, *tables = ctx.saved_tensors
    none = None, [None] * ctx.n_tables, None, None
    if d_out is None and d_lse is None:
        return None, None, None, *none
    outer = d_out, d_lse, None
    grads = attention_backward(*outer, q, k, v, lse, None, ctx.scale, tables, *ctx.host)
    return *grads, *none


attention.register_autograd(_attention_vjp, setup_context=_attention_setup)


# the map, and the modular loss


@custom_op("cdfast::cpu_visual_map", mutates_args=())
def visual_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    map_rows: int,
) -> Tensor:
    """A stored map (map_rows, MAP_TILE)."""
    s = _student_map(q, k, lse, scale, tables, Host(length, map_rows))
    dtype = MAP_DTYPE[q.dtype]
    return (s * FP16_SCALE).to(dtype) if dtype == torch.float16 else s


@visual_map.register_fake
def _(q, k, lse, scale, tables, length, map_rows):
    return q.new_empty(map_rows, MAP_TILE, dtype=MAP_DTYPE[q.dtype])


@custom_op("cdfast::cpu_alignment", mutates_args=())
def alignment(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: Tensor,
    objective: str,
    scale: float,
    tables: list[Tensor],
    length: int,
    map_rows: int,
) -> tuple[Tensor, Tensor]:
    """Loss per sample, and G."""
    host = Host(length, map_rows)
    s = _student_map(q, k, lse, scale, tables, host)
    return _loss_and_g(s, target, objective, tables, host)


@alignment.register_fake
def _(q, k, lse, target, objective, scale, tables, length, map_rows):
    loss = q.new_empty(tables[0].shape[0], dtype=torch.float32)
    return loss, _empty_map(q, map_rows)


@custom_op("cdfast::cpu_alignment_backward", mutates_args=())
def alignment_backward(
    d_loss: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    g: Tensor,
    scale: float,
    tables: list[Tensor],
    length: int,
    map_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dlse."""
    dq, dk, d_lse = (
        _empty(q),
        _empty(k),
        torch.empty_like(lse, memory_format=torch.contiguous_format),
    )
    problem = _problem(q, k, scale, tables, Host(length, map_rows))
    problem.modular = True
    problem.view("dq", _view(dq))
    problem.view("dk", _view(dk))
    lse, g, d_loss = lse.contiguous(), g.contiguous(), d_loss.contiguous()
    for name, x in {"lse": lse, "delta": d_lse, "map": g, "d_loss": d_loss}.items():
        problem.rows(name, x.data_ptr())
    native.EXTENSION.attention_backward(problem)
    return dq, dk, d_lse


@alignment_backward.register_fake
def _(d_loss, q, k, lse, g, scale, tables, length, map_rows):
    return _empty(q), _empty(k), _empty_lse(q)


def _alignment_setup(ctx, inputs, output):
    q, k, lse, _, _, scale, tables, *ctx.host = inputs
    ctx.scale, ctx.n_tables = scale, len(tables)
    ctx.save_for_backward(q, k, lse, output[1], *tables)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _alignment_vjp(ctx, d_loss, _d_g):
    q, k, lse, g, *tables = ctx.saved_tensors
    none = None, None, None, [None] * ctx.n_tables, None, None
    if d_loss is None:
        return None, None, None, *none
    grads = alignment_backward(d_loss, q, k, lse, g, ctx.scale, tables, *ctx.host)
    return *grads, *none


alignment.register_autograd(_alignment_vjp, setup_context=_alignment_setup)


# attention with the loss


@custom_op("cdfast::cpu_attention_with_alignment", mutates_args=())
def attention_with_alignment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: Tensor,
    objective: str,
    scale: float,
    tables: list[Tensor],
    length: int,
    map_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, loss per sample, lse, G."""
    host = Host(length, map_rows)
    s = torch.zeros(map_rows, MAP_TILE)
    out, lse = _forward(q, k, v, scale, tables, host, s)
    loss, g = _loss_and_g(s, target, objective, tables, host)
    return out, loss, lse, g


@attention_with_alignment.register_fake
def _(q, k, v, target, objective, scale, tables, length, map_rows):
    loss = q.new_empty(tables[0].shape[0], dtype=torch.float32)
    return _empty(q), loss, _empty_lse(q), _empty_map(q, map_rows)


def _fused_setup(ctx, inputs, output):
    q, k, v, _, _, scale, tables, *ctx.host = inputs
    _, _, lse, g = output
    ctx.scale, ctx.n_tables = scale, len(tables)
    ctx.save_for_backward(q, k, v, lse, g, *tables)
    ctx.mark_non_differentiable(lse, g)
    ctx.set_materialize_grads(False)


def _fused_vjp(ctx, d_out, d_loss, _d_lse, _d_g):
    q, k, v, lse, g, *tables = ctx.saved_tensors
    none = None, None, None, [None] * ctx.n_tables, None, None
    if d_out is None and d_loss is None:
        return None, None, None, *none
    outer = d_out, None, d_loss
    grads = attention_backward(*outer, q, k, v, lse, g, ctx.scale, tables, *ctx.host)
    return *grads, *none


attention_with_alignment.register_autograd(_fused_vjp, setup_context=_fused_setup)


# What ops.py calls; the arguments of reference.py


def flash_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, layout: VisualLayout, scale: float
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, scale, *_axis_arguments(layout))


@torch.no_grad()
def visual_attention_map_cpu(
    q: Tensor, k: Tensor, lse: Tensor, layout: VisualLayout, scale: float
) -> VisualMap:
    return VisualMap(visual_map(q, k, lse, scale, *_axis_arguments(layout)), layout)


def visual_alignment_loss_cpu(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    scale: float,
    objective: str,
    reduction: str,
) -> Tensor:
    loss, _ = alignment(q, k, lse, target.data, objective, scale, *_axis_arguments(layout))
    return reduce_losses(loss, layout, reduction)


def flash_attention_with_alignment_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    scale: float,
    objective: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    arguments = _axis_arguments(layout)
    out, loss, _, _ = attention_with_alignment(q, k, v, target.data, objective, scale, *arguments)
    return out, reduce_losses(loss, layout, reduction)
