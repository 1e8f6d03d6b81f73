"""Training data: LLaVA JSON and `messages` data sets, read with the model's own processor.

Every record is checked once at the start: its fields, where its images lie, and their format and
size by their headers. What fails is an error, or, with on_error="skip", left out and counted, the
same on every rank. An image that turns out to be damaged only when it is decoded is replaced by the
next good record of the same data set, and counted too.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cdfast.collator import VisionTextCollator
from cdfast.encoding import (
    Sample,
    check_answers,
    check_sample,
    encode,
)
from cdfast.images import MAX_PIXELS, DataError, ImageFile, check_image, load_image
from cdfast.lengths import measure
from cdfast.pairs import check_pair, check_pair_answers, encode_pair
from cdfast.progress import is_first_rank, progress
from cdfast.records import RecordFile

__all__ = [
    "MAX_PIXELS",
    "DataError",
    "ImageFile",
    "LlavaJsonDataset",
    "MessagesDataset",
    "Sample",
    "VisionTextCollator",
    "VisionTextDataset",
    "check_answers",
    "check_sample",
    "encode",
    "load_dataset",
    "load_image",
]

# Every reason a DataError can carry: a record's reason is kept as its number here.
REASONS = (
    "broken record",
    "image missing",
    "image outside its root",
    "image is a URL",
    "image unreadable",
    "image corrupt",
    "image too large",
    "nothing left within max_length",
    "chat template",
    "answer beyond max_length",
)
# Records named for each reason in the results of a run; all are counted.
_NAMED = 20

Paths = str | Path | Sequence[str | Path]
Roots = str | Path | Sequence[str | Path] | Mapping[Any, Any] | None


def listed(value: Any) -> list:
    """One path, or several, as a list."""
    return [value] if isinstance(value, str | Path) else list(value or [])


class VisionTextDataset(Dataset):
    """Encoded samples of one or several files; the files may differ in layout.

    Args:
        paths: one file or several: .json (a list), .jsonl, .parquet, or a folder written by
            `datasets.Dataset.save_to_disk`.
        image_roots: the folders in which image paths are looked up: one or several, tried in order
            for every file, the first in which the path exists is used; or a mapping from a file of
            `paths` to its own root or roots. Without any, the folder that holds the file.
        processor: the model's Hugging Face processor.
        max_length: the most tokens of a sample; see `encode`.
        turns: "dialogue" or "independent"; see `encode`.
        on_error: "raise", or "skip" to leave out records that cannot be used and count them in
            `skipped`. A file that cannot be read, and a chat template that does not fit the first
            record, are errors in either case.
        max_pixels: the largest image, by its header; None is no limit.
        check_images: look at every image's place and header at the start. False saves the time on
            slow storage; such faults are then found when the record is read.
        pairs: samples are pairs of a chosen and a rejected answer (`pairs.encode_pair`): every
            record needs `rejected`, and what is longer than max_length is not cut but broken.

    Attributes:
        has_image: bool (len,), for samplers that group by it.

    Raises:
        DataError: a file that cannot be read; with on_error="raise", the first broken record; with
            on_error="skip", no record that can be used.
        ValueError: an option out of range, an image root that is not a folder.
    """

    layout: str | None = None

    def __init__(
        self,
        paths: Paths,
        image_roots: Roots,
        processor: Any,
        *,
        max_length: int | None = None,
        turns: str = "dialogue",
        on_error: str = "raise",
        max_pixels: int | None = MAX_PIXELS,
        check_images: bool = True,
        pairs: bool = False,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1 or None, got {max_length}")
        self.processor = processor
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.pairs = pairs
        self.max_length, self.turns = max_length, turns
        self._lengths: np.ndarray | None = None  # every stage of a run asks for them
        self._encoding: dict[str, Any] = {
            "max_length": max_length,
            "turns": turns,
            "max_pixels": max_pixels,
        }
        self.files = _open_files(listed(paths), image_roots)
        self._layouts = [self.layout or file.layout() for file in self.files]
        self._dropped: Counter[str] = Counter()
        self._dropped_names: dict[str, list[str]] = {}
        self._warned: set[str] = set()
        self._build_index(check_images)
        # Shared with loader workers, whose own counters would be lost with them: for each sample
        # 0, or 1 + the number of the reason why it was replaced; and whether it was cut.
        self._replaced = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
        self._cut = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._try_first()

    def _build_index(self, check_images: bool) -> None:
        index: list[tuple[int, int]] = []
        has_image = []
        first: dict[str, DataError] = {}
        for f, r in self._all_records():
            try:
                sample = self.files[f].sample(r, self._layouts[f], pairs=self.pairs)
                check = check_pair if self.pairs else check_sample
                check(self.processor, sample, turns=self._encoding["turns"])
                if check_images:
                    for n, image in enumerate(sample.images):
                        check_image(
                            image, sample.source, field=f"image[{n}]", max_pixels=self.max_pixels
                        )
            except DataError as error:
                if self.on_error == "raise" or error.reason == "chat template":
                    raise
                self._dropped[error.reason] += 1
                names = self._dropped_names.setdefault(error.reason, [])
                if len(names) < _NAMED:
                    names.append(error.source)
                first.setdefault(error.reason, error)
                continue
            index.append((f, r))
            has_image.append(bool(sample.images))
        for reason, example in first.items():
            left_out = f"{self._dropped[reason]} records left out ({reason})"
            self._warn(reason, f"{left_out}, the first: {example}")
        if not index:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in self._dropped.items())
            raise DataError(
                source=", ".join(file.name for file in self.files),
                field="records",
                expected="at least one that can be used",
                got=f"none ({reasons}); the first: {next(iter(first.values()))}",
                remedy="correct the records, or check image_root",
            )
        self._index = np.array(index, dtype=np.int64)
        self.has_image = torch.tensor(has_image)

    def _all_records(self) -> Any:
        total = sum(len(file.records) for file in self.files)
        records = ((f, r) for f, file in enumerate(self.files) for r in range(len(file.records)))
        return progress(records, "Checking records", total)

    def _try_first(self) -> None:
        """Encode the first sample that can be, and check its labels against its answers."""
        for i in range(len(self)):
            try:
                sample = self.sample(i)
                check = check_pair_answers if self.pairs else check_answers
                check(self.processor, sample, self._encode(sample))
                return
            except DataError as error:
                if self.on_error == "raise" or error.reason == "chat template":
                    raise
                self._note(i, error)
        self._none_left()

    def _encode(self, sample: Sample) -> dict[str, Any]:
        encoder = encode_pair if self.pairs else encode
        return encoder(self.processor, sample, **self._encoding)

    def _none_left(self) -> None:
        raise DataError(
            source=", ".join(file.name for file in self.files),
            field="records",
            expected="at least one that can be encoded",
            got=f"none: {dict(self.skipped)}",
            remedy="correct the records, or see the warnings for the first of each kind",
        )

    def _warn(self, reason: str, text: str) -> None:
        if reason not in self._warned and is_first_rank():
            warnings.warn(text, stacklevel=3)
        self._warned.add(reason)

    def _note(self, index: int, error: DataError) -> None:
        self._replaced[index] = 1 + REASONS.index(error.reason)
        self._warn(
            f"read: {error.reason}", f"the next good record is used in place of one: {error}"
        )

    def together(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return samples that show the same images encoded as one: see `encode`, `others`.

        Raises:
            DataError: with on_error="raise", they cannot be used.
        """
        first, *others = indices
        if others and not self._replaced[list(indices)].any():
            samples = [self.sample(index) for index in others]
            try:
                return encode(self.processor, self.sample(first), others=samples, **self._encoding)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                for index in indices:
                    self._note(index, error)
        return self[first]

    @property
    def skipped(self) -> Counter[str]:
        """Records left out or replaced so far, by reason (in all loader workers)."""
        counts = Counter(self._dropped)
        codes = torch.bincount(self._replaced.long(), minlength=len(REASONS) + 1)[1:]
        counts.update({REASONS[n]: int(c) for n, c in enumerate(codes.tolist()) if c})
        return counts

    def skipped_records(self) -> dict[str, list[str]]:
        """The first records left out or replaced so far, by reason (in all loader workers)."""
        names = {reason: list(sources) for reason, sources in self._dropped_names.items()}
        for index in self._replaced.nonzero().flatten().tolist():
            listed = names.setdefault(REASONS[int(self._replaced[index]) - 1], [])
            if len(listed) < _NAMED:
                listed.append(self.sample(index).source)
        return names

    @property
    def truncated(self) -> int:
        """How many samples were cut to max_length so far (in all loader workers)."""
        return int(self._cut.sum())

    def __len__(self) -> int:
        return len(self._index)

    def sample(self, index: int) -> Sample:
        """Return a sample as the record has it; its images are not opened.

        Args:
            index: from 0 to len - 1 (negative: from the end).

        Raises:
            IndexError: out of range.
        """
        f, r = self._index[range(len(self))[index]]
        return self.files[f].sample(int(r), self._layouts[f], pairs=self.pairs)

    def lengths(self) -> np.ndarray:
        """int64 (len,) tokens of each sample, without decoding images; see `lengths.measure`.

        Raises:
            ValueError: samples are pairs, or split into turns.
            DataError: with on_error="raise", a record that cannot be measured.
        """
        if self.pairs or self.turns != "dialogue":
            kind = "pairs of answers" if self.pairs else f"turns={self.turns!r}"
            raise ValueError(
                f"packing: expected samples of one conversation each; got {kind}. Leave packing "
                "out, or encode dialogues (turns='dialogue')."
            )
        if self._lengths is None:
            self._lengths = measure(
                self.processor,
                self.sample,
                len(self),
                max_length=self.max_length,
                on_error=self.on_error,
            )
        return self._lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an encoded sample: see `encode` and `pairs.encode_pair`.

        Raises:
            DataError: with on_error="raise", the record cannot be used.
        """
        start = range(len(self))[index]
        for offset in range(len(self)):
            i = (start + offset) % len(self)
            # A record known to be bad gives the same answer every time: do not decode it again.
            if self._replaced[i]:
                continue
            try:
                encoded = self._encode(self.sample(i))
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._note(i, error)
                continue
            if encoded["truncated"]:
                self._cut[i] = True
            return encoded
        self._none_left()
        raise AssertionError


class LlavaJsonDataset(VisionTextDataset):
    """LLaVA's layout: `conversations` of `from` and `value`, and `image`, one path or a list.

    As many `<image>` marks as images; each keeps its place in the text, and the newline beside it
    goes. A turn's `from` is human (or user), gpt (or assistant), or system.
    """

    layout = "conversations"


class MessagesDataset(VisionTextDataset):
    """`messages` of `role` and `content`, and `images` (or `image`).

    `content` is a string, with `<image>` marks, or a list of parts `{"type": "image"}` and
    `{"type": "text", "text": ...}`; an image part may name its path itself (`image` or `path`).
    `images` are paths, or an image column of `datasets`.
    """

    layout = "messages"


def shown_names(paths: Sequence[str | Path]) -> list[str]:
    """What errors call each file: its name, or its path where two have the same name."""
    names = [Path(path).name for path in paths]
    times = Counter(names)
    return [n if times[n] == 1 else str(path) for n, path in zip(names, paths)]


def _open_files(paths: list, image_roots: Roots) -> list[RecordFile]:
    if not paths:
        raise ValueError("paths: expected at least one file, got none")
    files = []
    if isinstance(image_roots, Mapping):
        by_file = {Path(file): listed(roots) for file, roots in image_roots.items()}
        unknown = set(by_file) - {Path(path) for path in paths}
        if unknown:
            raise ValueError(
                f"image_roots: expected files of paths as keys, got {sorted(map(str, unknown))}"
            )
    else:
        by_file = {Path(path): listed(image_roots) for path in paths}
    for path, shown in zip(paths, shown_names(paths)):
        roots = by_file.get(Path(path)) or [Path(path).parent]
        for root in roots:
            if not Path(root).is_dir():
                raise ValueError(f"image_roots: expected folders that exist, got {str(root)!r}")
        files.append(RecordFile(path, tuple(str(root) for root in roots), shown))
    return files


def load_dataset(
    paths: Paths,
    image_roots: Roots,
    processor: Any,
    *,
    max_length: int | None = None,
    turns: str = "dialogue",
    on_error: str = "raise",
    max_pixels: int | None = MAX_PIXELS,
    check_images: bool = True,
    pairs: bool = False,
) -> VisionTextDataset:
    """Open training files; each file's layout is found from its records.

    Args:
        paths, image_roots, processor, max_length, turns, on_error, max_pixels, check_images,
            pairs: see `VisionTextDataset`.

    Returns:
        A map-style data set of encoded samples.

    Raises:
        DataError: see `VisionTextDataset`.
        ValueError: see `VisionTextDataset`.
    """
    return VisionTextDataset(
        paths,
        image_roots,
        processor,
        max_length=max_length,
        turns=turns,
        on_error=on_error,
        max_pixels=max_pixels,
        check_images=check_images,
        pairs=pairs,
    )
