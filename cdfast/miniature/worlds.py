"""The worlds that scenes are made of: coloured shapes, and handwritten digits on photographs.

The second one, `PHOTOS`, has real picture content: every object is one person's handwritten digit,
coloured, and the background is a piece of a photograph. Each instance of a digit and each region
of a photograph belongs to one split, so scenes of another split show instances and backgrounds that
training never showed. Sources and licences: docs/miniature.md; build_photos.py makes the file.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from cdfast.miniature.scenes import (
    COLOURS,
    IMAGE_SIZE,
    TOYS,
    Scene,
    SceneObject,
    World,
    scene_key,
    split_of,
)

# The five that an encoder of all ten told apart best on validation pictures.
DIGITS = ("zero", "three", "five", "six", "seven")
DIGIT_SIZE = 8
FULL_INK = 16
# Photographs are darkened to this share, so that colours stay what they are called.
PHOTO_BRIGHTNESS = 0.45
PHOTO_NOISE_STD = 6.0


def content_path() -> Path:
    """The digits and photographs that come with the package."""
    return Path(__file__).parents[1] / "assets" / "miniature-photos" / "content.npz"


@functools.cache
def _content() -> dict[str, np.ndarray]:
    with np.load(content_path()) as stored:
        return dict(stored)


def render_photos(scene: Scene) -> np.ndarray:
    """Coloured handwritten digits on a piece of a photograph, as uint8 (48, 48, 3)."""
    content = _content()
    split = split_of(scene_key(scene))
    rng = np.random.default_rng(scene.noise_seed)
    image = _background(content[f"photos_{split}"], rng)
    image = image * PHOTO_BRIGHTNESS + scene.background - 40
    for o in scene.objects:
        instances = content[f"{o.shape}_{split}"]
        ink = _ink(instances[rng.integers(len(instances))], o)[..., None]
        image = image * (1 - ink) + np.asarray(COLOURS[o.colour], np.float32) * ink
    image += PHOTO_NOISE_STD * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _background(photos: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A piece (48, 48, 3) of one of the photographs (n, height, width, 3), mirrored or not."""
    photo = photos[rng.integers(len(photos))]
    top = rng.integers(photo.shape[0] - IMAGE_SIZE + 1)
    left = rng.integers(photo.shape[1] - IMAGE_SIZE + 1)
    piece = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].astype(np.float32)
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def _ink(digit: np.ndarray, o: SceneObject) -> np.ndarray:
    """Float32 (48, 48) in 0..1: a digit (8, 8) of 0..16, drawn bilinearly 2 radii high at `o`."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    middle = (DIGIT_SIZE - 1) / 2
    per_pixel = DIGIT_SIZE / (2 * o.radius)
    weights = [
        np.maximum(
            0, 1 - abs((axis - centre)[:, None] * per_pixel + middle - np.arange(DIGIT_SIZE))
        )
        for centre in (o.y, o.x)
    ]
    return (weights[0] @ digit.astype(np.float32) @ weights[1].T / FULL_INK).astype(np.float32)


PHOTOS = World("miniature-photos", DIGITS, render_photos)
WORLDS = {world.name: world for world in (TOYS, PHOTOS)}
