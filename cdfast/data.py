"""Training data: LLaVA JSON and `messages` data sets, read with the model's own processor."""

from __future__ import annotations

from cdfast.encoding import Sample, VisionTextCollator, check_answers, encode
from cdfast.images import MAX_PIXELS, DataError, ImageFile, load_image

__all__ = [
    "MAX_PIXELS",
    "DataError",
    "ImageFile",
    "Sample",
    "VisionTextCollator",
    "check_answers",
    "encode",
    "load_image",
]
