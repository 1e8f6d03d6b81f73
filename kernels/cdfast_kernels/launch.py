"""How the Triton kernels are launched: the one table of tile shapes, and the view of a batch.

The settings were chosen from compiled resource figures (benchmarks/compile_resources.py: no spills,
matrix instructions present), not from measurements: no GPU has been available to this project.
Triton 3.9 spills nowhere at head sizes 64 and 128; 3.6 a few bytes in three kernels, where other
shapes would cost more than that (tests/kernels/test_compile.py).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cdfast_kernels.errors import bad_argument
from cdfast_kernels.layout import MAP_TILE, VisualLayout, pack_map, unpack_map

LOG2E = 1.4426950408889634

# Names a file of settings measured on this device, which come before those of the table below.
TABLE_VARIABLE = "CDFAST_LAUNCH_TABLE"


class Settings(NamedTuple):
    """Tile shape and compile options of one kernel on one architecture."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    # Alignment kernels: start the dP accumulator from G (fewer instructions), or add G after the
    # dot (fewer live registers).
    acc_init: bool = True


KERNELS = ("fwd", "map", "delta", "dq", "dkdv", "align_dq", "align_dk")

# (architecture, largest padded head size, bytes per element at most) -> settings per kernel, in the
# order of KERNELS. Key tiles divide the map tile of 64. fp32 has no matrix instructions here
# (input_precision="ieee"), so its tiles are small.
_LAUNCH: dict[tuple[int, int, int], tuple[Settings, ...]] = {
    (100, 64, 2): (
        Settings(128, 64, 4, 3),
        Settings(128, 64, 8, 3),
        Settings(128, 64, 4, 2),
        Settings(128, 64, 8, 2, False),
        Settings(64, 64, 8, 1),
        Settings(128, 64, 8, 2),
        Settings(64, 64, 8, 2),
    ),
    (100, 128, 2): (
        Settings(128, 64, 8, 3),
        Settings(128, 64, 8, 3),
        Settings(128, 64, 8, 2),
        Settings(128, 32, 8, 2),
        Settings(64, 64, 8, 1),
        Settings(128, 64, 8, 2),
        Settings(32, 64, 8, 2),
    ),
    (90, 64, 2): (
        Settings(128, 64, 4, 3),
        Settings(128, 64, 8, 3),
        Settings(128, 64, 4, 2),
        Settings(128, 64, 8, 2),
        Settings(64, 64, 8, 2),
        Settings(128, 64, 8, 2),
        Settings(64, 64, 8, 2),
    ),
    (90, 128, 2): (
        Settings(128, 64, 8, 3),
        Settings(128, 64, 8, 3),
        Settings(128, 64, 8, 2),
        Settings(128, 32, 8, 2),
        Settings(32, 64, 8, 2),
        Settings(128, 64, 8, 2),
        Settings(32, 64, 8, 3),
    ),
    (80, 64, 2): (
        Settings(128, 64, 4, 2),
        Settings(64, 64, 4, 2),
        Settings(64, 64, 4, 2),
        Settings(64, 32, 4, 2, False),
        Settings(32, 64, 4, 2),
        Settings(64, 64, 4, 2),
        Settings(32, 64, 8, 2),
    ),
    (80, 128, 2): (
        Settings(64, 64, 4, 2),
        Settings(64, 64, 8, 2),
        Settings(64, 64, 4, 2),
        Settings(64, 64, 8, 2, False),
        Settings(32, 64, 8, 2, False),
        Settings(64, 32, 4, 2),
        Settings(32, 64, 8, 2),
    ),
    (80, 256, 2): (
        Settings(64, 32, 8, 2),
        Settings(64, 64, 8, 1),
        Settings(64, 32, 8, 1),
        Settings(32, 32, 8, 1, False),
        Settings(32, 32, 8, 1, False),
        Settings(32, 32, 8, 1),
        Settings(32, 32, 8, 1),
    ),
    (80, 128, 4): (Settings(32, 32, 8, 1, False),) * 7,
    (80, 256, 4): (Settings(16, 32, 8, 1, False),) * 7,
}
# Without matrix products.
_ROWS = Settings(32, 64, 4, 1)
# The interpreter's time is per operation, not per element.
_INTERPRETER = (Settings(64, 64, 4, 1),) * 7


def architecture(x: Tensor) -> int:
    """Compute capability as sm number, 0 in the interpreter."""
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@functools.cache
def _measured(path: str) -> dict[tuple[int, int, int, str], Settings]:
    """The settings of a file that a sweep has written, {} without one."""
    if not path:
        return {}
    try:
        rows = json.loads(Path(path).read_text())
        table = {}
        for row in rows:
            settings = Settings(*row["settings"])
            if row["kernel"] not in KERNELS or MAP_TILE % settings.BLOCK_N:
                raise ValueError(f"an unknown kernel, or key tiles that do not divide 64: {row}")
            key = row["arch"], row["head_dim_pad"], row["element_size"], row["kernel"]
            table[key] = settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "a table of launch settings, as python -m benchmarks.tune_kernels --table writes"
        remedy = f"Write it again on this device, or unset {TABLE_VARIABLE}."
        raise bad_argument(TABLE_VARIABLE, expected, f"{path}: {error!r}", remedy) from error
    return table


def settings_for(kernel: str, arch: int, dim: int, element_size: int) -> Settings:
    """The row of the table for an architecture: the newest one not above it that has an entry."""
    if kernel == "rows":
        return _ROWS
    index = KERNELS.index(kernel)
    if arch == 0:
        return _INTERPRETER[index]
    pad = head_dim_pad(dim)
    measured = _measured(os.environ.get(TABLE_VARIABLE, "")).get((arch, pad, element_size, kernel))
    if measured is not None:
        return measured
    fits = [
        (-known, largest, size)
        for known, largest, size in _LAUNCH
        if known <= arch and largest >= pad and size >= element_size
    ]
    # fp32 rows exist once, for sm_80: prefer the exact element size over the newest architecture.
    known, largest, size = min(fits, key=lambda row: (row[2], row[0], row[1]))
    return _LAUNCH[-known, largest, size][index]


Grid = Callable[[Settings], tuple[int, int]]


def launch(name: str, kernel: Any, grid: Grid, arguments: dict[str, Any]) -> None:
    """Run a kernel with the settings of its row of the table.

    `arguments` may hold more than the kernel takes: kernels of one operation share most of them.
    """
    q = arguments["Q"]
    settings = settings_for(name, architecture(q), q.shape[-1], q.element_size())
    programs = grid(settings)
    if 0 in programs:
        return
    tiles = {"BLOCK_M": settings.BLOCK_M, "BLOCK_N": settings.BLOCK_N}
    pool = {**arguments, **tiles, "ACC_INIT": settings.acc_init}
    options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    kernel[programs](**{argument: pool[argument] for argument in kernel.arg_names}, **options)


def batch_arguments(axis: Axis, q: Tensor, k: Tensor, scale: float) -> dict[str, Any]:
    """What every kernel of an operation on q and k takes."""
    heads, dim = q.shape[-2:]
    # float32 keeps natural units: folding log2(e) into the scale costs one rounding of the scores.
    exact = q.dtype == torch.float32
    return {
        "Q": q,
        "K": k,
        **strides(q=q, k=k),
        "SAMPLES": axis.samples,
        "CODES": axis.codes,
        "BOUNDS": axis.bounds,
        "TILES": axis.tiles,
        "SLOT_TILES": axis.slot_tiles,
        "PANELS": axis.panels,
        "n_slots": axis.n_slots,
        "n_tiles": axis.tiles.shape[1],
        "tokens_per_sample": axis.tokens_per_sample,
        "scale": scale if exact else scale * LOG2E,
        "softmax_scale": scale,
        "inv_heads": 1 / heads,
        "HEADS": heads,
        "GROUP": heads // k.shape[-2],
        "HEAD_DIM": dim,
        "HEAD_DIM_PAD": head_dim_pad(dim),
        "EXACT": exact,
        "CONTIGUOUS": axis.contiguous,
    }


def head_dim_pad(dim: int) -> int:
    return triton.next_power_of_2(dim)


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_xb, stride_xn, stride_xh of each x=tensor: of batch (0 if packed), token and head."""
    found = {}
    for name, x in tensors.items():
        found[f"stride_{name}b"] = 0 if x.ndim == 3 else x.stride(0)
        found[f"stride_{name}n"], found[f"stride_{name}h"] = x.stride(-3), x.stride(-2)
    return found


class Axis(NamedTuple):
    """A batch as kernels see it: the tables of a schedule and four host numbers."""

    samples: Tensor
    codes: Tensor
    bounds: Tensor
    tiles: Tensor
    entries: Tensor
    counts: Tensor
    slot_tiles: Tensor
    panels: Tensor
    length: int
    packed: bool
    contiguous: bool
    map_rows: int

    @classmethod
    def of(cls, layout: VisualLayout) -> Axis:
        table = layout.schedule
        return cls(
            table.samples,
            table.codes,
            table.bounds,
            table.tiles,
            table.entries,
            table.counts,
            layout.slot_tiles,
            table.panels,
            layout.length,
            layout.is_packed,
            table.contiguous,
            layout.map_rows,
        )

    @classmethod
    def join(cls, tables: list[Tensor], host: list[int]) -> Axis:
        """From what `split` gives."""
        length, packed, contiguous, map_rows = host
        return cls._make((*tables, length, bool(packed), bool(contiguous), map_rows))

    def split(self) -> tuple[list[Tensor], list[int]]:
        """The tables, and the host numbers: what an operator of torch can take."""
        return list(self[:-4]), [int(x) for x in self[-4:]]

    @property
    def n_samples(self) -> int:
        return self.samples.shape[0]

    @property
    def n_tokens(self) -> int:
        return self.codes.shape[0]

    @property
    def n_slots(self) -> int:
        return self.slot_tiles.shape[1]

    @property
    def tokens_per_sample(self) -> int:
        """Distance of two samples in flat tokens."""
        return 0 if self.packed else self.length

    def empty_lse(self, q: Tensor) -> Tensor:
        shape: tuple[int, ...] = (q.shape[-2], self.n_tokens)
        if not self.packed:
            shape = (self.n_samples, q.shape[-2], self.length)
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    def lse_strides(self, **tensors: Tensor) -> dict[str, int]:
        """As `strides`, of tensors stored like the LSE."""
        found = {}
        for name, x in tensors.items():
            found[f"stride_{name}b"] = 0 if self.packed else x.stride(0)
            found[f"stride_{name}n"], found[f"stride_{name}h"] = x.stride(-1), x.stride(-2)
        return found

    def row_grid(self, heads: int) -> Grid:
        return lambda tile: (self.n_samples * heads, triton.cdiv(self.length, tile.BLOCK_M))

    def key_grid(self, heads: int) -> Grid:
        # Key tiles lie on the axis: a packed sequence can begin inside one.
        extra = int(self.packed)
        return lambda tile: (self.n_samples * heads, triton.cdiv(self.length, tile.BLOCK_N) + extra)

    def map_grid(self, rows: int) -> Grid:
        return lambda tile: (self.n_samples * self.n_slots, triton.cdiv(rows, tile.BLOCK_M))

    def sample_grid(self, rows: int) -> Grid:
        return lambda tile: (self.n_samples, triton.cdiv(rows, tile.BLOCK_M))

    def empty_chunk(self, n_rows: int) -> Tensor:
        """(samples, slots, n_rows, 64), float32: see map_fwd.py."""
        shape = (self.n_samples, self.n_slots, n_rows, 64)
        return torch.empty(shape, dtype=torch.float32, device=self.codes.device)

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(tokens, ...) as (samples, length, ...), `fill` where a packed sample is shorter."""
        if not self.packed:
            return x.reshape(self.n_samples, self.length, *x.shape[1:])
        position, inside = self._positions()
        picked = x[position.clamp(max=self.n_tokens - 1)]
        return picked.masked_fill(~inside.reshape(*inside.shape, *[1] * (x.ndim - 1)), fill)

    def flat(self, x: Tensor) -> Tensor:
        """(samples, length, ...) as (tokens, ...): the inverse of `rows`."""
        if not self.packed:
            return x.flatten(0, 1)
        sample = self._sample_of_token()
        token = torch.arange(self.n_tokens, device=x.device)
        return x[sample, token - self.samples[:, 0].long()[sample]]

    def unpack_map(self, data: Tensor) -> Tensor:
        """(samples, length, slots * 64) of a stored map, 0 where it stores nothing."""
        return unpack_map(data, self.samples[:, 0], self.length, self.panels, self.map_rows)

    def pack_map(self, columns: Tensor) -> Tensor:
        """Inverse of `unpack_map`: (map rows, 64)."""
        return pack_map(columns, self.samples[:, 0], self.panels, self.map_rows)

    def visual_columns(self) -> Tensor:
        """bool (samples, slots * 64): stored columns that are visual tokens of the sample."""
        offset = torch.arange(64, device=self.codes.device)
        position = (self.slot_tiles.long()[:, :, None] * 64 + offset).flatten(1)
        begin, end = self.samples[:, 0, None], self.samples[:, 1, None]
        inside = (position >= begin) & (position < end)
        first = torch.arange(self.n_samples, device=position.device) * self.tokens_per_sample
        code = self.codes[(position + first[:, None]).clamp(0, self.n_tokens - 1)]
        return inside & (code >= 0) & (code % 2 == 1)

    def _positions(self) -> tuple[Tensor, Tensor]:
        begin, end = self.samples[:, 0, None].long(), self.samples[:, 1, None]
        position = begin + torch.arange(self.length, device=begin.device)
        return position, position < end

    def _sample_of_token(self) -> Tensor:
        token = torch.arange(self.n_tokens, dtype=torch.int32, device=self.codes.device)
        return torch.bucketize(token, self.samples[:, 1].contiguous(), right=True)
