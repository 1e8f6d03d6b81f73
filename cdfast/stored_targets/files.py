"""A teacher's targets on disk: shards of safetensors, read sample by sample where batches are made.

    <folder>/index.json                      what the targets are of, see plan.py
    <folder>/shards/0-00003.safetensors      data set 0, its samples 3 S to 4 S - 1
    <folder>/shards/0-00003.json             samples, size and SHA-256 of the shard, written last

A shard of S samples with R answer rows and M visual tokens in all holds

    source, content    (S,) int64  hashes of a sample's name, and of its tokens and labels
    answer_rows, visual_tokens  (S,) int32  how many of each a sample has
    indices            (R, k) int32         tokens, see top_k.py
    log_probs          (R, k + 1) float16 or float32
    vectors            (M, L) the same      L aligned student layers, see pooled_vectors.py

sample by sample; the last three only where the stages of the data set use them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cdfast_kernels import VisualLayout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from cdfast.aligner import AlignmentTargets
from cdfast.config import ConfigError
from cdfast.distill import TeacherOutput
from cdfast.images import DataError
from cdfast.manifest import describe
from cdfast.storage import staged_file, write_text
from cdfast.stored_targets.pooled_vectors import PooledVectors
from cdfast.stored_targets.top_k import TopK

INDEX_FILE = "index.json"
FORMAT = 1
# Parts of a sample's targets, and the tensors that each consists of.
KL, ALIGNMENT = "kl", "alignment"
_TENSORS = {KL: ("indices", "log_probs"), ALIGNMENT: ("vectors",)}
_PER_SAMPLE = ("source", "content", "answer_rows", "visual_tokens")
# Shards whose header is kept by a process: each holds a file open.
_OPEN_SHARDS = 64
# A sample in memory: its hashes, and where its rows are.
_RECORD = np.dtype(
    [
        ("source", np.int64),
        ("content", np.int64),
        ("shard", np.int32),
        ("answer_rows", np.int32),
        ("visual_tokens", np.int32),
        ("row", np.int64),
        ("token", np.int64),
    ]
)


def source_hash(source: str) -> int:
    """64 bits of a sample's name."""
    digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def content_hash(input_ids: Tensor, labels: Tensor) -> int:
    """64 bits of a sample's tokens and labels (N,), int64: what the rows of its targets go by."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (input_ids, labels):
        digest.update(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


# -- writing ---------------------------------------------------------------------------------------


def shard_path(folder: Path, data_set: int, number: int) -> Path:
    return folder / "shards" / f"{data_set}-{number:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard and then what proves it whole: after a crash it is whole or not there."""
    with staged_file(path) as partial:
        save_file(tensors, partial)
    samples = len(tensors["source"])
    write_text(path.with_suffix(".json"), json.dumps({"samples": samples, **describe(path)}) + "\n")


def shard_problem(path: Path, samples: int, content: bool) -> str | None:
    """Why a shard cannot be used; None if it can.

    Args:
        samples: that it is to hold.
        content: read all of it and compare its hash; else its size alone is looked at.
    """
    try:
        written = json.loads(path.with_suffix(".json").read_text())
        if written["samples"] != samples:
            return f"it has {written['samples']} samples, not {samples}"
        size = path.stat().st_size
        if size != written["size"]:
            return f"it has {size} bytes, not {written['size']}"
        if content and describe(path)["sha256"] != written["sha256"]:
            return "its content is not what was written"
    except FileNotFoundError:
        return "it is not there"
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read: {error}"
    return None


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json holds.

    Raises:
        ConfigError: there is none, or it is not of this format.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["format"]
    except FileNotFoundError as error:
        raise ConfigError(
            f"teacher_targets: expected a folder that cdfast.targets has written; {folder} has no "
            f"{INDEX_FILE}. Run python -m cdfast.targets with the options of this run and "
            f"--targets-dir {folder}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"teacher_targets: {path} cannot be read: {error}") from error
    if found != FORMAT:
        raise ConfigError(
            f"teacher_targets: {path} has format {found}; this version reads {FORMAT}. Make the "
            "targets again."
        )
    return index


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardPlan:
    """How the samples of a data set lie in shards."""

    data_set: int
    samples: int
    per_shard: int

    @property
    def shards(self) -> range:
        return range(-(-self.samples // self.per_shard))

    def indices(self, shard: int) -> range:
        """The samples of a shard, as indices of the data set."""
        first = shard * self.per_shard
        return range(first, min(first + self.per_shard, self.samples))


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: str, pid: int) -> Any:
    # By process: a forked worker must not share its parent's handle.
    return safe_open(path, framework="pt")


class StoredTargets:
    """The targets of one data set, for one stage.

    Args:
        folder: of the targets.
        plan: of the data set's shards.
        parts: of `KL` and `ALIGNMENT`: what the stage's losses need.
        vocabulary: tokens that teacher and student share.
        layers: student layers, in the order of the columns of `vectors`.

    Raises:
        ConfigError: a shard is missing or not whole (its size is looked at; cdfast.targets compares
            hashes).
    """

    def __init__(
        self,
        folder: Path,
        plan: ShardPlan,
        parts: frozenset[str],
        vocabulary: int,
        layers: Sequence[int],
    ):
        self.parts, self.vocabulary, self.layers = parts, vocabulary, tuple(layers)
        self.paths = [shard_path(folder, plan.data_set, n) for n in plan.shards]
        for path, shard in zip(self.paths, plan.shards):
            problem = shard_problem(path, len(plan.indices(shard)), content=False)
            if problem:
                raise ConfigError(
                    f"teacher_targets: {path}: {problem}. Run cdfast.targets again with the same "
                    "options: it keeps what is whole and makes the rest."
                )
        tables = [self._table(number) for number in range(len(self.paths))]
        table = np.concatenate(tables) if tables else np.zeros(0, _RECORD)
        self._table_by_source = table[np.argsort(table["source"], kind="stable")]

    def _table(self, number: int) -> Any:
        """One record per sample of a shard."""
        path = self.paths[number]
        with _read_errors(path), safe_open(str(path), "pt") as shard:
            columns = {name: shard.get_tensor(name).numpy() for name in _PER_SAMPLE}
        table = np.zeros(len(columns["source"]), _RECORD)
        table["shard"] = number
        for name, values in columns.items():
            table[name] = values
        for name, counts in (("row", "answer_rows"), ("token", "visual_tokens")):
            table[name] = np.cumsum(columns[counts], dtype=np.int64) - columns[counts]
        return table

    def read(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """The targets of an encoded sample: `indices`, `log_probs` and `vectors` as far as used.

        Raises:
            DataError: the store does not have the sample, or has one of the same name with other
                tokens or labels.
        """
        source = sample["source"]
        key, table = source_hash(source), self._table_by_source
        at = int(np.searchsorted(table["source"], key))
        if at == len(table) or table["source"][at] != key:
            raise self._refused(source, "the sample among the stored targets", "no such sample")
        record = table[at]
        if record["content"] != content_hash(sample["input_ids"], sample["labels"]):
            raise self._refused(source, "the tokens and labels that the teacher read", "others")
        rows = slice(int(record["row"]), int(record["row"] + record["answer_rows"]))
        tokens = slice(int(record["token"]), int(record["token"] + record["visual_tokens"]))
        number = int(record["shard"])
        with _read_errors(self.paths[number]):
            shard = _opened(str(self.paths[number]), os.getpid())
            where = {KL: rows, ALIGNMENT: tokens}
            return {
                name: shard.get_slice(name)[where[part]]
                for part in sorted(self.parts)
                for name in _TENSORS[part]
            }

    def output(self, stored: Mapping[str, Tensor] | None, layout: VisualLayout) -> TeacherOutput:
        """What a student's step needs, of a batch's `stored_targets`; vectors in float32.

        Raises:
            ValueError: the batch carries none.
        """
        if stored is None:
            raise ValueError(
                "stored_targets: expected them in every training batch; got none. Wrap the "
                "training set in cdfast.stored_targets.files.WithStoredTargets."
            )
        top_k = targets = None
        if KL in self.parts:
            top_k = TopK(stored["indices"], stored["log_probs"], self.vocabulary)
        if ALIGNMENT in self.parts:
            columns = stored["vectors"].float().unbind(1)
            vectors = {n: PooledVectors(c) for n, c in zip(self.layers, columns, strict=True)}
            targets = AlignmentTargets(vectors, layout)
        return TeacherOutput(targets, hidden={}, weight=None, top_k=top_k)

    def _refused(self, source: str, expected: str, got: str) -> DataError:
        return DataError(
            source=source,
            field="stored targets",
            expected=expected,
            got=got,
            remedy="make the targets from the data and options of this run",
        )


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Names the shard in what safetensors and the system say about it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DataError(
            source=str(path),
            field="shard",
            expected="a readable shard of stored targets",
            got=str(error),
            remedy="run cdfast.targets again, which compares hashes and makes it anew",
        ) from error


class WithStoredTargets(Dataset[dict[str, Any]]):
    """Encoded samples, each with its `stored_targets`, read where the sample is encoded."""

    def __init__(self, samples: Any, targets: StoredTargets):
        self.samples, self.targets = samples, targets

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {**sample, "stored_targets": self.targets.read(sample)}
