"""What a data set would do in a run: every record read, every image decoded, every answer masked,
and all of it counted instead of stopping at the first fault. Part of `--dry-run`.

A record goes through the functions that training uses (`RecordFile.sample`, `encode_uncut` and
`cut`, or `encode_pair`), so what is counted here is what would be refused there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from cdfast.chat import chat_template
from cdfast.encoding import Sample, answer_runs, check_answers, cut, encode_uncut
from cdfast.images import DataError, ImageFile, load_image
from cdfast.losses import IGNORE_INDEX
from cdfast.pairs import check_pair_answers, encode_pair

# Faults and repeats that are shown with their whole message; all are counted.
NAMED = 3
UNEXPECTED = "unexpected error"
# Records that a worker hands over at once: enough to hide the hand-over, few enough for the bar.
_AT_ONCE = 8


@dataclass(frozen=True)
class EncodingOptions:
    """How training would encode a record: the recipe's options of the same names."""

    max_length: int | None = None
    turns: str = "dialogue"
    on_error: str = "raise"
    max_pixels: int | None = None
    pairs: bool = False


class Row(NamedTuple):
    """Token counts of one sequence: as encoded, and of these within max_length."""

    tokens: int
    visual: int
    answer: int
    kept: int
    kept_answer: int
    answers: int
    kept_answers: int


class Finding(NamedTuple):
    """What one record would do.

    Args:
        source: file and record.
        reason: why it cannot be used, as a short fixed name; None where it can.
        message: the whole error.
        digest: equal for records of the same conversation and images; 0 where it cannot be read.
        images: their number.
        rows: the encoded sequence, two of a pair; none where encoding failed or was not done.
    """

    source: str
    reason: str | None
    message: str
    digest: int
    images: int
    rows: tuple[Row, ...]


class _Findings(Dataset):
    """`look_at` for chosen records, as a data set, so that loader workers do the decoding."""

    def __init__(
        self, samples: Any, indices: Sequence[int], processor: Any, options: EncodingOptions
    ):
        self.samples, self.indices = samples, indices
        self.processor, self.options = processor, options

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Finding:
        index = int(self.indices[position])
        return look_at(lambda: self.samples.sample(index), self.processor, self.options)


def look_at(read: Any, processor: Any, options: EncodingOptions) -> Finding:
    """Read, decode and encode one record; a fault becomes part of what is found.

    Args:
        read: returns the `Sample`.
        processor: None decodes the images and encodes nothing.
        options: see `EncodingOptions`.
    """
    sample: Sample | None = None
    rows: tuple[Row, ...] = ()
    reason, message, source = None, "", ""
    try:
        sample = read()
        source = sample.source
        if processor is None:
            for n, image in enumerate(sample.images):
                load_image(image, source, field=f"images[{n}]", max_pixels=options.max_pixels)
        elif options.pairs:
            rows = _pair_rows(processor, sample, options)
        else:
            uncut = encode_uncut(
                processor, sample, turns=options.turns, max_pixels=options.max_pixels
            )
            rows = (_row(uncut.labels, uncut.visual, options.max_length),)
            cut(uncut, options.max_length)
    except DataError as error:
        reason, message, source = error.reason, str(error), error.source
    # Training leaves out only what is a DataError, so anything else is a finding of its own.
    except Exception as error:
        reason, message = UNEXPECTED, f"{source}: {type(error).__name__}: {error}"
    digest = 0 if sample is None else _digest(sample)
    return Finding(source, reason, message, digest, len(sample.images) if sample else 0, rows)


def _row(labels: list[int], visual: int, max_length: int | None) -> Row:
    kept = labels if max_length is None else labels[:max_length]
    return Row(
        tokens=len(labels),
        visual=visual,
        answer=sum(label != IGNORE_INDEX for label in labels),
        kept=len(kept),
        kept_answer=sum(label != IGNORE_INDEX for label in kept),
        answers=len(answer_runs(labels)),
        kept_answers=len(answer_runs(kept)),
    )


def _pair_rows(processor: Any, sample: Sample, options: EncodingOptions) -> tuple[Row, ...]:
    chosen = encode_pair(
        processor,
        sample,
        max_length=options.max_length,
        turns=options.turns,
        max_pixels=options.max_pixels,
    )
    image_id = chat_template(processor).image_id if sample.images else None
    return tuple(
        # Of a pair nothing is cut.
        _row(one["labels"].tolist(), one["input_ids"].tolist().count(image_id), None)
        for one in (chosen, chosen["rejected"])
    )


def _digest(sample: Sample) -> int:
    """A number that two records of the same conversation and images share."""
    told = hashlib.blake2b(digest_size=8)
    told.update(json.dumps([sample.messages, sample.rejected], sort_keys=True).encode())
    for image in sample.images:
        if isinstance(image, ImageFile):
            told.update(image.name.encode("utf-8", "surrogatepass"))
        elif isinstance(image, bytes):
            told.update(image)
        else:
            told.update(np.asarray(image).tobytes())
    return int.from_bytes(told.digest(), "big")


@dataclass
class DataCheck:
    """Findings of one data set, summed up as they come.

    Args:
        options: of the run.
        indices: which records are looked at, in order.
        processor: None where no tokens are counted.
    """

    options: EncodingOptions
    indices: Sequence[int]
    processor: Any
    checked: int = 0
    # The rest is what was found.
    broken: Counter = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    images: Counter = field(default_factory=Counter)
    repeats: list[str] = field(default_factory=list)
    repeated: int = 0
    # Positions in `indices`: the first that can be used, the first such with an image, and the
    # first whose chat template fails.
    first: int | None = None
    first_with_image: int | None = None
    first_template_fault: int | None = None
    rows: array = field(default_factory=lambda: array("q"))
    mask_fault: str | None = None
    warnings: list[str] = field(default_factory=list)
    example: dict[str, Any] | None = None
    _seen: dict[int, str] = field(default_factory=dict)

    def add(self, found: Finding) -> None:
        """Count the next record."""
        position = self.checked
        self.checked += 1
        if found.digest:
            self.images[found.images] += 1
            self._count_repeat(found)
        for row in found.rows:
            self.rows.extend(row)
        if found.reason is not None:
            self.fault(found.reason, found.message)
            if found.reason == "chat template" and self.first_template_fault is None:
                self.first_template_fault = position
            return
        self.first = position if self.first is None else self.first
        if found.images and self.first_with_image is None:
            self.first_with_image = position

    def fault(self, reason: str, message: str) -> None:
        """Count one record that cannot be used."""
        self.broken[reason] += 1
        named = self.named.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(message)

    def _count_repeat(self, found: Finding) -> None:
        before = self._seen.setdefault(found.digest, found.source)
        if before is not found.source:
            self.repeated += 1
            if len(self.repeats) < NAMED:
                self.repeats.append(f"{found.source} repeats {before}")

    def stops(self, faults: Sequence[str]) -> list[str]:
        """Why a run on this data would stop, one sentence each; none where it would not.

        Args:
            faults: of whole files.
        """
        reasons = list(faults)
        bad = sum(self.broken.values())
        if bad and self.options.on_error == "raise":
            reasons.append(f"{bad} records cannot be used, and on_error is 'raise'")
        elif self.broken[UNEXPECTED]:
            reasons.append(f"{self.broken[UNEXPECTED]} records end in an error that none expects")
        template, first = self.first_template_fault, self.first
        if template is not None and (first is None or template < first):
            reasons.append("the chat template does not fit the first record")
        if self.mask_fault is not None:
            reasons.append(f"the answer mask is wrong: {self.mask_fault}")
        if self.checked and first is None:
            reasons.append("no record can be used")
        return reasons

    def summary(self) -> dict[str, Any]:
        """What was found, as plain values."""
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, len(Row._fields))
        of = dict(zip(Row._fields, rows.T))
        bad = sum(self.broken.values())
        found: dict[str, Any] = {
            "checked": self.checked,
            "complete": self.checked == len(self.indices),
            "usable": self.checked - bad,
            "broken": {
                reason: {"records": count, "first": self.named[reason]}
                for reason, count in self.broken.most_common()
            },
            "images_per_record": {str(n): c for n, c in sorted(self.images.items())},
            "duplicates": {"records": self.repeated, "first": self.repeats},
            "warnings": self.warnings,
            "example": self.example,
        }
        if not len(rows):
            return found
        found["tokens"] = {
            name: _statistics(of[column])
            for name, column in (("total", "tokens"), ("visual", "visual"), ("answer", "answer"))
        }
        found["truncation"] = {
            "max_length": self.options.max_length,
            "sequences": int((of["kept"] < of["tokens"]).sum()),
            "tokens_lost": int((of["tokens"] - of["kept"]).sum()),
            "answer_shortened": int((of["kept_answer"] < of["answer"]).sum()),
            "whole_answer_lost": int((of["kept_answers"] < of["answers"]).sum()),
        }
        return found


def _statistics(values: np.ndarray) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 1),
        "p95": round(float(np.percentile(values, 95)), 1),
        "max": int(values.max()),
        "sum": int(values.sum()),
    }


def evenly_spaced(total: int, wanted: int | None) -> Sequence[int]:
    """Numbers of the records to look at: all, or `wanted` at equal distances from the first on."""
    if wanted is None or wanted >= total:
        return range(total)
    return [n * total // wanted for n in range(wanted)]


def findings(samples: Any, check: DataCheck, workers: int) -> Iterator[Finding]:
    """Yield what is found of each record of `check.indices`, in order.

    Args:
        samples: has `sample(index)`.
        check: whose records and options.
        workers: processes that decode; 0: this one.
    """
    looked = _Findings(samples, check.indices, check.processor, check.options)
    # More processes than hand-overs would have nothing to do.
    workers = min(workers, -(-len(looked) // _AT_ONCE))
    loader: Any = DataLoader(looked, batch_size=_AT_ONCE, num_workers=workers, collate_fn=list)
    for several in loader:
        yield from several


def check_masks(samples: Any, check: DataCheck) -> None:
    """Compare the labels of the first usable record with its answers, and decode an example.

    The comparison is the one that training makes when it opens a data set. The example is the first
    usable record, with an image where there is one; both are left in `check`.
    """
    if check.first is None or check.processor is None:
        return
    first, options = int(check.indices[check.first]), check.options
    compare = check_pair_answers if options.pairs else check_answers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            sample = samples.sample(first)
            compare(check.processor, sample, _encoded(check.processor, sample, options))
        except DataError as error:
            check.mask_fault = str(error)
    check.warnings = [str(warning.message) for warning in caught]
    shown = check.first if check.first_with_image is None else check.first_with_image
    sample = samples.sample(int(check.indices[shown]))
    encoded = _encoded(check.processor, sample, options)
    parts = _decoded(check.processor, encoded)
    if options.pairs:
        others = _decoded(check.processor, encoded["rejected"])
        parts += [("rejected", text) for kind, text in others if kind == "answer"]
    check.example = {"source": sample.source, "parts": parts}


def _encoded(processor: Any, sample: Sample, options: EncodingOptions) -> dict[str, Any]:
    given: dict[str, Any] = {"turns": options.turns, "max_pixels": options.max_pixels}
    if options.pairs:
        return encode_pair(processor, sample, max_length=options.max_length, **given)
    return cut(encode_uncut(processor, sample, **given), options.max_length)


def _decoded(processor: Any, encoded: dict[str, Any]) -> list[tuple[str, str]]:
    """Stretches of prompt and of supervised tokens as text, image tokens as their number."""
    template = chat_template(processor)
    parts: list[tuple[str, str]] = []
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    kinds = ["prompt" if label == IGNORE_INDEX else "answer" for label in labels]
    at = 0
    while at < len(ids):
        end = next((n for n in range(at, len(ids)) if kinds[n] != kinds[at]), len(ids))
        parts.append((kinds[at], _text(template, ids[at:end])))
        at = end
    return parts


def _text(template: Any, ids: list[int]) -> str:
    pieces, at = [], 0
    while at < len(ids):
        is_image = ids[at] == template.image_id
        end = next(
            (n for n in range(at, len(ids)) if (ids[n] == template.image_id) != is_image), len(ids)
        )
        piece = f"{template.image} x {end - at}" if is_image else ""
        pieces.append(f"[{piece}]" if piece else template.tokenizer.decode(ids[at:end]))
        at = end
    return "".join(pieces)
