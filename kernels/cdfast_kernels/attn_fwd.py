"""Flash attention forward: O and the natural-log LSE of every live row, one pass over the keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, batch_arguments, launch, strides
from cdfast_kernels.tl_common import (
    LN2,
    exp_scores,
    is_live,
    key_tiles,
    load_tile,
    masked_tile,
    row_program,
    row_ptrs,
    store_tile,
    tile_ptrs,
    visible,
)


@triton.jit
def _attend(
    q,
    acc,
    m,
    total,
    n_0,
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    CODES,
    token_base,
    begin,
    end,
    first_live,
    end_live,
    rows,
    row_codes,
    scale,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """One key tile of the online softmax, that begins at n_0."""
    at = tl.cast(n_0, tl.int64)
    columns = n_0 + tl.arange(0, BLOCK_N)
    column_live, column_codes = columns >= 0, columns
    if MASKED:
        column_live, column_codes = is_live(
            CODES, token_base, columns, begin, end, first_live, end_live, CONTIGUOUS
        )
    k = load_tile(k_base + at * stride_kn, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
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
    v = load_tile(v_base + at * stride_vn, column_live, MASKED, HEAD_DIM, HEAD_DIM_PAD)
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
    q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
    kv_head = head // GROUP
    k_base = tile_ptrs(
        K, sample, kv_head, 0, stride_kb, stride_kn, stride_kh, BLOCK_N, HEAD_DIM_PAD
    )
    v_base = tile_ptrs(
        V, sample, kv_head, 0, stride_vb, stride_vn, stride_vh, BLOCK_N, HEAD_DIM_PAD
    )

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
            acc, m, total = _attend(
                q,
                acc,
                m,
                total,
                n_0,
                k_base,
                v_base,
                stride_kn,
                stride_vn,
                CODES,
                token_base,
                begin,
                end,
                first_live,
                end_live,
                rows,
                row_codes,
                scale,
                False,
                EXACT,
                HEAD_DIM,
                HEAD_DIM_PAD,
                BLOCK_N,
                CONTIGUOUS,
            )
    for i in tl.range(0, n_masked):
        acc, m, total = _attend(
            q,
            acc,
            m,
            total,
            masked_tile(i, a_lo, n_a, b_lo, BLOCK_N),
            k_base,
            v_base,
            stride_kn,
            stride_vn,
            CODES,
            token_base,
            begin,
            end,
            first_live,
            end_live,
            rows,
            row_codes,
            scale,
            True,
            EXACT,
            HEAD_DIM,
            HEAD_DIM_PAD,
            BLOCK_N,
            CONTIGUOUS,
        )

    in_sample = rows < end
    out = tl.where(row_live[:, None], acc / tl.where(row_live, total, 1.0)[:, None], 0.0)
    out_ptrs = tile_ptrs(
        OUT, sample, head, row_0, stride_ob, stride_on, stride_oh, BLOCK_M, HEAD_DIM_PAD
    )
    store_tile(out_ptrs, out, in_sample, HEAD_DIM, HEAD_DIM_PAD)
    log_l = tl.log2(tl.where(row_live, total, 1.0)) * LN2
    lse = m + log_l if EXACT else m * LN2 + log_l
    lse_ptrs = row_ptrs(LSE, sample, head, rows, stride_lb, stride_ln, stride_lh)
    tl.store(lse_ptrs, tl.where(row_live, lse, float("-inf")), mask=in_sample)


def attn_fwd(q: Tensor, k: Tensor, v: Tensor, axis: Axis, scale: float) -> tuple[Tensor, Tensor]:
    """out like q (contiguous), lse (B, H, N), packed (H, total), float32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = axis.empty_lse(q)
    arguments = {
        **batch_arguments(axis, q, k, scale),
        **{"V": v, "OUT": out, "LSE": lse, **strides(v=v, o=out), **axis.lse_strides(l=lse)},
    }
    launch("fwd", _attn_fwd_kernel, axis.row_grid(q.shape[-2]), arguments)
    return out, lse
