"""Progress bars of passes over data: on the standard error, of one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

T = TypeVar("T")
_FROM = 2000


def is_first_rank() -> bool:
    """Whether this is the process that speaks for all, before there is a process group too."""
    return os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a progress bar on the first rank if there are 2000 or more.

    Args:
        items: what is gone through.
        title: before the bar.
        total: how many there are; None: their length.
    """
    sized: Any = items
    total = len(sized) if total is None and isinstance(items, Sized) else total
    if total is None or total < _FROM or not is_first_rank():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, total=total, console=Console(stderr=True), transient=True)
