"""Alignment losses on stored maps: row statistics -> coefficients -> loss and G = dL/dS, and the
backward of the modular form. Mathematics: kernels/README.md.

Of a map of the student only G survives the forward, without a dimension (entries of about one),
with a float32 scale per row: float16 for float16 and bfloat16 inputs, else float32; float32 also
for `kl`, whose entries reach 1 / (smallest probability).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, head_dim_pad, launch, score_scale, strides
from cdfast_kernels.map_fwd import map_tile, visual_map_fwd
from cdfast_kernels.tl_common import (
    LOG2E,
    MAP_SCALE,
    TINY,
    exp_scores,
    is_live,
    load_sample,
    load_tile,
    map_ptrs,
    slots_up_to,
    store_tile,
    tile_offsets,
    visible,
    visible_t,
)

BLOCK_ROWS = 32
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
    # G is the stored map times row_scale; the loss of a row is loss_scale times its sum.
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
    target_scale,
    n_slots,
    n_tokens,
    tokens_per_sample,
    BLOCK_M: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    KL: tl.constexpr,
):
    """G of one (row tile, slot), and the row sums of the loss's terms. MAP and G may be one."""
    _sample, slot, rows, _n_0, entries, row_live, in_sample, token_base = map_tile(
        SAMPLES, CODES, SLOT_TILES, n_slots, tokens_per_sample, BLOCK_M, CONTIGUOUS
    )
    width = n_slots * 64
    s = tl.load(map_ptrs(MAP, token_base, rows, width, slot, 0, 64), mask=entries, other=0.0)
    t_ptrs = map_ptrs(TARGET, token_base, rows, width, slot, 0, 64)
    t = tl.load(t_ptrs, mask=entries, other=0.0).to(tl.float32) * target_scale
    row = COEFFICIENTS + token_base + rows
    student = tl.load(row, mask=row_live, other=0.0)[:, None]
    target = tl.load(row + n_tokens, mask=row_live, other=0.0)[:, None]
    if KL:
        floored = tl.where(s < TINY, TINY, s)
        s_hat = tl.where(entries, floored * student, 1.0)
        t_hat = t * target
        log_ratio = tl.log(tl.where(t_hat == 0, 1.0, t_hat)) - tl.log(s_hat)
        term = tl.where(t_hat == 0, 0.0, t_hat * log_ratio)
        g = tl.where(entries & (s >= TINY), 1.0 - t_hat / s_hat, 0.0)
    else:
        excess_gain = tl.load(row + 2 * n_tokens, mask=row_live, other=0.0)[:, None]
        gain = tl.load(row + 3 * n_tokens, mask=row_live, other=0.0)[:, None]
        s_hat = s * student
        u = (s_hat - t * target) * gain
        term = u * u
        g = u - s_hat * excess_gain
    tl.store(
        map_ptrs(G, token_base, rows, width, slot, 0, 64),
        g.to(G.dtype.element_ty),
        mask=in_sample[:, None],
    )
    part = PARTS + slot.to(tl.int64) * n_tokens + token_base + rows
    tl.store(part, tl.sum(term, 1), mask=in_sample)


def alignment_fwd(
    q: Tensor, k: Tensor, lse: Tensor, target: Tensor, axis: Axis, scale: float, objective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample (samples,), G (tokens, slots * 64) and its row scale (tokens,)."""
    device, half = q.device, q.dtype != torch.float32
    g_dtype = torch.float16 if half and objective != "kl" else torch.float32
    width = axis.n_slots * 64
    if 0 in (axis.n_tokens, axis.n_slots):
        loss = torch.zeros(axis.n_samples, device=device)
        g = torch.empty(axis.n_tokens, width, dtype=g_dtype, device=device)
        return loss, g, torch.zeros(axis.n_tokens, device=device)
    target = target.reshape(axis.n_tokens, width)
    student, parts = visual_map_fwd(q, k, lse, axis, scale, torch.float32, target)
    if objective == "pooled":
        return _pooled(student, target, axis, g_dtype)
    rows = _coefficients(objective, parts, axis)
    del parts
    # float32: G replaces S entry by entry.
    g = student if g_dtype == torch.float32 else torch.empty_like(student, dtype=g_dtype)
    gain = rows.excess * rows.gain
    table = torch.stack((rows.student, rows.target, gain, rows.gain)).float()
    terms = torch.empty(axis.n_slots, axis.n_tokens, device=device)
    _alignment_g_fwd_kernel[axis.map_grid(BLOCK_ROWS)](
        student,
        target,
        g,
        terms,
        table,
        axis.samples,
        axis.codes,
        axis.slot_tiles,
        1 / MAP_SCALE.value if target.dtype == torch.float16 else 1.0,
        axis.n_slots,
        axis.n_tokens,
        axis.tokens_per_sample,
        BLOCK_M=BLOCK_ROWS,
        CONTIGUOUS=axis.contiguous,
        KL=objective == "kl",
    )
    row_loss = terms.sum(0, dtype=torch.float64) * rows.loss_scale
    loss = axis.sum_rows(torch.where(rows.counted, row_loss, 0.0))
    return loss.float(), g, rows.row_scale.float()


def _coefficients(objective: str, parts: Tensor, axis: Axis) -> Coefficients:
    max_s, max_t, dot, ss, tt, s1, t1 = parts.double().unbind(1)
    tiny = TINY.value
    unit_s, unit_t = max_s.masked_fill(max_s < tiny, 1), max_t.masked_fill(max_t < tiny, 1)
    dot, ss, tt = ((dot * unit_s * unit_t).sum(0), (ss * unit_s**2).sum(0), (tt * unit_t**2).sum(0))
    per_row = objective in ("row", "kl")
    n_rows, n_entries = (axis.spread(x.double().clamp(min=1)) for x in axis.counts.unbind(1))
    if objective == "kl":
        return _kl_coefficients(s1.sum(0), t1.sum(0), n_rows, axis)
    if objective == "mse":
        one = torch.ones_like(dot)
        gain = _gain(one, one, dot, ss, tt)
        counted = axis.entries > 0
        row_scale = torch.where(counted, 2 / n_entries / gain, 0)
        loss_scale = 1 / n_entries / gain**2
        return Coefficients(one, one, 0 * one, gain, row_scale, loss_scale, counted)
    max_s, max_t = max_s.amax(0), max_t.amax(0)
    norms = (dot, ss, tt)
    if not per_row:
        dot_all, ss_all, tt_all = (axis.spread(axis.sum_rows(x)) for x in norms)
        norms = (dot_all, ss_all, tt_all)
        max_s, max_t = (axis.spread(axis.max_rows(x)) for x in (max_s, max_t))
    # A largest value may ignore NaN; the sums do not.
    zero = (torch.minimum(max_s, max_t) < tiny) & ~(norms[0] + norms[1] + norms[2]).isnan()
    student = norms[1].masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    target = norms[2].masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    gain = _gain(student, target, dot, ss, tt)
    counted = (axis.entries > (1 if per_row else 0)) & ~zero
    weight = 1 / n_rows if per_row else torch.ones_like(dot)
    row_scale = torch.where(counted, weight * student / gain, 0)
    excess = 1 - norms[0] * student * target
    return Coefficients(student, target, excess, gain, row_scale, weight / 2 / gain**2, counted)


def _gain(student: Tensor, target: Tensor, dot: Tensor, ss: Tensor, tt: Tensor) -> Tensor:
    """1 / |u| of each row, so that G keeps its digits in float16 when u is small."""
    s, t = ss * student**2, tt * target**2
    largest = torch.maximum(s, t)
    square = torch.maximum(s + t - 2 * dot * student * target, SMALLEST_DIFFERENCE**2 * largest)
    return square.masked_fill(largest == 0, 1).rsqrt().clamp(max=1e30)


def _kl_coefficients(sum_s: Tensor, sum_t: Tensor, n_rows: Tensor, axis: Axis) -> Coefficients:
    zero = sum_t == 0
    counted = (axis.entries > 1) & ~zero
    student = 1 / sum_s.masked_fill(axis.entries == 0, 1)
    target = 1 / sum_t.masked_fill(zero, 1)
    one = torch.ones_like(student)
    row_scale = torch.where(counted, student / n_rows, 0)
    return Coefficients(student, target, one, one, row_scale, 1 / n_rows, counted)


def _pooled(
    student: Tensor, target: Tensor, axis: Axis, g_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The authors' loss: see kernels/README.md. Element-wise over the stored maps."""
    s, t = axis.rows(student), axis.rows(target).float()
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
    row_scale = axis.spread((largest / norm_s).squeeze(1))
    return loss.float(), axis.flat(g.to(g_dtype)), row_scale.float()


def _threshold(x: Tensor, square: Tensor, n: Tensor) -> Tensor:
    """mean + unbiased std over the visual square, invisible zeros included."""
    n = n.square()
    mean = x.sum((1, 2), keepdim=True, dtype=torch.float64) / n.clamp(min=1)
    deviation = torch.where(square, x - mean.to(x.dtype), 0).square()
    total = deviation.sum((1, 2), keepdim=True, dtype=torch.float64)
    return (mean + (total / (n - 1).clamp(min=1)).sqrt()).to(x.dtype)


@triton.jit
def _alignment_bwd_dq_kernel(
    Q,
    K,
    LSE,
    DQ,
    DLSE,
    G,
    ROW_SCALE,
    DLOSS,
    SAMPLES,
    CODES,
    TILES,
    SLOT_TILES,
    scale,
    softmax_scale,
    inv_heads,
    n_slots,
    n_tiles,
    tokens_per_sample,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_lb,
    stride_ln,
    stride_lh,
    stride_eb,
    stride_en,
    stride_eh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """dq = scale sum_v P G/H k and dlse = -sum_v P G/H of one row tile of one head."""
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, first_live, end_live, _ = load_sample(SAMPLES, sample)
    row_0 = begin + (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if row_0 >= end:
        return
    sample, head = sample.to(tl.int64), head.to(tl.int64)
    token_base = sample * tokens_per_sample
    rows = row_0 + tl.arange(0, BLOCK_M)
    row_live, row_codes = is_live(
        CODES, token_base, rows, begin, end, first_live, end_live, CONTIGUOUS
    )
    row_at = row_0.to(tl.int64)
    q_ptrs = Q + sample * stride_qb + head * stride_qh + row_at * stride_qn
    q_ptrs += tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
    q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    l_base = sample * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ln
    lse = tl.load(LSE + l_base, mask=row_live, other=0.0)
    shift = lse if EXACT else lse * LOG2E
    r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0)
    r *= tl.load(DLOSS + sample) * inv_heads
    k_base = K + sample * stride_kb + head // GROUP * stride_kh
    k_base += tile_offsets(stride_kn, BLOCK_N, HEAD_DIM_PAD)
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(row_0 + BLOCK_M, end) - 1
    n_key_tiles = slots_up_to(TILES, sample, n_tiles, last, begin) * (64 // BLOCK_N)
    for i in tl.range(0, n_key_tiles):
        slot = i // (64 // BLOCK_N)
        n_0 = tl.load(SLOT_TILES + sample * n_slots + slot) * 64
        n_0 += i % (64 // BLOCK_N) * BLOCK_N
        columns = n_0 + tl.arange(0, BLOCK_N)
        column_live, column_codes = is_live(
            CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
        )
        k_ptrs = k_base + n_0.to(tl.int64) * stride_kn
        k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
        g_ptrs = map_ptrs(G, token_base, rows, n_slots * 64, slot, n_0 % 64, BLOCK_N)
        g = tl.load(g_ptrs, mask=row_live[:, None], other=0.0).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = visible(rows, row_codes, columns, column_codes, column_live, CONTIGUOUS)
        s = tl.where(seen, s, float("-inf"))
        ds = exp_scores(s - shift[:, None], EXACT) * (g * r[:, None])
        delta += tl.sum(ds, 1)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    in_sample = rows < end
    g_ptrs = DQ + sample * stride_gb + head * stride_gh + row_at * stride_gn
    store_tile(
        g_ptrs + tile_offsets(stride_gn, BLOCK_M, HEAD_DIM_PAD),
        tl.where(row_live[:, None], acc * softmax_scale, 0.0),
        in_sample,
        HEAD_DIM,
        HEAD_DIM_PAD,
    )
    e_ptrs = DLSE + sample * stride_eb + head * stride_eh + rows.to(tl.int64) * stride_en
    tl.store(e_ptrs, tl.where(row_live, -delta, 0.0), mask=in_sample)


@triton.jit
def _alignment_bwd_dk_kernel(
    Q,
    K,
    LSE,
    DK,
    G,
    ROW_SCALE,
    DLOSS,
    SAMPLES,
    CODES,
    BOUNDS,
    SLOT_TILES,
    scale,
    softmax_scale,
    inv_heads,
    n_slots,
    tokens_per_sample,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_lb,
    stride_ln,
    stride_lh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """dk of one key tile inside one slot; keys outside all slots have none (DK comes as zeros)."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    sample, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    begin, end, first_live, end_live, end_prefix = load_sample(SAMPLES, sample)
    sample, kv_head = sample.to(tl.int64), kv_head.to(tl.int64)
    slot = tl.program_id(1) // (64 // BLOCK_N)
    tile = tl.load(SLOT_TILES + sample * n_slots + slot)
    n_0 = tile * 64 + tl.program_id(1) % (64 // BLOCK_N) * BLOCK_N
    if (tile < 0) | (n_0 >= end):
        return
    token_base = sample * tokens_per_sample
    columns = n_0 + tl.arange(0, BLOCK_N)
    column_live, column_codes = is_live(
        CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
    )
    at = n_0.to(tl.int64)
    k_ptrs = K + sample * stride_kb + kv_head * stride_kh + at * stride_kn
    k_ptrs += tile_offsets(stride_kn, BLOCK_N, HEAD_DIM_PAD)
    k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
    dk = tl.zeros([BLOCK_N, HEAD_DIM_PAD], tl.float32)
    m_lo = tl.maximum(n_0, first_live)
    m_hi = end_live
    if not CONTIGUOUS:
        last = tl.minimum(n_0 + BLOCK_N, end) - 1
        own_end = tl.load(BOUNDS + (token_base + last) * 2 + 1)
        m_hi = tl.where(n_0 < end_prefix, end_live, own_end)
    dloss = tl.load(DLOSS + sample) * inv_heads
    q_base = Q + sample * stride_qb + tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
    for h in range(GROUP):
        head = kv_head * GROUP + h
        for m_0 in tl.range(m_lo, m_hi, BLOCK_M):
            rows = m_0 + tl.arange(0, BLOCK_M)
            row_at = tl.cast(m_0, tl.int64)
            row_live, row_codes = is_live(
                CODES, token_base, rows, begin, end, first_live, end_live, CONTIGUOUS
            )
            q_ptrs = q_base + head * stride_qh + row_at * stride_qn
            q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
            l_base = sample * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ln
            lse = tl.load(LSE + l_base, mask=row_live, other=0.0)
            shift = lse if EXACT else lse * LOG2E
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            seen = visible_t(rows, row_codes, columns, column_codes, row_live, CONTIGUOUS)
            s = tl.where(seen, s, float("-inf"))
            p = exp_scores(s - shift[None, :], EXACT)
            r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0) * dloss
            g_ptrs = map_ptrs(G, token_base, rows, n_slots * 64, slot, n_0 % 64, BLOCK_N)
            g = tl.load(g_ptrs, mask=row_live[:, None], other=0.0)
            ds = p * (tl.trans(g).to(tl.float32) * r[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    g_at = sample * stride_gb + kv_head * stride_gh + at * stride_gn
    store_tile(
        DK + g_at + tile_offsets(stride_gn, BLOCK_N, HEAD_DIM_PAD),
        dk * softmax_scale,
        column_live,
        HEAD_DIM,
        HEAD_DIM_PAD,
    )


def alignment_bwd(
    dloss: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    g: Tensor,
    row_scale: Tensor,
    axis: Axis,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dlse of the modular form: dS = P G/H, dlse = -sum_v P G/H."""
    dq, dk = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dlse = axis.empty_lse(q)
    if 0 in (axis.n_tokens, axis.n_slots):
        return dq, dk, dlse.zero_()
    heads, dim = q.shape[-2:]
    launch_scale, exact = score_scale(scale, q)
    shape = {
        "HEADS": heads,
        "GROUP": heads // k.shape[-2],
        "HEAD_DIM": dim,
        "HEAD_DIM_PAD": head_dim_pad(dim),
        "EXACT": exact,
        "CONTIGUOUS": axis.contiguous,
    }
    settings = launch("align_dq", q)
    _alignment_bwd_dq_kernel[axis.row_grid(heads, settings.BLOCK_M)](
        q,
        k,
        lse,
        dq,
        dlse,
        g,
        row_scale,
        dloss,
        axis.samples,
        axis.codes,
        axis.tiles,
        axis.slot_tiles,
        launch_scale,
        scale,
        1 / heads,
        axis.n_slots,
        axis.tiles.shape[1],
        axis.tokens_per_sample,
        *strides(q),
        *strides(k),
        *strides(dq),
        *axis.lse_strides(lse),
        *axis.lse_strides(dlse),
        **shape,
        **settings.kwargs(),
    )
    settings = launch("align_dk", q)
    grid = (axis.n_samples * k.shape[-2], axis.n_slots * (64 // settings.BLOCK_N))
    _alignment_bwd_dk_kernel[grid](
        q,
        k,
        lse,
        dk,
        g,
        row_scale,
        dloss,
        axis.samples,
        axis.codes,
        axis.bounds,
        axis.slot_tiles,
        launch_scale,
        scale,
        1 / heads,
        axis.n_slots,
        axis.tokens_per_sample,
        *strides(q),
        *strides(k),
        *strides(dk),
        *axis.lse_strides(lse),
        **shape,
        **settings.kwargs(),
    )
    return dq, dk, dlse
