"""Attention drawn on its picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from cdfast.planes import Box, place

# The longer side of an overlay has at least this many pixels.
_SIDE = 448
_COLOURS = "inferno"


def draw_overlay(
    picture: Image.Image,
    values: np.ndarray,
    box: Box,
    sinks: np.ndarray,
    limit: float,
    smooth: bool = False,
) -> Image.Image:
    """A grid of values in colour on the grey picture, with crosses on sinks."""
    # A plotting library, which nobody needs who asks for arrays only.
    import matplotlib

    zoom = max(1, -(-_SIDE // max(picture.size)))
    size = (picture.width * zoom, picture.height * zoom)
    box = tuple(edge * zoom for edge in box)  # type: ignore[assignment]
    placed = place(values, box, size, smooth)
    seen = ~np.isnan(placed)
    share = np.clip(np.where(seen, placed, 0) / (limit or 1), 0, 1)
    grey = np.asarray(picture.resize(size, Image.Resampling.BICUBIC).convert("L"), np.float64) / 255
    colour = matplotlib.colormaps[_COLOURS](0.15 + 0.85 * share)[..., :3]
    weight = (0.75 * share)[..., None]
    blended = (1 - weight) * (0.2 + 0.8 * grey[..., None]) + weight * colour
    blended = np.where(seen[..., None], blended, 0.25 * grey[..., None])
    drawn = Image.fromarray((blended * 255).round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    across = (box[2] - box[0]) / values.shape[1]
    down = (box[3] - box[1]) / values.shape[0]
    for y, x in zip(*np.nonzero(sinks)):
        centre = box[0] + (x + 0.5) * across, box[1] + (y + 0.5) * down
        _cross(pen, centre, 0.3 * min(across, down))
    return drawn


def _cross(pen: ImageDraw.ImageDraw, centre: tuple[float, float], arm: float) -> None:
    x, y = centre
    for colour, width in (("black", 3), ("white", 1)):  # seen on any background
        for slope in (1, -1):
            pen.line((x - arm, y - slope * arm, x + arm, y + slope * arm), colour, width)
