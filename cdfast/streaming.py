"""Training data that is streamed: read from the front, in an order that counts alone can restore.

Ranks and their loader workers are *slots*. With F files and S slots, gcd(F, S) groups of slots have
files of their own, and the slots of a group share its records by turns, so that every record
belongs to one slot. A slot goes over its records again and again: the stream has no end, so no rank
waits for another. In each pass it draws an order of its files, and shuffles windows of records.

What batch b of a rank is follows from b: it comes from worker b mod W. So a run resumes by counting
the records that each slot has given out, and passing over them without opening an image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cdfast.data import REASONS, Paths, Roots, listed, shown_names
from cdfast.encoding import Sample, check_answers, encode
from cdfast.images import MAX_PIXELS, DataError
from cdfast.pairs import check_pair_answers, encode_pair
from cdfast.shards import Reference, expand, references

WINDOW = 1000


class StreamedDataset(IterableDataset):
    """Encoded samples of files that are too large to be looked through at the start.

    For a `torch.utils.data.DataLoader` with this batch_size and number of workers, and no sampler.

    Args:
        paths: .jsonl, .parquet and .tar (WebDataset) files, folders of them, or folders of
            `datasets.Dataset.save_to_disk`.
        image_roots: the folders in which image paths are looked up; without any, the folder that
            holds the file.
        processor: the model's Hugging Face processor.
        batch_size: samples of a rank's batch.
        workers: loader processes of each rank, 0 as 1.
        rank, world_size: which of how many processes this one is.
        seed: of the order.
        window: records that are shuffled together; 1: the order of the files.
        max_length, turns, on_error, max_pixels, pairs: see `data.VisionTextDataset`. With
            on_error="skip" the next good record of the window takes the place of a broken one.

    Raises:
        DataError: a file that is absent or cannot be streamed, fewer records than slots, no usable
            record in the first window, or a chat template that does not fit.
        ValueError: an option out of range, an image root that is not a folder.
    """

    def __init__(
        self,
        paths: Paths,
        image_roots: Roots,
        processor: Any,
        *,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        window: int = WINDOW,
        max_length: int | None = None,
        turns: str = "dialogue",
        on_error: str = "raise",
        max_pixels: int | None = MAX_PIXELS,
        pairs: bool = False,
    ):
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        self.files = expand(listed(paths))
        self.names = shown_names(self.files)
        self.roots = tuple(str(root) for root in listed(image_roots))
        for root in self.roots:
            if not Path(root).is_dir():
                raise ValueError(f"image_roots: expected folders that exist, got {root!r}")
        self.processor, self.on_error, self.pairs = processor, on_error, pairs
        self.batch_size, self.workers, self.seed, self.window = batch_size, workers, seed, window
        self.rank, self.world_size = rank, world_size
        self._encoding: dict[str, Any] = {
            "max_length": max_length,
            "turns": turns,
            "max_pixels": max_pixels,
        }
        found = [(file.name, file.stat().st_size if file.is_file() else 0) for file in self.files]
        self._digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
        self._batch = 0
        self._warned: set[str] = set()
        # A row for each worker; shared with it, whose own counters would be lost with it. The last
        # column counts samples that were cut.
        self._counts = torch.zeros(max(workers, 1), len(REASONS) + 1, dtype=torch.int64)
        self._counts.share_memory_()
        self._try_first()

    def made_for(self) -> dict[str, int]:
        """What its loader and its process are to be."""
        return {
            "batch_size": self.batch_size,
            "workers": self.workers,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def order(self) -> dict[str, int | str]:
        """What the order of samples depends on: to be the same on resume."""
        return {
            "batch_size": self.batch_size,
            "workers": max(self.workers, 1),
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle_window": self.window,
            "files": f"{len(self.files)} (names and sizes {self._digest})",
        }

    def begin_at(self, batch: int) -> None:
        """Let the next iteration begin with a rank's batch number `batch`, from 0."""
        self._batch = batch

    @property
    def skipped(self) -> Counter[str]:
        """Times a broken record was replaced in this process's part of the run, by reason."""
        counts = self._counts.sum(0).tolist()
        return Counter({reason: n for reason, n in zip(REASONS, counts) if n})

    def skipped_records(self) -> dict[str, list[str]]:
        """Empty: a warning names the first of each reason, and no list is kept of a stream."""
        return {}

    @property
    def truncated(self) -> int:
        """How many samples were cut to max_length so far."""
        return int(self._counts[:, -1].sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Encoded samples without end, see `encode` and `pairs.encode_pair`.

        Raises:
            DataError: a file that cannot be read; with on_error="raise", a broken record.
            ValueError: a loader with another number of workers.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if workers != max(self.workers, 1):
            raise ValueError(
                f"workers: expected a loader of {self.workers} workers, as the data set was made "
                f"for; got {workers}. Give both the same number."
            )
        # The loader asks its worker 0 first, whatever batch it begins with.
        slot = (self._batch + worker) % workers
        done = len(range(slot, self._batch, workers)) * self.batch_size
        for records, start in self._windows(self.rank * workers + slot, done):
            for n in range(start, len(records)):
                yield self._encoded(records, n, worker)

    def _windows(self, slot: int, done: int) -> Iterator[tuple[list[Reference], int]]:
        """Shuffled windows of a slot, and where to begin in each, behind its first `done` records.

        References cost little, so what is done is counted off by making and dropping them.
        """
        epoch = 0
        while True:
            records, length = self._pass(slot, epoch), 0
            for number in itertools.count():
                several = list(itertools.islice(records, self.window))
                if not several:
                    break
                length += len(several)
                if done >= len(several):
                    done -= len(several)
                    continue
                order = np.random.default_rng((self.seed, 1, slot, epoch, number))
                yield [several[i] for i in order.permutation(len(several))], done
                done = 0
            if not length:
                raise self._too_few()
            # Every pass of a slot is as long as this one.
            epoch += 1 + done // length
            done %= length

    def _pass(self, slot: int, epoch: int) -> Iterator[Reference]:
        """The records of a slot in one pass over the files, before windows are shuffled."""
        slots = self.world_size * max(self.workers, 1)
        groups = math.gcd(len(self.files), slots)
        group, member = slot % groups, slot // groups
        own = np.arange(group, len(self.files), groups)
        # The same for all slots of the group, which then take turns in the same sequence.
        own = np.random.default_rng((self.seed, 0, group, epoch)).permutation(own)
        records = itertools.chain.from_iterable(self._file(int(f)) for f in own)
        return itertools.islice(records, member, None, slots // groups)

    def _file(self, number: int) -> Iterator[Reference]:
        return references(self.files[number], self.names[number])

    def _too_few(self) -> DataError:
        return DataError(
            source=", ".join(self.names[:5]),
            field="data",
            expected=f"records for {self.world_size} processes with {max(self.workers, 1)} workers "
            "each",
            got=f"too few of them in {len(self.files)} files",
            remedy="give fewer --workers, or leave --streaming out for a set this small",
            reason="file unreadable",
        )

    def sample(self, record: Reference) -> Sample:
        """Read a record; its images are not decoded."""
        return record.sample(self.roots, pairs=self.pairs)

    def _encode(self, sample: Sample) -> dict[str, Any]:
        return (encode_pair if self.pairs else encode)(self.processor, sample, **self._encoding)

    def _encoded(self, records: list[Reference], number: int, worker: int) -> dict[str, Any]:
        """Record `number` of a window, or the next good one of it."""
        for offset in range(len(records)):
            record = records[(number + offset) % len(records)]
            try:
                encoded = self._encode(self.sample(record))
            except DataError as error:
                if self.on_error == "raise":
                    raise
                if offset == 0:
                    self._counts[worker, REASONS.index(error.reason)] += 1
                    self._warn(error)
                continue
            self._counts[worker, -1] += int(encoded["truncated"])
            return encoded
        raise self._none_left(records[number])

    def _none_left(self, record: Reference) -> DataError:
        return DataError(
            source=record.place,
            field="records",
            expected=f"one that can be encoded among the {self.window} read together with it",
            got=f"none: {dict(self.skipped)}",
            remedy="correct the records, or run --dry-run to see what they have",
        )

    def _warn(self, error: DataError) -> None:
        # On every rank: each has records of its own.
        if error.reason not in self._warned:
            warnings.warn(
                f"{error.reason}: the next good record is used in place of one: {error}",
                stacklevel=3,
            )
        self._warned.add(error.reason)

    def _first_window(self) -> Iterator[Reference]:
        records = itertools.chain.from_iterable(self._file(f) for f in range(len(self.files)))
        return itertools.islice(records, self.window)

    def first(self) -> Iterator[dict[str, Any]]:
        """The samples among the first `window` records that can be used, in the files' order."""
        for record in self._first_window():
            try:
                yield self._encode(self.sample(record))
            except DataError:
                if self.on_error == "raise":
                    raise

    def _try_first(self) -> None:
        """Encode the first record that can be, and check its labels against its answers."""
        check = check_pair_answers if self.pairs else check_answers
        record = None
        for record in self._first_window():
            try:
                sample = self.sample(record)
                check(self.processor, sample, self._encode(sample))
                return
            except DataError as error:
                if self.on_error == "raise" or error.reason == "chat template":
                    raise
                self._warn(error)
        raise self._none_left(record) if record else self._too_few()
