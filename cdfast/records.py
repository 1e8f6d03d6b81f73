"""Files of training records, and what a record says: LLaVA's `conversations`, `messages`, or the
`chosen` and `rejected` conversations of preference data.

A record is a stranger's input: every field is checked before it is used, and what does not fit is
a `DataError` that names the file, the record and the field. Records count from 0.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdfast.encoding import Sample
from cdfast.images import DataError, ImageFile

IMAGE_MARK = "<image>"
LAYOUTS = ("conversations", "messages", "chosen")
_LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SPACE = re.compile(r"[ \t\n\r]*")
_ROLES = {role: role for role in ("user", "assistant", "system")}


class Lines:
    """Texts in one buffer: forked loader workers share it, where a list of dicts would be copied.

    Args:
        lines: the texts, as UTF-8.
        numbers: for each its line in the file, from 1; None when the file has no lines of its own.
    """

    def __init__(self, lines: list[bytes], numbers: list[int] | None = None):
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._buffer = np.frombuffer(b"".join(lines), dtype=np.uint8)
        self.numbers = None if numbers is None else np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return parsed(self._buffer[start : self._ends[index]].tobytes())


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are unique: json keeps the last of two without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in an object")
    return made


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _list_items(text: str) -> Iterator[str]:
    """The text of every item of a JSON list, as it stands.

    Raises:
        json.JSONDecodeError: no valid JSON; its position is that in the whole text.
        ValueError: a number of too many digits.
    """
    decoder = json.JSONDecoder()
    at = _behind_space(text, _behind_space(text, 0) + 1)
    is_empty = text[at : at + 1] == "]"
    while not is_empty:
        _, end = decoder.raw_decode(text, at)
        yield text[at:end]
        at = _behind_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']' behind a record", text, at)
        at = _behind_space(text, at + 1)
    end = _behind_space(text, at + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


class Table:
    """Rows of an Arrow data set as plain Python values; images stay as they are stored, encoded.

    Args:
        rows: a `datasets.Dataset`.
    """

    numbers = None

    def __init__(self, rows: Any):
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index : index + 1].to_pylist()[0]


class RecordFile:
    """One file (or saved data set folder) of records.

    Args:
        path: .json (a list), .jsonl, .parquet, or a folder of `datasets.Dataset.save_to_disk`.
        roots: the folders in which its images are looked up, in order.
        name: what errors call it.

    Raises:
        DataError: the file is missing, unreadable, of another kind, not valid JSON, or empty.
    """

    def __init__(self, path: str | Path, roots: tuple[str, ...], name: str):
        self.path, self.roots, self.name = Path(path), roots, name
        self.records = self._read()
        if not len(self.records):
            raise self._unreadable("at least one record", "none", "give a file with records")

    def _unreadable(
        self, expected: str, got: str, remedy: str, line: int | None = None
    ) -> DataError:
        return DataError(
            source=self.name if line is None else f"{self.name}, line {line}",
            field="file",
            expected=expected,
            got=got,
            remedy=remedy,
            reason="file unreadable",
        )

    def _read(self) -> Lines | Table:
        suffix = self.path.suffix.lower()
        if not self.path.exists():
            raise self._unreadable("an existing file", f"{str(self.path)!r}", "check the path")
        if not (self.path.is_file() or self.path.is_dir()):
            # Reading a pipe or a device may never end.
            raise self._unreadable(
                "a regular file", f"{str(self.path)!r}, a special file", "copy it into a file"
            )
        try:
            if self.path.is_dir() or suffix == ".parquet":
                return self._read_table()
            if suffix == ".jsonl":
                return self._read_lines()
            if suffix == ".json":
                return self._read_list()
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise self._unreadable(
                "a readable file in UTF-8", f"{type(error).__name__}: {error}", "repair the file"
            ) from error
        raise self._unreadable(
            ".json, .jsonl, .parquet, or a folder of save_to_disk",
            f"{self.path.name!r}",
            "convert it, or correct its name",
        )

    def _read_list(self) -> Lines:
        text = self.path.read_text(encoding="utf-8-sig")
        items: list[bytes] = []
        try:
            if not text.startswith("[", _behind_space(text, 0)):
                got = type(json.loads(text)).__name__
                raise self._unreadable(
                    "a list of records",
                    f"a JSON {got}",
                    "put the records into a list, or name a file of one record a line .jsonl",
                )
            for item in _list_items(text):
                items.append(item.encode())
        except json.JSONDecodeError as error:
            raise self._unreadable(
                "valid JSON",
                f"{error.msg} (column {error.colno})",
                "repair it, or name it .jsonl if it has one record a line",
                error.lineno,
            ) from error
        except DataError:
            raise
        # ValueError: a number of more digits than Python converts.
        except (RecursionError, ValueError) as error:
            raise self._unreadable(
                "valid JSON",
                f"record {len(items)}: {type(error).__name__}: {error}",
                "correct or remove the record",
            ) from error
        return Lines(items)

    def _read_lines(self) -> Lines:
        lines, numbers = [], []
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if line:
                    lines.append(line)
                    numbers.append(number)
        return Lines(lines, numbers)

    def _read_table(self) -> Table:
        # Only here: importing datasets takes a second.
        import datasets

        try:
            if self.path.is_dir():
                rows = datasets.load_from_disk(str(self.path))
            else:
                # It is read as a pattern, which may match other files.
                rows = datasets.Dataset.from_parquet(glob.escape(str(self.path)))
        except Exception as error:
            raise self._unreadable(
                "a data set that `datasets` can open",
                f"{type(error).__name__}: {error}",
                "save it again",
            ) from error
        if isinstance(rows, datasets.DatasetDict):
            raise self._unreadable(
                "one split", f"the splits {sorted(rows)}", "name the folder of one split"
            )
        return Table(rows)

    def source(self, index: int, record: Any = None) -> str:
        """Return the name of a record for errors, with its line and id where it has them."""
        numbers = self.records.numbers
        notes = [] if numbers is None else [f"line {numbers[index]}"]
        return record_name(f"{self.name}, record {index}", notes, record)

    def layout(self) -> str:
        """Return one of `LAYOUTS`: what its first record that has one of them has.

        Raises:
            DataError: no record has any.
        """
        for index in range(len(self.records)):
            try:
                record = self.records[index]
            except (ValueError, RecursionError):
                continue
            found = [name for name in LAYOUTS if isinstance(record, dict) and name in record]
            if found:
                return found[0]
        raise self._unreadable(
            "records with 'conversations' (LLaVA), 'messages', or 'chosen' and 'rejected'",
            "none of them in any record",
            "convert the file to one of these layouts",
        )

    def sample(self, index: int, layout: str, *, pairs: bool = False) -> Sample:
        """Return a record as a sample; its images are not opened.

        Args:
            index: from 0.
            layout: one of `LAYOUTS`.
            pairs: read its `rejected` too, where it has it; else it is not looked at.

        Raises:
            DataError: the record is broken.
        """
        try:
            record = self.records[index]
        except (ValueError, RecursionError) as error:
            got = f"{type(error).__name__}: {error}"
            raise _broken(self.source(index), "record", "valid JSON", got, "repair it") from error
        return record_sample(record, self.source(index, record), layout, self.roots, pairs=pairs)


def parsed(line: bytes) -> Any:
    """The record of a JSON text.

    Raises:
        ValueError: no valid JSON in UTF-8, or a key that stands twice in an object.
        RecursionError: nested too deep.
    """
    return json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats)


def record_sample(
    record: Any,
    source: str,
    layout: str | None,
    roots: tuple[str, ...],
    *,
    pairs: bool = False,
) -> Sample:
    """What a record says, checked; its images are not opened.

    Args:
        record: as it was parsed.
        source: its name in errors.
        layout: one of `LAYOUTS`; None: the first of them that it has.
        roots: the folders in which its images are looked up, in order.
        pairs: read its `rejected` too, where it has it; else it is not looked at.

    Raises:
        DataError: the record is broken.
    """
    if not isinstance(record, dict):
        raise _broken(source, "record", "an object", record, "remove it")
    if layout is None:
        found = [name for name in LAYOUTS if record.get(name) is not None]
        if not found:
            expected = "'conversations' (LLaVA), 'messages', or 'chosen' and 'rejected'"
            raise _broken(source, "record", expected, sorted(record), "correct or remove it")
        layout = found[0]
    messages, inline = _conversation(record, layout, source)
    _check_order(messages, layout, source)
    images = _images(record, inline, roots, source)
    marks = sum(part["type"] == "image" for m in messages for part in m["content"])
    if marks != len(images):
        kind = f"{IMAGE_MARK} marks" if layout == "conversations" else "image parts"
        raise _broken(
            source,
            "image",
            f"as many images as {kind}",
            f"{len(images)} images and {marks} {kind}",
            f"add or remove {kind} or images so that they match",
        )
    rejected = _rejected(record, layout, messages, source) if pairs else None
    return Sample(messages, images, source, rejected)


def record_name(place: str, notes: Sequence[str], record: Any = None) -> str:
    """The name of a record for errors: its place, notes, and its id where it has one."""
    notes = [*notes]
    if isinstance(record, dict) and isinstance(record.get("id"), str | int):
        notes.append(f"id {printable(str(record['id'])[:80])}")
    return place + (f" ({', '.join(notes)})" if notes else "")


def printable(text: str) -> str:
    """`text` without what would break a line or steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _broken(source: str, field: str, expected: str, got: Any, remedy: str) -> DataError:
    return DataError(source=source, field=field, expected=expected, got=got, remedy=remedy)


def _turns(record: dict, field: str, source: str) -> Iterator[tuple[str, dict]]:
    turns = record.get(field)
    if not isinstance(turns, list) or not turns:
        raise _broken(source, field, "a list of turns", turns, "correct or remove the record")
    for n, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _broken(source, f"{field}[{n}]", "an object", turn, "correct the turn")
        yield f"{field}[{n}]", turn


def _role(turn: dict, key: str, roles: dict[str, str], where: str, source: str) -> str:
    role = turn.get(key)
    if not isinstance(role, str) or role not in roles:
        expected = f"one of {', '.join(roles)}"
        raise _broken(source, f"{where}.{key}", expected, role, "correct the turn")
    return roles[role]


def split_marks(text: str) -> list[dict]:
    """Split a text at its `<image>` marks into parts, without the one newline beside a mark.

    Args:
        text: such as `"<image>\\nWhat is this?"` or `"What is this?\\n<image>"`.

    Returns:
        Image and text parts in the text's order; blank text between marks is left out.
    """
    pieces = text.split(IMAGE_MARK)
    parts: list[dict] = []
    for n, piece in enumerate(pieces):
        if n:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if n < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _conversation(record: dict, field: str, source: str) -> tuple[list[dict], list[Any]]:
    """A record's turns as messages, and the images that stand in them.

    `chosen` and `rejected` may be in either of the two styles.
    """
    turns = record.get(field)
    first = turns[0] if isinstance(turns, list) and turns else None
    if field == "conversations" or (
        field != "messages" and isinstance(first, dict) and "from" in first
    ):
        return _llava_messages(record, field, source), []
    return _messages(record, field, source)


def _rejected(record: dict, layout: str, messages: list[dict], source: str) -> str | None:
    """The text of the last turn's rejected answer; None where the record has none."""
    value = record.get("rejected")
    if value is None:
        return None
    if layout == "chosen":
        turns, _ = _conversation(record, "rejected", source)
        _check_order(turns, "rejected", source)
        if turns[:-1] != messages[:-1]:
            expected = "the turns of 'chosen' before its last answer"
            raise _broken(source, "rejected", expected, "others", "correct or remove the record")
        parts = turns[-1]["content"]
    elif isinstance(value, str):
        parts = split_marks(value)
    elif isinstance(value, list):
        parts = [_part(part, f"rejected[{n}]", source)[0] for n, part in enumerate(value)]
    else:
        expected = "a string or a list of text parts"
        raise _broken(source, "rejected", expected, value, "correct the answer")
    if any(part["type"] == "image" for part in parts):
        raise _broken(source, "rejected", "text", "an image", "move the image to the question")
    return "".join(part["text"] for part in parts)


def _llava_messages(record: dict, field: str, source: str) -> list[dict]:
    messages = []
    for where, turn in _turns(record, field, source):
        role = _role(turn, "from", _LLAVA_ROLES, where, source)
        value = turn.get("value")
        if not isinstance(value, str):
            raise _broken(source, f"{where}.value", "a string", value, "correct the turn")
        messages.append({"role": role, "content": split_marks(value)})
    return messages


def _messages(record: dict, field: str, source: str) -> tuple[list[dict], list[Any]]:
    messages: list[dict] = []
    inline: list[Any] = []
    for where, turn in _turns(record, field, source):
        role = _role(turn, "role", _ROLES, where, source)
        content = turn.get("content")
        if isinstance(content, str):
            parts = split_marks(content)
        elif isinstance(content, list):
            parts = []
            for n, part in enumerate(content):
                clean, image = _part(part, f"{where}.content[{n}]", source)
                parts.append(clean)
                inline += image
        else:
            expected = "a string or a list of parts"
            raise _broken(source, f"{where}.content", expected, content, "correct the turn")
        messages.append({"role": role, "content": parts})
    return messages, inline


def _part(part: Any, where: str, source: str) -> tuple[dict, list[Any]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}, []
    if kind in ("image", "image_url"):
        names = ("image", "path", "url", "image_url")
        given = [part[name] for name in names if part.get(name) is not None]
        # {"type": "image_url", "image_url": {"url": ...}} is another service's spelling.
        given = [g["url"] if isinstance(g, dict) and "url" in g else g for g in given]
        return {"type": "image"}, given[:1]
    expected = '{"type": "image"} or {"type": "text", "text": a string}'
    raise _broken(source, where, expected, part, "correct the part")


def _check_order(messages: list[dict], layout: str, source: str) -> None:
    roles = [message["role"] for message in messages]
    system = roles[:1] == ["system"]
    turns = roles[system:]
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise _broken(
            source,
            layout,
            "an optional system turn, then user and assistant in turn, the assistant last",
            " ".join(roles),
            "correct or remove the record",
        )
    for n, message in enumerate(messages):
        where = f"{layout}[{n}]"
        if not message["content"] or (
            message["role"] == "assistant" and not any(_says(part) for part in message["content"])
        ):
            got = "an empty one"
            raise _broken(
                source,
                where,
                f"a {message['role']} turn that says something",
                got,
                "remove the turn",
            )
        if message["role"] != "user" and any(p["type"] == "image" for p in message["content"]):
            got = f"one in a turn of {message['role']}"
            raise _broken(source, where, "images in the user's turns", got, "move the image")


def _says(part: dict) -> bool:
    return part["type"] == "text" and bool(part["text"].strip())


def _images(record: dict, inline: list[Any], roots: tuple[str, ...], source: str) -> tuple:
    fields = [name for name in ("image", "images") if record.get(name) is not None]
    if len(fields) == 2:
        raise _broken(source, "image", "'image' or 'images'", "both", "remove one of them")
    field = fields[0] if fields else None
    given = [] if field is None else record[field]
    given = given if isinstance(given, list) else [given]
    if given and inline:
        raise _broken(
            source, "images", "images in the record or in its parts", "both", "remove one of them"
        )
    images: list[Any] = []
    for n, image in enumerate(given or inline):
        # A `datasets` image column: {"bytes": ..., "path": ...}.
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
            images.append(image["bytes"])
            continue
        name = image.get("path") if isinstance(image, dict) else image
        if not isinstance(name, str):
            where = f"{field or 'image part'}[{n}]"
            expected = "a path relative to image_root, or an image column of `datasets`"
            raise _broken(source, where, expected, image, "correct or remove the record")
        images.append(ImageFile(name, roots))
    return tuple(images)
