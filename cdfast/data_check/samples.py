"""Records that `--dry-run` looks at: of files read whole, or the first ones of streamed files.

Unlike training it goes on where a file cannot be used, and says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cdfast.data import shown_names
from cdfast.encoding import Sample
from cdfast.images import DataError
from cdfast.records import RecordFile
from cdfast.shards import Reference, expand, references
from cdfast.streaming import records_of_slots, too_few


def missing_roots(roots: Sequence[str]) -> list[str]:
    """A sentence for every image root that is no folder."""
    return [
        f"image_root: expected a folder; got {root!r}. Give --image-root."
        for root in roots
        if not Path(root).is_dir()
    ]


class FileSamples:
    """Records of the files of one data set, opened one by one so that each can fail by itself.

    Args:
        paths: the files.
        roots: image roots; without any, the folder of each file.
        pairs: read the rejected answers too.

    Attributes:
        faults: why files cannot be used, one sentence each.
    """

    def __init__(self, paths: Sequence[str], roots: Sequence[str], pairs: bool = False):
        self.pairs = pairs
        self.files: list[RecordFile] = []
        self.layouts: list[str] = []
        self.faults = missing_roots(roots)
        for path, name in zip(paths, shown_names(paths)):
            try:
                file = RecordFile(path, tuple(roots) or (str(Path(path).parent),), name)
                self.layouts.append(file.layout())
                self.files.append(file)
            except DataError as error:
                self.faults.append(str(error))
        self._starts = np.cumsum([0, *(len(file.records) for file in self.files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, index: int) -> Sample:
        """Return record `index` of all files; its images are not opened."""
        f = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = index - int(self._starts[f])
        return self.files[f].sample(record, self.layouts[f], pairs=self.pairs)


class StreamSamples:
    """The first records of each file of a stream, which is not counted.

    Args:
        paths, roots, pairs: see `FileSamples`; the files are those that can be streamed.
        number: about how many records of all files together.
        processes, workers: of the run, which are to have a record each; see `StreamedDataset`.

    Attributes:
        faults: why files cannot be used, one sentence each.
    """

    def __init__(
        self,
        paths: Sequence[str],
        roots: Sequence[str],
        pairs: bool = False,
        number: int = 2000,
        processes: int = 1,
        workers: int = 1,
    ):
        self.pairs, self.roots = pairs, tuple(roots)
        self.faults = missing_roots(roots)
        self.records: list[Reference] = []
        files: list[Path] = []
        for path in paths:
            try:
                files += expand([path])
            except DataError as error:
                self.faults.append(str(error))
        each = -(-number // max(len(files), 1))
        names, slots = shown_names(files), processes * max(workers, 1)
        counts: list[int] = []
        for file, name in zip(files, names):
            try:
                # So many of one file are enough for all slots, however these share the files.
                found = list(itertools.islice(references(file, name), max(each, slots)))
                self.records += found[:each]
                counts.append(len(found))
            except DataError as error:
                self.faults.append(str(error))
        if not self.faults and min(records_of_slots(counts, slots)) == 0:
            self.faults.append(str(too_few(names, processes, workers)))

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Sample:
        """Read record `index`; its images are not opened."""
        return self.records[index].sample(self.roots, pairs=self.pairs)
