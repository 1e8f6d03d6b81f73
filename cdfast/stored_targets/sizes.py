"""How large stored targets get: the formula, what it is fed with, and whether it fits."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdfast.config import ConfigError
from cdfast.losses import answer_rows, unshifted_rows
from cdfast.storage import nearest_existing

# Samples of a data set that are encoded for the estimate.
MEASURED_SAMPLES = 64
# Hashes of 8 bytes, two; counts of 4 bytes, two.
_BYTES_PER_SAMPLE = 24
_INDEX_BYTES = 4
# Of the estimated size that must be free: the mean of some samples is not the mean of all.
_MARGIN = 1.05


def stored_bytes(
    samples: float,
    answer_rows: float,
    visual_tokens: float,
    *,
    layers: int,
    top_k: int,
    itemsize: int,
) -> dict[str, float]:
    """Bytes on disk of each part of the targets, without some kilobytes of headers.

    Args:
        samples: of the data set.
        answer_rows: per sample, on average; 0 where no stage has the logit loss.
        visual_tokens: per sample, on average.
        layers: aligned student layers; 0 where no stage aligns attention.
        top_k: tokens per row.
        itemsize: bytes of a log-probability and of a vector's entry: 2 or 4.
    """
    return {
        "tokens": samples * answer_rows * top_k * _INDEX_BYTES,
        "log-probs": samples * answer_rows * (top_k + 1) * itemsize,
        "vectors": samples * visual_tokens * layers * itemsize,
        "per sample": samples * _BYTES_PER_SAMPLE,
    }


def map_bytes(tokens: float, visual_tokens: float, *, layers: int) -> float:
    """Bytes of one sample's whole maps in float16: what is not stored."""
    return layers * tokens * visual_tokens * 2


@dataclass(frozen=True)
class Measured:
    """What some samples, spread over a data set, say about all of it."""

    samples: int
    looked_at: int
    answer_rows: float
    visual_tokens: float


def measure_samples(data_set: Any, image_token_id: int, kl_rows: str) -> Measured:
    """Mean answer rows and visual tokens of up to `MEASURED_SAMPLES` samples, evenly spread."""
    total = len(data_set)
    looked_at = min(total, MEASURED_SAMPLES)
    rows = visual = 0
    for n in range(looked_at):
        sample = data_set[n * total // looked_at]
        labels = sample["labels"][None]
        chosen = unshifted_rows(labels) if kl_rows == "unshifted" else answer_rows(labels)
        rows += int(chosen.sum())
        visual += int((sample["input_ids"] == image_token_id).sum())
    return Measured(total, looked_at, rows / looked_at, visual / looked_at)


def shown_bytes(size: float) -> str:
    """Bytes in the largest unit that leaves at least two digits."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 10 * 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} {units[0]}"


def free_bytes(folder: Path) -> int:
    """Free on the disk that holds a folder, or will."""
    return shutil.disk_usage(nearest_existing(folder)).free


def check_space(needed: float, folder: Path) -> None:
    """Refuse to begin what does not fit.

    Raises:
        ConfigError: the estimated size with its margin is not free.
    """
    free = free_bytes(folder)
    if needed * _MARGIN > free:
        raise ConfigError(
            f"targets-dir: expected {shown_bytes(needed * _MARGIN)} free for {folder}, the "
            f"estimate of what is missing and {_MARGIN - 1:.0%}; got {shown_bytes(free)}. Free "
            "space, give a smaller --top-k, or another --targets-dir."
        )
