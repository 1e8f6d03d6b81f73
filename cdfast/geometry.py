"""Where visual tokens are in their picture: the model's own processor geometry.

A picture reaches the tokens through padding, resizing, cropping and cutting into tiles, and the
model may merge patches. Each known kind of model is described here by *planes*: grids of tokens
that cover a box in the pixels of the original picture. Other kinds are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

LLAVA = ("llava", "cdfast_llava")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
TILED = ("idefics3", "smolvlm")
# Image processors that pad to a square, resize and crop, in this order, each where it is set to.
SQUARE_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")

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
        planes: name -> plane, the finest first; all cover one box.
        count: visual tokens of the image.
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
        return next(iter(self.planes.values())).box

    def array(self, vector: np.ndarray, part: str = "all") -> np.ndarray:
        """(h, w) of a value per token.

        Args:
            vector: (count,).
            part: a plane's name, or "all": on the finest grid the sum of all planes, a coarse cell
                divided equally among the fine ones below it, so that the sum is kept.
        """
        if part in self.planes:
            return self.planes[part].values(vector)
        if part != "all":
            known = ", ".join(["all", *self.planes])
            raise ValueError(f"part: expected one of {known}; got {part!r}.")
        height, width = self.shape
        total = np.zeros(self.shape, vector.dtype)
        for plane in self.planes.values():
            down, across = height // plane.tokens.shape[0], width // plane.tokens.shape[1]
            fine = np.kron(plane.values(vector), np.ones((down, across), vector.dtype))
            total += fine / (down * across)
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


def image_grids(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[Image.Image],
    batch: Mapping[str, Any],
    number: int,
) -> list[ImageGrid]:
    """The grids of one prompt's images.

    Args:
        model: a Llava, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3 or SmolVLM model.
        processor: its processor.
        images: the prompt's pictures, as given to the processor.
        batch: what the processor returned for this prompt alone.
        number: visual tokens of the prompt.

    Raises:
        GeometryError: another kind of model or processor, or tokens that do not add up.
    """
    kind = model.config.model_type
    if kind in LLAVA:
        height, width = batch["pixel_values"].shape[-2:]
        count = number // len(images)
        grids = [_llava_grid(model, processor, i, (width, height), count) for i in images]
    elif kind in QWEN:
        grids = _qwen_grids(model, images, batch)
    elif kind in TILED:
        grids = [_tiled_grid(model, processor, image) for image in images]
    else:
        known = ", ".join((*LLAVA, *QWEN, *TILED))
        raise GeometryError(
            f"{kind}: it is not known where visual tokens of this kind of model are in the picture "
            f"(known: {known}). Use .vector(), which has a value per visual token in the order of "
            "the prompt."
        )
    counts = [grid.count for grid in grids]
    if sum(counts) != number:
        raise GeometryError(
            f"{kind}: expected {' + '.join(map(str, counts))} visual tokens for images of sizes "
            f"{[image.size for image in images]}; the prompt has {number}. The processor does not "
            "belong to the model, or cuts pictures in a way that is not known here. Use .vector()."
        )
    return grids


def _llava_grid(
    model: PreTrainedModel, processor: Any, image: Image.Image, size: tuple[int, int], count: int
) -> ImageGrid:
    width, height = size
    left, top, right, bottom = square_box(processor.image_processor, image.size, size)
    patch = model.config.vision_config.patch_size
    rows, columns = height // patch, width // patch
    # The patches cover whole multiples of their size: 384 pixels in patches of 14 are 378.
    right = left + (right - left) * columns * patch / width
    bottom = top + (bottom - top) * rows * patch / height
    patches = rows * columns
    # "default" drops the first token: the class token, or, of a tower that has none, a patch.
    # "full" keeps all, and a class token comes first.
    first = count - patches
    whole = getattr(model.config, "vision_feature_select_strategy", "full") == "full"
    if first not in ((0, 1) if whole else (0, -1)):
        raise GeometryError(
            f"{model.config.model_type}: expected {patches} visual tokens per image, {rows} x "
            f"{columns} patches; got {count}. Use .vector()."
        )
    tokens = np.arange(patches).reshape(rows, columns) + first
    return ImageGrid({"image": Plane(tokens, (left, top, right, bottom))}, count)


def square_box(image_processor: Any, size: tuple[int, int], target: tuple[int, int]) -> Box:
    """What a processor of `SQUARE_PROCESSORS` shows the model of a picture, in its pixels.

    Args:
        image_processor: pads to a square, resizes and crops, each where it is set to.
        size: (width, height) of the picture.
        target: (width, height) that the processor returned.

    Raises:
        GeometryError: another processor, or settings that do not lead to `target`.
    """
    name = re.sub("(Fast|Pil)$", "", type(image_processor).__name__)
    if name not in SQUARE_PROCESSORS:
        raise GeometryError(
            f"{name}: it is not known how this image processor fits a picture (known: "
            f"{', '.join(SQUARE_PROCESSORS)}). Use .vector()."
        )
    width, height = size
    # Corners of the content in pixels of the picture; resizing scales, it does not move them.
    left = top = 0.0
    right, bottom = float(width), float(height)
    if name == "LlavaImageProcessor" and image_processor.do_pad:
        side = max(width, height)
        left, top = float(-((side - width) // 2)), float(-((side - height) // 2))
        right, bottom = left + side, top + side
        width = height = side
    if image_processor.do_resize:
        width, height = _resized(image_processor.size, width, height)
    if getattr(image_processor, "do_center_crop", None):
        crop = image_processor.crop_size
        across, down = (right - left) / width, (bottom - top) / height
        # What is smaller than the crop is padded: then the corner is outside the picture.
        left += (width - crop["width"]) // 2 * across
        top += (height - crop["height"]) // 2 * down
        width, height = crop["width"], crop["height"]
        right, bottom = left + width * across, top + height * down
    if (width, height) != target:
        raise GeometryError(
            f"{name}: expected a picture of {size} to become {(width, height)}; the processor made "
            f"{target}. Use .vector()."
        )
    return left, top, right, bottom


def _resized(size: Mapping[str, Any], width: int, height: int) -> tuple[int, int]:
    shortest = size.get("shortest_edge")
    if shortest and not size.get("longest_edge"):
        long = int(shortest * max(width, height) / min(width, height))
        return (shortest, long) if width <= height else (long, shortest)
    if size.get("height") and size.get("width"):
        return size["width"], size["height"]
    raise GeometryError(
        f"size: expected shortest_edge, or height and width, in the image processor; got "
        f"{dict(size)}. Use .vector()."
    )


def _qwen_grids(
    model: PreTrainedModel, images: Sequence[Image.Image], batch: Mapping[str, Any]
) -> list[ImageGrid]:
    merge = model.config.vision_config.spatial_merge_size
    grids = []
    for image, (frames, height, width) in zip(images, batch["image_grid_thw"].tolist()):
        if frames != 1:
            raise GeometryError(
                f"{model.config.model_type}: expected images of one frame; got {frames}. Use "
                ".vector() for videos."
            )
        shape = (height // merge, width // merge)
        tokens = np.arange(math.prod(shape)).reshape(shape)
        # The picture is stretched to whole patches: nothing is cut off or added.
        plane = Plane(tokens, (0.0, 0.0, float(image.width), float(image.height)))
        grids.append(ImageGrid({"image": plane}, tokens.size))
    return grids


def _tiled_grid(model: PreTrainedModel, processor: Any, image: Image.Image) -> ImageGrid:
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    # The number of tiles is asked of the processor itself: what it keeps to itself otherwise.
    cut = processor.image_processor([[image]], return_row_col_info=True)
    rows, columns = cut["rows"][0][0], cut["cols"][0][0]
    box = (0.0, 0.0, float(image.width), float(image.height))
    inner = np.arange(side * side).reshape(side, side)
    planes = {}
    tiles = rows * columns
    if tiles:
        starts = np.arange(tiles).reshape(rows, columns) * side * side
        # Tile by tile, each row by row; put side by side as they were in the picture.
        tokens = starts[:, None, :, None] + inner[None, :, None, :]
        planes["tiles"] = Plane(tokens.reshape(rows * side, columns * side), box)
    planes["global"] = Plane(inner + tiles * side * side, box)
    return ImageGrid(planes, (tiles + 1) * side * side)
