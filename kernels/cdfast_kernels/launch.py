"""How the Triton kernels are launched: the one table of tile shapes, and the view of a batch.

The settings were chosen from compiled resource figures (benchmarks/compile_resources.py: no spills,
matrix instructions present), not from measurements: no GPU has been available to this project.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cdfast_kernels.layout import VisualLayout

LOG2E = 1.4426950408889634


class Settings(NamedTuple):
    """Tile shape and compile options of one kernel on one architecture."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    # Alignment kernels: start the dP accumulator from G (fewer instructions), or add G after the
    # dot (fewer live registers).
    acc_init: bool = True

    def kwargs(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


KERNELS = ("fwd", "map", "delta", "dq", "dkdv", "align_dq", "align_dk")

# (architecture, largest padded head size, bytes per element at most) -> settings per kernel, in the
# order of KERNELS. Key tiles divide the map tile of 64. fp32 has no matrix instructions here
# (input_precision="ieee"), so its tiles are small.
_LAUNCH: dict[tuple[int, int, int], tuple[Settings, ...]] = {
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
        Settings(64, 64, 8, 2),
    ),
    (80, 64, 2): (
        Settings(128, 64, 4, 2),
        Settings(64, 64, 4, 2),
        Settings(64, 64, 4, 2),
        Settings(64, 32, 4, 2, False),
        Settings(32, 64, 4, 2, False),
        Settings(64, 64, 4, 2),
        Settings(64, 64, 4, 2),
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
    (80, 128, 4): (Settings(32, 32, 4, 1, False),) * 7,
    (80, 256, 4): (Settings(16, 32, 4, 1, False),) * 7,
}
# The interpreter's time is per operation, not per element.
_INTERPRETER = (Settings(64, 64, 4, 1),) * 7


def architecture(x: Tensor) -> int:
    """Compute capability as sm number, 0 in the interpreter."""
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def settings_for(kernel: str, arch: int, dim: int, element_size: int) -> Settings:
    """The row of the table for an architecture: the newest one not above it that has an entry."""
    index = KERNELS.index(kernel)
    if arch == 0:
        return _INTERPRETER[index]
    pad = head_dim_pad(dim)
    fits = [
        (-known, largest, size)
        for known, largest, size in _LAUNCH
        if known <= arch and largest >= pad and size >= element_size
    ]
    # fp32 rows exist once, for sm_80: prefer the exact element size over the newest architecture.
    known, largest, size = min(fits, key=lambda row: (row[2], row[0], row[1]))
    return _LAUNCH[-known, largest, size][index]


def launch(kernel: str, q: Tensor) -> Settings:
    return settings_for(kernel, architecture(q), q.shape[-1], q.element_size())


def head_dim_pad(dim: int) -> int:
    return triton.next_power_of_2(dim)


def score_scale(scale: float, q: Tensor) -> tuple[float, bool]:
    """Scale of the scores in the unit of the kernels, and whether that unit is natural.

    float32 keeps natural units: folding log2(e) into the scale costs one rounding of the scores.
    """
    exact = q.dtype == torch.float32
    return (scale if exact else scale * LOG2E), exact


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, token, head) strides; the batch stride of a packed tensor is 0."""
    if x.ndim == 3:
        return 0, x.stride(0), x.stride(1)
    return x.stride(0), x.stride(1), x.stride(2)


class Axis(NamedTuple):
    """A batch as kernels see it: the tables of a schedule and three host numbers."""

    samples: Tensor
    codes: Tensor
    bounds: Tensor
    tiles: Tensor
    entries: Tensor
    counts: Tensor
    slot_tiles: Tensor
    length: int
    packed: bool
    contiguous: bool

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
            layout.length,
            layout.is_packed,
            table.contiguous,
        )

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

    def lse_strides(self, lse: Tensor) -> tuple[int, int, int]:
        """(batch, token, head) strides."""
        if self.packed:
            return 0, lse.stride(1), lse.stride(0)
        return lse.stride(0), lse.stride(2), lse.stride(1)

    def row_grid(self, heads: int, block: int) -> tuple[int, int]:
        return self.n_samples * heads, triton.cdiv(self.length, block)

    def key_grid(self, heads: int, block: int) -> tuple[int, int]:
        # Key tiles lie on the axis: a packed sequence can begin inside one.
        return self.n_samples * heads, triton.cdiv(self.length, block) + int(self.packed)

    def map_grid(self, block: int) -> tuple[int, int]:
        return self.n_samples * self.n_slots, triton.cdiv(self.length, block)

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

    def sum_rows(self, x: Tensor) -> Tensor:
        """Sum over the tokens of each sample, in a fixed order."""
        return self.rows(x).sum(1)

    def max_rows(self, x: Tensor) -> Tensor:
        return self.rows(x).amax(1)

    def spread(self, x: Tensor) -> Tensor:
        """(samples,) to the tokens of each sample."""
        if not self.packed:
            return x[:, None].expand(-1, self.length).flatten()
        return x[self._sample_of_token()]

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
