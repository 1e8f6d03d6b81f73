"""Records of a data set that show the same image, as one sample: the image is seen once.

Their conversations stand behind it as segments that do not see each other, as independent turns do.
A record is put to others where all its images come before its first answer, and paths and text up
to the last image are the same; the first record's place is that of the sample.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch.utils.data import Dataset

from cdfast.data import VisionTextDataset
from cdfast.encoding import Sample, conversations_of
from cdfast.images import DataError
from cdfast.lengths import VisualTokens, token_ids
from cdfast.progress import progress


class SharedImages(Dataset[dict[str, Any]]):
    """Samples of `data`, those that show the same image put together up to its max_length.

    Args:
        data: dialogues or independent turns; no pairs of answers.

    Attributes:
        groups: the indices of `data` that are one sample, ascending.
        tokens, alone: tokens of all samples as they are, and of the records one by one.
        visual, visual_alone: the visual tokens among them.

    Raises:
        ValueError: pairs of answers.
        DataError: with on_error="raise", a record that cannot be measured.
    """

    def __init__(self, data: VisionTextDataset):
        if data.pairs:
            raise ValueError(
                "share_images: expected samples of one answer; got pairs of answers, whose rows "
                "belong together. Leave share_images out."
            )
        self.data = data
        self.groups: list[list[int]] = []
        self.tokens = self.alone = self.visual = self.visual_alone = 0
        self._group()

    def _group(self) -> None:
        added = VisualTokens(self.data.processor)
        limit = self.data.max_length or sys.maxsize
        # What the last sample of a key has: its place, and its length.
        open_samples: dict[Hashable, tuple[int, int]] = {}
        for index in progress(range(len(self.data)), "Looking for shared images"):
            sample = self.data.sample(index)
            try:
                key, prefix, visual, own = _measured(added, sample, self.data.turns)
            except DataError:
                if self.data.on_error == "raise":
                    raise
                key, prefix, visual, own = None, 0, 0, 0  # replaced when it is read
            whole = min(prefix + own, limit)
            self.alone += whole
            self.visual_alone += visual
            place, length = open_samples.get(key, (-1, limit))
            if key is not None and length + own <= limit:
                self.groups[place].append(index)
                self.tokens += own
                open_samples[key] = (place, length + own)
                continue
            open_samples[key] = (len(self.groups), whole)
            self.groups.append([index])
            self.tokens += whole
            self.visual += visual

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an encoded sample with `segment_ids` and `position_ids`: see `encode`.

        Raises:
            DataError: with on_error="raise", a record cannot be used.
        """
        encoded = self.data.together(self.groups[index])
        if "segment_ids" in encoded:
            return encoded
        # All samples of a batch need segments where one has them.
        ids = encoded["input_ids"]
        alone = {"segment_ids": torch.zeros_like(ids), "position_ids": torch.arange(len(ids))}
        return {**encoded, **alone}

    @property
    def skipped(self) -> Any:
        """See `VisionTextDataset.skipped`."""
        return self.data.skipped

    def skipped_records(self) -> dict[str, list[str]]:
        """See `VisionTextDataset.skipped_records`."""
        return self.data.skipped_records()

    def summary(self) -> dict[str, int]:
        """Numbers for results."""
        return {
            "records": len(self.data),
            "samples": len(self),
            "visual_tokens": self.visual,
            "visual_tokens_alone": self.visual_alone,
            "tokens": self.tokens,
            "tokens_alone": self.alone,
        }

    def describe(self) -> str:
        """One line: how many samples are left, and what is saved."""
        saved = 1 - self.visual / max(self.visual_alone, 1)
        return (
            f"shared images: {len(self.data):,} records in {len(self):,} samples; "
            f"{self.visual:,} visual tokens, not {self.visual_alone:,} ({saved:.1%} saved); "
            f"{self.tokens:,} tokens in all, not {self.alone:,}"
        )


def _measured(added: VisualTokens, sample: Sample, turns: str) -> tuple[Hashable, int, int, int]:
    """(key of samples to be put together or None, tokens up to the last image, the visual ones,
    tokens behind it) of a sample."""
    template = added.template
    conversations = conversations_of(sample, turns)
    texts = [template.render(messages, sample.source) for messages in conversations]
    ids = token_ids(added, texts)
    visual = [n for n, token in enumerate(ids[0]) if token == template.image_id]
    start = visual[-1] + 1 if sample.images and visual else 0
    extra = added.added(sample, texts[0], len(ids[0]))
    # Every turn repeats the text up to the last image.
    own = sum(len(row) - start for row in ids)
    visual_tokens = extra + (len(visual) if start else 0)
    return _key(sample, texts[0], template.image), start + extra, visual_tokens, own


def _key(sample: Sample, text: str, mark: str | None) -> Hashable:
    """Images and text up to the last of them; None where no other record may be put to this one."""
    roles = [message["role"] for message in sample.messages]
    answered = sample.messages[roles.index("assistant") :]
    late = any(part["type"] == "image" for message in answered for part in message["content"])
    # Pixels that are in memory have no name to know them by.
    named = all(isinstance(image, Hashable) for image in sample.images)
    if mark is None or not sample.images or late or not named:
        return None
    images = tuple(
        hashlib.blake2b(image).digest() if isinstance(image, bytes) else image
        for image in sample.images
    )
    return images, text[: text.rindex(mark)]
