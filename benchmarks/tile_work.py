"""Work of the kernels by tiles: what tile shapes make of the ideal work (work.py).

A visited tile computes all of its products, with the head size padded to a power of two, and loads
its operands again. Which tiles are visited follows tl_common.key_tiles and csrc/visibility.cpp;
tests/kernels/test_work.py counts the same operations in the Triton interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from cdfast_kernels import VisualLayout
from cdfast_kernels.layout import MAP_TILE

from benchmarks.work import Shape, Sizes, Tables


class Tiles(NamedTuple):
    """Operations of whole tiles, and bytes read if every tile loads its operands whole."""

    flops: int
    read: int


class Settings(NamedTuple):
    """Tile shape of a kernel; launch.Settings begins with the same fields."""

    BLOCK_M: int
    BLOCK_N: int


def cpu_tile_flops(shape: Shape) -> dict[str, int]:
    """Phase over all keys of the CPU backend -> operations of its whole tiles."""
    product = cpu_visits(shape.layout) * MAP_TILE * shape.product
    each = {"forward": 2, "aligned forward": 2, "backward": 7, "aligned backward": 7}
    return {phase: products * product for phase, products in each.items()}


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
        read += Sizes(shape).stored  # the target, by panels
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
    for sample, (begin, end, _, end_live, _) in enumerate(tables.samples):
        first_row = np.arange(begin, end, block_m)
        first_row = first_row[first_row < end_live]
        end_row = np.minimum(first_row + block_m, end)
        visits += int(_keys_of_rows(tables, sample, first_row, end_row, block_n).sum())
    return visits


def _keys_of_rows(
    tables: Tables, sample: int, first_row: np.ndarray, end_row: np.ndarray, block_n: int
) -> np.ndarray:
    """Key tiles of each row tile first_row <= i < end_row."""
    _, _, first, end_live, end_prefix = tables.samples[sample]
    last = np.minimum(end_row, end_live)
    high, low = _ceil(last, block_n), first // block_n
    if tables.contiguous:
        found = high - low
    else:
        prefix = np.maximum(np.minimum(_ceil(end_prefix, block_n), high), low)
        own = tables.bounds[tables.base(sample) + first_row, 0] // block_n
        found = prefix - low + np.maximum(high - np.maximum(own, prefix), 0)
    return np.where(last > first, found, 0)


def cpu_visits(layout: VisualLayout) -> int:
    """(row, key tile) pairs of the CPU backend: tiles of 64 rows on the axis of the sample, their
    rows rounded up to a multiple of 4. Rows behind the last live token are not skipped."""
    tables, visits = Tables(layout), 0
    for sample, (begin, end, *_) in enumerate(tables.samples):
        if begin == end:
            continue
        tile = np.arange(begin // MAP_TILE * MAP_TILE, end, MAP_TILE)
        first_row, end_row = np.maximum(tile, begin), np.minimum(tile + MAP_TILE, end)
        keys = _keys_of_rows(tables, sample, first_row, end_row, MAP_TILE)
        visits += int((keys * 4 * _ceil(end_row - first_row, 4)).sum())
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
