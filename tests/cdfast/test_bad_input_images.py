"""Bad and odd images, each through `load_dataset`: refused by name and counted, or read right.

What test_data.py has already (pipes, folders, links, PNG bombs, the usual modes) is not repeated.
"""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cdfast.data import DataError, load_dataset
from cdfast.images import ImageFile, load_image
from tests.cdfast.tiny_processors import llava_processor

PROCESSOR = llava_processor()
NOISE = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)


def encoded(kind, pixels=NOISE, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def record(name, answer="red"):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"id": name[:20], "image": name, "conversations": turns}


def records_file(folder, *names):
    path = folder / "d.json"
    path.write_text(json.dumps([record(name) for name in names]))
    return path


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded("PNG"))
    (folder / "b.png").write_bytes(encoded("PNG", 255 - NOISE))
    return folder


def load(path, root, **options):
    return load_dataset(path, root, PROCESSOR, **options)


def cut(kind, share):
    content = encoded(kind)
    return content[: int(len(content) * share)]


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, data, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *chunks]
    return b"".join([*parts, png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b"")])


def gif_of_size(width, height):
    """The screen is small; the frame that is decoded is not."""
    content = bytearray(encoded("GIF", NOISE[:, :, 0]))
    at = content.index(b",", 13 + 3 * 256)
    content[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(content)


CORRUPT, LARGE = "image corrupt", "image too large"
# File name -> bytes, and the reason under which it is counted.
BAD = {
    "no-bytes.jpg": (b"", CORRUPT),
    "one-byte.png": (b"\x89", CORRUPT),
    "header-only.jpg": (cut("JPEG", 0.02), CORRUPT),
    "quarter.jpg": (cut("JPEG", 0.25), CORRUPT),
    "tenth.png": (cut("PNG", 0.1), CORRUPT),
    "half.png": (cut("PNG", 0.5), CORRUPT),
    "signature.png": (cut("PNG", 0.002), CORRUPT),
    "tenth.webp": (cut("WEBP", 0.1), CORRUPT),
    "most.webp": (cut("WEBP", 0.9), CORRUPT),
    "half.gif": (cut("GIF", 0.5), CORRUPT),
    "half.bmp": (cut("BMP", 0.5), CORRUPT),
    "half.tif": (cut("TIFF", 0.5), CORRUPT),
    "half.ppm": (cut("PPM", 0.5), CORRUPT),
    "page.jpg": (b"<!DOCTYPE html><html>404 not found</html>", CORRUPT),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", CORRUPT),
    "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', CORRUPT),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", CORRUPT),
    "pickle.png": (b"\x80\x04cos\nsystem\n.", CORRUPT),
    "no-width.png": (png(0, 8, b""), CORRUPT),
    "no-size.ppm": (b"P6\n0 0\n255\n", CORRUPT),
    "negative.ppm": (b"P6\n-4 4\n255\n" + b"\0" * 48, CORRUPT),
    "letters.ppm": (b"P6\nx y\n255\n", CORRUPT),
    "bad-sum.png": (encoded("PNG").replace(b"IDAT", b"IDAT\xff", 1), CORRUPT),
    "float.tif": (encoded("TIFF", NOISE[:, :, 0].astype(np.float32)), CORRUPT),
    "int32.tif": (encoded("TIFF", NOISE[:, :, 0].astype(np.int32)), CORRUPT),
    "text-bomb.png": (
        png(8, 8, b"\0" * 200, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 2**27))),
        CORRUPT,
    ),
    "wide.png": (png(2**31 - 1, 1, b""), LARGE),
    "both.png": (png(2**31 - 1, 2**31 - 1, b""), LARGE),
    "bomb.ppm": (b"P6\n60000 60000\n255\n", LARGE),
    "bomb.webp": (encoded("WEBP", np.zeros((9000, 9000, 3), np.uint8)), LARGE),
    "bomb.jpg": (encoded("JPEG", np.zeros((9000, 9000), np.uint8)), LARGE),
    "bomb.gif": (encoded("GIF", np.zeros((9000, 9000), np.uint8)), LARGE),
    "bomb.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 50000, 50000, 1, 24,
                                     0, 0, 0, 0, 0, 0), LARGE),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_named_or_skipped_alone(tmp_path, root, name):
    content, reason = BAD[name]
    (root / name).write_bytes(content)
    path = records_file(tmp_path, "a.png", name, "b.png")
    with pytest.raises(DataError) as error:
        load(path, root)[1]
    assert error.value.reason == reason
    assert error.value.source == f"d.json, record 1 (id {name})"
    # Found by its header at the start, or when it is decoded.
    assert error.value.field in ("image[0]", "images[0]")
    assert name in error.value.got
    assert ("max_pixels" if reason == LARGE else "replace the file") in error.value.remedy
    kept = load(path, root, on_error="skip")
    got = [kept[n] for n in range(len(kept))]
    assert dict(kept.skipped) == {reason: 1}
    alone = load(records_file(tmp_path, "a.png", "b.png"), root)
    # In the middle the next good one stands, or nothing, where the header showed the fault.
    for mine, theirs in ((got[0], alone[0]), (got[-1], alone[1])):
        assert torch.equal(mine["images"]["pixel_values"], theirs["images"]["pixel_values"])


def _peak_of_loading(folder, names, answer):
    """Reasons, and by how many MiB the resident memory has peaked above what was held before."""
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    reasons = []
    for name in names:
        try:
            load_image(ImageFile(name, (folder,)), "s")
        except DataError as error:
            reasons.append(error.reason)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.put((reasons, (peak - held) / 2**20))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bomb_takes_no_memory(root):
    """In a process of its own, whose peak starts with what it holds."""
    bombs = [name for name, (_, reason) in BAD.items() if "bomb" in name or reason == LARGE]
    for name in bombs:
        (root / name).write_bytes(BAD[name][0])
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_peak_of_loading, args=(str(root), bombs, answer))
    child.start()
    reasons, peak = answer.get(timeout=30)
    child.join(10)
    assert reasons == [BAD[name][1] for name in bombs]
    assert peak < 100, f"{peak:.0f} MiB"


def test_the_frame_of_a_gif_counts_and_not_only_its_screen(root):
    (root / "frame.gif").write_bytes(gif_of_size(30_000, 30_000))
    with pytest.raises(DataError, match=r"frame\.gif") as error:
        load_image(ImageFile("frame.gif", (str(root),)), "s")
    assert error.value.reason in (LARGE, CORRUPT)


RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def saved(root, name, image, **options):
    image.save(root / name, **options)
    return name


def odd_images(root):
    """File name -> the colour in its middle as a person sees it, and its size."""
    flat = {c: Image.new("RGB", (20, 12), c) for c in (RED, GREEN, BLUE)}
    clear = Image.new("RGBA", (20, 12), (*GREEN, 0))
    palette = flat[BLUE].quantize(4)
    palette.info["transparency"] = 0
    deep = Image.fromarray(np.full((12, 20), 51_400, np.uint16))
    (root / "deep.pgm").write_bytes(b"P5\n20 12\n65535\n" + struct.pack(">H", 51_400) * 240)
    (root / "text.txt").write_bytes(encoded("PNG", np.asarray(flat[RED])))
    (root / "wrong.jpg").write_bytes(encoded("PNG", np.asarray(flat[RED])))
    animated = {"save_all": True, "append_images": [flat[RED]]}
    grey = (200, 200, 200)
    return {
        "wrong.jpg": (RED, (20, 12)),
        "text.txt": (RED, (20, 12)),
        "deep.pgm": (grey, (20, 12)),
        saved(root, "cmyk.jpg", flat[RED].convert("CMYK")): (RED, (20, 12)),
        saved(root, "cmyk.tif", flat[GREEN].convert("CMYK")): (GREEN, (20, 12)),
        saved(root, "lab.tif", flat[RED].convert("LAB")): (RED, (20, 12)),
        saved(root, "deep.png", deep): (grey, (20, 12)),
        saved(root, "deep.tif", deep): (grey, (20, 12)),
        saved(root, "palette.png", palette): (BLUE, (20, 12)),
        saved(root, "clear.png", clear): (GREEN, (20, 12)),
        saved(root, "clear.webp", clear, lossless=True, exact=True): (GREEN, (20, 12)),
        saved(root, "moving.gif", flat[BLUE], **animated): (BLUE, (20, 12)),
        saved(root, "moving.webp", flat[BLUE], lossless=True, **animated): (BLUE, (20, 12)),
        saved(root, "moving.png", flat[BLUE], **animated): (BLUE, (20, 12)),
        saved(root, "pages.tif", flat[GREEN], **animated): (GREEN, (20, 12)),
        saved(root, "point.png", flat[RED].resize((1, 1))): (RED, (1, 1)),
        saved(root, "line.png", flat[RED].resize((5000, 1))): (RED, (5000, 1)),
        saved(root, "tall.png", flat[RED].resize((1, 5000))): (RED, (1, 5000)),
        saved(root, "na me \u00fc\u4e2d\U0001f431 '\"%20$(x).png", flat[RED]): (RED, (20, 12)),
        saved(root, "line\nbreak.png", flat[RED]): (RED, (20, 12)),
        saved(root, "-rf.png", flat[RED]): (RED, (20, 12)),
        saved(root, "x.png;http:a", flat[RED], format="PNG"): (RED, (20, 12)),
    }


def test_odd_images_are_read_right(tmp_path, root):
    wanted = odd_images(root)
    dataset = load(records_file(tmp_path, *wanted), root)
    assert not dataset.skipped
    for n, (name, (colour, size)) in enumerate(wanted.items()):
        image = load_image(dataset.sample(n).images[0], name)
        assert (image.mode, image.size) == ("RGB", size), name
        middle = image.getpixel((size[0] // 2, size[1] // 2))
        assert np.abs(np.subtract(middle, colour)).max() <= 12, (name, middle)
        assert dataset[n]["images"]["pixel_values"].shape == (1, 3, 48, 48), name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_stands_upright(root, orientation, kind):
    """As transformers.image_utils.load_image and every viewer show it: red on the left, above."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = RED
    # What a camera stores that was held so; numpy's own turns, not PIL's.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(root / "t", kind, exif=exif, quality=95)
    image = load_image(ImageFile("t", (str(root),)), "s")
    assert image.size == (40, 24)
    difference = np.abs(np.asarray(image).astype(int) - upright)[2:10, 2:18]
    assert difference.mean() < 12
    # The caller's own image is the caller's business.
    opened = Image.open(root / "t")
    assert load_image(opened, "s").size == opened.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("body", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0" * 9])
def test_broken_metadata_does_not_make_a_good_photograph_bad(root, body):
    (root / "t.jpg").write_bytes(encoded("JPEG", NOISE, exif=body))
    assert load_image(ImageFile("t.jpg", (str(root),)), "s").size == (80, 64)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_image_without_permission_is_named(tmp_path, root):
    (root / "b.png").chmod(0)
    with pytest.raises(DataError, match=r"record 1.*b\.png.*Remedy"):
        load(records_file(tmp_path, "a.png", "b.png"), root)


def test_image_of_a_device_does_not_hang(tmp_path, root):
    for name in ("zero", "random", "tty"):
        if Path("/dev", name).exists():
            path = records_file(tmp_path, "a.png", name)
            with pytest.raises(DataError, match=r"a regular file.*name the image file itself"):
                load(path, [root, "/dev"])


MUTATED = {kind: encoded(kind, NOISE[:24, :32]) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")}


def mutate(content, rng):
    """A few flipped, removed, repeated or inserted stretches, as transfers and disks make them."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 1, 2, 4, 30))
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + size] = rng.randbytes(len(out[at : at + size]))
        elif kind == 1:
            del out[at : at + size]
        elif kind == 2:
            out[at:at] = out[at : at + size]
        elif kind == 3:
            out[at : at + size] = b"\xff" * size
        else:
            del out[at + len(out) // 2 :]
    return bytes(out)


def fuzz(root, seeds):
    read = unnamed = 0
    for seed in seeds:
        rng = random.Random(seed)
        (root / "f.jpg").write_bytes(mutate(MUTATED[rng.choice(sorted(MUTATED))], rng))
        try:
            image = load_image(ImageFile("f.jpg", (str(root),)), "d.json, record 3")
        except DataError as error:
            unnamed += not re.match(r"d\.json, record 3: image: expected .*f\.jpg", str(error))
            continue
        assert image.mode == "RGB", seed
        assert 0 < image.width * image.height <= 64_000_000, seed
        read += 1
    assert unnamed == 0
    return read


@pytest.mark.timeout(20)
@pytest.mark.filterwarnings("ignore")
def test_mutated_images_load_or_are_named(root):
    read = fuzz(root, range(300))
    assert 10 < read < 290


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_images_load_or_are_named(root):
    fuzz(root, range(300, 20_000))
