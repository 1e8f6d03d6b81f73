"""Files that are read from the front, record by record: JSONL, Parquet, folders of `datasets`, and
WebDataset tar shards.

A `Reference` is a record that is not read yet: what it costs to have one is small, so that records
can be counted, shuffled and passed over without opening an image.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cdfast.encoding import Sample
from cdfast.images import DataError
from cdfast.records import parsed, printable, record_name, record_sample

SUFFIXES = (".jsonl", ".parquet", ".tar")
# What a tar shard may have beside a record's JSON, as images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Rows that are read at once from a Parquet file.
_ROWS = 64


class Reference(NamedTuple):
    """A record that is not read yet.

    Args:
        folder: that holds its file.
        place: file and number, such as "train-00.jsonl, record 12".
        notes: what else names it, such as its line.
        load: returns the record as plain values.
    """

    folder: str
    place: str
    notes: tuple[str, ...]
    load: Callable[[], Any]

    def sample(self, roots: tuple[str, ...], *, pairs: bool = False) -> Sample:
        """Read the record; its images are not decoded.

        Args:
            roots: the folders in which its images are looked up; without any, its own.
            pairs: read its rejected answer too.

        Raises:
            DataError: the record is broken.
        """
        try:
            record = self.load()
        except (ValueError, RecursionError, tarfile.TarError, OSError) as error:
            raise DataError(
                source=record_name(self.place, self.notes),
                field="record",
                expected="a record that can be read",
                got=f"{type(error).__name__}: {error}",
                remedy="repair it",
            ) from error
        source = record_name(self.place, self.notes, record)
        return record_sample(record, source, None, roots or (self.folder,), pairs=pairs)


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The files to stream from: those named, and those in the folders named, sorted by name.

    A folder written by `datasets.Dataset.save_to_disk` counts as one file.

    Raises:
        DataError: a file that is absent or cannot be streamed, or a folder without any that can.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir() and not (path / "state.json").exists():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise _unusable(path, f"a folder with {', '.join(SUFFIXES)} files", "none of them")
        for file in found:
            if not file.exists():
                raise _unusable(file, "an existing file or folder", "none", "check the path")
            if file.is_file() and file.suffix not in SUFFIXES:
                raise _unusable(
                    file,
                    f"{', '.join(SUFFIXES)} or a folder of them (streaming)",
                    f"{file.name!r}",
                    "write it with one record a line as .jsonl, or leave --streaming out",
                )
            if not (file.is_file() or file.is_dir()):
                raise _unusable(file, "a regular file", "a special file", "copy it into a file")
        files += found
    return files


def _unusable(path: Path, expected: str, got: str, remedy: str = "check the path") -> DataError:
    return DataError(
        source=str(path),
        field="data",
        expected=expected,
        got=got,
        remedy=remedy,
        reason="file unreadable",
    )


def references(path: Path, name: str) -> Iterator[Reference]:
    """The records of one file in its order.

    Args:
        path: of `expand`.
        name: what errors call it.

    Raises:
        DataError: the file cannot be read from here on.
    """
    reader = {".jsonl": _lines, ".parquet": _parquet, ".tar": _tar}.get(path.suffix, _saved)
    try:
        yield from reader(path, name)
    except DataError:
        raise
    # Arrow and tarfile raise errors of many classes on damaged files.
    except Exception as error:
        raise DataError(
            source=name,
            field="file",
            expected="a readable file",
            got=f"{type(error).__name__}: {error}",
            remedy="copy or write it again",
            reason="file unreadable",
        ) from error


def _lines(path: Path, name: str) -> Iterator[Reference]:
    folder, record = str(path.parent), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                yield Reference(
                    folder,
                    f"{name}, record {record}",
                    (f"line {number}",),
                    _line(text),
                )
                record += 1


def _parquet(path: Path, name: str) -> Iterator[Reference]:
    # Only here: importing datasets takes a second.
    import datasets

    rows = datasets.load_dataset(
        "parquet",
        data_files={"train": [glob.escape(str(path))]},  # read as a pattern
        split="train",
        streaming=True,
    )
    record = 0
    # `iter`, not __iter__, which would leave out what it takes for the part of another worker; as
    # Arrow, because images stay encoded then.
    for table in rows.with_format("arrow").iter(batch_size=_ROWS):
        for n in range(len(table)):
            yield Reference(str(path.parent), f"{name}, record {record}", (), _row(table, n))
            record += 1


def _saved(path: Path, name: str) -> Iterator[Reference]:
    import datasets

    rows = datasets.load_from_disk(str(path))
    if isinstance(rows, datasets.DatasetDict):
        raise _unusable(path, "one split", f"{sorted(rows)}", "name the folder of one split")
    table = rows.with_format("arrow")
    for n in range(len(table)):
        yield Reference(str(path.parent), f"{name}, record {n}", (), _saved_row(table, n))


# Functions that make functions: in a loop, all of them would read the row of its last turn.
def _row(table: Any, n: int) -> Callable[[], Any]:
    return lambda: table.slice(n, 1).to_pylist()[0]


def _saved_row(table: Any, n: int) -> Callable[[], Any]:
    return lambda: table[n : n + 1].to_pylist()[0]


def _line(text: bytes) -> Callable[[], Any]:
    return lambda: parsed(text)


def _tar(path: Path, name: str) -> Iterator[Reference]:
    """Members of one key, as WebDataset has them: KEY.json and KEY.jpg or KEY.0.png, KEY.1.png."""
    key, record = "", 0
    members: list[tuple[str, int, int]] = []
    # "r:": compressed shards have no places to come back to.
    with tarfile.open(path, "r:") as file:
        for member in file:
            # Else it keeps the headers of the whole shard.
            file.members = []  # type: ignore[attr-defined]
            if not member.isfile():
                continue
            folder, base = str(PurePosixPath(member.name).parent), PurePosixPath(member.name).name
            stem, _, rest = base.partition(".")
            now = f"{folder}/{stem}"
            if members and now != key:
                yield _tar_record(path, name, record, key, members)
                members, record = [], record + 1
            key = now
            members.append((rest.lower(), member.offset_data, member.size))
    if members:
        yield _tar_record(path, name, record, key, members)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key of sorting that has 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _tar_record(
    path: Path, name: str, number: int, key: str, members: list[tuple[str, int, int]]
) -> Reference:
    def load() -> Any:
        with path.open("rb") as file:

            def content(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            texts = [part[1:] for part in members if part[0].endswith("json")]
            if len(texts) != 1:
                raise ValueError(
                    f"{len(texts)} .json members; expected one, with 'conversations' or 'messages'"
                )
            record = parsed(content(*texts[0]))
            pictures = [part for part in members if f".{part[0]}".endswith(IMAGE_SUFFIXES)]
            pictures.sort(key=lambda part: _natural(part[0]))
            if pictures and isinstance(record, dict):
                # Names in the record are those of before it was packed.
                record = {k: v for k, v in record.items() if k not in ("image", "images")}
                record["images"] = [{"bytes": content(*part[1:])} for part in pictures]
            return record

    notes = (f"key {printable(key.removeprefix('./'))}",)
    return Reference(str(path.parent), f"{name}, record {number}", notes, load)
