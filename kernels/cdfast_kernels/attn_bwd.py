"""Flash attention backward, with the gradient of the LSE and of an alignment loss.

    dS_h = P_h (dO_h V^T + G/H - delta_h),   delta_h = D_h + (1/H) sum_v P_h G - dlse_h
    dq_h = scale dS_h k,   dk = scale sum over the group of dS_h^T q_h,   dv = sum of P_h^T dO_h

Three kernels: delta (the usual preprocess and the second pass over visual columns), dq, and dk with
dv. The modular form of the loss, dS_h = P_h G/H with dlse_h = -(1/H) sum_v P_h G, has a dq kernel
of its own that visits slots only, and the dk kernel without its attention terms. Each output
element is written by one program, so the results do not depend on timing. G enters as stored
(panels, without a dimension), times a row scale, times the gradient of the sample's loss.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, batch_arguments, launch, strides
from cdfast_kernels.tl_common import (
    MAP_TILE,
    exp_scores,
    is_live,
    key_tiles,
    load_panel,
    load_rows,
    load_sample,
    load_tile,
    masked_tile,
    panel_of,
    row_program,
    row_ptrs,
    score_shift,
    slots_up_to,
    store_tile,
    tile_offsets,
    tile_ptrs,
    visible,
    visible_t,
)


@triton.jit
def _graded_tile(
    i,
    q,
    shift,
    k_base,
    stride_kn,
    G,
    SLOT_TILES,
    PANELS,
    CODES,
    sample,
    n_slots,
    token_base,
    begin,
    end,
    first_live,
    end_live,
    rows,
    row_live,
    row_codes,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """P G on the i-th key tile of the sample's slots, and its keys."""
    nth_slot = i * BLOCK_N // MAP_TILE
    slot = sample * n_slots + nth_slot
    n_0 = tl.load(SLOT_TILES + slot) * MAP_TILE + (i * BLOCK_N - nth_slot * MAP_TILE)
    base, panel_end = tl.load(PANELS + slot * 3), tl.load(PANELS + slot * 3 + 2)
    columns = n_0 + tl.arange(0, BLOCK_N)
    column_live, column_codes = is_live(
        CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
    )
    k_ptrs = k_base + n_0.to(tl.int64) * stride_kn
    k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
    g = load_panel(G, base, panel_end, rows, row_live, n_0, BLOCK_N).to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = visible(rows, row_codes, columns, column_codes, column_live, CONTIGUOUS)
    s = tl.where(seen, s, float("-inf"))
    return k, exp_scores(s - shift[:, None], EXACT) * g


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
    PANELS,
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
    (
        sample,
        head,
        token_base,
        begin,
        end,
        first_live,
        end_live,
        _end_prefix,
        row_0,
        rows,
        row_live,
        row_codes,
    ) = row_program(SAMPLES, CODES, tokens_per_sample, HEADS, BLOCK_M, CONTIGUOUS)
    if row_0 >= end:
        return
    o_ptrs = tile_ptrs(
        OUT, sample, head, row_0, stride_ob, stride_on, stride_oh, BLOCK_M, HEAD_DIM_PAD
    )
    d_ptrs = tile_ptrs(
        DOUT, sample, head, row_0, stride_db, stride_dn, stride_dh, BLOCK_M, HEAD_DIM_PAD
    )
    o = load_tile(o_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    do = load_tile(d_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= load_rows(DLSE, sample, head, rows, row_live, stride_eb, stride_en, stride_eh)
    if ALIGN:
        q_ptrs = tile_ptrs(
            Q, sample, head, row_0, stride_qb, stride_qn, stride_qh, BLOCK_M, HEAD_DIM_PAD
        )
        q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
        lse = load_rows(LSE, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh)
        shift = score_shift(lse, EXACT)
        k_base = tile_ptrs(
            K, sample, head // GROUP, 0, stride_kb, stride_kn, stride_kh, BLOCK_N, HEAD_DIM_PAD
        )
        part = tl.zeros([BLOCK_M], tl.float32)
        last = tl.minimum(row_0 + BLOCK_M, end) - 1
        slots = slots_up_to(TILES, sample, n_tiles, last, begin)
        for i in tl.range(0, slots * (MAP_TILE // BLOCK_N)):
            _, p_g = _graded_tile(
                i,
                q,
                shift,
                k_base,
                stride_kn,
                G,
                SLOT_TILES,
                PANELS,
                CODES,
                sample,
                n_slots,
                token_base,
                begin,
                end,
                first_live,
                end_live,
                rows,
                row_live,
                row_codes,
                scale,
                HEAD_DIM,
                HEAD_DIM_PAD,
                BLOCK_N,
                EXACT,
                CONTIGUOUS,
            )
            part += tl.sum(p_g, 1)
        r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0)
        delta += part * (r * tl.load(DLOSS + sample) * inv_heads)
    delta_ptrs = row_ptrs(DELTA, sample, head, rows, stride_lb, stride_ln, stride_lh)
    tl.store(delta_ptrs, tl.where(row_live, delta, 0.0), mask=rows < end)


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
    DS_SCALE,
    SAMPLES,
    CODES,
    TILES,
    SLOT_TILES,
    PANELS,
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
    RESCALE: tl.constexpr,
):
    """dq = scale sum_v P G/H k and dlse = -sum_v P G/H of one row tile of one head."""
    (
        sample,
        head,
        token_base,
        begin,
        end,
        first_live,
        end_live,
        _end_prefix,
        row_0,
        rows,
        row_live,
        row_codes,
    ) = row_program(SAMPLES, CODES, tokens_per_sample, HEADS, BLOCK_M, CONTIGUOUS)
    if row_0 >= end:
        return
    q_ptrs = tile_ptrs(
        Q, sample, head, row_0, stride_qb, stride_qn, stride_qh, BLOCK_M, HEAD_DIM_PAD
    )
    q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    lse = load_rows(LSE, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh)
    shift = score_shift(lse, EXACT)
    r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0)
    r *= tl.load(DLOSS + sample) * inv_heads
    ds_scale, ds_unscale = _load_ds_scale(DS_SCALE, RESCALE)
    k_base = tile_ptrs(
        K, sample, head // GROUP, 0, stride_kb, stride_kn, stride_kh, BLOCK_N, HEAD_DIM_PAD
    )
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(row_0 + BLOCK_M, end) - 1
    slots = slots_up_to(TILES, sample, n_tiles, last, begin)
    for i in tl.range(0, slots * (MAP_TILE // BLOCK_N)):
        k, p_g = _graded_tile(
            i,
            q,
            shift,
            k_base,
            stride_kn,
            G,
            SLOT_TILES,
            PANELS,
            CODES,
            sample,
            n_slots,
            token_base,
            begin,
            end,
            first_live,
            end_live,
            rows,
            row_live,
            row_codes,
            scale,
            HEAD_DIM,
            HEAD_DIM_PAD,
            BLOCK_N,
            EXACT,
            CONTIGUOUS,
        )
        ds = p_g * r[:, None]
        delta += tl.sum(ds, 1)
        acc = tl.dot(_rounded(ds, ds_scale, k, RESCALE), k, acc, input_precision="ieee")
    dq_ptrs = tile_ptrs(
        DQ, sample, head, row_0, stride_gb, stride_gn, stride_gh, BLOCK_M, HEAD_DIM_PAD
    )
    dq = tl.where(row_live[:, None], acc * (softmax_scale * ds_unscale), 0.0)
    store_tile(dq_ptrs, dq, rows < end, HEAD_DIM, HEAD_DIM_PAD)
    e_ptrs = row_ptrs(DLSE, sample, head, rows, stride_eb, stride_en, stride_eh)
    tl.store(e_ptrs, tl.where(row_live, -delta, 0.0), mask=rows < end)


@triton.jit
def _load_ds_scale(DS_SCALE, RESCALE: tl.constexpr):
    """The power of two that dS is multiplied by before it is rounded, and its inverse."""
    if RESCALE:
        return tl.load(DS_SCALE), tl.load(DS_SCALE + 1)
    else:
        return 1.0, 1.0


@triton.jit
def _rounded(ds, ds_scale, like, RESCALE: tl.constexpr):
    """dS in the dtype of its products."""
    if RESCALE:
        ds = ds * ds_scale
    return ds.to(like.dtype)


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
    n_0,
    q,
    do,
    shift,
    delta,
    r,
    ds_scale,
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    G,
    CODES,
    TILES,
    sample,
    n_tiles,
    token_base,
    begin,
    end,
    first_live,
    end_live,
    rows,
    row_live,
    row_codes,
    scale,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC_INIT: tl.constexpr,
    RESCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """dq of one more key tile, that begins at n_0."""
    at = tl.cast(n_0, tl.int64)
    columns = n_0 + tl.arange(0, BLOCK_N)
    column_live, column_codes = columns >= 0, columns
    if MASKED:
        column_live, column_codes = is_live(
            CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
        )
    k = load_tile(k_base + at * stride_kn, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
    v = load_tile(v_base + at * stride_vn, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        seen = visible(rows, row_codes, columns, column_codes, column_live, CONTIGUOUS)
        s = tl.where(seen, s, float("-inf"))
    p = exp_scores(s - shift[:, None], EXACT)
    g = 0.0
    if ALIGN:
        base, panel_end = panel_of(TILES, sample, n_tiles, n_0, begin)
        g = load_panel(G, base, panel_end, rows, row_live, n_0, BLOCK_N).to(tl.float32)
    ds = _d_scores(do, tl.trans(v), p, g, r[:, None], delta[:, None], ALIGN, ACC_INIT)
    return tl.dot(_rounded(ds, ds_scale, k, RESCALE), k, acc, input_precision="ieee")


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
    DS_SCALE,
    SAMPLES,
    CODES,
    BOUNDS,
    TILES,
    scale,
    softmax_scale,
    inv_heads,
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
    RESCALE: tl.constexpr,
):
    """dq of one row tile of one head (strides g: of DQ)."""
    (
        sample,
        head,
        token_base,
        begin,
        end,
        first_live,
        end_live,
        end_prefix,
        row_0,
        rows,
        row_live,
        row_codes,
    ) = row_program(SAMPLES, CODES, tokens_per_sample, HEADS, BLOCK_M, CONTIGUOUS)
    if row_0 >= end:
        return
    q_ptrs = tile_ptrs(
        Q, sample, head, row_0, stride_qb, stride_qn, stride_qh, BLOCK_M, HEAD_DIM_PAD
    )
    d_ptrs = tile_ptrs(
        DOUT, sample, head, row_0, stride_db, stride_dn, stride_dh, BLOCK_M, HEAD_DIM_PAD
    )
    q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    do = load_tile(d_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    lse = load_rows(LSE, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh)
    shift = score_shift(lse, EXACT)
    delta = load_rows(DELTA, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh)
    r = delta
    if ALIGN:
        r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0)
        r *= tl.load(DLOSS + sample) * inv_heads
    ds_scale, ds_unscale = _load_ds_scale(DS_SCALE, RESCALE)
    kv_head = head // GROUP
    k_base = tile_ptrs(
        K, sample, kv_head, 0, stride_kb, stride_kn, stride_kh, BLOCK_N, HEAD_DIM_PAD
    )
    v_base = tile_ptrs(
        V, sample, kv_head, 0, stride_vb, stride_vn, stride_vh, BLOCK_N, HEAD_DIM_PAD
    )
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
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
            acc = _dq_tile(
                acc,
                n_0,
                q,
                do,
                shift,
                delta,
                r,
                ds_scale,
                k_base,
                v_base,
                stride_kn,
                stride_vn,
                G,
                CODES,
                TILES,
                sample,
                n_tiles,
                token_base,
                begin,
                end,
                first_live,
                end_live,
                rows,
                row_live,
                row_codes,
                scale,
                False,
                EXACT,
                ALIGN,
                ACC_INIT,
                RESCALE,
                HEAD_DIM,
                HEAD_DIM_PAD,
                BLOCK_N,
                CONTIGUOUS,
            )
    for i in tl.range(0, n_masked):
        acc = _dq_tile(
            acc,
            masked_tile(i, a_lo, n_a, b_lo, BLOCK_N),
            q,
            do,
            shift,
            delta,
            r,
            ds_scale,
            k_base,
            v_base,
            stride_kn,
            stride_vn,
            G,
            CODES,
            TILES,
            sample,
            n_tiles,
            token_base,
            begin,
            end,
            first_live,
            end_live,
            rows,
            row_live,
            row_codes,
            scale,
            True,
            EXACT,
            ALIGN,
            ACC_INIT,
            RESCALE,
            HEAD_DIM,
            HEAD_DIM_PAD,
            BLOCK_N,
            CONTIGUOUS,
        )
    dq_ptrs = tile_ptrs(
        DQ, sample, head, row_0, stride_gb, stride_gn, stride_gh, BLOCK_M, HEAD_DIM_PAD
    )
    dq = tl.where(row_live[:, None], acc * (softmax_scale * ds_unscale), 0.0)
    store_tile(dq_ptrs, dq, rows < end, HEAD_DIM, HEAD_DIM_PAD)


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
    DS_SCALE,
    SAMPLES,
    CODES,
    BOUNDS,
    TILES,
    scale,
    softmax_scale,
    inv_heads,
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
    RESCALE: tl.constexpr,
    ATTENTION: tl.constexpr,
):
    """dk and dv of one key tile of one key head (strides g: of DK and DV); the first key tiles are
    the longest and start first. The heads of a group are summed here, without atomics. Without
    ATTENTION only the dk of the alignment: V, DOUT, DELTA and DV are not touched."""
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
    k_ptrs = tile_ptrs(
        K, sample, kv_head, n_0, stride_kb, stride_kn, stride_kh, BLOCK_N, HEAD_DIM_PAD
    )
    k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
    dk = tl.zeros([BLOCK_N, HEAD_DIM_PAD], tl.float32)
    if ATTENTION:
        v_ptrs = tile_ptrs(
            V, sample, kv_head, n_0, stride_vb, stride_vn, stride_vh, BLOCK_N, HEAD_DIM_PAD
        )
        v = load_tile(v_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
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
    dloss = 0.0
    if ALIGN:
        base, panel_end = panel_of(TILES, sample, n_tiles, n_0, begin)
        dloss = tl.load(DLOSS + sample) * inv_heads
        if not ATTENTION:
            m_hi = tl.minimum(m_hi, panel_end).to(tl.int32)
    ds_scale, ds_unscale = _load_ds_scale(DS_SCALE, RESCALE)
    q_base = Q + sample * stride_qb + tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
    if ATTENTION:
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
            lse = load_rows(LSE, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [BLOCK_N, BLOCK_M]
            seen = visible_t(rows, row_codes, columns, column_codes, row_live, CONTIGUOUS)
            s = tl.where(seen, s, float("-inf"))
            p = exp_scores(s - score_shift(lse, EXACT)[None, :], EXACT)
            g = 0.0
            r = lse
            if ALIGN:
                r = tl.load(ROW_SCALE + token_base + rows, mask=row_live, other=0.0) * dloss
                g = load_panel(G, base, panel_end, rows, row_live, n_0, BLOCK_N)
                g = tl.trans(g).to(tl.float32)
            if ATTENTION:
                d_ptrs = d_base + head * stride_dh + row_at * stride_dn
                do = load_tile(d_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                delta = load_rows(
                    DELTA, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh
                )
                ds = _d_scores(v, tl.trans(do), p, g, r[None, :], delta[None, :], ALIGN, ACC_INIT)
            else:
                ds = p * (g * r[None, :])
            dk = tl.dot(_rounded(ds, ds_scale, q, RESCALE), q, dk, input_precision="ieee")
    in_sample = (columns >= begin) & (columns < end)
    dk_ptrs = tile_ptrs(
        DK, sample, kv_head, n_0, stride_gb, stride_gn, stride_gh, BLOCK_N, HEAD_DIM_PAD
    )
    dk = tl.where(column_live[:, None], dk * (softmax_scale * ds_unscale), 0.0)
    store_tile(dk_ptrs, dk, in_sample, HEAD_DIM, HEAD_DIM_PAD)
    if ATTENTION:
        dv_ptrs = tile_ptrs(
            DV, sample, kv_head, n_0, stride_gb, stride_gn, stride_gh, BLOCK_N, HEAD_DIM_PAD
        )
        dv = tl.where(column_live[:, None], dv, 0.0)
        store_tile(dv_ptrs, dv, in_sample, HEAD_DIM, HEAD_DIM_PAD)


class Alignment(NamedTuple):
    """dL/dS of a batch: G (map rows, 64), its row scale (tokens,), dloss (samples,)."""

    g: Tensor
    row_scale: Tensor
    dloss: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {"G": self.g, "ROW_SCALE": self.row_scale, "DLOSS": self.dloss}


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
    delta = axis.empty_lse(q)
    align = alignment is not None
    e_lse = lse if d_lse is None else d_lse
    common = {
        **batch_arguments(axis, q, k, scale),
        # Tensors that a kernel without alignment never reads stand in for those it has not.
        **(alignment or Alignment(delta, delta, delta)).arguments(),
        **{"V": v, "OUT": out, "DOUT": d_out, "LSE": lse, "DLSE": e_lse, "DELTA": delta},
        **strides(v=v, o=out, d=d_out),
        **axis.lse_strides(l=lse, e=e_lse),
        **{"ALIGN": align, "HAS_DLSE": d_lse is not None, "ATTENTION": True},
    }
    heads, kv_heads = q.shape[-2], k.shape[-2]
    launch("delta", _attn_bwd_delta_kernel, axis.row_grid(heads), common)
    common |= ds_scale_arguments(axis, q, alignment, (d_out, v, delta))
    launch("dq", _attn_bwd_dq_kernel, axis.row_grid(heads), {**common, "DQ": dq, **strides(g=dq)})
    outputs = {"DK": dk, "DV": dv, **strides(g=dk)}
    launch("dkdv", _attn_bwd_dkdv_kernel, axis.key_grid(kv_heads), common | outputs)
    return dq, dk, dv


def alignment_bwd(
    alignment: Alignment, q: Tensor, k: Tensor, lse: Tensor, axis: Axis, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dlse of the modular form: dS = P G/H, dlse = -sum_v P G/H."""
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dlse = axis.empty_lse(q)
    if 0 in (axis.n_tokens, axis.n_slots):
        return dq.zero_(), dk.zero_(), dlse.zero_()
    common = {
        **batch_arguments(axis, q, k, scale),
        **alignment.arguments(),
        **ds_scale_arguments(axis, q, alignment),
        # Not read without attention.
        **{"V": k, "DOUT": q, "DELTA": lse, "DV": dk, **strides(v=k, d=q)},
        **{"LSE": lse, "DLSE": dlse, **axis.lse_strides(l=lse, e=dlse)},
        **{"ALIGN": True, "ATTENTION": False},
    }
    heads, kv_heads = q.shape[-2], k.shape[-2]
    outputs = {"DQ": dq, **strides(g=dq)}
    launch("align_dq", _alignment_bwd_dq_kernel, axis.row_grid(heads), common | outputs)
    outputs = {"DK": dk, **strides(g=dk)}
    launch("align_dk", _attn_bwd_dkdv_kernel, axis.key_grid(kv_heads), common | outputs)
    return dq, dk, dlse


def ds_scale_arguments(
    axis: Axis,
    q: Tensor,
    alignment: Alignment | None,
    attention: tuple[Tensor, Tensor, Tensor] | None = None,
) -> dict[str, Tensor | bool]:
    """float16 only: a power of two that lifts dS to the top of the range before it is rounded.

    The dS of a small loss would be subnormal there. |dS| <= max |dO| max |v| + max |delta| for the
    attention of `attention` = (dO, v, delta), plus 3 |dloss|: for every objective
    |P_h G / H| <= 3 |dloss|, as P_h <= H S.
    """
    if q.dtype != torch.float16:
        return {"DS_SCALE": q, "RESCALE": False}
    bound = torch.zeros((), device=q.device)
    if alignment is not None:
        bound = bound + 3 * alignment.dloss.abs().amax()
    if attention is not None:
        d_out, v, delta = attention
        live = (axis.codes >= 0).view(*d_out.shape[:-2], 1)
        norms = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (d_out, v))
        largest_d_out, largest_v = (torch.where(live, x, 0).amax() for x in norms)
        bound = bound + largest_d_out * largest_v + delta.abs().amax()
    # Through log2, so that a bound that is not finite ends in gradients that are not.
    exponent = 14 - bound.log2().ceil()
    exponent = torch.where(bound > 0, exponent, 0).clamp(-100, 100)
    return {"DS_SCALE": torch.stack((exponent, -exponent)).exp2(), "RESCALE": True}
