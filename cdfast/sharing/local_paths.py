"""Paths of this machine, found in results and replaced by the names they end with."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

_BEGIN = r"(?:~[\w-]*/|/|[A-Za-z]:[\\/]|\\\\)"
# Inside a text: not after what makes it a part of a URL, a tag or a fraction.
_INSIDE = re.compile(rf"(?<![\w.:/<~\\-]){_BEGIN}[^\s\"'<>|,;)\]]+")
_WHOLE = re.compile(rf"{_BEGIN}[^\n]*")


def names_only(value: Any) -> Any:
    """A copy of plain values in which absolute paths are cut to their last part."""
    return _cut(value, _whole_paths(value))


def paths_in(value: Any) -> set[str]:
    """The absolute paths that `names_only` cuts."""
    found = set(_whole_paths(value))
    for text in _texts(value):
        if text not in found:
            found.update(_INSIDE.findall(text))
    return found


def without_paths(page: str, paths: set[str]) -> str:
    """A page of HTML in which the given paths are cut to their last part, however it quotes them.

    A page is full of slashes that begin no path, so nothing is guessed here.
    """
    for path in sorted(paths, key=len, reverse=True):
        for form in {path, html.escape(path), json.dumps(path)[1:-1]}:
            page = _replaced(page, form, html.escape(_name(path)))
    return page


def _cut(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(item, known) for item in value]
    if not isinstance(value, str):
        return value
    if value in known:
        return _name(value)
    # A path with spaces ends inside a text only where it is known from elsewhere.
    for path in known:
        value = _replaced(value, path, _name(path))
    return _INSIDE.sub(lambda found: _name(found.group()), value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _whole_paths(value: Any) -> list[str]:
    """Texts that are a path and nothing else, the longest first."""
    found = {text for text in _texts(value) if _WHOLE.fullmatch(text)}
    return sorted(found, key=len, reverse=True)


def _replaced(text: str, path: str, name: str) -> str:
    return re.sub(rf"(?<![\w.:/~\\-]){re.escape(path)}(?![\w-])", lambda _: name, text)


def _name(path: str) -> str:
    """The last part; of a folder of the whole disk, none of it."""
    return (PureWindowsPath(path).name if "\\" in path else Path(path).name) or "..."
