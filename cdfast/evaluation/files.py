"""Files of published benchmarks: their records, their fields, and what is left out of them.

A benchmark's file is a stranger's input, as training data is: every field is checked before it is
used, image paths stay inside the task's folder, and what does not fit is a `DataError` that names
the file, the record and the field. Records count from 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdfast.images import DataError, ImageFile
from cdfast.records import RecordFile

# Records named for each reason in the results; all are counted.
_NAMED = 20


@dataclass
class LeftOut:
    """Records that cannot be used: an error at once, or counted.

    Args:
        on_error: "raise", or "skip" to leave such records out.

    Attributes:
        counts: records left out, by reason.
        names: the first of them, by reason.
    """

    on_error: str = "raise"
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {self.on_error!r}")

    @contextmanager
    def record(self) -> Iterator[None]:
        """What is inside reads one record; its DataError is raised or counted."""
        try:
            yield
        except DataError as error:
            self.note(error)

    def note(self, error: DataError) -> None:
        """Raise the error, or count its record as left out."""
        if self.on_error == "raise" or error.reason in ("file unreadable", "chat template"):
            raise error
        # An image that cannot be decoded is met again by every model.
        if error.source in self._seen:
            return
        self._seen.add(error.source)
        self.counts[error.reason] += 1
        named = self.names.setdefault(error.reason, [])
        if len(named) < _NAMED:
            named.append(error.source)


@dataclass(frozen=True)
class StoredImage:
    """An image in a column of a table, read when it is needed: a benchmark's may be gigabytes.

    Args:
        records: the table.
        row: from 0.
        column: of `{"bytes": ..., "path": ...}`, as `datasets` writes an image column.
    """

    records: Any
    row: int
    column: str

    def read(self, source: str) -> bytes:
        """Return the encoded image.

        Raises:
            DataError: there is none in that place.
        """
        value = self.records[self.row].get(self.column)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise _broken(source, self.column, "an image column of `datasets` (bytes)", got)
        return content


def _broken(source: str, name: str, expected: str, got: Any) -> DataError:
    return DataError(
        source=source,
        field=name,
        expected=expected,
        got=got,
        remedy="correct the record, or set --on-error skip to leave such records out",
    )


def _unreadable(path: Path, expected: str, got: str, remedy: str) -> DataError:
    return DataError(
        source=f"{path.parent.name}/{path.name}",
        field="file",
        expected=expected,
        got=got,
        remedy=remedy,
        reason="file unreadable",
    )


def open_records(path: Path) -> RecordFile:
    """A .json list, .jsonl or .parquet of records.

    Raises:
        DataError: missing, unreadable, of another kind, or empty.
    """
    if not path.exists():
        remedy = "put the published file there; see docs/evaluation.md for every file's name"
        raise _unreadable(path, f"the file {path.name}", "no such file", remedy)
    return RecordFile(path, (), f"{path.parent.name}/{path.name}")


def records_of(
    file: RecordFile, left_out: LeftOut, *, ids: str = "id"
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Index, name for errors, and content of every record of a file that is an object.

    Args:
        file: of `open_records`.
        left_out: where records that are no valid objects go.
        ids: the field whose value names a record in errors.
    """
    for index in range(len(file.records)):
        with left_out.record():
            try:
                record = file.records[index]
            except (ValueError, RecursionError) as error:
                got = f"{type(error).__name__}: {error}"
                raise _broken(file.source(index), "record", "valid JSON", got) from error
            if not isinstance(record, dict):
                raise _broken(file.source(index), "record", "an object", record)
            yield index, file.source(index, {"id": record.get(ids)}), record


def read_object(path: Path) -> dict[str, Any]:
    """The content of a .json file that is one object, such as SugarCrepe's.

    Raises:
        DataError: missing, unreadable, or not an object with at least one entry.
    """
    return _read_json(path, dict, "a JSON object with at least one record")


def read_ids(path: Path) -> list[Any]:
    """The content of a .json file that is a list of ids.

    Raises:
        DataError: missing, unreadable, or not a list of whole numbers or strings.
    """
    ids = _read_json(path, list, "a JSON list of at least one id")
    for bad in (i for i in ids if isinstance(i, bool) or not isinstance(i, int | str)):
        raise _unreadable(path, "ids that are numbers or strings", repr(bad), "correct the file")
    return ids


def _read_json(path: Path, kind: type, expected: str) -> Any:
    if not path.is_file():
        remedy = "put the published file there; see docs/evaluation.md for every file's name"
        raise _unreadable(path, f"the file {path.name}", "no such file", remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    # ValueError: damaged JSON or UTF-8, or a number of more digits than Python converts.
    except (OSError, ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise _unreadable(path, "valid JSON in UTF-8", got, "download the file again") from error
    if not isinstance(content, kind) or not content:
        got = f"a JSON {type(content).__name__} of {len(content) if content else 0} entries"
        raise _unreadable(path, expected, got, "give the file as it was published")
    return content


def text_of(record: dict[str, Any], name: str, source: str) -> str:
    """A field that must be a text with something in it.

    Raises:
        DataError: missing, no string, or blank.
    """
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _broken(source, name, "a text", _shown(record, name))
    return value.strip()


def id_of(record: dict[str, Any], name: str, source: str) -> str:
    """A field that must be a whole number or a text, as a text.

    Raises:
        DataError: missing, or something else.
    """
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise _broken(source, name, "a number or a text", _shown(record, name))
    return str(value)


def yes_or_no(record: dict[str, Any], name: str, source: str) -> str:
    """A label, as "Yes" or "No".

    Raises:
        DataError: something else.
    """
    value = record.get(name)
    label = value.strip().lower().rstrip(".") if isinstance(value, str) else None
    if label not in ("yes", "no"):
        raise _broken(source, name, "yes or no", _shown(record, name))
    return label.capitalize()


def image_of(record: dict[str, Any], name: str, source: str, folder: Path) -> ImageFile:
    """A field that must name an image below the task's folder; it is not opened.

    Raises:
        DataError: no text.
    """
    return image_file(text_of(record, name, source), folder)


def image_file(name: str, folder: Path, *below: str) -> ImageFile:
    """An image of a task: looked up in its `images`, in the folders `below`, and in its folder."""
    places = [*(folder / place for place in ("images", *below)), folder]
    return ImageFile(name, tuple(str(place) for place in places if place.is_dir()))


def _shown(record: dict[str, Any], name: str) -> str:
    if name in record:
        return repr(record[name])
    return f"no such field (it has {', '.join(map(str, list(record)[:12])) or 'none'})"
