"""Packing: samples of unequal lengths in rows without padding, and which samples share a row.

A row is what one process takes in one forward pass: a single token axis of at most `capacity`
tokens, on which samples follow each other and see only themselves. How many rows an epoch has is
fixed by the lengths alone, so that Trainer can count steps before the first.

    fill = tokens of all samples / (rows x capacity)
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import seed_worker

from cdfast.collator import check_packable_samples
from cdfast.progress import progress

# Lengths are rounded up to this share of their mean, and samples of one rounded length change
# places from epoch to epoch. It costs half of it, under 1% of a row.
_CLASSES = 64
# Best-fit is taken where it needs less than this share of the rows.
_BEST_FIT_FROM = 0.98
# Models whose packed batches are tested against padded ones. Others may count positions in more
# than one dimension (Qwen2.5-VL, Qwen3-VL), or see images in both directions.
FAMILIES = (
    "llava",
    "cdfast_llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "smolvlm",
    "idefics3",
)


def check_packable(model: PreTrainedModel) -> None:
    """Refuse a model that packed batches are not known to be right for.

    Raises:
        ValueError: its family; which are known.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"packing: expected a model of the kinds {', '.join(FAMILIES)}, whose packed batches "
            f"are tested; got {kind!r}, whose positions or image tensors may not fit several "
            "samples in a row. Leave packing out."
        )


class PackedRows(Sampler[list[int]]):
    """A batch sampler of packed rows: every sample once in an epoch, in rows of `capacity` tokens.

    From long to short, each sample goes to the row that is emptiest so far, of as few rows as this
    allows. So all rows hold about as many tokens, long samples and short ones, and ranks wait for
    each other little. Where rows hold few samples it leaves gaps: if best-fit (the fullest row that
    has the room) needs under 98% of the rows, it is taken; with many samples a row it would put
    those of one length together. Then the rows are shuffled. Hundreds of thousands of samples take
    seconds.

    Args:
        lengths: tokens of each sample.
        capacity: the most tokens of a row.
        seed: with the epoch it decides the order.
        processes: the number of rows is a multiple of it, so that all ranks take equally many.
        names: index -> what errors call a sample.

    Raises:
        ValueError: a sample longer than a row; too few samples for the processes.
    """

    # What accelerate's BatchSamplerShard, which deals the rows to ranks in turn, asks for: rows
    # differ in samples, and none may be dropped.
    batch_size = None
    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        capacity: int,
        *,
        seed: int = 0,
        processes: int = 1,
        names: Callable[[int], str] = "sample {}".format,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.capacity, self.seed, self.epoch = capacity, seed, 0
        if len(self.lengths) < processes:
            raise ValueError(
                f"packing: expected a sample for each of {processes} processes at least; got "
                f"{len(self.lengths)}. Use fewer processes, or more data."
            )
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > capacity:
            raise ValueError(
                f"pack_tokens: expected rows that hold every sample, of at least "
                f"{self.lengths[longest]} tokens; got {capacity} (pack_tokens x batch size), and "
                f"{names(longest)} is longer. Raise pack_tokens, or lower max_length."
            )
        unit = max(1, int(self.lengths.mean()) // _CLASSES)
        # What the deal goes by: at least the length, at most a row.
        self._sizes = np.minimum(-(-self.lengths // unit) * unit, capacity)
        sizes = np.sort(self._sizes)[::-1].tolist()
        tight = _multiple(len(_best_fit(sizes, capacity)), processes)
        if tight > len(sizes):
            raise ValueError(
                f"packing: expected samples that share rows, so that {processes} processes get "
                f"equally many; got {len(sizes)} samples, nearly all of which need a row of "
                f"{capacity} tokens for themselves. Raise pack_tokens."
            )
        most = min(int(tight / _BEST_FIT_FROM), len(sizes))
        even = self._fewest(sizes, processes, most)
        self._best_fit = even is None
        self._rows = even or tight

    def _fewest(self, sizes: list[int], processes: int, most: int) -> int | None:
        """The smallest multiple of `processes` rows that `_deal` overflows none of, by halving.

        None if that is more than `most`.
        """
        low, high = -(-sum(sizes) // (self.capacity * processes)), most // processes
        if high < low or _deal(sizes, high * processes, self.capacity) is None:
            return None
        while low < high:
            middle = (low + high) // 2
            if _deal(sizes, middle * processes, self.capacity) is None:
                low = middle + 1
            else:
                high = middle
        return high * processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self._sizes))
        # Stable, so that samples of one size stay in random order.
        order = order[np.argsort(-self._sizes[order], kind="stable")]
        sizes = self._sizes[order].tolist()
        rows = None if self._best_fit else _deal(sizes, self._rows, self.capacity)
        if rows is None:
            rows = _split(_best_fit(sizes, self.capacity), self._rows)
        samples = order.tolist()
        for row in random.permutation(len(rows)).tolist():
            yield [samples[place] for place in rows[row]]

    @property
    def fill(self) -> float:
        """Tokens of all samples over those that the rows could hold."""
        return float(self.lengths.sum() / (self._rows * self.capacity))

    def padded_fill(self) -> float:
        """Tokens over places of padded batches of as many samples as a row has, in random order."""
        size = max(1, round(len(self.lengths) / self._rows))
        order = np.random.default_rng(self.seed).permutation(self.lengths)
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        return float(self.lengths.sum() / sum(len(b) * b.max() for b in batches))

    def summary(self) -> dict[str, float]:
        """Numbers for results and for `describe_rows`."""
        return {
            "samples": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "rows": self._rows,
            "capacity": self.capacity,
            "fill": self.fill,
            "padded_fill": self.padded_fill(),
        }


def describe_rows(summary: dict[str, float]) -> str:
    """One line: how many samples, how many rows, how full."""
    return (
        f"packing: {summary['samples']:,} samples of {summary['tokens']:,} tokens in "
        f"{summary['rows']:,} rows of at most {summary['capacity']:,}, "
        f"{summary['samples'] / summary['rows']:.1f} samples a row; {summary['fill']:.1%} of the "
        f"rows is filled (in padded batches of as many: {summary['padded_fill']:.1%})"
    )


def _deal(sizes: list[int], rows: int, capacity: int) -> list[list[int]] | None:
    """Places of `sizes`, from large to small, by row, each to the emptiest; None if one overflows.

    Which row gets a size depends on the sizes alone.
    """
    emptiest = [(0, row) for row in range(rows)]
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for place, size in enumerate(sizes):
        used, row = emptiest[0]
        if used + size > capacity:
            return None
        heapq.heapreplace(emptiest, (used + size, row))
        dealt[row].append(place)
    return dealt


def _best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Places of `sizes`, from large to small, by row, each to the fullest that has the room."""
    smallest = min(sizes)
    rows: list[list[int]] = []
    # Of rows that can take one more: their rooms, ascending, and the rows that have each.
    rooms: list[int] = []
    having: dict[int, list[int]] = {}
    for place, size in enumerate(sizes):
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = having[room].pop()
            if not having[room]:
                del having[rooms.pop(at)]
        rows[row].append(place)
        left = room - size
        if left in having:
            having[left].append(row)
        elif left >= smallest:
            bisect.insort(rooms, left)
            having[left] = [row]
    return rows


def _split(rows: list[list[int]], count: int) -> list[list[int]]:
    """`rows`, of which those with most samples are halved until there are `count`."""
    while len(rows) < count:
        row = rows.pop(max(range(len(rows)), key=lambda n: len(rows[n])))
        rows += [row[::2], row[1::2]]
    return rows


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def row_loader(
    dataset: Dataset[Any], rows: PackedRows, collate: Callable[[list[Any]], Any], args: Any
) -> DataLoader:
    """A data loader of packed rows with the data loader options of TrainingArguments."""
    names = ("pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context")
    options = {name: getattr(args, f"dataloader_{name}") for name in names}
    return DataLoader(
        dataset,
        batch_sampler=rows,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        ),
        **{n: value for n, value in options.items() if value is not None},
    )


def sample_lengths(dataset: Any) -> np.ndarray:
    """int64 (len,) tokens of each sample: `dataset.lengths()` where it has that, else by encoding.

    Raises:
        ValueError: the data set has no length; a sample is a pair of answers, or has segments.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "packing: expected a data set whose samples can be counted and measured before the "
            f"first step; got {type(dataset).__name__}, which is streamed. Leave packing out."
        )
    measure = getattr(dataset, "lengths", None)
    if measure is not None:
        return np.asarray(measure(), dtype=np.int64)
    indices = progress(range(len(dataset)), "Measuring samples (images are decoded)")
    return np.array([_length(dataset[index]) for index in indices], dtype=np.int64)


def sample_name(dataset: Any, index: int) -> str:
    """What errors call a sample: its source where the data set knows it without decoding."""
    sample = getattr(dataset, "sample", None)
    return f"sample {index}" if sample is None else str(sample(index).source)


def _length(sample: dict[str, Any]) -> int:
    check_packable_samples([sample])
    return len(sample["input_ids"])
