"""Grids of visual tokens on a picture, and values of theirs at its pixels.

A picture reaches the tokens through padding, resizing, cropping and cutting into tiles, and the
model may merge patches. What comes out is described by *planes*: grids of tokens that cover a box
in the pixels of the original picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]


class GeometryError(ValueError):
    """The model's tokens cannot be placed on the picture; the message says which and why."""


@dataclass(frozen=True)
class Plane:
    """A grid of visual tokens on the picture.

    Attributes:
        tokens: int64 (h, w), of each cell the number of its token among those of the image; -1
            where the model has dropped the patch.
        box: (left, top, right, bottom) that the grid covers, in pixels of the original picture. It
            may leave the picture (padding) or not fill it (cropping).
    """

    tokens: np.ndarray
    box: Box

    def values(self, vector: np.ndarray) -> np.ndarray:
        """(h, w) of a value per token, 0 where a patch was dropped."""
        return np.where(self.tokens < 0, 0, vector[np.maximum(self.tokens, 0)])


@dataclass(frozen=True)
class ImageGrid:
    """The planes of one image: one, or the tiles and the global image.

    Attributes:
        planes: name -> plane, the finest first.
        count: visual tokens of the image. Those in no plane, such as a class token or the newline
            tokens behind rows of patches, have no place in the picture.
    """

    planes: Mapping[str, Plane]
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the finest plane."""
        height, width = next(iter(self.planes.values())).tokens.shape
        return height, width

    @property
    def box(self) -> Box:
        """What the finest plane covers."""
        return next(iter(self.planes.values())).box

    def box_of(self, part: str = "all") -> Box:
        """What `array(..., part)` covers."""
        return self.planes[part].box if part in self.planes else self.box

    def array(self, vector: np.ndarray, part: str = "all") -> np.ndarray:
        """(h, w) of a value per token.

        Args:
            vector: (count,).
            part: a plane's name, or "all": on the finest grid the sum of all planes, a coarse cell
                divided among the fine ones by the area that they share, so that the sum is kept.
        """
        if part in self.planes:
            return self.planes[part].values(vector)
        if part != "all":
            known = ", ".join(["all", *self.planes])
            raise ValueError(f"part: expected one of {known}; got {part!r}.")
        total = np.zeros(self.shape, vector.dtype)
        for plane in self.planes.values():
            left, top, right, bottom = plane.box
            rows, columns = plane.tokens.shape
            down = _shares((top, bottom, rows), (self.box[1], self.box[3], self.shape[0]))
            across = _shares((left, right, columns), (self.box[0], self.box[2], self.shape[1]))
            total += (down @ plane.values(vector) @ across.T).astype(vector.dtype)
        return total

    def mask(self, vector: np.ndarray, part: str = "all") -> np.ndarray:
        """bool (h, w) of a bool per token; "all": the cells below any marked one."""
        return self.array(vector.astype(np.float64), part) > 0


def place(values: np.ndarray, box: Box, size: tuple[int, int], smooth: bool = False) -> np.ndarray:
    """Values of a grid (h, w) at every pixel of a picture: (height, width), NaN outside the box.

    Args:
        values: (h, w).
        box: what the grid covers, in pixels of the picture.
        size: (width, height) of the picture.
        smooth: bilinear between the centres of cells; otherwise the cell that the pixel is in.
    """
    left, top, right, bottom = box
    u = (np.arange(size[0]) + 0.5 - left) / (right - left) * values.shape[1]
    v = (np.arange(size[1]) + 0.5 - top) / (bottom - top) * values.shape[0]
    inside = ((v >= 0) & (v < values.shape[0]))[:, None] & ((u >= 0) & (u < values.shape[1]))
    if smooth:
        (x0, x1, fx), (y0, y1, fy) = _between(u, values.shape[1]), _between(v, values.shape[0])
        upper = values[y0][:, x0] * (1 - fx) + values[y0][:, x1] * fx
        lower = values[y1][:, x0] * (1 - fx) + values[y1][:, x1] * fx
        placed = upper * (1 - fy[:, None]) + lower * fy[:, None]
    else:
        x = np.clip(np.floor(u).astype(int), 0, values.shape[1] - 1)
        y = np.clip(np.floor(v).astype(int), 0, values.shape[0] - 1)
        placed = values[y][:, x]
    return np.where(inside, placed, np.nan)


def _between(at: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells whose centres a coordinate is between, and how far it is from the first."""
    centre = np.clip(at - 0.5, 0, cells - 1)
    low = np.floor(centre).astype(int)
    return low, np.minimum(low + 1, cells - 1), centre - low


def resampling_matrix(source: ImageGrid, target: ImageGrid) -> np.ndarray:
    """R (target tokens, source tokens): the share of each source token's value that goes to each
    target token, by the area of the picture that they share.

    Columns of tokens with a place in the picture that the target covers at least in part sum to 1,
    so that sums are kept; others are 0.

    Args:
        source: any planes; each is spread over the target by itself.
        target: one plane that holds every token.

    Raises:
        GeometryError: the target has several planes, or tokens without a place.
    """
    [*planes] = target.planes.values()
    if len(planes) != 1 or sorted(planes[0].tokens.ravel()) != list(range(target.count)):
        shapes = {name: plane.tokens.shape for name, plane in target.planes.items()}
        raise GeometryError(
            f"visual tokens: expected one grid of all {target.count} tokens to resample to; got "
            f"{shapes}. What share goes to tiles, to the picture as a whole or to newline tokens "
            "cannot be told from another grid: use a student without them."
        )
    left, top, right, bottom = planes[0].box
    rows, columns = planes[0].tokens.shape
    matrix = np.zeros((target.count, source.count))
    for plane in source.planes.values():
        box, shape = plane.box, plane.tokens.shape
        down = _shares((box[1], box[3], shape[0]), (top, bottom, rows))
        across = _shares((box[0], box[2], shape[1]), (left, right, columns))
        held = plane.tokens.ravel() >= 0
        shares = np.kron(down, across)[:, held]
        matrix[np.ix_(planes[0].tokens.ravel(), plane.tokens.ravel()[held])] = shares
    return matrix


def _shares(coarse: tuple[float, float, int], fine: tuple[float, float, int]) -> np.ndarray:
    """(fine cells, coarse cells): the share of each coarse cell that goes to each fine one.

    Args:
        coarse, fine: (start, end, cells) along one axis of the picture.
    """
    ours, theirs = (np.linspace(start, end, cells + 1) for start, end, cells in (fine, coarse))
    low = np.maximum(ours[:-1, None], theirs[None, :-1])
    shared = np.clip(np.minimum(ours[1:, None], theirs[None, 1:]) - low, 0, None)
    # Of a cell that the fine grid covers in part, that part has it all.
    return shared / np.maximum(shared.sum(0), np.finfo(shared.dtype).tiny)
