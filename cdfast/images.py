"""Image files named by a data set: found inside their root, capped by their header, decoded to RGB.

A data set's JSON is input from strangers. Joining its paths to a folder lets an absolute path or a
`..` win, a symlink leads out of the folder, a URL makes the loader fetch, and a small file can
decode to gigabytes. Every image goes through `ImageFile.resolve` and `load_image`, which refuse
these, and every refusal is a `DataError` that names the file and the record.
"""

from __future__ import annotations

import functools
import io
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

MAX_PIXELS = 64_000_000
# Raster formats only: PIL's EPS plug-in runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_URL = re.compile(r"^\s*(?:[a-z][a-z0-9+.\-]*://|(?:data|file|https?|ftp):)", re.IGNORECASE)
# EXIF's orientations other than 1; transformers.image_utils.load_image turns them upright too.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DRIVE = re.compile(r"^[A-Za-z]:")


class DataError(ValueError):
    """A record, image or template that cannot be used.

    Args:
        message: the whole text; made from the other arguments when empty.
        source: the file and record, such as `"llava.json, record 12 (id 000123)"`.
        field: the field or part at fault.
        expected: what was wanted there.
        got: what stands there (its repr is shortened).
        remedy: what the user can do.
        reason: a short fixed name, under which skipped records are counted.
    """

    def __init__(
        self,
        message: str = "",
        *,
        source: str = "",
        field: str = "",
        expected: str = "",
        got: Any = "",
        remedy: str = "",
        reason: str = "broken record",
    ):
        self.source, self.field, self.expected, self.remedy = source, field, expected, remedy
        self.got = got if isinstance(got, str) else repr(got)
        self.reason = reason
        if not message:
            shown = self.got if len(self.got) <= 200 else self.got[:200] + "..."
            message = f"{source}: {field}: expected {expected}, got {shown}. Remedy: {remedy}."
        # One positional argument: a DataLoader worker re-raises by calling the class with a text.
        super().__init__(message)


@functools.lru_cache(maxsize=64)
def _real(root: Path) -> Path:
    return root.resolve()


@dataclass(frozen=True)
class ImageFile:
    """A path from a data set, relative to one of several roots; looked up only when it is needed.

    Args:
        name: the path as the record gives it.
        roots: folders, tried in order: the first in which the path exists is used.
    """

    name: str
    roots: tuple[str, ...]

    def resolve(self, source: str, field: str = "image") -> Path:
        """Return the file's real path, which lies inside the root it was found in.

        Args:
            source: the record, for the error.
            field: the record's field, for the error.

        Returns:
            The path with symlinks resolved; a regular file.

        Raises:
            DataError: a URL, an absolute path, `..`, a symlink that leaves its root, a missing
                file, or something that is not a regular file.
        """
        name = self.name
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise DataError(
                source=source,
                field=field,
                expected="the path of an image, relative to image_root",
                got=repr(name),
                remedy="write a relative path, or remove the field from a text-only record",
            )
        if _URL.match(name):
            raise DataError(
                source=source,
                field=field,
                expected="the path of a local file (nothing is ever fetched)",
                got=f"the URL {name!r}",
                remedy="download it and point image_root at it",
                reason="image is a URL",
            )
        parts = re.split(r"[/\\]", name)
        if name.startswith(("/", "\\", "~")) or _DRIVE.match(name) or ".." in parts:
            raise DataError(
                source=source,
                field=field,
                expected="a path inside its image root",
                got=repr(name),
                remedy="write the path relative to image_root, without '..'",
                reason="image outside its root",
            )
        for root in self.roots:
            found = self._inside(Path(root), source, field)
            if found is not None:
                return found
        where = ", ".join(self.roots) or "no image root was given"
        raise DataError(
            source=source,
            field=field,
            expected="an existing image file",
            got=f"{name!r}, which is in none of the image roots ({where})",
            remedy="check image_root, or set on_error='skip' to leave such records out",
            reason="image missing",
        )

    def _inside(self, root: Path, source: str, field: str) -> Path | None:
        try:
            real_root = _real(root)
            real = (real_root / self.name).resolve(strict=True)
            mode = real.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        # ValueError: characters that no file name can have.
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                source=source,
                field=field,
                expected="a readable image file",
                got=f"{self.name[:100]!r}: {error}",
                remedy="check the path and its permissions",
                reason="image unreadable",
            ) from error
        if not real.is_relative_to(real_root):
            raise DataError(
                source=source,
                field=field,
                expected="a path inside its image root",
                got=f"{self.name!r}, a link that leads out of {root}",
                remedy="copy the file into the root, or name the link's target as an image root",
                reason="image outside its root",
            )
        # A named pipe or a device would block the loader for ever.
        if not stat.S_ISREG(mode):
            raise DataError(
                source=source,
                field=field,
                expected="a regular file",
                got=f"{self.name!r}, which is a folder or a special file",
                remedy="name the image file itself",
                reason="image unreadable",
            )
        return real


def _opened(image: Any, source: str, field: str) -> tuple[Image.Image, str]:
    """Open without decoding; returns the image and the name to show in errors."""
    target: Any
    if isinstance(image, ImageFile):
        target, name = image.resolve(source, field), image.name
    elif isinstance(image, bytes | bytearray):
        target, name = io.BytesIO(image), f"{len(image)} bytes in the record"
    elif isinstance(image, str | Path):
        # The caller's own path, not one from a record: it needs no root, but must be a plain file.
        name = str(image)
        if _URL.match(name) or not Path(image).is_file():
            ImageFile(name, ()).resolve(source, field)
        target = image
    else:
        raise DataError(
            source=source,
            field=field,
            expected="a PIL image, a uint8 array (H, W, 3), bytes, or a path",
            got=type(image).__name__,
            remedy="pass one of these",
        )
    try:
        return Image.open(target, formats=FORMATS), name
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise _too_large(source, field, f"{name!r}: {error}", limit) from error
    except Exception as error:
        raise _corrupt(source, field, name, error) from error


def _corrupt(source: str, field: str, name: str, error: Exception) -> DataError:
    return DataError(
        source=source,
        field=field,
        expected=f"an image that decodes ({', '.join(FORMATS)})",
        got=f"{name!r}: {error}",
        remedy="replace the file, or set on_error='skip' to leave such records out",
        reason="image corrupt",
    )


def _too_large(source: str, field: str, got: str, max_pixels: int) -> DataError:
    return DataError(
        source=source,
        field=field,
        expected=f"at most {max_pixels} pixels (max_pixels)",
        got=got,
        remedy="scale the image down, or raise max_pixels if you trust the file",
        reason="image too large",
    )


def check_image(
    image: Any, source: str, *, field: str = "image", max_pixels: int | None = MAX_PIXELS
) -> None:
    """Check an image's place, format and size from its header, without decoding it.

    Args:
        image: an `ImageFile`, a path, bytes, a PIL image, or a uint8 array (H, W, 3).
        source: the record, for the error.
        field: the record's field, for the error.
        max_pixels: the largest width times height; None is no limit.

    Raises:
        DataError: as `load_image`, except for damage behind the header.
    """
    if isinstance(image, np.ndarray | Image.Image):
        load_image(image, source, field=field, max_pixels=max_pixels)
        return
    opened, name = _opened(image, source, field)
    with opened:
        _check_size(opened.size, name, source, field, max_pixels)


def image_size(image: Any, source: str, *, field: str = "image") -> tuple[int, int]:
    """Return (width, height) of the upright image by its header, without decoding it.

    Args:
        image, source, field: as for `check_image`.

    Raises:
        DataError: as `load_image`, except for size and for damage behind the header.
    """
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    if isinstance(image, Image.Image):
        return image.size
    opened, _ = _opened(image, source, field)
    with opened:
        width, height = opened.size
        # Orientations from 5 on lie on their side.
        return (height, width) if (_orientation(opened) or 1) >= 5 else (width, height)


def _check_size(
    size: tuple[int, int], name: str, source: str, field: str, max_pixels: int | None
) -> None:
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        got = f"{size[0]} x {size[1]} = {size[0] * size[1]} pixels in {name!r}"
        raise _too_large(source, field, got, max_pixels)


def load_image(
    image: Any, source: str, *, field: str = "image", max_pixels: int | None = MAX_PIXELS
) -> Image.Image:
    """Return the image in RGB; the size in its header is checked before anything is decoded.

    Args:
        image: an `ImageFile`, a path, bytes, a PIL image, or a uint8 array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4).
        source: the record, for the error.
        field: the record's field, for the error.
        max_pixels: the largest width times height; None is no limit.

    Returns:
        A decoded PIL image in mode RGB.

    Raises:
        DataError: the image is missing, outside its root, a URL, too large or corrupt.
    """
    if isinstance(image, np.ndarray):
        opened, name = _from_array(image, source, field), "the array"
    elif isinstance(image, Image.Image):
        opened, name = image, getattr(image, "filename", "") or "the image"
    else:
        opened, name = _opened(image, source, field)
    ours = opened is not image
    try:
        _check_size(opened.size, name, source, field, max_pixels)
        return _decoded(opened, ours)
    except DataError:
        raise
    # Decoders raise a dozen different errors on damaged files.
    except Exception as error:
        raise _corrupt(source, field, name, error) from error
    finally:
        # Decoded pixels stay; the file would stay open with the error, or with more frames.
        if ours and hasattr(opened, "fp"):
            opened.close()


def _decoded(image: Image.Image, ours: bool) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise ValueError("the image is empty")
    image.load()
    if not ours and image.mode == "RGB":
        return image
    turn = _TURNS.get(_orientation(image)) if ours else None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # PIL clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} has no fixed range of values; save it with 8 or 16 bits a channel"
        )
    # A copy, since the file behind the image is about to be closed.
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    """How the camera was held; None where the metadata cannot be read, as where there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def _from_array(image: np.ndarray, source: str, field: str) -> Image.Image:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise DataError(
            source=source,
            field=field,
            expected="a uint8 array (H, W, 3)",
            got=f"{image.dtype} of shape {image.shape}",
            remedy="convert it to uint8 with the channels last",
        )
    image = image[:, :, 0] if channels == 1 and image.ndim == 3 else image
    return Image.fromarray(np.ascontiguousarray(image))
