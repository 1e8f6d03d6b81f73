"""Operations and bytes of the kernels: what the mathematics needs, and what their tiles make of it.

Counted are matrix products, two operations per multiply-add; exponentials, masks and sums are not.

    ideal       products on the (row, key) pairs that are visible, and on visual ones (*entries*)
                where a kernel visits slots only; every input read once, every output written once

Bytes are those of tensors of numbers; the integer tables of a layout are left out, and of a map
only the rows of its panels are taken. tile_work.py has what tile shapes make of it, counting.py
counts what the kernels really do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from cdfast_kernels import VisualLayout
from cdfast_kernels.layout import MAP_TILE
from cdfast_kernels.visual_map import MAP_DTYPE

# Operations of the library, as their kernels see them.
OPERATIONS = ("plain", "student", "target", "modular")
STATISTICS = 7  # float32 numbers per row and slot: map_fwd.STATISTICS
SUMMED_BY_ROWS = ("row", "mse", "kl")


@dataclass(frozen=True)
class Shape:
    """What the work of a call depends on; `dtype` is that of q, k and v."""

    layout: VisualLayout
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    objective: str = "row"

    @property
    def product(self) -> int:
        """Operations of one product, of all heads, per (row, key) pair."""
        return 2 * self.heads * self.head_dim

    @property
    def g_size(self) -> int:
        """Bytes of a number of G on the Triton backend (alignment.g_dtype)."""
        return 2 if self.dtype.itemsize == 2 and self.objective != "kl" else 4


class Ideal(NamedTuple):
    flops: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Tables:
    """The tables of a layout on the host, as the kernels read them."""

    def __init__(self, layout: VisualLayout):
        table = layout.schedule
        self.samples = table.samples.cpu().numpy().astype(np.int64)
        self.bounds = table.bounds.cpu().numpy().astype(np.int64)
        self.tiles = table.tiles.cpu().numpy()
        self.slot_tiles = layout.slot_tiles.cpu().numpy().astype(np.int64)
        self.panels = table.panels.cpu().numpy()
        self.contiguous = table.contiguous
        self.counts = table.counts.cpu().numpy()
        codes = table.codes.cpu().numpy()
        self.live = codes >= 0
        self.visual = self.live & (codes % 2 == 1)
        self.rank = codes >> 1
        self.before = np.concatenate(([0], self.live.cumsum()))  # live tokens before each
        self.stride = 0 if layout.is_packed else layout.length

    def base(self, sample: int) -> int:
        """Flat number of position 0 of a sample's axis."""
        return sample * self.stride

    def live_between(self, sample: int, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Live tokens at positions first <= p < end; 0 where that is empty."""
        at = self.base(sample)
        return np.maximum(self.before[at + np.maximum(first, end)] - self.before[at + first], 0)

    def panel_rows(self) -> int:
        """Live rows of all panels: (row, slot) pairs that a map has numbers for."""
        found = 0
        for sample, panels in enumerate(self.panels):
            found += int(self.live_between(sample, panels[:, 1], panels[:, 2]).sum())
        return found


def visible_pairs(layout: VisualLayout) -> int:
    """(row, key) pairs of one head: sum over live rows of the live keys up to the row, of its own
    segment and of the shared prefix."""
    tables = Tables(layout)
    pairs = 0
    for sample, (begin, end, first, _, end_prefix) in enumerate(tables.samples):
        rows = np.arange(begin, end)
        token = tables.base(sample) + rows
        rows, token = rows[tables.live[token]], token[tables.live[token]]
        pairs += int(tables.live_between(sample, tables.bounds[token, 0], rows + 1).sum())
        prefix = int(tables.live_between(sample, first, end_prefix)) if end > begin else 0
        pairs += prefix * int((tables.rank[token] > 0).sum())
    return pairs


def visible_entries(layout: VisualLayout) -> int:
    """(row, visual key) pairs of one head that are visible."""
    return int(layout.schedule.counts[:, 1].sum())


def ideal(shape: Shape, operation: str) -> dict[str, Ideal]:
    """Kernel -> its ideal work, for the Triton kernels of one forward and backward.

    With H heads of d, products of 2 H d operations per pair or entry:

        _attn_fwd_kernel           q k^T, P v                        2 pairs
        _visual_map_fwd_kernel     q k^T                             1 entries
        _attn_bwd_delta_kernel     q k^T (with alignment)            1 entries
            float32 also           q k^T, dO v^T                     2 pairs
        _attn_bwd_dq_kernel        q k^T, dO v^T, dS k               3 pairs
        _attn_bwd_dkdv_kernel      q k^T, dO v^T, dS^T q, P^T dO     4 pairs
        _alignment_bwd_dq_kernel   q k^T, dS k                       2 entries
        _attn_bwd_dkdv_kernel      q k^T, dS^T q (modular)           2 entries

    Args:
        operation: "plain" (attention), "student" (with the loss), "target" (the teacher's map, no
            backward) or "modular" (the loss from q, k and a given LSE).
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation: expected one of {OPERATIONS}; got {operation!r}.")
    found: dict[str, Ideal] = {}
    if operation in ("plain", "student"):
        found |= _ideal_attention(shape, operation == "student")
    if operation != "plain":
        found |= _ideal_alignment(shape, operation)
    return found


class Sizes:
    """Bytes of the tensors of a call, live tokens only."""

    def __init__(self, shape: Shape):
        tables = Tables(shape.layout)
        size = shape.head_dim * shape.dtype.itemsize
        live, visual = int(tables.live.sum()), int(tables.visual.sum())
        image_rows = int(tables.counts[:, 0].sum())
        self.live, self.panel_rows = live, tables.panel_rows()
        self.q, self.k = live * shape.heads * size, live * shape.kv_heads * size
        self.row = 4 * live * shape.heads  # lse, delta
        # What the slots need of q, k and lse.
        self.image_q = image_rows * shape.heads * size
        self.visual_k = visual * shape.kv_heads * size
        self.image_row = 4 * image_rows * shape.heads
        # Maps: S of a chunk is float32.
        self.chunk = 4 * MAP_TILE * self.panel_rows
        self.stored = MAP_DTYPE[shape.dtype].itemsize * MAP_TILE * self.panel_rows
        self.g = shape.g_size * MAP_TILE * self.panel_rows


def _ideal_attention(shape: Shape, aligned: bool) -> dict[str, Ideal]:
    size, pairs = Sizes(shape), visible_pairs(shape.layout) * shape.product
    entries = visible_entries(shape.layout) * shape.product
    exact = shape.dtype == torch.float32
    # G and its row scale.
    extra = size.g + 4 * size.live if aligned else 0
    delta = entries if aligned else 0
    delta_read = size.q + extra
    if exact:
        delta += 2 * pairs
        delta_read += size.q + 2 * size.k + size.row
    else:
        delta_read += size.q
        if aligned:
            delta_read += size.image_q + size.visual_k + size.image_row
    both = 2 * size.q + 2 * size.k + 2 * size.row + extra
    return {
        "_attn_fwd_kernel": Ideal(2 * pairs, size.q + 2 * size.k, size.q + size.row),
        "_attn_bwd_delta_kernel": Ideal(delta, delta_read, size.row),
        "_attn_bwd_dq_kernel": Ideal(3 * pairs, both, size.q),
        "_attn_bwd_dkdv_kernel": Ideal(4 * pairs, both, 2 * size.k),
    }


def _ideal_alignment(shape: Shape, operation: str) -> dict[str, Ideal]:
    size, entries = Sizes(shape), visible_entries(shape.layout) * shape.product
    inputs = size.image_q + size.visual_k + size.image_row
    if operation == "target":
        return {"_visual_map_fwd_kernel": Ideal(entries, inputs, size.stored)}
    statistics = 4 * STATISTICS * size.panel_rows
    found = {
        "_visual_map_fwd_kernel": Ideal(entries, inputs + size.stored, size.chunk + statistics)
    }
    if shape.objective in SUMMED_BY_ROWS:
        # Row scale and four coefficients in float32, the scale of the loss in float64.
        found["_row_coefficients_kernel"] = Ideal(0, statistics, 28 * size.live)
    if shape.objective != "pooled":
        coefficients = 4 * (2 if shape.objective == "kl" else 4) * size.live
        read = size.chunk + size.stored + coefficients
        found["_alignment_g_fwd_kernel"] = Ideal(0, read, size.g + 4 * size.panel_rows)
        read = 4 * size.panel_rows + 8 * size.live
        found["_row_loss_kernel"] = Ideal(0, read, 8 * size.live)
    if operation == "modular":
        read = inputs + size.g
        found["_alignment_bwd_dq_kernel"] = Ideal(2 * entries, read, size.q + size.row)
        found["_attn_bwd_dkdv_kernel"] = Ideal(2 * entries, read, size.k)
    return found


def cpu_phases(shape: Shape) -> dict[str, Ideal]:
    """Phase of the CPU backend -> its ideal work; a backward is two passes in one call.

    With products of 2 H d operations per pair or entry (csrc/forward.h, csrc/backward.h):

        forward, aligned forward      q k^T, P v                                   2 pairs
        backward, aligned backward    q k^T, dO v^T, dS k over rows, and           7 pairs
                                      q k^T, dO v^T, P^T dO, dS^T q over keys
        map, loss forward             q k^T                                        1 entries
        loss backward                 q k^T, dS k; q k^T, dS^T q                   4 entries

    Maps inside an operation, and G, are float32. S becomes G in place; neither is counted twice.
    """
    size, pairs = Sizes(shape), visible_pairs(shape.layout) * shape.product
    entries = visible_entries(shape.layout) * shape.product
    attention = Ideal(2 * pairs, size.q + 2 * size.k, size.q + size.row)
    backward = Ideal(7 * pairs, 2 * size.q + 2 * size.k + size.row, size.q + 2 * size.k)
    loss_inputs = size.image_q + size.visual_k + size.image_row
    forward, stored, g = attention, size.stored, size.chunk
    return {
        "forward": forward,
        "aligned forward": Ideal(forward.flops, forward.read + stored, forward.written + g),
        "map": Ideal(entries, loss_inputs, stored),
        "loss forward": Ideal(entries, loss_inputs + stored, g),
        "backward": backward,
        "aligned backward": Ideal(backward.flops, backward.read + g, backward.written),
        "loss backward": Ideal(4 * entries, loss_inputs + g, size.q + size.k + size.row),
    }
