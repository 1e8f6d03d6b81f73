"""Flash attention forward: O and the natural-log LSE of every live row, one pass over the keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, head_dim_pad, launch, score_scale, strides
from cdfast_kernels.tl_common import (
    LN2,
    exp_scores,
    is_live,
    key_tiles,
    load_sample,
    load_tile,
    masked_tile,
    store_tile,
    tile_offsets,
    visible,
)


@triton.jit
def _attend(
    q,
    acc,
    m,
    total,
    k_ptrs,
    v_ptrs,
    rows,
    row_codes,
    columns,
    column_codes,
    column_live,
    scale,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """One key tile of the online softmax."""
    k = load_tile(k_ptrs, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        seen = visible(rows, row_codes, columns, column_codes, column_live, CONTIGUOUS)
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    if MASKED:
        # A row that has seen nothing yet keeps m = -inf; its exponents must not be inf - inf.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        shift = m_new
    p = exp_scores(s - shift[:, None], EXACT)
    alpha = exp_scores(m - shift, EXACT)
    total = total * alpha + tl.sum(p, 1)
    v = load_tile(v_ptrs, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, total


@triton.jit
def _attn_fwd_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    SAMPLES,
    CODES,
    BOUNDS,
    scale,
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
    stride_ob,
    stride_on,
    stride_oh,
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
    """One row tile of one head. `scale` is in units of log 2 unless EXACT."""
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, first_live, end_live, end_prefix = load_sample(SAMPLES, sample)
    # The last row tiles are the longest: they start first.
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
    k_base = K + sample * stride_kb + head // GROUP * stride_kh
    k_base += tile_offsets(stride_kn, BLOCK_N, HEAD_DIM_PAD)
    v_base = V + sample * stride_vb + head // GROUP * stride_vh
    v_base += tile_offsets(stride_vn, BLOCK_N, HEAD_DIM_PAD)

    acc = tl.zeros([BLOCK_M, HEAD_DIM_PAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
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
            acc, m, total = _attend(
                q,
                acc,
                m,
                total,
                k_base + at * stride_kn,
                v_base + at * stride_vn,
                rows,
                row_codes,
                columns,
                columns,
                columns >= 0,
                scale,
                False,
                EXACT,
                HEAD_DIM,
                HEAD_DIM_PAD,
                CONTIGUOUS,
            )
    for i in tl.range(0, n_masked):
        n_0 = masked_tile(i, a_lo, n_a, b_lo, BLOCK_N)
        at = n_0.to(tl.int64)
        columns = n_0 + tl.arange(0, BLOCK_N)
        column_live, column_codes = is_live(
            CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
        )
        acc, m, total = _attend(
            q,
            acc,
            m,
            total,
            k_base + at * stride_kn,
            v_base + at * stride_vn,
            rows,
            row_codes,
            columns,
            column_codes,
            column_live,
            scale,
            True,
            EXACT,
            HEAD_DIM,
            HEAD_DIM_PAD,
            CONTIGUOUS,
        )

    in_sample = rows < end
    out = tl.where(row_live[:, None], acc / tl.where(row_live, total, 1.0)[:, None], 0.0)
    out_ptrs = OUT + sample * stride_ob + head * stride_oh + row_at * stride_on
    store_tile(
        out_ptrs + tile_offsets(stride_on, BLOCK_M, HEAD_DIM_PAD),
        out,
        in_sample,
        HEAD_DIM,
        HEAD_DIM_PAD,
    )
    log_l = tl.log2(tl.where(row_live, total, 1.0)) * LN2
    lse = m + log_l if EXACT else m * LN2 + log_l
    lse_ptrs = LSE + sample * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ln
    tl.store(lse_ptrs, tl.where(row_live, lse, float("-inf")), mask=in_sample)


def attn_fwd(q: Tensor, k: Tensor, v: Tensor, axis: Axis, scale: float) -> tuple[Tensor, Tensor]:
    """out like q (contiguous), lse (B, H, N), packed (H, total), float32."""
    heads, dim = q.shape[-2:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = axis.empty_lse(q)
    settings = launch("fwd", q)
    launch_scale, exact = score_scale(scale, q)
    grid = axis.row_grid(heads, settings.BLOCK_M)
    if 0 not in grid:
        _attn_fwd_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            axis.samples,
            axis.codes,
            axis.bounds,
            launch_scale,
            axis.tokens_per_sample,
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(out),
            *axis.lse_strides(lse),
            HEADS=heads,
            GROUP=heads // k.shape[-2],
            HEAD_DIM=dim,
            HEAD_DIM_PAD=head_dim_pad(dim),
            EXACT=exact,
            CONTIGUOUS=axis.contiguous,
            **settings.kwargs(),
        )
    return out, lse
