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
    if isinstance(value, dict):
        return {key: names_only(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_only(item) for item in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value):
        return _name(value)
    return _INSIDE.sub(lambda found: _name(found.group()), value)


def paths_in(value: Any) -> set[str]:
    """The absolute paths that `names_only` cuts."""
    if isinstance(value, dict):
        return set().union(*map(paths_in, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(paths_in, value))
    if not isinstance(value, str):
        return set()
    return {value} if _WHOLE.fullmatch(value) else set(_INSIDE.findall(value))


def without_paths(page: str, paths: set[str]) -> str:
    """A page of HTML in which the given paths are cut to their last part, however it quotes them.

    A page is full of slashes that begin no path, so nothing is guessed here.
    """
    for path in sorted(paths, key=len, reverse=True):
        for form in _quoted(path):
            page = page.replace(form, html.escape(_name(path)))
    return page


def _quoted(path: str) -> Iterator[str]:
    yield path
    yield html.escape(path)
    yield json.dumps(path)[1:-1]


def _name(path: str) -> str:
    """The last part; of a folder of the whole disk, none of it."""
    return (PureWindowsPath(path).name if "\\" in path else Path(path).name) or "..."
