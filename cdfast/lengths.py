"""How long samples are, without decoding their images: what packing plans rows by.

A processor makes as many tokens of an image as its size asks for. So the text is tokenized with one
placeholder per image, and what the images add is read off a blank image of the size in the file's
header, once for every size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cdfast.chat import chat_template
from cdfast.encoding import Sample, begins_with_bos, process
from cdfast.images import DataError, image_size
from cdfast.progress import progress

# Texts that the tokenizer is given at once.
_CHUNK = 256


class VisualTokens:
    """What the images of a sample add to its length, by their sizes; each size is tried once."""

    def __init__(self, processor: Any):
        self.processor, self.template = processor, chat_template(processor)
        self._known: dict[tuple[tuple[int, int], ...], int] = {}

    def added(self, sample: Sample, text: str, placeholders: int) -> int:
        """Tokens that the sample's images have beyond the ids of its text.

        Args:
            sample: only the headers of its images are read.
            text: as rendered, with one placeholder per image.
            placeholders: tokens of that text.

        Raises:
            DataError: an image that cannot be opened, or that the processor refuses.
        """
        sizes = tuple(image_size(image, sample.source) for image in sample.images)
        if not sizes:
            return 0
        if sizes not in self._known:
            blanks = [Image.new("RGB", size) for size in sizes]
            ids, _, _ = process(self.processor, self.template, text, blanks, sample.source)
            self._known[sizes] = len(ids) - placeholders
        return self._known[sizes]


def measure(
    processor: Any,
    sample: Callable[[int], Sample],
    count: int,
    *,
    max_length: int | None = None,
    on_error: str = "raise",
) -> np.ndarray:
    """int64 (count,) tokens of each sample as `encode` makes them of dialogues.

    Args:
        processor: as given to `encode`.
        sample: index -> sample.
        count: number of samples.
        max_length: the most tokens to keep.
        on_error: "raise", or "skip": a sample that cannot be measured is as long as the next that
            can, which takes its place when it is read.

    Raises:
        DataError: with on_error="raise", a sample that cannot be measured; none that can.
    """
    visual = VisualTokens(processor)
    lengths = np.zeros(count, dtype=np.int64)
    for indices in _batched(progress(range(count), "Measuring samples"), _CHUNK):
        samples = [sample(index) for index in indices]
        texts = [visual.template.render(s.messages, s.source) for s in samples]
        for index, s, text, ids in zip(indices, samples, texts, token_ids(visual, texts)):
            try:
                lengths[index] = len(ids) + visual.added(s, text, len(ids))
            except DataError:
                if on_error == "raise":
                    raise
    good = lengths.nonzero()[0]
    if not len(good):
        raise DataError(
            source=sample(0).source,
            field="images",
            expected="at least one sample that can be measured",
            got="none",
            remedy="correct the records, or check image_root",
        )
    following = good[np.searchsorted(good, np.arange(count)) % len(good)]
    lengths = lengths[following]
    return lengths if max_length is None else np.minimum(lengths, max_length)


def token_ids(visual: VisualTokens, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that still have one placeholder per image."""
    tokenizer = visual.template.tokenizer
    encoded = tokenizer(
        list(texts),
        add_special_tokens=not begins_with_bos(tokenizer, texts[0]),
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _batched(items: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    """itertools.batched, which Python 3.12 has."""
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk
