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
from collections.abc import Iterator, Sequence
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


def records_of_slots(counts: Sequence[int], slots: int) -> list[int]:
    """How many records each slot has in a pass over files of so many records each."""
    groups = math.gcd(len(counts), slots)
    return [
        len(range(slot // groups, sum(counts[slot % groups :: groups]), slots // groups))
        for slot in range(slots)
    ]


def too_few(names: Sequence[str], world_size: int, workers: int) -> DataError:
    """The error of files that leave a slot without a record.

    Args:
        names: of the files, as errors call them.
        world_size: processes.
        workers: of each, 0 as 1.
    """
    return DataError(
        source=", ".join(names[:5]),
        field="data",
        expected=f"records for {world_size} processes with {max(workers, 1)} workers each",
        got=f"too few of them in {len(names)} files",
        remedy="give fewer --workers, or leave --streaming out for a set this small",
        reason="file unreadable",
    )


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
            on_error="skip" the next good record of the window takes the place of a broken one; of a
            window without any, the records of the next window that has some.

    Raises:
        DataError: a file that is absent or cannot be streamed, no record at all or none that can
            be used, or a chat template that does not fit.
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
        self._iterated = False
        self._warned: set[str] = set()
        # A row for each worker; shared with it, whose own counters would be lost with it. The last
        # column counts samples that were cut.
        self._counts = torch.zeros(max(workers, 1), len(REASONS) + 1, dtype=torch.int64)
        self._counts.share_memory_()
        self._first = self._try_first()

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
            DataError: a file that cannot be read; fewer records than slots; with on_error="raise",
                a broken record, else a slot that has no usable record in a whole pass.
            ValueError: a loader with another number of workers, or a second iteration of one with
                persistent workers.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if workers != max(self.workers, 1):
            raise ValueError(
                f"workers: expected a loader of {self.workers} workers, as the data set was made "
                f"for; got {workers}. Give both the same number."
            )
        if info is not None and self._iterated:
            # Its copy of the data set is older than what begin_at has set since.
            raise ValueError(
                "persistent_workers: expected False, because a worker that is kept does not learn "
                "where the next iteration begins; got True. Leave persistent_workers out."
            )
        self._iterated = info is not None
        # The loader asks its worker 0 first, whatever batch it begins with.
        slot = (self._batch + worker) % workers
        done = len(range(slot, self._batch, workers)) * self.batch_size
        yield from self._samples(self._windows(self.rank * workers + slot, done), worker)

    def _samples(
        self, windows: Iterator[tuple[int, list[Reference], int]], worker: int
    ) -> Iterator[dict[str, Any]]:
        """A sample for each record of `windows`, whether it can be used or not.

        The windows alone decide which, so that it is the same wherever the stream is resumed.
        """
        # Places in windows without a usable record, each with a reason, and the pass of the first.
        waiting: list[tuple[int, str]] = []
        since = 0
        for epoch, records, start in windows:
            if not waiting:
                since = epoch
            elif epoch > since + 1:  # the pass between them has been looked at as a whole
                part = f"among those of rank {self.rank}, loader worker {worker}"
                raise self._none_left(part, Counter(reason for _, reason in waiting))
            own = range(start, len(records))
            for place, reason in itertools.chain(waiting, ((place, "") for place in own)):
                encoded, passed_over = self._usable(records, place % len(records))
                if encoded is None:
                    waiting += zip(own, passed_over)
                    break
                for replaced in [reason] if reason else passed_over[:1]:
                    self._counts[worker, REASONS.index(replaced)] += 1
                self._counts[worker, -1] += int(encoded["truncated"])
                yield encoded
            else:
                waiting = []

    def _windows(self, slot: int, done: int) -> Iterator[tuple[int, list[Reference], int]]:
        """The windows of a slot behind its first `done` records.

        Each as its pass, its records, shuffled, and where to begin in them. References cost little,
        so what is done is counted off by making and dropping them.
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
                yield epoch, [several[i] for i in order.permutation(len(several))], done
                done = 0
            if not length:
                raise too_few(self.names, self.world_size, self.workers)
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

    def sample(self, record: Reference) -> Sample:
        """Read a record; its images are not decoded."""
        return record.sample(self.roots, pairs=self.pairs)

    def _encode(self, sample: Sample) -> dict[str, Any]:
        return (encode_pair if self.pairs else encode)(self.processor, sample, **self._encoding)

    def _usable(
        self, records: list[Reference], number: int
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Record `number` of a window encoded, or the next good one of it, and why others are not.

        Returns:
            The sample, None if the window has none, and a reason for each record before it.
        """
        passed_over: list[str] = []
        for offset in range(len(records)):
            record = records[(number + offset) % len(records)]
            try:
                return self._encode(self.sample(record)), passed_over
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._warn(error)
                passed_over.append(error.reason)
        return None, passed_over

    def _none_left(self, part: str, reasons: Counter[str]) -> DataError:
        return DataError(
            source=", ".join(self.names[:5]),
            field="records",
            expected=f"one that can be encoded {part}",
            got=f"none: {dict(reasons)}",
            remedy="correct the records, see --dry-run for what they have, or give fewer --workers",
        )

    def _warn(self, error: DataError) -> None:
        # On every rank: each has records of its own.
        if error.reason not in self._warned:
            warnings.warn(
                f"{error.reason}: the next good record is used in place of one: {error}",
                stacklevel=3,
            )
        self._warned.add(error.reason)

    def _in_order(self) -> Iterator[Reference]:
        return itertools.chain.from_iterable(self._file(f) for f in range(len(self.files)))

    def first(self) -> Iterator[dict[str, Any]]:
        """The samples that can be used among `window` records, from the first such on, in order."""
        for record in itertools.islice(self._in_order(), self._first, self._first + self.window):
            try:
                yield self._encode(self.sample(record))
            except DataError:
                if self.on_error == "raise":
                    raise

    def _try_first(self) -> int:
        """Encode the first record that can be, and check its labels against its answers.

        Returns:
            Its number.
        """
        check = check_pair_answers if self.pairs else check_answers
        reasons: Counter[str] = Counter()
        for number, record in enumerate(self._in_order()):
            try:
                sample = self.sample(record)
                check(self.processor, sample, self._encode(sample))
                return number
            except DataError as error:
                if self.on_error == "raise" or error.reason == "chat template":
                    raise
                self._warn(error)
                reasons[error.reason] += 1
        if reasons:
            raise self._none_left("among all", reasons)
        raise too_few(self.names, self.world_size, self.workers)
