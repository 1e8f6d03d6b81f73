"""Alignment losses: row statistics -> coefficients -> loss and G = dL/dS. Mathematics:
kernels/README.md; backward: attn_bwd.py.

Of a map of the student only G survives the forward, without a dimension (entries of about one),
with a float32 scale per row: float16 for float16 and bfloat16 inputs, else float32; float32 also
for `kl`, whose entries reach 1 / (smallest probability).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, batch_arguments, launch
from cdfast_kernels.map_fwd import Rows, Target, map_program, student_map_fwd, target_arguments
from cdfast_kernels.tl_common import MAP_SCALE, MAP_TILE, TINY, panel_ptrs

# float32 bytes of S that exist at a time where a loss can be formed row by row, and the multiple
# that a chunk of rows is rounded to.
CHUNK_BYTES = 128 * 2**20
CHUNK_ROWS = 128
# Relative to the row's norm: below it G keeps an absolute error of one rounding.
SMALLEST_DIFFERENCE = 1e-3


class Coefficients(NamedTuple):
    """Per row, float64: u = student * S - target * T, G ~ (u - student * S * excess) * gain.

    For `kl`: S and T times `student` and `target` are the renormalised rows.
    """

    student: Tensor
    target: Tensor
    excess: Tensor
    gain: Tensor
    # G is what is stored times row_scale; the loss of a row is loss_scale times its sum.
    row_scale: Tensor
    loss_scale: Tensor
    counted: Tensor


@triton.jit
def _alignment_g_fwd_kernel(
    MAP,
    TARGET,
    G,
    PARTS,
    COEFFICIENTS,
    SAMPLES,
    CODES,
    SLOT_TILES,
    PANELS,
    target_scale,
    n_slots,
    tokens_per_sample,
    first_row,
    n_rows,
    BLOCK_M: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    TARGET_IN_PANELS: tl.constexpr,
    KL: tl.constexpr,
):
    """G of one (row tile, slot) as panels, from a chunk of S; row sums of the loss's terms."""
    (
        _sample,
        slot,
        rows,
        _n_0,
        entries,
        row_live,
        panel,
        in_panel,
        chunk,
        in_chunk,
        place,
    ) = map_program(
        SAMPLES,
        CODES,
        SLOT_TILES,
        PANELS,
        n_slots,
        tokens_per_sample,
        first_row,
        n_rows,
        BLOCK_M,
        CONTIGUOUS,
    )
    s = tl.load(panel_ptrs(MAP, chunk, rows, 0, MAP_TILE), mask=entries, other=0.0)
    t_ptrs = panel_ptrs(TARGET, panel if TARGET_IN_PANELS else chunk, rows, 0, MAP_TILE)
    t = tl.load(t_ptrs, mask=entries, other=0.0).to(tl.float32) * target_scale
    # (coefficients, samples, rows), and (slots, samples, rows)
    step = (tl.num_programs(0) // n_slots).to(tl.int64) * n_rows
    at = place + tl.arange(0, BLOCK_M)
    row = COEFFICIENTS + at
    student = tl.load(row, mask=row_live, other=0.0)[:, None]
    target = tl.load(row + step, mask=row_live, other=0.0)[:, None]
    if KL:
        floored = tl.where(s < TINY, TINY, s)
        s_hat = tl.where(entries, floored * student, 1.0)
        t_hat = t * target
        log_ratio = tl.log(tl.where(t_hat == 0, 1.0, t_hat)) - tl.log(s_hat)
        term = tl.where(t_hat == 0, 0.0, t_hat * log_ratio)
        g = tl.where(entries & (s >= TINY), 1.0 - t_hat / s_hat, 0.0)
    else:
        excess_gain = tl.load(row + 2 * step, mask=row_live, other=0.0)[:, None]
        gain = tl.load(row + 3 * step, mask=row_live, other=0.0)[:, None]
        s_hat = s * student
        u = (s_hat - t * target) * gain
        term = u * u
        g = u - s_hat * excess_gain
    g_ptrs = panel_ptrs(G, panel, rows, 0, MAP_TILE)
    tl.store(g_ptrs, g.to(G.dtype.element_ty), mask=in_panel[:, None])
    tl.store(PARTS + slot * step + at, tl.sum(term, 1), mask=in_chunk)


def g_dtype(q_dtype: torch.dtype, objective: str) -> torch.dtype:
    half = q_dtype != torch.float32 and objective != "kl"
    return torch.float16 if half else torch.float32


def alignment_fwd(
    q: Tensor, k: Tensor, lse: Tensor, target: Target, axis: Axis, scale: float, objective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample (samples,), G (map rows, 64) and its row scale (tokens,)."""
    g = torch.empty(axis.map_rows, 64, dtype=g_dtype(q.dtype, objective), device=q.device)
    row_loss = torch.zeros(axis.n_samples, axis.length, dtype=torch.float64, device=q.device)
    if 0 in (axis.n_tokens, axis.n_slots):
        return row_loss.sum(1).float(), g, torch.zeros(axis.n_tokens, device=q.device)
    row_scale = torch.zeros_like(row_loss)
    entries = axis.rows(axis.entries)
    for rows in _chunks(axis, objective):
        t = target.rows(axis, rows)
        student, parts = student_map_fwd(q, k, lse, axis, scale, rows, t)
        if objective == "pooled":
            return _pooled(student, t, axis, g.dtype)
        here = slice(rows.first, rows.first + rows.size)
        row = _coefficients(objective, parts, entries[:, here], axis.counts)
        terms = _g(q, student, t, g, row, axis, rows, objective)
        summed = terms.sum(0, dtype=torch.float64) * row.loss_scale
        row_loss[:, here] = torch.where(row.counted, summed, 0)
        row_scale[:, here] = row.row_scale
    return row_loss.sum(1).float(), g, axis.flat(row_scale).float()


def _chunks(axis: Axis, objective: str) -> list[Rows]:
    """Whole samples where the loss needs them at once, else rows for CHUNK_BYTES of S."""
    count = axis.length
    if objective in ("row", "mse", "kl"):
        tile_rows = CHUNK_BYTES // (axis.n_samples * axis.n_slots * 64 * 4)
        count = min(max(tile_rows // CHUNK_ROWS, 1) * CHUNK_ROWS, count)
    starts = range(0, axis.length, count)
    return [Rows(first, min(count, axis.length - first)) for first in starts]


def _g(
    q: Tensor,
    student: Tensor,
    target: Tensor,
    g: Tensor,
    row: Coefficients,
    axis: Axis,
    rows: Rows,
    objective: str,
) -> Tensor:
    """Writes the rows of G; the row sums of the loss's terms (slots, samples, rows)."""
    table = torch.stack((row.student, row.target, row.excess * row.gain, row.gain)).float()
    terms = torch.empty(axis.n_slots, axis.n_samples, rows.size, device=q.device)
    arguments = {
        **batch_arguments(axis, q, q, 1.0),
        **{"MAP": student, "G": g, "PARTS": terms, "COEFFICIENTS": table, "KL": objective == "kl"},
        **target_arguments(target),
        **rows.arguments(),
    }
    launch("g", _alignment_g_fwd_kernel, axis.map_grid(rows.size), arguments)
    return terms


def _coefficients(objective: str, parts: Tensor, entries: Tensor, counts: Tensor) -> Coefficients:
    """Of rows (samples, rows), from their statistics and the number of their entries."""
    max_s, max_t, dot, ss, tt, s1, t1 = parts.double().unbind(1)
    tiny = TINY.value
    unit_s, unit_t = max_s.masked_fill(max_s < tiny, 1), max_t.masked_fill(max_t < tiny, 1)
    dot, ss, tt = ((dot * unit_s * unit_t).sum(0), (ss * unit_s**2).sum(0), (tt * unit_t**2).sum(0))
    per_row = objective in ("row", "kl")
    n_rows, n_entries = counts.double().clamp(min=1).unsqueeze(2).unbind(1)
    if objective == "kl":
        return _kl_coefficients(s1.sum(0), t1.sum(0), entries, n_rows)
    if objective == "mse":
        one = torch.ones_like(dot)
        gain = _gain(one, one, dot, ss, tt)
        counted = entries > 0
        row_scale = torch.where(counted, 2 / n_entries / gain, 0)
        loss_scale = 1 / n_entries / gain**2
        return Coefficients(one, one, 0 * one, gain, row_scale, loss_scale, counted)
    max_s, max_t = max_s.amax(0), max_t.amax(0)
    norms = (dot, ss, tt)
    if not per_row:
        dot_all, ss_all, tt_all = (x.sum(1, keepdim=True).expand_as(x) for x in norms)
        norms = (dot_all, ss_all, tt_all)
        max_s, max_t = (x.amax(1, keepdim=True).expand_as(x) for x in (max_s, max_t))
    # A largest value may ignore NaN; the sums do not.
    zero = (torch.minimum(max_s, max_t) < tiny) & ~(norms[0] + norms[1] + norms[2]).isnan()
    student = norms[1].masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    target = norms[2].masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    gain = _gain(student, target, dot, ss, tt)
    counted = (entries > (1 if per_row else 0)) & ~zero
    weight = 1 / n_rows.expand_as(dot) if per_row else torch.ones_like(dot)
    row_scale = torch.where(counted, weight * student / gain, 0)
    excess = 1 - norms[0] * student * target
    return Coefficients(student, target, excess, gain, row_scale, weight / 2 / gain**2, counted)


def _gain(student: Tensor, target: Tensor, dot: Tensor, ss: Tensor, tt: Tensor) -> Tensor:
    """1 / |u| of each row, so that G keeps its digits in float16 when u is small."""
    s, t = ss * student**2, tt * target**2
    largest = torch.maximum(s, t)
    square = torch.maximum(s + t - 2 * dot * student * target, SMALLEST_DIFFERENCE**2 * largest)
    return square.masked_fill(largest == 0, 1).rsqrt().clamp(max=1e30)


def _kl_coefficients(sum_s: Tensor, sum_t: Tensor, entries: Tensor, n_rows: Tensor) -> Coefficients:
    zero = sum_t == 0
    counted = (entries > 1) & ~zero
    student = 1 / sum_s.masked_fill(entries == 0, 1)
    target = 1 / sum_t.masked_fill(zero, 1)
    one = torch.ones_like(student)
    weight = 1 / n_rows.expand_as(one)
    row_scale = torch.where(counted, student * weight, 0)
    return Coefficients(student, target, one, one, row_scale, weight, counted)


def _pooled(
    student: Tensor, target: Tensor, axis: Axis, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The authors' loss: see kernels/README.md. Element-wise over whole maps."""
    s = student.transpose(1, 2).flatten(2)
    if target.ndim == 2:
        t = axis.unpack_map(target).float()
    else:
        t = target.transpose(1, 2).flatten(2)
    if target.dtype == torch.float16:
        t = t / MAP_SCALE.value
    visual = axis.rows((axis.codes >= 0) & (axis.codes % 2 == 1), False)
    square = visual[:, :, None] & axis.visual_columns()[:, None, :]
    n = visual.sum(1)[:, None, None].double()
    s, t = torch.where(square, s, 0), torch.where(square, t, 0)
    keep = square & (s <= _threshold(s, square, n)) & (t <= _threshold(t, square, n)) & (t != 0)
    count = keep.sum(1).clamp(min=1)
    # Multiplied, not selected: a NaN fails every comparison and must still reach the loss.
    pooled_s = (s * keep).sum(1, dtype=torch.float64) / count
    pooled_t = (t * keep).sum(1, dtype=torch.float64) / count
    smallest = torch.minimum(pooled_s.amax(1), pooled_t.amax(1))[:, None]
    zero = smallest < TINY.value
    norm_s = pooled_s.norm(dim=1, keepdim=True).masked_fill(zero, 1)
    unit_s = pooled_s / norm_s
    u = unit_s - pooled_t / pooled_t.norm(dim=1, keepdim=True).masked_fill(zero, 1)
    loss = u.square().sum(1) / 2
    few = visual.sum(1) < 2
    column = (u - loss[:, None] * unit_s) / count
    column = column.masked_fill(zero | few[:, None], 0)
    largest = column.abs().amax(1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1)
    g = keep * (column / largest).float()[:, None, :]
    loss = torch.where(few, 0.0, torch.where(zero.squeeze(1), 1.0, loss))
    row_scale = axis.flat((largest / norm_s).expand(-1, axis.length))
    return loss.float(), axis.pack_map(g.to(dtype)), row_scale.float()


def _threshold(x: Tensor, square: Tensor, n: Tensor) -> Tensor:
    """mean + unbiased std over the visual square, invisible zeros included."""
    n = n.square()
    mean = x.sum((1, 2), keepdim=True, dtype=torch.float64) / n.clamp(min=1)
    deviation = torch.where(square, x - mean.to(x.dtype), 0).square()
    total = deviation.sum((1, 2), keepdim=True, dtype=torch.float64)
    return (mean + (total / (n - 1).clamp(min=1)).sqrt()).to(x.dtype)
