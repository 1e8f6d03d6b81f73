"""The head-mean map on visual key tiles, and the row statistics that an alignment loss needs.

One program makes one (row tile, map slot) of S = (1/H) sum_h exp(s_h - lse_h), with the heads
looped inside it: S is written once, without atomics, and no map of a single head exists.

A map to keep is written as panels (VisualMap.data). A map that lives inside one operation is made
for a few rows of each sample at a time, as a *chunk*: (samples, slots, rows, 64), float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdfast_kernels.launch import Axis, batch_arguments, launch
from cdfast_kernels.tl_common import (
    MAP_SCALE,
    MAP_TILE,
    TINY,
    entry_mask,
    exp_scores,
    load_rows,
    load_sample,
    load_tile,
    panel_ptrs,
    score_shift,
    tile_ptrs,
)
from cdfast_kernels.visual_map import MAP_DTYPE

# Per (slot, row): the largest s and t; over s / max s and t / max t the sums of s t, s^2 and t^2,
# scaled so that squares of small probabilities do not underflow; and the sums of s (not below the
# smallest normal number) and t.
STATISTICS = ("max_s", "max_t", "dot", "ss", "tt", "s1", "t1")
N_STATISTICS = tl.constexpr(len(STATISTICS))


class Rows(NamedTuple):
    """The rows first, ..., first + size - 1 of every sample, counted from its beginning."""

    first: int
    size: int

    def arguments(self) -> dict[str, int]:
        return {"first_row": self.first, "n_rows": self.size}


class Target(NamedTuple):
    """A target map: its panels, or the q, k and lse of each map of a window; and their scales."""

    tensors: list[Tensor]
    scales: list[float]

    @property
    def in_panels(self) -> bool:
        return len(self.tensors) == 1

    def rows(self, axis: Axis, rows: Rows) -> Tensor:
        """The panels, or the mean of the window as a chunk."""
        if self.in_panels:
            return self.tensors[0]
        mean = axis.empty_chunk(rows.size)
        for i, scale in enumerate(self.scales):
            q, k, lse = self.tensors[3 * i : 3 * i + 3]
            out = {"MAP": mean, "map_scale": 1 / len(self.scales), "ADD": i > 0}
            _launch_map(q, k, lse, axis, scale, rows, out)
        return mean


@triton.jit
def map_program(
    SAMPLES,
    CODES,
    SLOT_TILES,
    PANELS,
    n_slots,
    tokens_per_sample,
    first_row,
    n_rows,
    BLOCK_M: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """What a program of `Axis.map_grid` works on.

    Returns sample, slot, rows, first key, entries, live rows; base of the slot's panel and the rows
    that it holds; base of the slot's chunk and the rows that it holds; and the place of the first
    row in arrays (samples, n_rows).
    """
    sample, slot = tl.program_id(0) // n_slots, tl.program_id(0) % n_slots
    begin, end, first_live, end_live, _ = load_sample(SAMPLES, sample)
    sample, slot = sample.to(tl.int64), slot.to(tl.int64)
    row_0 = tl.program_id(1) * BLOCK_M
    rows = begin + first_row + row_0 + tl.arange(0, BLOCK_M)
    in_chunk = row_0 + tl.arange(0, BLOCK_M) < n_rows
    at = sample * n_slots + slot
    tile = tl.load(SLOT_TILES + at)
    # A slot that the sample does not use lies behind all of its rows.
    n_0 = tl.where(tile >= 0, tile * MAP_TILE, end)
    columns = n_0 + tl.arange(0, MAP_TILE)
    entries, row_live = entry_mask(
        CODES,
        sample * tokens_per_sample,
        rows,
        columns,
        begin,
        end,
        first_live,
        end_live,
        CONTIGUOUS,
    )
    panel, panel_first, panel_end = (
        tl.load(PANELS + at * 3),
        tl.load(PANELS + at * 3 + 1),
        tl.load(PANELS + at * 3 + 2),
    )
    in_panel = in_chunk & (rows >= panel_first) & (rows < panel_end)
    # Rows past the chunk belong to the next one.
    entries = entries & in_chunk[:, None]
    chunk = at * n_rows - begin - first_row
    place = sample * n_rows + row_0
    return (
        sample,
        slot,
        rows,
        n_0,
        entries,
        row_live & in_chunk,
        panel,
        in_panel,
        chunk,
        in_chunk,
        place,
    )


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
    PANELS,
    scale,
    inv_heads,
    map_scale,
    target_scale,
    n_slots,
    tokens_per_sample,
    first_row,
    n_rows,
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
    IN_PANELS: tl.constexpr,
    ADD: tl.constexpr,
    STATS: tl.constexpr,
    TARGET_IN_PANELS: tl.constexpr,
):
    """One (row tile, slot) of a map, as panels or as a chunk, and its statistics against TARGET."""
    (
        sample,
        slot,
        rows,
        n_0,
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
    acc = tl.zeros([BLOCK_M, MAP_TILE], tl.float32)
    if tl.max(tl.max(entries.to(tl.int32), 1), 0) > 0:
        column_live = tl.max(entries.to(tl.int32), 0) > 0
        row_0 = tl.min(rows, 0)
        q_base = tile_ptrs(Q, sample, 0, row_0, stride_qb, stride_qn, 0, BLOCK_M, HEAD_DIM_PAD)
        k_base = tile_ptrs(K, sample, 0, n_0, stride_kb, stride_kn, 0, MAP_TILE, HEAD_DIM_PAD)
        for h in tl.range(0, HEADS):
            head = tl.cast(h, tl.int64)
            q_ptrs, k_ptrs = q_base + head * stride_qh, k_base + head // GROUP * stride_kh
            q = load_tile(q_ptrs, row_live, True, HEAD_DIM, HEAD_DIM_PAD)
            k = load_tile(k_ptrs, column_live, True, HEAD_DIM, HEAD_DIM_PAD)
            lse = load_rows(LSE, sample, head, rows, row_live, stride_lb, stride_ln, stride_lh)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(entries, s, float("-inf"))
            acc += exp_scores(s - score_shift(lse, EXACT)[:, None], EXACT)
        # Where lse = -inf at a live row, exp(-inf + inf) of a hidden key is no number.
        acc = tl.where(entries, acc * inv_heads, 0.0)
    if IN_PANELS:
        at, held = panel_ptrs(MAP, panel, rows, 0, MAP_TILE), in_panel
    else:
        at, held = panel_ptrs(MAP, chunk, rows, 0, MAP_TILE), in_chunk
    stored = acc * map_scale
    if ADD:
        stored += tl.load(at, mask=held[:, None], other=0.0)
    tl.store(at, stored.to(MAP.dtype.element_ty), mask=held[:, None])
    if STATS:
        t_base = panel if TARGET_IN_PANELS else chunk
        t_ptrs = panel_ptrs(TARGET, t_base, rows, 0, MAP_TILE)
        # Whole rows are read: a mask of entries would split the loads. What is no entry holds 0.
        t = tl.load(t_ptrs, mask=in_panel[:, None], other=0.0).to(tl.float32) * target_scale
        max_s, max_t = tl.max(acc, 1), tl.max(t, 1)
        s_unit = acc / tl.where(max_s < TINY, 1.0, max_s)[:, None]
        t_unit = t / tl.where(max_t < TINY, 1.0, max_t)[:, None]
        # (slots, statistics, samples, rows)
        step = (tl.num_programs(0) // n_slots).to(tl.int64) * n_rows
        part = PARTS + slot * N_STATISTICS * step + place + tl.arange(0, BLOCK_M)
        tl.store(part, max_s, mask=in_chunk)
        tl.store(part + step, max_t, mask=in_chunk)
        tl.store(part + 2 * step, tl.sum(s_unit * t_unit, 1), mask=in_chunk)
        tl.store(part + 3 * step, tl.sum(s_unit * s_unit, 1), mask=in_chunk)
        tl.store(part + 4 * step, tl.sum(t_unit * t_unit, 1), mask=in_chunk)
        # `kl` floors its entries.
        floored = tl.where(entries, tl.where(acc < TINY, TINY, acc), 0.0)
        tl.store(part + 5 * step, tl.sum(floored, 1), mask=in_chunk)
        tl.store(part + 6 * step, tl.sum(t, 1), mask=in_chunk)


def visual_map_fwd(q: Tensor, k: Tensor, lse: Tensor, axis: Axis, scale: float) -> Tensor:
    """S as a stored map: (map rows, 64)."""
    dtype = MAP_DTYPE[q.dtype]
    data = torch.empty(axis.map_rows, MAP_TILE.value, dtype=dtype, device=q.device)
    unit = MAP_SCALE.value if dtype == torch.float16 else 1.0
    out = {"MAP": data, "map_scale": unit, "IN_PANELS": True}
    _launch_map(q, k, lse, axis, scale, Rows(0, axis.length), out)
    return data


def student_map_fwd(
    q: Tensor, k: Tensor, lse: Tensor, axis: Axis, scale: float, rows: Rows, target: Tensor
) -> tuple[Tensor, Tensor]:
    """S as a chunk, and its statistics against a target (slots, len(STATISTICS), samples, rows).

    The target is a chunk, or panels (2-D).
    """
    student = axis.empty_chunk(rows.size)
    shape = (axis.n_slots, len(STATISTICS), axis.n_samples, rows.size)
    parts = torch.empty(shape, device=q.device)
    out = {"MAP": student, "PARTS": parts, "STATS": True, **target_arguments(target)}
    _launch_map(q, k, lse, axis, scale, rows, out)
    return student, parts


def target_arguments(target: Tensor) -> dict[str, Any]:
    unit = 1 / MAP_SCALE.value if target.dtype == torch.float16 else 1.0
    return {"TARGET": target, "target_scale": unit, "TARGET_IN_PANELS": target.ndim == 2}


def _launch_map(
    q: Tensor, k: Tensor, lse: Tensor, axis: Axis, scale: float, rows: Rows, out: dict[str, Any]
) -> None:
    arguments = {
        **{"LSE": lse, **axis.lse_strides(l=lse), "map_scale": 1.0},
        **{"IN_PANELS": False, "ADD": False, "STATS": False},
        # Not read without statistics.
        **{"PARTS": lse, "TARGET": lse, "target_scale": 1.0, "TARGET_IN_PANELS": False},
        **batch_arguments(axis, q, k, scale),
        **rows.arguments(),
        **out,
    }
    launch("map", _visual_map_fwd_kernel, axis.map_grid(rows.size), arguments)
