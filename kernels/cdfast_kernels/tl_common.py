"""What all Triton kernels share: tiles of tokens, visibility, and the tiles a row tile must visit.

Positions are on the axis of schedule.py. Every offset that grows with the batch is int64.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Smallest normal float32: below it a probability counts as zero.
TINY = tl.constexpr(1.1754943508222875e-38)
# As visual_map.FP16_SCALE and layout.MAP_TILE, which a test holds equal.
MAP_SCALE = tl.constexpr(2.0**15)
MAP_TILE = tl.constexpr(64)
SAMPLE_FIELDS = tl.constexpr(5)


@triton.jit
def exp_scores(x, EXACT: tl.constexpr):
    """exp of natural scores if EXACT, else of scores in units of log 2 (one multiply less)."""
    if EXACT:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def load_sample(SAMPLES, sample):
    """First position and end of a sample's axis, of its live tokens, and the end of its prefix."""
    base = SAMPLES + sample.to(tl.int64) * SAMPLE_FIELDS
    return (
        tl.load(base),
        tl.load(base + 1),
        tl.load(base + 2),
        tl.load(base + 3),
        tl.load(base + 4),
    )


@triton.jit
def tile_offsets(stride_n, BLOCK: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    """int64 [BLOCK, HEAD_DIM_PAD] offsets inside a tile of tokens; loop invariant."""
    rows = tl.arange(0, BLOCK).to(tl.int64) * stride_n
    return rows[:, None] + tl.arange(0, HEAD_DIM_PAD)[None, :]


@triton.jit
def load_tile(
    ptrs, rows_ok, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr
):
    """[BLOCK, HEAD_DIM_PAD] of a tile; masked rows and channels past HEAD_DIM are never read."""
    channels = tl.arange(0, HEAD_DIM_PAD) < HEAD_DIM
    if HEAD_DIM == HEAD_DIM_PAD:
        if MASKED:
            tile = tl.load(ptrs, mask=rows_ok[:, None], other=0.0)
        else:
            tile = tl.load(ptrs)
    elif MASKED:
        tile = tl.load(ptrs, mask=rows_ok[:, None] & channels[None, :], other=0.0)
    else:
        tile = tl.load(ptrs, mask=channels[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(ptrs, tile, rows_ok, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr):
    if HEAD_DIM == HEAD_DIM_PAD:
        tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=rows_ok[:, None])
    else:
        channels = tl.arange(0, HEAD_DIM_PAD) < HEAD_DIM
        tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=rows_ok[:, None] & channels[None, :])


@triton.jit
def load_codes(CODES, token_base, positions, begin, end):
    """Codes of tokens; DEAD (-1) outside the sample."""
    inside = (positions >= begin) & (positions < end)
    return tl.load(CODES + token_base + positions, mask=inside, other=-1)


@triton.jit
def is_live(
    CODES, token_base, positions, begin, end, first_live, end_live, CONTIGUOUS: tl.constexpr
):
    """Which positions hold a live token, and their codes (0 where nobody needs them)."""
    if CONTIGUOUS:
        live = (positions >= first_live) & (positions < end_live)
        codes = tl.zeros_like(positions)
    else:
        codes = load_codes(CODES, token_base, positions, begin, end)
        live = codes >= 0
    return live, codes


@triton.jit
def visible(rows, row_codes, columns, column_codes, column_live, CONTIGUOUS: tl.constexpr):
    """bool [rows, columns] for rows that are live: j <= i, j live, same segment or the prefix."""
    seen = (rows[:, None] >= columns[None, :]) & column_live[None, :]
    if not CONTIGUOUS:
        row_rank = (row_codes >> 1)[:, None]
        column_rank = (column_codes >> 1)[None, :]
        seen = seen & ((row_rank == column_rank) | (column_rank == 0))
    return seen


@triton.jit
def visible_t(rows, row_codes, columns, column_codes, row_live, CONTIGUOUS: tl.constexpr):
    """`visible` as [columns, rows], for columns that are live."""
    seen = (rows[None, :] >= columns[:, None]) & row_live[None, :]
    if not CONTIGUOUS:
        row_rank = (row_codes >> 1)[None, :]
        column_rank = (column_codes >> 1)[:, None]
        seen = seen & ((row_rank == column_rank) | (column_rank == 0))
    return seen


@triton.jit
def entry_mask(
    CODES, token_base, rows, columns, begin, end, first_live, end_live, CONTIGUOUS: tl.constexpr
):
    """bool [rows, columns]: live row i sees visual key j; and the live rows."""
    row_live, row_codes = is_live(
        CODES, token_base, rows, begin, end, first_live, end_live, CONTIGUOUS
    )
    column_codes = load_codes(CODES, token_base, columns, begin, end)
    visual = (column_codes >= 0) & ((column_codes & 1) == 1)
    seen = visible(rows, row_codes, columns, column_codes, visual, CONTIGUOUS)
    return seen & row_live[:, None], row_live


@triton.jit
def key_tiles(
    BOUNDS,
    token_base,
    row_0,
    end,
    first_live,
    end_live,
    end_prefix,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """The key tiles of the row tile that begins at row_0.

    Returns (full_lo, full_hi, a_lo, n_a, b_lo, n_masked): tiles from full_lo to full_hi need no
    mask; n_masked others do, n_a of them from a_lo on and the rest from b_lo on.
    """
    a_lo = first_live // BLOCK_N * BLOCK_N
    hi = tl.minimum(tl.minimum(row_0 + BLOCK_M, end), end_live)
    # Row tiles wholly in front of the live tokens or behind them visit nothing.
    hi = tl.where((row_0 < end_live) & (hi > first_live), hi, a_lo)
    if CONTIGUOUS:
        a_hi = tl.minimum(tl.cdiv(first_live, BLOCK_N), tl.cdiv(hi, BLOCK_N)) * BLOCK_N
        full_lo = a_hi
        full_hi = tl.maximum(tl.minimum((row_0 + 1) // BLOCK_N * BLOCK_N, hi), full_lo)
        b_lo = full_hi
    else:
        full_lo = a_lo
        full_hi = a_lo
        a_hi = tl.minimum(tl.cdiv(end_prefix, BLOCK_N), tl.cdiv(hi, BLOCK_N)) * BLOCK_N
        a_hi = tl.maximum(a_hi, a_lo)
        own = tl.load(BOUNDS + (token_base + row_0) * 2)
        b_lo = tl.maximum(own // BLOCK_N * BLOCK_N, a_hi)
    n_a = (a_hi - a_lo) // BLOCK_N
    n_b = tl.maximum(tl.cdiv(hi - b_lo, BLOCK_N), 0)
    return full_lo, full_hi, a_lo, n_a, b_lo, n_a + n_b


@triton.jit
def masked_tile(i, a_lo, n_a, b_lo, BLOCK_N: tl.constexpr):
    """First key of the i-th masked tile of `key_tiles`."""
    return tl.where(i < n_a, a_lo + i * BLOCK_N, b_lo + (i - n_a) * BLOCK_N)


@triton.jit
def slot_of(TILES, sample, n_tiles, n_0, begin):
    """Slot of the map tile that holds position n_0; -1 where it has no visual key."""
    tile = n_0 // MAP_TILE - begin // MAP_TILE
    return tl.load(TILES + (sample * n_tiles + tile) * 2)


@triton.jit
def slots_up_to(TILES, sample, n_tiles, position, begin):
    """How many slots of the sample begin at or before a position."""
    tile = position // MAP_TILE - begin // MAP_TILE
    return tl.load(TILES + (sample * n_tiles + tile) * 2 + 1)


@triton.jit
def map_ptrs(MAP, token_base, rows, width, slot, offset, BLOCK_N: tl.constexpr):
    """Pointers [rows, BLOCK_N] into a stored map (tokens, width), from a slot's offset-th key."""
    columns = slot * MAP_TILE + offset + tl.arange(0, BLOCK_N)
    return MAP + (token_base + rows)[:, None] * width + columns[None, :]
