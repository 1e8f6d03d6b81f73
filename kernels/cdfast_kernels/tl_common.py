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
    """int64 [BLOCK, HEAD_DIM_PAD] offsets inside a tile of tokens."""
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
def panel_of(TILES, sample, n_tiles, n_0, begin):
    """Base and end of the panel of the map tile that holds position n_0; end 0 where none is."""
    tile = n_0 // MAP_TILE - begin // MAP_TILE
    entry = TILES + (sample * n_tiles + tile) * 3
    return tl.load(entry), tl.load(entry + 1)


@triton.jit
def slots_up_to(TILES, sample, n_tiles, position, begin):
    """How many slots of the sample begin at or before a position."""
    tile = position // MAP_TILE - begin // MAP_TILE
    return tl.load(TILES + (sample * n_tiles + tile) * 3 + 2).to(tl.int32)


@triton.jit
def panel_ptrs(MAP, base, rows, column, BLOCK_N: tl.constexpr):
    """Pointers [rows, BLOCK_N] into a panel, from one of its columns on."""
    columns = column + tl.arange(0, BLOCK_N)
    return MAP + (base + rows)[:, None] * MAP_TILE + columns[None, :]


@triton.jit
def load_panel(MAP, base, panel_end, rows, row_live, n_0, BLOCK_N: tl.constexpr):
    """Keys n_0, n_0 + 1, ... of a stored map, 0 in rows that the panel does not hold."""
    tile_0 = n_0 // MAP_TILE * MAP_TILE
    column = n_0 - tile_0
    held = row_live & (rows >= tile_0) & (rows < panel_end)
    return tl.load(panel_ptrs(MAP, base, rows, column, BLOCK_N), mask=held[:, None], other=0.0)


@triton.jit
def row_program(
    SAMPLES,
    CODES,
    tokens_per_sample,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """The row tile and head of a program of `Axis.row_grid`; the longest row tiles start first.

    Returns sample, head, flat token of the sample's position 0, the fields of `load_sample`, first
    row, rows, which rows are live, and their codes. The first row may lie behind the sample.
    """
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin, end, first_live, end_live, end_prefix = load_sample(SAMPLES, sample)
    row_0 = begin + (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    sample, head = sample.to(tl.int64), head.to(tl.int64)
    token_base = sample * tokens_per_sample
    rows = row_0 + tl.arange(0, BLOCK_M)
    live, codes = is_live(CODES, token_base, rows, begin, end, first_live, end_live, CONTIGUOUS)
    return (
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
        live,
        codes,
    )


@triton.jit
def tile_ptrs(
    X,
    sample,
    head,
    position,
    stride_b,
    stride_n,
    stride_h,
    BLOCK: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
):
    """Pointers [BLOCK, HEAD_DIM_PAD] to the tile of tokens that begins at a position."""
    base = X + sample * stride_b + head * stride_h + tl.cast(position, tl.int64) * stride_n
    return base + tile_offsets(stride_n, BLOCK, HEAD_DIM_PAD)


@triton.jit
def row_ptrs(X, sample, head, rows, stride_b, stride_n, stride_h):
    """Pointers [rows] into a tensor stored like the LSE."""
    return X + sample * stride_b + head * stride_h + rows.to(tl.int64) * stride_n


@triton.jit
def load_rows(X, sample, head, rows, row_live, stride_b, stride_n, stride_h):
    """Numbers of live rows of a tensor stored like the LSE, 0 elsewhere."""
    ptrs = row_ptrs(X, sample, head, rows, stride_b, stride_n, stride_h)
    return tl.load(ptrs, mask=row_live, other=0.0)


@triton.jit
def score_shift(lse, EXACT: tl.constexpr):
    """The natural-log LSE in the unit of the scores."""
    if EXACT:
        return lse
    else:
        return lse * LOG2E
