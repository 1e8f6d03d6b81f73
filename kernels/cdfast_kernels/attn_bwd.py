"""Flash attention backward, with the gradient of the LSE and of an alignment loss.

    dS_h = P_h (dO_h V^T + G/H - delta_h),   delta_h = D_h + (1/H) sum_v P_h G - dlse_h
    dq_h = scale dS_h k,   dk = scale sum over the group of dS_h^T q_h,   dv = sum of P_h^T dO_h

Three kernels: delta (the usual preprocess and the second pass over visual columns), dq, and dk with
dv. Each output element is written by one program, so the results do not depend on timing. G enters
as (tokens, slots * 64) without a dimension, times a row scale, times the gradient of the sample's
loss.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, head_dim_pad, launch, score_scale, strides
from cdfast_kernels.tl_common import (
    LOG2E,
    exp_scores,
    is_live,
    key_tiles,
    load_sample,
    load_tile,
    map_ptrs,
    masked_tile,
    slot_of,
    slots_up_to,
    store_tile,
    tile_offsets,
    visible,
    visible_t,
)


@triton.jit
def _attn_bwd_delta_kernel(
    Q,
    K,
    OUT,
    DOUT,
    LSE,
    DLSE,
    DELTA,
    G,
    ROW_SCALE,
    DLOSS,
    SAMPLES,
    CODES,
    TILES,
    SLOT_TILES,
    scale,
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
    stride_ob,
    stride_on,
    stride_oh,
    stride_db,
    stride_dn,
    stride_dh,
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
    HAS_DLSE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """delta of one row tile of one head, 0 at padding; stored like the LSE."""
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
    o_ptrs = OUT + sample * stride_ob + head * stride_oh + row_at * stride_on
    d_ptrs = DOUT + sample * stride_db + head * stride_dh + row_at * stride_dn
    o_ptrs += tile_offsets(stride_on, BLOCK_M, HEAD_DIM_PAD)
    d_ptrs += tile_offsets(stride_dn, BLOCK_M, HEAD_DIM_PAD)
    o = load_tile(o_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    do = load_tile(d_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse_rows = rows.to(tl.int64)
    if HAS_DLSE:
        e_ptrs = DLSE + sample * stride_eb + head * stride_eh + lse_rows * stride_en
        delta -= tl.load(e_ptrs, mask=row_live, other=0.0)
    l_base = sample * stride_lb + head * stride_lh + lse_rows * stride_ln
    if ALIGN:
        q_ptrs = Q + sample * stride_qb + head * stride_qh + row_at * stride_qn
        q_ptrs += tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
        q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
        lse = tl.load(LSE + l_base, mask=row_live, other=0.0)
        shift = lse if EXACT else lse * LOG2E
        k_base = K + sample * stride_kb + head // GROUP * stride_kh
        k_base += tile_offsets(stride_kn, BLOCK_N, HEAD_DIM_PAD)
        part = tl.zeros([BLOCK_M], tl.float32)
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
            part += tl.sum(exp_scores(s - shift[:, None], EXACT) * g, 1)
        r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0)
        delta += part * (r * tl.load(DLOSS + sample) * inv_heads)
    tl.store(DELTA + l_base, tl.where(row_live, delta, 0.0), mask=rows < end)


@triton.jit
def _d_scores(dp_left, dp_right, p, g, r, delta, ALIGN: tl.constexpr, ACC_INIT: tl.constexpr):
    """dS = P (dP + G r - delta), dP = dp_left @ dp_right; g, r and delta broadcast against P."""
    if ALIGN and ACC_INIT:
        dp = tl.dot(dp_left, dp_right, g * r - delta, input_precision="ieee")
        ds = p * dp
    elif ALIGN:
        # Kept apart, or the compiler folds G into the accumulator, which spills on sm_80.
        ds = p * (tl.dot(dp_left, dp_right, input_precision="ieee") - delta) + p * (g * r)
    else:
        ds = p * (tl.dot(dp_left, dp_right, input_precision="ieee") - delta)
    return ds


@triton.jit
def _dq_tile(
    acc,
    q,
    do,
    shift,
    delta,
    r,
    k_ptrs,
    v_ptrs,
    G,
    token_base,
    rows,
    row_live,
    row_codes,
    columns,
    column_codes,
    column_live,
    n_0,
    slot,
    width,
    scale,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC_INIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    k = load_tile(k_ptrs, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
    v = load_tile(v_ptrs, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        seen = visible(rows, row_codes, columns, column_codes, column_live, CONTIGUOUS)
        s = tl.where(seen, s, float("-inf"))
    p = exp_scores(s - shift[:, None], EXACT)
    g = 0.0
    if ALIGN:
        # One comparison: the interpreter rejects a mask made of a vector & a scalar.
        has_g = tl.where(row_live, slot, -1) >= 0
        g_ptrs = map_ptrs(G, token_base, rows, width, tl.maximum(slot, 0), n_0 % 64, BLOCK_N)
        g = tl.load(g_ptrs, mask=has_g[:, None], other=0.0).to(tl.float32)
    ds = _d_scores(do, tl.trans(v), p, g, r[:, None], delta[:, None], ALIGN, ACC_INIT)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _attn_bwd_dq_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DQ,
    G,
    ROW_SCALE,
    DLOSS,
    SAMPLES,
    CODES,
    BOUNDS,
    TILES,
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
    stride_vb,
    stride_vn,
    stride_vh,
    stride_db,
    stride_dn,
    stride_dh,
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
    ALIGN: tl.constexpr,
    ACC_INIT: tl.constexpr,
):
    """dq of one row tile of one head (strides g: of DQ)."""
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, first_live, end_live, end_prefix = load_sample(SAMPLES, sample)
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
    d_ptrs = DOUT + sample * stride_db + head * stride_dh + row_at * stride_dn
    q_ptrs += tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
    d_ptrs += tile_offsets(stride_dn, BLOCK_M, HEAD_DIM_PAD)
    q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    do = load_tile(d_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    l_base = sample * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ln
    lse = tl.load(LSE + l_base, mask=row_live, other=0.0)
    shift = lse if EXACT else lse * LOG2E
    delta = tl.load(DELTA + l_base, mask=row_live, other=0.0)
    r = delta
    if ALIGN:
        r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0)
        r *= tl.load(DLOSS + sample) * inv_heads
    k_base = K + sample * stride_kb + head // GROUP * stride_kh
    k_base += tile_offsets(stride_kn, BLOCK_N, HEAD_DIM_PAD)
    v_base = V + sample * stride_vb + head // GROUP * stride_vh
    v_base += tile_offsets(stride_vn, BLOCK_N, HEAD_DIM_PAD)

    acc = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
    width = n_slots * 64
    full_lo, full_hi, a_lo, n_a, b_lo, n_masked = key_tiles(
        BOUNDS,
        token_base,
        row_0,
        end,
        first_live,
        end_live,
        end_prefix,
        BLOCK_M,
        BLOCK_N,
        CONTIGUOUS,
    )
    if CONTIGUOUS:
        for n_0 in tl.range(full_lo, full_hi, BLOCK_N):
            at = tl.cast(n_0, tl.int64)
            columns = n_0 + tl.arange(0, BLOCK_N)
            slot = -1
            if ALIGN:
                slot = slot_of(TILES, sample, n_tiles, n_0, begin)
            acc = _dq_tile(
                acc,
                q,
                do,
                shift,
                delta,
                r,
                k_base + at * stride_kn,
                v_base + at * stride_vn,
                G,
                token_base,
                rows,
                row_live,
                row_codes,
                columns,
                columns,
                columns >= 0,
                n_0,
                slot,
                width,
                scale,
                False,
                EXACT,
                ALIGN,
                ACC_INIT,
                HEAD_DIM,
                HEAD_DIM_PAD,
                BLOCK_N,
                CONTIGUOUS,
            )
    for i in tl.range(0, n_masked):
        n_0 = masked_tile(i, a_lo, n_a, b_lo, BLOCK_N)
        at = n_0.to(tl.int64)
        columns = n_0 + tl.arange(0, BLOCK_N)
        column_live, column_codes = is_live(
            CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
        )
        slot = -1
        if ALIGN:
            slot = slot_of(TILES, sample, n_tiles, n_0, begin)
        acc = _dq_tile(
            acc,
            q,
            do,
            shift,
            delta,
            r,
            k_base + at * stride_kn,
            v_base + at * stride_vn,
            G,
            token_base,
            rows,
            row_live,
            row_codes,
            columns,
            column_codes,
            column_live,
            n_0,
            slot,
            width,
            scale,
            True,
            EXACT,
            ALIGN,
            ACC_INIT,
            HEAD_DIM,
            HEAD_DIM_PAD,
            BLOCK_N,
            CONTIGUOUS,
        )
    g_ptrs = DQ + sample * stride_gb + head * stride_gh + row_at * stride_gn
    store_tile(
        g_ptrs + tile_offsets(stride_gn, BLOCK_M, HEAD_DIM_PAD),
        tl.where(row_live[:, None], acc * softmax_scale, 0.0),
        rows < end,
        HEAD_DIM,
        HEAD_DIM_PAD,
    )


@triton.jit
def _attn_bwd_dkdv_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DK,
    DV,
    G,
    ROW_SCALE,
    DLOSS,
    SAMPLES,
    CODES,
    BOUNDS,
    TILES,
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
    stride_vb,
    stride_vn,
    stride_vh,
    stride_db,
    stride_dn,
    stride_dh,
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
    ALIGN: tl.constexpr,
    ACC_INIT: tl.constexpr,
):
    """dk and dv of one key tile of one key head (strides g: of DK and DV); the first key tiles are
    the longest and start first. The heads of a group are summed here, without atomics."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    sample, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    begin, end, first_live, end_live, end_prefix = load_sample(SAMPLES, sample)
    n_0 = (begin // BLOCK_N + tl.program_id(1)) * BLOCK_N
    if n_0 >= end:
        return
    sample, kv_head = sample.to(tl.int64), kv_head.to(tl.int64)
    token_base = sample * tokens_per_sample
    columns = n_0 + tl.arange(0, BLOCK_N)
    column_live, column_codes = is_live(
        CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
    )
    at = n_0.to(tl.int64)
    k_ptrs = K + sample * stride_kb + kv_head * stride_kh + at * stride_kn
    v_ptrs = V + sample * stride_vb + kv_head * stride_vh + at * stride_vn
    k_ptrs += tile_offsets(stride_kn, BLOCK_N, HEAD_DIM_PAD)
    v_ptrs += tile_offsets(stride_vn, BLOCK_N, HEAD_DIM_PAD)
    k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
    v = load_tile(v_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
    dk = tl.zeros([BLOCK_N, HEAD_DIM_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM_PAD], tl.float32)

    # Rows that see a key of the tile: from the tile's first key to the end of its last segment.
    m_lo = tl.maximum(n_0, first_live)
    m_hi = end_live
    if not CONTIGUOUS:
        last = tl.minimum(n_0 + BLOCK_N, end) - 1
        own_end = tl.load(BOUNDS + (token_base + last) * 2 + 1)
        m_hi = tl.where(n_0 < end_prefix, end_live, own_end)
    # A tile without a live key has no work.
    m_hi = tl.where((n_0 + BLOCK_N > first_live) & (n_0 < end_live), m_hi, m_lo)
    width = n_slots * 64
    slot = -1
    dloss = 0.0
    if ALIGN:
        slot = slot_of(TILES, sample, n_tiles, n_0, begin)
        dloss = tl.load(DLOSS + sample) * inv_heads
    q_base = Q + sample * stride_qb + tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
    d_base = DOUT + sample * stride_db + tile_offsets(stride_dn, BLOCK_M, HEAD_DIM_PAD)
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
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [BLOCK_N, BLOCK_M]
            seen = visible_t(rows, row_codes, columns, column_codes, row_live, CONTIGUOUS)
            s = tl.where(seen, s, float("-inf"))
            p = exp_scores(s - shift[None, :], EXACT)
            d_ptrs = d_base + head * stride_dh + row_at * stride_dn
            do = load_tile(d_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            delta = tl.load(DELTA + l_base, mask=row_live, other=0.0)
            g = 0.0
            r = delta
            if ALIGN:
                r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0) * dloss
                has_g = tl.where(row_live, slot, -1) >= 0
                g_ptrs = map_ptrs(
                    G, token_base, rows, width, tl.maximum(slot, 0), n_0 % 64, BLOCK_N
                )
                g = tl.load(g_ptrs, mask=has_g[:, None], other=0.0)
                g = tl.trans(g).to(tl.float32)
            ds = _d_scores(v, tl.trans(do), p, g, r[None, :], delta[None, :], ALIGN, ACC_INIT)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    in_sample = (columns >= begin) & (columns < end)
    g_at = sample * stride_gb + kv_head * stride_gh + at * stride_gn
    g_at += tile_offsets(stride_gn, BLOCK_N, HEAD_DIM_PAD)
    dk = tl.where(column_live[:, None], dk * softmax_scale, 0.0)
    dv = tl.where(column_live[:, None], dv, 0.0)
    store_tile(DK + g_at, dk, in_sample, HEAD_DIM, HEAD_DIM_PAD)
    store_tile(DV + g_at, dv, in_sample, HEAD_DIM, HEAD_DIM_PAD)


class Alignment(NamedTuple):
    """dL/dS of a batch: G (tokens, slots * 64), its row scale (tokens,), dloss (samples,)."""

    g: Tensor
    row_scale: Tensor
    dloss: Tensor


def attn_bwd(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    axis: Axis,
    scale: float,
    alignment: Alignment | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv (contiguous, 0 at padding)."""
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if 0 in (axis.n_samples, axis.length):
        return dq, dk, dv
    heads, dim = q.shape[-2:]
    delta = axis.empty_lse(q)
    launch_scale, exact = score_scale(scale, q)
    # Tensors that a kernel without alignment never reads stand in for those it has not.
    g, row_scale, dloss = alignment if alignment is not None else (delta, delta, delta)
    shape = {
        "HEADS": heads,
        "GROUP": heads // k.shape[-2],
        "HEAD_DIM": dim,
        "HEAD_DIM_PAD": head_dim_pad(dim),
        "EXACT": exact,
        "CONTIGUOUS": axis.contiguous,
        "ALIGN": alignment is not None,
    }
    sizes = (axis.n_slots, axis.tiles.shape[1], axis.tokens_per_sample)
    settings = launch("delta", q)
    _attn_bwd_delta_kernel[axis.row_grid(heads, settings.BLOCK_M)](
        q,
        k,
        out,
        d_out,
        lse,
        lse if d_lse is None else d_lse,
        delta,
        g,
        row_scale,
        dloss,
        axis.samples,
        axis.codes,
        axis.tiles,
        axis.slot_tiles,
        launch_scale,
        1 / heads,
        *sizes,
        *strides(q),
        *strides(k),
        *strides(out),
        *strides(d_out),
        *axis.lse_strides(lse),
        *axis.lse_strides(lse if d_lse is None else d_lse),
        HAS_DLSE=d_lse is not None,
        **shape,
        **settings.kwargs(),
    )
    numbers = (launch_scale, scale, 1 / heads, *sizes)
    inputs = (*strides(q), *strides(k), *strides(v), *strides(d_out))
    tables = (axis.samples, axis.codes, axis.bounds, axis.tiles)
    settings = launch("dq", q)
    _attn_bwd_dq_kernel[axis.row_grid(heads, settings.BLOCK_M)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        dq,
        g,
        row_scale,
        dloss,
        *tables,
        *numbers,
        *inputs,
        *strides(dq),
        *axis.lse_strides(lse),
        ACC_INIT=settings.acc_init,
        **shape,
        **settings.kwargs(),
    )
    settings = launch("dkdv", q)
    _attn_bwd_dkdv_kernel[axis.key_grid(k.shape[-2], settings.BLOCK_N)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        dk,
        dv,
        g,
        row_scale,
        dloss,
        *tables,
        *numbers,
        *inputs,
        *strides(dk),
        *axis.lse_strides(lse),
        ACC_INIT=settings.acc_init,
        **shape,
        **settings.kwargs(),
    )
    return dq, dk, dv
