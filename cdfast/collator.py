"""Encoded samples of unequal lengths to one batch: padded, or packed in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdfast.losses import IGNORE_INDEX


class VisionTextCollator:
    """Pad encoded samples to one batch; `pack` puts them in one row instead.

    Args:
        pad_token_id: what fills `input_ids`; labels are filled with -100, everything else
            with 0.
        padding_side: "right" or "left".
        pad_to_multiple_of: round the length up to a multiple of this.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, pad_token_id: int, padding_side: str = "right", pad_to_multiple_of: int | None = None
    ):
        if pad_token_id is None:
            raise ValueError(
                "pad_token_id: expected a token id, got None; set tokenizer.pad_token first"
            )
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side: expected 'right' or 'left', got {padding_side!r}")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected at least 1, got {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            samples: what `encode` returned, or all what `pairs.encode_pair` returned; at least one.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, N) int64; the image tensors of all samples
            concatenated along dim 0 (no such key when no sample has an image); extras, and
            `segment_ids` and `position_ids` where every sample has them, (B, N); `sample_ids`, the
            samples' sources; `stored_targets` of the samples that carry them, one after the other.
            Of B pairs a batch has 2B rows, all chosen answers and then all
            rejected ones in the same order, and `pairs`, the number B.

        Raises:
            ValueError: no samples, or pairs among others.
        """
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        sources = [sample["source"] for sample in samples]
        rejected = [sample["rejected"] for sample in samples if "rejected" in sample]
        if rejected and len(rejected) < len(samples):
            raise ValueError(
                f"samples: expected pairs of answers throughout, or none; got {len(rejected)} of "
                f"{len(samples)}. Keep preference data in a data set of its own."
            )
        samples = [*samples, *rejected]
        length = max(len(sample["input_ids"]) for sample in samples)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        ids = [sample["input_ids"] for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, length, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], length, 0),
            "labels": self._pad([sample["labels"] for sample in samples], length, IGNORE_INDEX),
        }
        for name, rows in _extras(samples).items():
            batch[name] = self._pad(rows, length, 0)
        if all("segment_ids" in sample for sample in samples):
            batch["position_ids"] = self._pad([s["position_ids"] for s in samples], length, 0)
            batch["segment_ids"] = self._pad([s["segment_ids"] for s in samples], length, 0)
        batch |= _images(samples)
        if any("stored_targets" in sample for sample in samples):
            stored = [sample["stored_targets"] for sample in samples]
            batch["stored_targets"] = {n: torch.cat([s[n] for s in stored]) for n in stored[0]}
        batch["sample_ids"] = sources
        if rejected:
            batch["pairs"] = len(rejected)
        return batch

    def pack(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of one row without padding, in which samples follow each other.

        Args:
            samples: what `encode` returned for dialogues; at least one.

        Returns:
            `input_ids`, `attention_mask` (all 1), `labels` (1, total) int64; `position_ids`
            (1, total), which start again at every sample; `cu_seqlens` (S + 1,) int32, where each
            begins, then `total`; image tensors, extras and `sample_ids` as in a padded batch.

        Raises:
            ValueError: no samples, pairs of answers, or samples with segments.
        """
        check_packable_samples(samples)
        ids = [sample["input_ids"] for sample in samples]
        ends = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0)
        labels = torch.cat([sample["labels"] for sample in samples])
        # Row i predicts label i + 1: none may predict the first token of the next sample.
        labels[ends[:-1]] = IGNORE_INDEX
        return {
            "input_ids": torch.cat(ids)[None],
            # Without one, transformers would make a dense mask of the positions.
            "attention_mask": torch.ones(1, len(labels), dtype=torch.int64),
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
            "cu_seqlens": ends.to(torch.int32),
            **{name: torch.cat(rows)[None] for name, rows in _extras(samples).items()},
            **_images(samples),
            "sample_ids": [sample["source"] for sample in samples],
        }

    def _pad(self, rows: list[Tensor], length: int, value: int) -> Tensor:
        out = rows[0].new_full((len(rows), length), value)
        for n, row in enumerate(rows):
            at = 0 if self.padding_side == "right" else length - len(row)
            out[n, at : at + len(row)] = row
        return out


def check_packable_samples(samples: Sequence[dict[str, Any]]) -> None:
    """Refuse encoded samples that cannot stand in a packed row.

    Raises:
        ValueError: none at all, a pair of answers, or a sample with segments.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for sample in samples:
        if "rejected" in sample or "segment_ids" in sample:
            kind = "a pair of answers" if "rejected" in sample else "split into independent turns"
            raise ValueError(
                f"packing: expected samples of one conversation each; got {sample['source']}, "
                f"which is {kind}. Leave packing out, or encode dialogues (turns='dialogue')."
            )


def _extras(samples: Sequence[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """The processor's other per-token tensors by name, of every sample; 0 where it has none."""
    names = sorted({name for sample in samples for name in sample.get("extras", {})})
    return {
        name: [s.get("extras", {}).get(name, torch.zeros_like(s["input_ids"])) for s in samples]
        for name in names
    }


def _images(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The image tensors of all samples by name."""
    names = sorted({name for sample in samples for name in sample["images"]})
    return {
        name: _concatenate([s["images"][name] for s in samples if name in s["images"]])
        for name in names
    }


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along dim 0; other dims are padded with zeros at the end to the largest."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
    out = tensors[0].new_zeros([sum(len(t) for t in tensors), *shape])
    at = 0
    for tensor in tensors:
        region = (slice(at, at + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        out[region] = tensor
        at += len(tensor)
    return out
