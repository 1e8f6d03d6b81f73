"""Which launch settings are worth a measurement, and rows as they stand in launch.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import DTYPES

# KiB of shared memory that one program can have.
SHARED_KIB = {80: 163, 90: 227, 100: 227}
# float32 numbers per thread in accumulators and score tiles: more does not fit into 255 registers.
MOST_NUMBERS = 224
# Kernels that write two accumulators of a key tile; the others have one of a row tile.
KEY_TILES = ("dkdv", "align_dk")
ACC_INIT = ("dq", "dkdv")


@dataclass(frozen=True)
class Spec:
    """One row of the table: a head size (padded to a power of 2) and a dtype."""

    head_dim: int
    dtype: str

    @property
    def element_size(self) -> int:
        return torch.empty(0, dtype=DTYPES[self.dtype]).element_size()


SPECS = (Spec(128, "bf16"), Spec(64, "bf16"), Spec(256, "bf16"), Spec(128, "fp32"))


def candidates(kernel: str, spec: Spec, arch: int) -> list[Any]:
    """Settings to try, the present ones first; those that cannot fit are left out."""
    from cdfast_kernels.launch import Settings, settings_for

    present = settings_for(kernel, arch, spec.head_dim, spec.element_size)
    full = spec.element_size == 4
    rows = (16, 32, 64) if full else (32, 64, 128)
    keys = (32, 64)
    if kernel == "map":
        keys = (present.BLOCK_N,)  # its key tile is the map tile
    elif kernel == "fwd" and not full:
        rows = (64, 128)
    stages = (1, 2) if full or spec.head_dim > 128 else (2, 3, 4)
    found = [present]
    for m, n, warps, depth in itertools.product(rows, keys, (4, 8), stages):
        settings = Settings(m, n, warps, depth, present.acc_init)
        if settings not in found and fits(kernel, settings, spec, arch):
            found.append(settings)
    return found


def fits(kernel: str, settings: Any, spec: Spec, arch: int) -> bool:
    """Whether a rough count of registers and shared memory allows these settings."""
    m, n = settings.BLOCK_M, settings.BLOCK_N
    held = 2 * n if kernel in KEY_TILES else m
    numbers = (held * spec.head_dim + 2 * m * n) / (32 * settings.num_warps)
    streamed = m if kernel in KEY_TILES else n
    kept = n if kernel in KEY_TILES else m
    tiles = 2 * streamed * settings.num_stages + kept
    shared = tiles * spec.head_dim * spec.element_size / 1024
    limit = max(kib for known, kib in SHARED_KIB.items() if known <= max(arch, 80))
    # The compiler may need less (it overlaps buffers), hardly more.
    return numbers <= MOST_NUMBERS and shared <= 1.25 * limit


def variations(kernel: str, settings: Any) -> list[Any]:
    """A second step around the best tile shape: G as the first value of the accumulator or not."""
    return [settings._replace(acc_init=not settings.acc_init)] if kernel in ACC_INIT else []


def table_row(arch: int, spec: Spec, best: dict[str, list], names: tuple[str, ...]) -> str:
    """The row as it stands in launch.py; kernels that were not measured keep their settings."""
    from cdfast_kernels.launch import Settings, head_dim_pad, settings_for

    lines = [f"    ({arch}, {head_dim_pad(spec.head_dim)}, {spec.element_size}): ("]
    for kernel in names:
        present = settings_for(kernel, arch, spec.head_dim, spec.element_size)
        m, n, warps, stages, acc_init = Settings(*best.get(kernel, present))
        last = "" if acc_init else ", False"
        note = f"  # {kernel}" + ("" if kernel in best else ", not measured")
        lines.append(f"        Settings({m}, {n}, {warps}, {stages}{last}),{note}")
    return "\n".join([*lines, "    ),"])


def table_rows(arch: int, spec: Spec, best: dict[str, list]) -> list[dict[str, Any]]:
    """The same as CDFAST_LAUNCH_TABLE reads it."""
    from cdfast_kernels.launch import head_dim_pad

    return [
        {
            "kernel": kernel,
            "arch": arch,
            "head_dim_pad": head_dim_pad(spec.head_dim),
            "element_size": spec.element_size,
            "settings": settings,
        }
        for kernel, settings in best.items()
    ]
