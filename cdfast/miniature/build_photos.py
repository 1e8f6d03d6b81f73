"""Make the pictures of `worlds.PHOTOS` again: `python -m cdfast.miniature.build_photos`.

It needs scikit-learn (digits) and scikit-image (photographs), which nothing else here needs:
`pip install scikit-learn==1.9.1 scikit-image==0.26.0`. Both bring the pictures inside their wheels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cdfast.miniature.worlds import DIGITS, content_path

NUMBERS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
}
# All are CC0 or in the public domain, as scikit-image's documentation of each function says.
PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "brick", "gravel")
PHOTO_SIZE = (160, 240)
# Training sees the left part of every photograph, validation and test the two halves of the rest.
TRAIN_WIDTH = 160
HELD_OUT_HEIGHT = 80
# Shares of a digit's instances, drawn at random: the last ones of the file look different from the
# others (docs/miniature.md).
TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.15
SPLIT_SEED = 0


def digit_instances(images: np.ndarray) -> dict[str, np.ndarray]:
    """Images (n, 8, 8) of one digit, dealt to the three splits."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    first = round(TRAIN_SHARE * len(images))
    second = round((TRAIN_SHARE + VALIDATION_SHARE) * len(images))
    parts = np.split(images[order].astype(np.uint8), [first, second])
    return dict(zip(("train", "validation", "test"), parts))


def photo_regions(photo: np.ndarray) -> dict[str, np.ndarray]:
    """Regions of one photograph, scaled to 240 x 160 pixels, that do not overlap."""
    rows, columns = PHOTO_SIZE
    scaled = Image.fromarray(photo).convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    pixels = np.asarray(scaled)
    return {
        "train": pixels[:, :TRAIN_WIDTH],
        "validation": pixels[:HELD_OUT_HEIGHT, TRAIN_WIDTH:],
        "test": pixels[HELD_OUT_HEIGHT:, TRAIN_WIDTH:],
    }


def build(output: Path) -> dict[str, np.ndarray]:
    """Write the arrays `<digit>_<split>` (n, 8, 8) and `photos_<split>` (n, height, width, 3)."""
    from skimage import data
    from sklearn.datasets import load_digits

    digits = load_digits()
    content = {
        f"{name}_{split}": part
        for name in DIGITS
        for split, part in digit_instances(digits.images[digits.target == NUMBERS[name]]).items()
    }
    regions = [photo_regions(getattr(data, name)()) for name in PHOTOGRAPHS]
    for split in ("train", "validation", "test"):
        content[f"photos_{split}"] = np.stack([region[split] for region in regions])
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output, **content)  # type: ignore[arg-type]
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "cdfast.miniature.build_photos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=content_path(), metavar="FILE")
    options = parser.parse_args(arguments)
    content = build(options.output)
    for name, array in content.items():
        print(f"{name}: {' x '.join(map(str, array.shape))}")
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
