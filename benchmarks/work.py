"""Operations and bytes of the kernels: what the mathematics needs, and what their tiles make of it.

Counted are matrix products, two operations per multiply-add; exponentials, masks and sums are not.

    ideal       products on the (row, key) pairs that are visible, and on visual ones (*entries*)
                where a kernel visits slots only; every input read once, every output written once
    tiles       the same kernels at given tile shapes: whole tiles, padded head size, and operands
                read again by every tile that needs them

Bytes are those of tensors of numbers; the integer tables of a layout are left out, and of a map
only the rows of its panels are taken. counting.py counts what the kernels really do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Tiles(NamedTuple):
    """Operations of whole tiles, and bytes read if every tile loads its operands whole."""

    flops: int
    read: int


class Settings(NamedTuple):
    """Tile shape of a kernel; launch.Settings begins with the same fields."""

    BLOCK_M: int
    BLOCK_N: int


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


class _Sizes:
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
    size, pairs = _Sizes(shape), visible_pairs(shape.layout) * shape.product
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
    size, entries = _Sizes(shape), visible_entries(shape.layout) * shape.product
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


def tiles(shape: Shape, operation: str, settings: Callable[[str], Settings]) -> dict[str, Tiles]:
    """Kernel -> the work of whole tiles, for kernels with matrix products.

    Args:
        operation: as of `ideal`.
        settings: the tile shape of a kernel by its name in launch.KERNELS, such as "fwd".
    """
    found = {}
    for name, kernel in _products(shape, operation).items():
        found[name] = kernel(shape, settings)
    return found


def _products(
    shape: Shape, operation: str
) -> Mapping[str, Callable[[Shape, Callable[[str], Settings]], Tiles]]:
    aligned = operation == "student"
    found: dict[str, Callable[[Shape, Callable[[str], Settings]], Tiles]] = {}
    if operation in ("plain", "student"):
        found["_attn_fwd_kernel"] = lambda s, at: _row_tiles(s, at("fwd"), 2, 1)
        found["_attn_bwd_delta_kernel"] = lambda s, at: _delta_tiles(s, at("delta"), aligned)
        found["_attn_bwd_dq_kernel"] = lambda s, at: _row_tiles(s, at("dq"), 3, 2, aligned)
        found["_attn_bwd_dkdv_kernel"] = lambda s, at: _key_tiles(s, at("dkdv"), True, aligned)
    if operation != "plain":
        found["_visual_map_fwd_kernel"] = lambda s, at: _map_tiles(s, at("map"), operation)
    if operation == "modular":
        found["_alignment_bwd_dq_kernel"] = lambda s, at: _slot_tiles(s, at("align_dq"), 2)
        found["_attn_bwd_dkdv_kernel"] = lambda s, at: _key_tiles(s, at("align_dk"), False, True)
    return found


def _tile(shape: Shape, settings: Settings) -> int:
    """Operations of one product of one tile of one head; the head size is padded."""
    pad = 1 << (shape.head_dim - 1).bit_length()
    return 2 * settings.BLOCK_M * settings.BLOCK_N * pad


def _rows_read(shape: Shape, settings: Settings, tensors: int, numbers: int) -> int:
    """Bytes of the row tiles of all heads: tensors like q, and float32 numbers per row."""
    rows = sum(-(-(end - begin) // settings.BLOCK_M) for begin, end in _ends(shape))
    rows *= settings.BLOCK_M * shape.heads
    return rows * (tensors * shape.head_dim * shape.dtype.itemsize + 4 * numbers)


def _ends(shape: Shape) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in Tables(shape.layout).samples[:, :2]]


def _row_tiles(
    shape: Shape, settings: Settings, products: int, tensors: int, aligned: bool = False
) -> Tiles:
    """Forward (2 products, q) and dq (3 products; q and dO; G on all visited tiles)."""
    visits = row_visits(shape.layout, *settings[:2]) * shape.heads
    numbers = 0 if tensors == 1 else 2 + aligned
    read = visits * settings.BLOCK_N * 2 * shape.head_dim * shape.dtype.itemsize
    if aligned:
        read += visits * settings.BLOCK_M * settings.BLOCK_N * shape.g_size
    read += _rows_read(shape, settings, tensors, numbers)
    return Tiles(products * visits * _tile(shape, settings), read)


def _slot_tiles(shape: Shape, settings: Settings, products: int) -> Tiles:
    """Products on slots: of a row tile all slots that begin before its last row."""
    m, n = settings[:2]
    visits = slot_visits(shape.layout, m, n) * shape.heads
    read = visits * n * (shape.head_dim * shape.dtype.itemsize + m * shape.g_size)
    read += _rows_read(shape, settings, 1, 2)
    return Tiles(products * visits * _tile(shape, settings), read)


def _delta_tiles(shape: Shape, settings: Settings, aligned: bool) -> Tiles:
    exact = shape.dtype == torch.float32
    flops = read = 0
    if aligned:
        flops, read = _slot_tiles(shape, settings, 1)
    if exact:
        pairs = _row_tiles(shape, settings, 2, 1)
        flops, read = flops + pairs.flops, read + pairs.read
    return Tiles(flops, read + _rows_read(shape, settings, 2, 1))


def _map_tiles(shape: Shape, settings: Settings, operation: str) -> Tiles:
    visits = map_visits(shape.layout, settings.BLOCK_M)
    size = shape.head_dim * shape.dtype.itemsize
    tile = Settings(settings.BLOCK_M, MAP_TILE)
    read = visits * shape.heads * ((settings.BLOCK_M + MAP_TILE) * size + 4 * settings.BLOCK_M)
    if operation != "target":
        read += _Sizes(shape).stored  # the target, by panels
    return Tiles(visits * shape.heads * _tile(shape, tile), read)


def _key_tiles(shape: Shape, settings: Settings, attention: bool, aligned: bool) -> Tiles:
    """dk and dv; without attention dk of the loss alone."""
    m, n = settings[:2]
    visits, programs = key_visits(shape.layout, m, n, panels_only=not attention)
    tensors, numbers = (2, 3) if attention else (1, 2)
    size = shape.head_dim * shape.dtype.itemsize
    per_visit = m * (tensors * size + 4 * numbers) + (m * n * shape.g_size if aligned else 0)
    read = visits * shape.heads * per_visit + programs * shape.kv_heads * tensors * n * size
    return Tiles((4 if attention else 2) * visits * shape.heads * _tile(shape, settings), read)


# Tiles that the kernels visit, of one head


def row_visits(layout: VisualLayout, block_m: int, block_n: int) -> int:
    """(row tile, key tile) pairs: the key tiles of the prefix and of the segment that the tile's
    first row is in, up to its last row; between live keys."""
    tables, visits = Tables(layout), 0
    for sample, (begin, end, first, end_live, end_prefix) in enumerate(tables.samples):
        row_0 = np.arange(begin, end, block_m)
        last = np.minimum(row_0 + block_m, min(end, end_live))
        row_0, last = (x[(row_0 < end_live) & (last > first)] for x in (row_0, last))
        high, low = _ceil(last, block_n), first // block_n
        if tables.contiguous:
            visits += int((high - low).sum())
            continue
        prefix = np.maximum(np.minimum(_ceil(end_prefix, block_n), high), low)
        own = tables.bounds[tables.base(sample) + row_0, 0] // block_n
        visits += int((prefix - low + np.maximum(high - np.maximum(own, prefix), 0)).sum())
    return visits


def slot_visits(layout: VisualLayout, block_m: int, block_n: int) -> int:
    """(row tile, key tile of a slot) pairs: the slots that begin before the tile's end."""
    tables, visits = Tables(layout), 0
    for sample, (begin, end, *_) in enumerate(tables.samples):
        last = np.minimum(np.arange(begin, end, block_m) + block_m, end) - 1
        visits += int(tables.tiles[sample, last // MAP_TILE - begin // MAP_TILE, 2].sum())
    return visits * (MAP_TILE // block_n)


def key_visits(
    layout: VisualLayout, block_m: int, block_n: int, panels_only: bool = False
) -> tuple[int, int]:
    """(key tile, row tile) pairs, and key tiles: the rows from a tile's first key to the end of its
    last key's segment, or of the sample where it has a key of the prefix."""
    tables, visits, programs = Tables(layout), 0, 0
    for sample, (begin, end, first, end_live, end_prefix) in enumerate(tables.samples):
        if begin == end:
            continue
        n_0 = np.arange(begin // block_n * block_n, end, block_n)
        programs += len(n_0)
        m_hi = np.full_like(n_0, end_live)
        if not tables.contiguous:
            last = tables.base(sample) + np.minimum(n_0 + block_n, end) - 1
            m_hi = np.where(n_0 < end_prefix, end_live, tables.bounds[last, 1])
        m_hi = np.where((n_0 + block_n > first) & (n_0 < end_live), m_hi, 0)
        if panels_only:
            tile = n_0 // MAP_TILE - begin // MAP_TILE
            m_hi = np.minimum(m_hi, tables.tiles[sample, tile, 1])
        visits += int(np.maximum(_ceil(m_hi - np.maximum(n_0, first), block_m), 0).sum())
    return visits, programs


def map_visits(layout: VisualLayout, block_m: int) -> int:
    """(row tile, slot) pairs with an entry."""
    tables, visits = Tables(layout), 0
    for sample, (begin, end, _, end_live, _) in enumerate(tables.samples):
        first_row = np.arange(begin, end, block_m)
        for tile in tables.slot_tiles[sample]:
            if tile < 0:
                continue
            key = np.arange(max(tile * MAP_TILE, begin), min((tile + 1) * MAP_TILE, end))
            token = tables.base(sample) + key
            key, token = key[tables.visual[token]], token[tables.visual[token]]
            # A key is seen by the live rows from it to the end of its segment.
            until = np.where(tables.rank[token] == 0, end_live, tables.bounds[token, 1])
            low = np.maximum(first_row[:, None], key).clip(max=end)
            high = np.minimum(first_row[:, None] + block_m, until)
            visits += int((tables.live_between(sample, low, high) > 0).any(1).sum())
    return visits


def _ceil(x: np.ndarray, n: int) -> np.ndarray:
    return -(-x // n)
