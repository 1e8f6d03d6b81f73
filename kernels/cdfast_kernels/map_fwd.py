"""The head-mean map on visual key tiles, and the row statistics that an alignment loss needs.

One program makes one (row tile, map slot) of S = (1/H) sum_h exp(s_h - lse_h), with the heads
looped inside it: S is written once, without atomics, and no map of a single head exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, head_dim_pad, launch, score_scale, strides
from cdfast_kernels.tl_common import (
    LOG2E,
    MAP_SCALE,
    TINY,
    entry_mask,
    exp_scores,
    load_sample,
    load_tile,
    map_ptrs,
    tile_offsets,
)
from cdfast_kernels.visual_map import MAP_DTYPE

# Per (slot, row): the largest s and t; over s / max s and t / max t the sums of s t, s^2 and t^2,
# scaled so that squares of small probabilities do not underflow; and the sums of s (not below the
# smallest normal number) and t.
STATISTICS = ("max_s", "max_t", "dot", "ss", "tt", "s1", "t1")


@triton.jit
def map_tile(
    SAMPLES, CODES, SLOT_TILES, n_slots, tokens_per_sample, BLOCK_M: tl.constexpr, CONTIGUOUS
):
    """Where the program is: sample, slot, rows and first key of its tile, entries, live rows, rows
    inside the sample, and the sample's first flat token."""
    sample, slot = tl.program_id(0) // n_slots, tl.program_id(0) % n_slots
    begin, end, first_live, end_live, _ = load_sample(SAMPLES, sample)
    rows = begin + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.load(SLOT_TILES + sample.to(tl.int64) * n_slots + slot)
    # A slot that the sample does not use lies behind all of its rows.
    n_0 = tl.where(tile >= 0, tile * 64, end)
    columns = n_0 + tl.arange(0, 64)
    sample = sample.to(tl.int64)
    token_base = sample * tokens_per_sample
    entries, row_live = entry_mask(
        CODES, token_base, rows, columns, begin, end, first_live, end_live, CONTIGUOUS
    )
    return sample, slot, rows, n_0, entries, row_live, rows < end, token_base


@triton.jit
def _visual_map_fwd_kernel(
    Q,
    K,
    LSE,
    MAP,
    TARGET,
    PARTS,
    SAMPLES,
    CODES,
    SLOT_TILES,
    scale,
    inv_heads,
    map_scale,
    target_scale,
    n_slots,
    n_tokens,
    tokens_per_sample,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_lb,
    stride_ln,
    stride_lh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    STATS: tl.constexpr,
):
    sample, slot, rows, n_0, entries, row_live, in_sample, token_base = map_tile(
        SAMPLES, CODES, SLOT_TILES, n_slots, tokens_per_sample, BLOCK_M, CONTIGUOUS
    )
    acc = tl.zeros([BLOCK_M, 64], tl.float32)
    if tl.max(tl.max(entries.to(tl.int32), 1), 0) > 0:
        column_live = tl.max(entries.to(tl.int32), 0) > 0
        row_at = tl.min(rows, 0).to(tl.int64)
        q_base = Q + sample * stride_qb + row_at * stride_qn
        q_base += tile_offsets(stride_qn, BLOCK_M, HEAD_DIM_PAD)
        k_base = K + sample * stride_kb + n_0.to(tl.int64) * stride_kn
        k_base += tile_offsets(stride_kn, 64, HEAD_DIM_PAD)
        l_base = LSE + sample * stride_lb + rows.to(tl.int64) * stride_ln
        for h in tl.range(0, HEADS):
            head = tl.cast(h, tl.int64)
            q_ptrs, k_ptrs = q_base + head * stride_qh, k_base + head // GROUP * stride_kh
            q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
            k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
            lse = tl.load(l_base + head * stride_lh, mask=row_live, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            shift = lse if EXACT else lse * LOG2E
            s = tl.where(entries, s, float("-inf"))
            acc += exp_scores(s - shift[:, None], EXACT)
        # Where lse = -inf at a live row, exp(-inf + inf) of a hidden key is no number.
        acc = tl.where(entries, acc * inv_heads, 0.0)
    at = map_ptrs(MAP, token_base, rows, n_slots * 64, slot, 0, 64)
    tl.store(at, (acc * map_scale).to(MAP.dtype.element_ty), mask=in_sample[:, None])
    if STATS:
        t_at = map_ptrs(TARGET, token_base, rows, n_slots * 64, slot, 0, 64)
        t = tl.load(t_at, mask=entries, other=0.0).to(tl.float32) * target_scale
        max_s, max_t = tl.max(acc, 1), tl.max(t, 1)
        s_unit = acc / tl.where(max_s < TINY, 1.0, max_s)[:, None]
        t_unit = t / tl.where(max_t < TINY, 1.0, max_t)[:, None]
        part = PARTS + slot.to(tl.int64) * 7 * n_tokens + token_base + rows
        tl.store(part, max_s, mask=in_sample)
        tl.store(part + n_tokens, max_t, mask=in_sample)
        tl.store(part + 2 * n_tokens, tl.sum(s_unit * t_unit, 1), mask=in_sample)
        tl.store(part + 3 * n_tokens, tl.sum(s_unit * s_unit, 1), mask=in_sample)
        tl.store(part + 4 * n_tokens, tl.sum(t_unit * t_unit, 1), mask=in_sample)
        # `kl` floors its entries.
        floored = tl.where(entries, tl.where(acc < TINY, TINY, acc), 0.0)
        tl.store(part + 5 * n_tokens, tl.sum(floored, 1), mask=in_sample)
        tl.store(part + 6 * n_tokens, tl.sum(t, 1), mask=in_sample)


def visual_map_fwd(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    axis: Axis,
    scale: float,
    dtype: torch.dtype | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S as a stored map (tokens, slots * 64) of `dtype`, and the statistics against a target map.

    The statistics are (slots, len(STATISTICS), tokens), float32; empty without a target.
    """
    heads, dim = q.shape[-2:]
    dtype = MAP_DTYPE[q.dtype] if dtype is None else dtype
    data = torch.empty(axis.n_tokens, axis.n_slots * 64, dtype=dtype, device=q.device)
    n_parts = axis.n_slots if target is not None else 0
    parts = torch.empty(n_parts, len(STATISTICS), axis.n_tokens, device=q.device)
    if 0 in (axis.n_tokens, axis.n_slots):
        return data, parts
    settings = launch("map", q)
    launch_scale, exact = score_scale(scale, q)
    half = MAP_SCALE.value
    _visual_map_fwd_kernel[axis.map_grid(settings.BLOCK_M)](
        q,
        k,
        lse,
        data,
        data if target is None else target,
        parts,
        axis.samples,
        axis.codes,
        axis.slot_tiles,
        launch_scale,
        1 / heads,
        half if dtype == torch.float16 else 1.0,
        1 / half if target is not None and target.dtype == torch.float16 else 1.0,
        axis.n_slots,
        axis.n_tokens,
        axis.tokens_per_sample,
        *strides(q),
        *strides(k),
        *axis.lse_strides(lse),
        HEADS=heads,
        GROUP=heads // k.shape[-2],
        HEAD_DIM=dim,
        HEAD_DIM_PAD=head_dim_pad(dim),
        BLOCK_M=settings.BLOCK_M,
        EXACT=exact,
        CONTIGUOUS=axis.contiguous,
        STATS=target is not None,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    return data, parts
