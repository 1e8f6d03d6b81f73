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
from cdfast_kernels.map_fwd import (
    N_STATISTICS,
    Rows,
    Target,
    map_program,
    student_map_fwd,
    target_arguments,
)
from cdfast_kernels.tl_common import MAP_SCALE, MAP_TILE, TINY, load_sample, panel_ptrs

# float32 bytes of S that exist at a time where a loss can be formed row by row, and the multiple
# that a chunk of rows is rounded to.
CHUNK_BYTES = 64 * 2**20
CHUNK_ROWS = 128
# Relative to the row's norm: below it G keeps an absolute error of one rounding.
SMALLEST_DIFFERENCE = tl.constexpr(1e-3)


class Coefficients(NamedTuple):
    """Numbers of each row of a chunk, from which G and the loss are formed entry by entry.

    With u = (student * S - target * T) * gain: G = u - student * S * excess_gain is what is stored,
    times ROW_SCALE dL/dS; the loss of a row is loss_scale times its sum of u^2. For `kl`: student *
    S and target * T are the renormalised rows.

    Attributes:
        table: float32 (4, samples, rows) student, target, excess_gain and gain.
        loss_scale: float64 (samples, rows), 0 in rows that do not count.
    """

    table: Tensor
    loss_scale: Tensor


@triton.jit
def _inverse_difference(student, target, dot, ss, tt):
    """1 / |u| of each row, so that G keeps its digits in float16 when u is small."""
    s, t = ss * student * student, tt * target * target
    largest = tl.maximum(s, t)
    square = s + t - 2 * dot * student * target
    square = tl.maximum(square, SMALLEST_DIFFERENCE * SMALLEST_DIFFERENCE * largest)
    return tl.minimum(1 / tl.sqrt(tl.where(largest == 0, 1.0, square)), 1e30)


@triton.jit
def _row_coefficients_kernel(
    PARTS,
    COEFFICIENTS,
    LOSS_SCALE,
    ROW_SCALE,
    SAMPLES,
    ENTRIES,
    COUNTS,
    n_slots,
    tokens_per_sample,
    first_row,
    n_rows,
    BLOCK_M: tl.constexpr,
    OBJECTIVE: tl.constexpr,
):
    """The coefficients of losses that are sums over rows: "row", "mse" and "kl". In float64."""
    sample = tl.program_id(0).to(tl.int64)
    begin, end, _, _, _ = load_sample(SAMPLES, sample)
    place = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_chunk = place < n_rows
    token = sample * tokens_per_sample + begin + first_row + place
    in_sample = in_chunk & (begin + first_row + place < end)
    entries = tl.load(ENTRIES + token, mask=in_sample, other=0)
    step = tl.num_programs(0).to(tl.int64) * n_rows
    at = sample * n_rows + place
    largest_s = tl.zeros([BLOCK_M], tl.float32)
    largest_t = tl.zeros([BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_M], tl.float64)
    ss = tl.zeros([BLOCK_M], tl.float64)
    tt = tl.zeros([BLOCK_M], tl.float64)
    s1 = tl.zeros([BLOCK_M], tl.float64)
    t1 = tl.zeros([BLOCK_M], tl.float64)
    for slot in tl.range(0, n_slots):
        part = PARTS + tl.cast(slot, tl.int64) * N_STATISTICS * step + at
        max_s = tl.load(part, mask=in_sample, other=0.0)
        max_t = tl.load(part + step, mask=in_sample, other=0.0)
        unit_s = tl.where(max_s < TINY, 1.0, max_s).to(tl.float64)
        unit_t = tl.where(max_t < TINY, 1.0, max_t).to(tl.float64)
        dot += tl.load(part + 2 * step, mask=in_sample, other=0.0) * unit_s * unit_t
        ss += tl.load(part + 3 * step, mask=in_sample, other=0.0) * unit_s * unit_s
        tt += tl.load(part + 4 * step, mask=in_sample, other=0.0) * unit_t * unit_t
        s1 += tl.load(part + 5 * step, mask=in_sample, other=0.0)
        t1 += tl.load(part + 6 * step, mask=in_sample, other=0.0)
        largest_s, largest_t = tl.maximum(largest_s, max_s), tl.maximum(largest_t, max_t)
    sample_rows = tl.maximum(tl.load(COUNTS + sample * 2), 1).to(tl.float64)
    sample_entries = tl.maximum(tl.load(COUNTS + sample * 2 + 1), 1).to(tl.float64)
    one = tl.full([BLOCK_M], 1.0, tl.float64)
    if OBJECTIVE == "kl":
        zero = t1 == 0
        student, target = 1 / tl.where(s1 == 0, 1.0, s1), 1 / tl.where(zero, 1.0, t1)
        excess_gain, gain = one, one
        counted = (entries > 1) & (zero == 0)
        row_scale, loss_scale = student / sample_rows, one / sample_rows
    elif OBJECTIVE == "mse":
        student, target = one, one
        gain = _inverse_difference(student, target, dot, ss, tt)
        excess_gain = 0 * one
        counted = entries > 0
        row_scale, loss_scale = 2 / sample_entries / gain, 1 / sample_entries / (gain * gain)
    else:
        # A largest value may ignore NaN; the sums do not.
        sums = dot + ss + tt
        zero = (tl.minimum(largest_s, largest_t) < TINY) & (sums == sums)
        student = tl.where(zero, 0.0, 1 / tl.sqrt(tl.where(zero, 1.0, ss)))
        target = tl.where(zero, 0.0, 1 / tl.sqrt(tl.where(zero, 1.0, tt)))
        gain = _inverse_difference(student, target, dot, ss, tt)
        excess_gain = (1 - dot * student * target) * gain
        counted = (entries > 1) & (zero == 0)
        row_scale, loss_scale = student / sample_rows / gain, 0.5 / sample_rows / (gain * gain)
    row_scale = tl.where(counted, row_scale, 0.0).to(tl.float32)
    tl.store(ROW_SCALE + token, row_scale, mask=in_sample)
    tl.store(LOSS_SCALE + at, tl.where(counted, loss_scale, 0.0), mask=in_chunk)
    tl.store(COEFFICIENTS + at, student.to(tl.float32), mask=in_chunk)
    tl.store(COEFFICIENTS + step + at, target.to(tl.float32), mask=in_chunk)
    tl.store(COEFFICIENTS + 2 * step + at, excess_gain.to(tl.float32), mask=in_chunk)
    tl.store(COEFFICIENTS + 3 * step + at, gain.to(tl.float32), mask=in_chunk)


@triton.jit
def _alignment_g_fwd_kernel(
    MAP,
    TARGET,
    G,
    TERMS,
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
    # Whole rows are read: a mask of entries would split the loads. What is no entry holds 0.
    held = in_panel[:, None]
    s = tl.load(panel_ptrs(MAP, chunk, rows, 0, MAP_TILE), mask=held, other=0.0)
    t_ptrs = panel_ptrs(TARGET, panel if TARGET_IN_PANELS else chunk, rows, 0, MAP_TILE)
    t = tl.load(t_ptrs, mask=held, other=0.0).to(tl.float32) * target_scale
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
    tl.store(TERMS + slot * step + at, tl.sum(term, 1), mask=in_chunk)


@triton.jit
def _row_loss_kernel(
    TERMS,
    LOSS_SCALE,
    ROW_LOSS,
    n_slots,
    first_row,
    n_rows,
    length,
    BLOCK_M: tl.constexpr,
):
    """Loss of each row: its terms over the slots, in float64."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_chunk = place < n_rows
    at = sample * n_rows + place
    step = tl.num_programs(0).to(tl.int64) * n_rows
    total = tl.zeros([BLOCK_M], tl.float64)
    for slot in tl.range(0, n_slots):
        total += tl.load(TERMS + tl.cast(slot, tl.int64) * step + at, mask=in_chunk, other=0.0)
    loss_scale = tl.load(LOSS_SCALE + at, mask=in_chunk, other=0.0)
    # Rows that do not count may hold anything.
    loss = tl.where(loss_scale == 0, 0.0, total * loss_scale)
    tl.store(ROW_LOSS + sample * length + first_row + place, loss, mask=in_chunk)


def g_dtype(q_dtype: torch.dtype, objective: str) -> torch.dtype:
    half = q_dtype != torch.float32 and objective != "kl"
    return torch.float16 if half else torch.float32


def alignment_fwd(
    q: Tensor, k: Tensor, lse: Tensor, target: Target, axis: Axis, scale: float, objective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample (samples,), G (map rows, 64) and its row scale (tokens,)."""
    g = torch.empty(axis.map_rows, 64, dtype=g_dtype(q.dtype, objective), device=q.device)
    if 0 in (axis.n_tokens, axis.n_slots):
        loss = torch.zeros(axis.n_samples, device=q.device)
        return loss, g, torch.zeros(axis.n_tokens, device=q.device)
    row_scale = torch.empty(axis.n_tokens, device=q.device)
    shape = (axis.n_samples, axis.length)
    row_loss = torch.empty(shape, dtype=torch.float64, device=q.device)
    for rows in _chunks(axis, objective):
        t = target.rows(axis, rows)
        student, parts = student_map_fwd(q, k, lse, axis, scale, rows, t)
        if objective == "pooled":
            return _pooled(student, t, axis, g.dtype)
        row = _coefficients(objective, q, parts, row_scale, axis, rows)
        terms = torch.empty(axis.n_slots, axis.n_samples, rows.size, device=q.device)
        arguments = {
            **batch_arguments(axis, q, k, scale),
            **{"MAP": student, "G": g, "TERMS": terms, "COEFFICIENTS": row.table},
            **{"LOSS_SCALE": row.loss_scale, "ROW_LOSS": row_loss, "length": axis.length},
            **target_arguments(t),
            **rows.arguments(),
            "KL": objective == "kl",
        }
        launch("rows", _alignment_g_fwd_kernel, axis.map_grid(rows.size), arguments)
        launch("rows", _row_loss_kernel, axis.sample_grid(rows.size), arguments)
    return row_loss.sum(1).float(), g, row_scale


def _chunks(axis: Axis, objective: str) -> list[Rows]:
    """Whole samples where the loss needs them at once, else rows for CHUNK_BYTES of S."""
    count = axis.length
    if objective in ("row", "mse", "kl"):
        tile_rows = CHUNK_BYTES // (axis.n_samples * axis.n_slots * 64 * 4)
        count = min(max(tile_rows // CHUNK_ROWS, 1) * CHUNK_ROWS, count)
    starts = range(0, axis.length, count)
    return [Rows(first, min(count, axis.length - first)) for first in starts]


def _coefficients(
    objective: str, q: Tensor, parts: Tensor, row_scale: Tensor, axis: Axis, rows: Rows
) -> Coefficients:
    """From the statistics of a chunk of rows; writes their part of `row_scale`."""
    if objective == "map":
        return _map_coefficients(parts, row_scale, axis)
    shape = (axis.n_samples, rows.size)
    table = torch.empty(4, *shape, device=q.device)
    loss_scale = torch.empty(shape, dtype=torch.float64, device=q.device)
    arguments = {
        **{"Q": q, "PARTS": parts, "COEFFICIENTS": table, "LOSS_SCALE": loss_scale},
        **{"ROW_SCALE": row_scale, "SAMPLES": axis.samples, "ENTRIES": axis.entries},
        **{"COUNTS": axis.counts, "n_slots": axis.n_slots, "OBJECTIVE": objective},
        "tokens_per_sample": axis.tokens_per_sample,
        **rows.arguments(),
    }
    launch("rows", _row_coefficients_kernel, axis.sample_grid(rows.size), arguments)
    return Coefficients(table, loss_scale)


def _map_coefficients(parts: Tensor, row_scale: Tensor, axis: Axis) -> Coefficients:
    """`map` normalises by the norms of whole samples, but scales G row by row, as `row` does."""
    max_s, max_t, dot, ss, tt, _, _ = parts.double().unbind(1)
    tiny = TINY.value
    unit_s, unit_t = max_s.masked_fill(max_s < tiny, 1), max_t.masked_fill(max_t < tiny, 1)
    dot, ss, tt = ((dot * unit_s * unit_t).sum(0), (ss * unit_s**2).sum(0), (tt * unit_t**2).sum(0))
    dot_all, ss_all, tt_all = (x.sum(1, keepdim=True) for x in (dot, ss, tt))
    largest_s, largest_t = (x.amax((0, 2))[:, None] for x in (max_s, max_t))
    # A largest value may ignore NaN; the sums do not.
    zero = (torch.minimum(largest_s, largest_t) < tiny) & ~(dot_all + ss_all + tt_all).isnan()
    student = ss_all.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    target = tt_all.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    s, t = ss * student**2, tt * target**2
    largest = torch.maximum(s, t)
    square = s + t - 2 * dot * student * target
    square = torch.maximum(square, SMALLEST_DIFFERENCE.value**2 * largest)
    gain = square.masked_fill(largest == 0, 1).rsqrt().clamp(max=1e30)
    counted = (axis.rows(axis.entries) > 0) & ~zero
    row_scale.copy_(axis.flat(torch.where(counted, student / gain, 0)))
    excess_gain = (1 - dot_all * student * target) * gain
    rows = (x.expand_as(gain) for x in (student, target, excess_gain, gain))
    loss_scale = torch.where(counted, 0.5 / gain**2, 0)
    return Coefficients(torch.stack(list(rows)).float(), loss_scale)


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
