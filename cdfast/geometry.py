"""Where visual tokens are in their picture: the model's own processor geometry.

Each known kind of model is described here by the planes of `cdfast.planes`; other kinds are refused
by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from cdfast.adapters import LLAVA
from cdfast.planes import Box, GeometryError, ImageGrid, Plane

ANYRES = ("llava_next", "llava_onevision")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
TILED = ("idefics3", "smolvlm")
INTERNVL = ("internvl",)
# Image processors that pad to a square, resize and crop, in this order, each where it is set to.
SQUARE_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")


def image_grids(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[Image.Image],
    batch: Mapping[str, Any],
    number: int,
) -> list[ImageGrid]:
    """The grids of one prompt's images.

    Args:
        model: a Llava, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
            Idefics3 or SmolVLM model.
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
    elif kind in ANYRES:
        # LLaVA-OneVision cuts a picture that is alone in its prompt.
        cut = kind == "llava_next" or len(images) == 1
        grids = [
            _anyres_grid(model, image) if cut else _padded_grid(model, image) for image in images
        ]
    elif kind in TILED:
        grids = [_tiled_grid(model, processor, image) for image in images]
    elif kind in INTERNVL:
        grids = [_internvl_grid(model, processor, image) for image in images]
    else:
        known = ", ".join((*LLAVA, *ANYRES, *QWEN, *TILED, *INTERNVL))
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
    return _tiles_and_global(side, cut["rows"][0][0], cut["cols"][0][0], image)


def _internvl_grid(model: PreTrainedModel, processor: Any, image: Image.Image) -> ImageGrid:
    # Here, not above: maps of other families must not depend on where this function is.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    config, images = model.config, processor.image_processor
    height, width = config.vision_config.image_size
    side = int(height // config.vision_config.patch_size[0] * config.downsample_ratio)
    columns, rows = get_optimal_tiled_canvas(
        (image.height, image.width), (height, width), images.min_patches, images.max_patches
    )
    # A picture of one tile has no thumbnail beside it.
    tiled = (rows, columns) if rows * columns > 1 else (0, 0)
    return _tiles_and_global(side, *tiled, image)


def _tiles_and_global(side: int, rows: int, columns: int, image: Image.Image) -> ImageGrid:
    """rows x columns tiles of side x side tokens, one after the other, then the whole picture.

    Both are stretched over the picture; (0, 0): the whole picture alone.
    """
    box = (0.0, 0.0, float(image.width), float(image.height))
    inner = np.arange(side * side).reshape(side, side)
    planes = {}
    tiles = rows * columns
    if tiles:
        planes["tiles"] = Plane(_side_by_side(side, rows, columns), box)
    planes["global"] = Plane(inner + tiles * side * side, box)
    return ImageGrid(planes, (tiles + 1) * side * side)


def _side_by_side(side: int, rows: int, columns: int) -> np.ndarray:
    """Numbers of tokens that come tile by tile, each row by row, as they were in the picture."""
    starts = np.arange(rows * columns).reshape(rows, columns) * side * side
    inner = np.arange(side * side).reshape(side, side)
    tokens = starts[:, None, :, None] + inner[None, :, None, :]
    return tokens.reshape(rows * side, columns * side)


def _anyres_grid(model: PreTrainedModel, image: Image.Image) -> ImageGrid:
    """The picture as a whole, then tiles of it on a canvas, without the padding: row by row of the
    canvas, each row with a newline token behind it."""
    vision = model.config.vision_config
    tile, side = vision.image_size, vision.image_size // vision.patch_size
    size = (image.height, image.width)
    canvas = select_best_resolution(size, model.config.image_grid_pinpoints)
    # Pixels of the picture on the canvas, rounded up; padding is on both sides of them.
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    content = [min(math.ceil(n * scale), limit) for n, limit in zip(size, canvas)]
    kept, edges = _unpadded((canvas[0] // tile * side, canvas[1] // tile * side), size)
    # The patches of a tile are spread over it: where they leave a rest, 27 of 14 pixels in 384,
    # they are up to that rest, 6 pixels, from where they are said to be.
    ends = []
    for axis in (0, 1):
        offset = (canvas[axis] - content[axis]) // 2
        cells = (edges[axis], edges[axis] + kept[axis])
        ends.append([(cell * tile / side - offset) * size[axis] / content[axis] for cell in cells])
    rows, columns = _coarsened(model, kept, side)
    tokens = side * side + np.arange(rows * (columns + 1)).reshape(rows, columns + 1)[:, :-1]
    (top, bottom), (left, right) = ends
    covered = side * vision.patch_size / tile
    whole = (0.0, 0.0, image.width * covered, image.height * covered)
    planes = {
        "tiles": Plane(tokens, (left, top, right, bottom)),
        "global": Plane(np.arange(side * side).reshape(side, side), whole),
    }
    return ImageGrid(planes, side * side + rows * (columns + 1))


def _unpadded(
    grid: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) that the model keeps of a padded grid of features, and how many it cuts off
    above and to the left; rounded as in `unpad_image` of transformers."""
    (rows, columns), (height, width) = grid, size
    if width / height > columns / rows:
        above = (rows - int(round(height * (columns / width), 7))) // 2
        return (rows - 2 * above, columns), (above, 0)
    left = (columns - int(round(width * (rows / height), 7))) // 2
    return (rows, columns - 2 * left), (0, left)


def _coarsened(model: PreTrainedModel, grid: tuple[int, int], side: int) -> tuple[int, int]:
    """LLaVA-OneVision interpolates features of more than so many tiles ("anyres_max_9")."""
    if model.config.model_type != "llava_onevision":
        return grid
    most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(grid[0] * grid[1] / (most * side**2))
    return grid if ratio <= 1.1 else (int(grid[0] // ratio), int(grid[1] // ratio))


def _padded_grid(model: PreTrainedModel, image: Image.Image) -> ImageGrid:
    """One tile of the picture padded to a square, and a newline token."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    longer = max(image.size)
    left, top = (-((longer - n) // 2) for n in image.size)
    reach = longer * side * vision.patch_size / vision.image_size
    tokens = np.arange(side * side).reshape(side, side)
    plane = Plane(tokens, (float(left), float(top), left + reach, top + reach))
    return ImageGrid({"image": plane}, side * side + 1)
