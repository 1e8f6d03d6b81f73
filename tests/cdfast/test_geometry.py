"""A patch that lights up is where it is in the picture, whatever the processor did to it."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from cdfast.geometry import image_grids, square_box
from cdfast.planes import GeometryError, place
from cdfast.prompts import encode_prompts, make_prompt
from tests.cdfast.tiny_families import FAMILIES, llava, llava_crop, photo

SIZES = [(100, 60), (60, 100), (48, 48), (333, 97), (50, 51)]
SPOTS = [(0.5, 0.5), (0.35, 0.8), (0.62, 0.15)]


def with_spot(size, centre, side):
    """A picture as grey as padding, with one bright square."""
    picture = np.full((size[1], size[0], 3), 125, np.uint8)
    x, y = centre
    x0, y0 = round(x - side / 2), round(y - side / 2)
    picture[max(y0, 0) : y0 + side, max(x0, 0) : x0 + side] = 255
    return Image.fromarray(picture)


def patch_means(pixels, patch):
    """(..., rows, columns) of (..., 3, H, W)."""
    h, w = (n // patch for n in pixels.shape[-2:])
    pixels = pixels[..., : h * patch, : w * patch]
    return pixels.reshape(*pixels.shape[:-2], h, patch, w, patch).mean((-5, -3, -1))


def brightest_token(model, batch, image, offset):
    """Token of an image whose pixels are brightest, per plane, from what the model is given."""
    pixels = batch["pixel_values"].float().numpy()
    kind = model.config.model_type
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        sizes = batch["image_grid_thw"].prod(1).tolist()
        start = sum(sizes[:image])
        tokens = pixels[start : start + sizes[image]].mean(1).reshape(-1, 4).mean(1)
        return {"image": int(tokens.argmax())}
    if kind in ("idefics3", "smolvlm"):
        tiles = patch_means(pixels[0], 32)  # 16 pixels, merged 2 x 2
        own = tiles[offset // 4 :]
        count = batch["tiles"][image]
        own = own[:count].reshape(count, -1)
        spots = {"global": int(own[-1].argmax()) + 4 * (count - 1)}
        if count > 1:
            spots["tiles"] = int(own[:-1].argmax())
        return spots
    if kind in ("llava_next", "llava_onevision"):
        return brightest_of_tiles(model, batch, image)
    if kind == "internvl":
        tiles = patch_means(pixels, 8)[offset // 9 :][: batch["tiles"][image]]
        # Through the model's own merging of 2 x 2 patches.
        merged = model.model.pixel_shuffle(torch.from_numpy(tiles)[..., None])
        tokens = merged.mean(-1).reshape(len(tiles), -1)
        spots = {"global": int(tokens[-1].argmax()) + 9 * (len(tiles) - 1)}
        return spots if len(tiles) == 1 else {**spots, "tiles": int(tokens[:-1].argmax())}
    means = patch_means(pixels[image], 8)
    return {"image": int(means.argmax())}


def brightest_of_tiles(model, batch, image):
    tokens, base = brightness_of_tiles(model, batch, image)
    if len(tokens) == base + 1:
        return {"image": int(tokens.argmax())}
    return {"global": int(tokens[:base].argmax()), "tiles": int(tokens[base:].argmax()) + base}


def brightness_of_tiles(model, batch, image):
    """Brightness of patches, put in order by the model itself as it does with their features."""
    alone = model.config.model_type == "llava_next" or len(batch["pixel_values"]) == 1
    size = batch["image_sizes"][image]
    side = model.config.vision_config.image_size
    pinpoints = model.config.image_grid_pinpoints
    tiles = image_size_to_num_patches(size, pinpoints, side) if alone else 1
    means = patch_means(batch["pixel_values"][image, :tiles], model.config.vision_config.patch_size)
    if model.config.model_type == "llava_next":
        options = {"vision_feature_select_strategy": "default"}
    else:
        options = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    [tokens], _ = model.model.pack_image_features(
        [means.flatten(1)[..., None]],
        size[None],
        image_newline=torch.full((1,), -9.0),  # darker than any patch
        **options,
    )
    return tokens[:, 0].numpy(), means[0].numel()


def grids_of(model, processor, pictures):
    prompt = make_prompt(processor, pictures, "What?")
    batch = encode_prompts(processor, [prompt])
    number = int((batch["input_ids"] == model.config.image_token_id).sum())
    return batch, image_grids(model, processor, prompt.images, batch, number)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spot", SPOTS, ids=str)
def test_a_bright_patch_lights_up_where_it_is(family, spot):
    """One picture, and two of unequal shape in one prompt; the spot is in the middle square of
    each, which every processor shows to the model."""
    model, processor = FAMILIES[family]()
    alone = [(size,) for size in SIZES] if family == "llava-onevision" else []
    for sizes in [*zip(SIZES, [*SIZES[1:], SIZES[0]]), *alone]:
        pictures, centres = [], []
        for width, height in sizes:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            centre = left + spot[0] * side, top + spot[1] * side
            pictures.append(with_spot((width, height), centre, max(6, side // 3)))
            centres.append(centre)
        batch, grids = grids_of(model, processor, pictures)
        per_tile = 9 if family == "internvl" else 4
        batch["tiles"] = [grid.count // per_tile for grid in grids]
        offset = 0
        for image, (grid, centre) in enumerate(zip(grids, centres)):
            for part, token in brightest_token(model, batch, image, offset).items():
                vector = np.zeros(grid.count, np.float32)
                vector[token] = 1.0
                array = grid.array(vector, part)
                box = grid.box_of(part)
                lit = place(array, box, pictures[image].size)
                y, x = np.nonzero(np.nan_to_num(lit) > 0)
                rows, columns = array.shape
                cell = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
                # The brightest patch is somewhere inside the square.
                reach = max(6, min(pictures[image].size) // 3) / 2
                assert abs(x.mean() + 0.5 - centre[0]) <= reach + cell[0] / 2
                assert abs(y.mean() + 0.5 - centre[1]) <= reach + cell[1] / 2
                assert len(x) <= (cell[0] + 1) * (cell[1] + 1)
            offset += grid.count


def ramp(size, axis):
    """Brightness that grows along an axis: of a patch, it says where the patch is."""
    line = np.linspace(0, 1, size[1 - axis], endpoint=False) + 0.5 / size[1 - axis]
    values = line[:, None] if axis == 0 else line
    return np.broadcast_to(20 + 200 * values[..., None], (size[1], size[0], 3)).astype(np.uint8)


@pytest.mark.parametrize("number", [1, 2], ids=["alone", "two"])
@pytest.mark.parametrize("family", ["next", "onevision", "onevision-coarsened"])
def test_every_patch_of_tiles_is_where_it_says(family, number):
    """To a third of a patch, whatever was padded, cut off again, interpolated and put together."""
    model, processor = FAMILIES["llava-" + family.removesuffix("-coarsened")]()
    processor.image_processor.do_normalize = False
    if family == "onevision-coarsened":
        processor.vision_aspect_ratio = model.config.vision_aspect_ratio = "anyres_max_1"
    checked = Counter()
    for size in SIZES:
        for axis in (0, 1):
            batch, grids = grids_of(model, processor, [Image.fromarray(ramp(size, axis))] * number)
            tokens, _ = brightness_of_tiles(model, batch, number - 1)
            for part, plane in grids[-1].planes.items():
                start, end, cells = *plane.box[1 - axis :: 2], plane.tokens.shape[axis]
                cell = (end - start) / cells
                centres = start + (np.arange(cells) + 0.5) * cell
                along = plane.values(tokens).mean(1 - axis)
                if plane.box[axis] < 0:  # padding beside the picture: a row within it
                    middle = plane.tokens.shape[1 - axis] // 2
                    along = np.take(plane.values(tokens), middle, 1 - axis)
                inside = (centres > cell / 2) & (centres < size[1 - axis] - cell / 2)
                got = (along * 255 - 20) / 200 * size[1 - axis]
                assert np.abs(got - centres)[inside].max(initial=0) < cell / 3 + 1
                checked[part] += inside.sum()
    several = family != "next" and number == 2
    assert set(checked) == ({"image"} if several else {"tiles", "global"})
    assert min(checked.values()) >= 30


def test_what_the_model_never_sees_is_outside():
    model, processor = llava_crop()
    _, [grid] = grids_of(model, processor, [photo(150, 50)])
    placed = place(np.ones(grid.shape), grid.box, (150, 50))
    columns = np.flatnonzero(~np.isnan(placed).any(0))
    assert columns.tolist() == list(range(50, 100))  # the square in the middle
    # Bright on the left end: the crop does not see it.
    batch, _ = grids_of(model, processor, [with_spot((150, 50), (20, 25), 30)])
    assert batch["pixel_values"].max() < 0.5


def test_padding_is_outside_the_picture():
    model, processor = FAMILIES["llava-pad"]()
    _, [grid] = grids_of(model, processor, [photo(90, 30)])
    assert grid.box == (0, -30, 90, 60)
    placed = place(np.arange(36.0).reshape(6, 6), grid.box, (90, 30))
    assert set(placed.ravel()) == set(range(12, 24))  # the two rows of patches in the middle


@pytest.mark.parametrize("strategy, first", [("default", 0), ("full", 1)])
def test_class_token_has_no_place(strategy, first):
    model, processor = llava_crop(strategy)
    _, [grid] = grids_of(model, processor, [photo(48, 48)])
    assert grid.count == 36 + first
    assert grid.planes["image"].tokens.ravel().tolist() == list(range(first, 36 + first))


def test_a_dropped_patch_keeps_its_empty_place():
    """`default` on a tower without a class token drops the first patch, as the authors' code."""
    model, processor = llava(strategy="full")
    model.config.vision_feature_select_strategy = "default"
    picture = photo(48, 48)
    batch = encode_prompts(processor, [make_prompt(processor, picture, "What?")])
    [grid] = image_grids(model, processor, [picture], batch, 35)
    vector = np.arange(1.0, 36.0)
    assert grid.array(vector).ravel().tolist() == [0, *vector]


def test_patches_that_do_not_fill_the_picture():
    """384 pixels in patches of 14: the last 6 pixels have no patch."""
    model, processor = llava()
    model.config.vision_config.patch_size = 9
    picture = photo(96, 96)
    batch = encode_prompts(processor, [make_prompt(processor, picture, "What?")])
    [grid] = image_grids(model, processor, [picture], batch, 25)
    assert grid.box == (0, 0, 90, 90)
    assert np.isnan(place(np.ones((5, 5)), grid.box, (96, 96))[:, 90:]).all()


def test_tiles_and_global_image_add_up():
    model, processor = FAMILIES["smolvlm"]()
    _, [grid] = grids_of(model, processor, [photo(150, 90)])
    assert set(grid.planes) == {"tiles", "global"}
    vector = np.random.default_rng(0).random(grid.count)
    tiles, whole = grid.array(vector, "tiles"), grid.array(vector, "global")
    assert tiles.shape == (4, 6)
    assert whole.shape == (2, 2)
    # Tile (1, 2) of 2 x 3, its own cell (0, 1), is the grid's cell (2, 5).
    assert tiles[2, 5] == vector[5 * 4 + 1]
    assert whole[1, 0] == vector[6 * 4 + 2]
    total = grid.array(vector)
    assert total[2, 5] == pytest.approx(tiles[2, 5] + whole[1, 1] / 6)
    assert total.sum() == pytest.approx(vector.sum())
    marked = np.zeros(grid.count, bool)
    marked[6 * 4] = True
    assert grid.mask(marked).sum() == 6


def test_tiles_that_are_no_multiple_of_the_global_image_add_up():
    model, processor = FAMILIES["llava-next"]()
    _, [grid] = grids_of(model, processor, [photo(100, 60)])
    assert grid.shape == (8, 12)
    assert grid.planes["global"].tokens.shape == (6, 6)
    vector = np.random.default_rng(0).random(grid.count)
    newlines = grid.count - 36 - grid.planes["tiles"].tokens.size
    assert newlines == grid.shape[0]
    placed = grid.array(vector, "tiles").sum() + grid.array(vector, "global").sum()
    assert grid.array(vector).sum() == pytest.approx(placed)
    # Constant in, constant out: a cell of the picture as a whole is spread by area.
    only = np.where(np.arange(grid.count) < 36, 1.0, 0.0)
    spread = grid.array(only)[1:-1, 1:-1]
    assert spread.max() == pytest.approx(spread.min())


def test_smooth_keeps_the_values_at_the_centres():
    values = np.arange(6.0).reshape(2, 3)
    smooth = place(values, (0, 0, 9, 6), (9, 6), smooth=True)
    assert smooth[1::3, 1::3].tolist() == values.tolist()
    assert smooth[1, 2] == pytest.approx(1 / 3)


class SomeImageProcessor:
    pass


def test_unknown_image_processor_is_refused_by_name():
    with pytest.raises(GeometryError, match=r"SomeImageProcessor: it is not known how"):
        square_box(SomeImageProcessor(), (10, 10), (48, 48))


def test_settings_that_do_not_lead_to_the_processors_size_are_refused():
    _, processor = llava_crop()
    with pytest.raises(GeometryError, match=r"to become \(48, 48\); the processor made \(32, 32\)"):
        square_box(processor.image_processor, (100, 60), (32, 32))


def test_tokens_that_do_not_add_up_are_refused():
    model, processor = FAMILIES["qwen2.5-vl"]()
    picture = photo(64, 64)
    batch = encode_prompts(processor, [make_prompt(processor, picture, "What?")])
    with pytest.raises(GeometryError, match=r"expected 16 visual tokens .* the prompt has 15"):
        image_grids(model, processor, [picture], batch, 15)
