"""A table and a plot of benchmark results in the terminal, with rich and plotext.

In a terminal with UTF-8 in colour (unless NO_COLOR is set); piped, or without UTF-8, plain ASCII.
Where a package is missing, one line says what to install.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

INSTALL = "pip install 'cdfast[bench]'"
WIDTH, HEIGHT = 80, 24  # where there is no terminal to ask
LARGEST_WIDTH, LARGEST_HEIGHT = 120, 24
SYMBOLS = "ox+*#@%&$="
COLOURS = ("blue+", "orange+", "green+", "magenta+", "cyan+", "red+")
# plotext draws its frame with these.
ASCII_FRAME = str.maketrans("─│┌┐└┘├┤┬┴┼", "-|+++++++++")
MOST_TICKS = 8


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table.

    Args:
        title: above it.
        columns: heads of the columns; the first is of text, the others of numbers.
        rows: cells, one per column; None is "not measured". Where the table is too wide for whole
            words but would not be with rows as columns, it is printed so.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(f"{title}: no table in the terminal, rich is not installed: {INSTALL}")
        return
    plain = _plain()
    width = _size()[0]
    lines = [[_encodable(_cell(cell)) for cell in line] for line in (columns, *rows)]
    turned = [list(line) for line in zip(*lines)]
    if _least_width(lines) > width >= _least_width(turned):
        lines = turned
    whole = _least_width(lines) <= width
    console = Console(
        file=sys.stdout,
        width=width,
        force_terminal=False if plain else None,  # whatever FORCE_COLOR says
        highlight=False,
        emoji=False,
    )
    found = Table(box=box.ASCII if plain else box.SIMPLE_HEAD)
    for i, cells in enumerate(zip(*lines)):
        found.add_column(
            Text(cells[0]),
            justify="left" if i == 0 else "right",
            overflow="fold",
            min_width=_longest_word(cells) if whole else None,
        )
    for line in lines[1:]:
        found.add_row(*map(Text, line))
    console.print(Text(_encodable(title), style="bold"), found, sep="\n")


def _cell(value: Any) -> str:
    return "not measured" if value is None else str(value)


def _longest_word(cells: Sequence[str]) -> int:
    return max(len(word) for cell in cells for word in (cell.split() or [""]))


def _least_width(lines: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table needs, frame included, so that no word is broken."""
    return 1 + sum(3 + _longest_word(column) for column in zip(*lines))


def plot(
    series: dict[str, list[tuple[float, float]]],
    x: str,
    y: str,
    log: bool = True,
    width: int | None = None,
    height: int | None = None,
) -> None:
    """Print a plot of several series over one axis, with a legend below it.

    Args:
        series: name -> points (x, y); points that cannot be drawn (NaN, or not above 0 on a
            logarithmic axis) are left out, and a series without points is named.
        x: what the horizontal axis is.
        y: what the vertical axis is.
        log: both axes are logarithmic.
        width: columns; default: those of the terminal, at most 120, and 80 without one.
        height: lines, without the legend; default: those of the terminal, at most 24.
    """
    try:
        import plotext

        figure = plotext.figure
    except (ImportError, AttributeError) as error:  # plotext 5 has no figure
        reason = str(error).partition("\n")[0]
        print(f"{y} over {x}: no plot in the terminal ({reason}), needs plotext >= 6: {INSTALL}")
        return
    drawn = {
        name: sorted(p for p in points if _drawable(p, log)) for name, points in series.items()
    }
    for name in (name for name, points in drawn.items() if not points):
        print(_encodable(f"{name}: not measured"))
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        print(_encodable(f"{y} over {x}: nothing to plot"))
        return
    plain = _plain()
    columns, lines = _size()
    width = width or columns
    text = _drawing(
        plotext, figure, drawn, (x, y), log, (width, height or lines), "." if plain else "braille"
    ).string(colorless=not _coloured())
    print(_encodable(text.translate(ASCII_FRAME) if plain else text).rstrip("\n"))
    print(_legend(list(drawn), width))


def _drawing(
    plotext: Any,
    figure: Any,
    series: dict[str, list[tuple[float, float]]],
    labels: tuple[str, str],
    log: bool,
    size: tuple[int, int],
    line: str,
) -> Any:
    """plotext's matrix of characters. Logarithms are taken here: its ticks on such axes are not."""
    place = math.log10 if log else float
    plotext.terminal.limit(False, False)
    figure.clear()
    figure.theme("simple")
    figure.plot_size(*size)
    figure.legend(False)
    for i, points in enumerate(series.values()):
        xs, ys = ([place(p[axis]) for p in points] for axis in (0, 1))
        colour = COLOURS[i % len(COLOURS)]
        figure.draw(figure.signal(xs, ys, marker=plotext.marker(line, colour)).lines())
        figure.draw(figure.signal(xs, ys, marker=plotext.marker(_symbol(i), colour)))
    every = [p for points in series.values() for p in points]
    for axis, name in enumerate("xy"):
        values = sorted({p[axis] for p in every})
        at = values if axis == 0 and len(values) <= MOST_TICKS else ticks(values, log)
        figure.ruler(name).ticks([place(v) for v in at], [_tick(v) for v in at])
    figure.title(_encodable(labels[1]))
    figure.label(_encodable(labels[0]), "x")
    return figure.build()


def ticks(values: Sequence[float], log: bool) -> list[float]:
    """At most eight round numbers inside the range of the values, or its two ends."""
    low, high = min(values), max(values)
    found: list[float] = []
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [s * 10.0**e for e in powers for s in steps if low <= s * 10.0**e <= high]
            if len(found) <= MOST_TICKS:
                break
        found = found[:: math.ceil(len(found) / MOST_TICKS) or 1]
    elif high > low:
        step = 10.0 ** math.floor(math.log10(high - low))
        step *= next(f for f in (0.2, 0.5, 1, 2) if (high - low) / (f * step) < MOST_TICKS)
        found = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found if len(found) > 1 else sorted({low, high})


def _tick(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def _symbol(i: int) -> str:
    letters = SYMBOLS + "abcdefghijklmnpqrstuvwyz"
    return letters[i % len(letters)]


def _legend(names: list[str], width: int) -> str:
    """Symbols and names, in as many lines as they need."""
    lines = [""]
    for i, name in enumerate(names):
        entry = _encodable(f"{_symbol(i)} {name}")
        if lines[-1] and len(lines[-1]) + 3 + len(entry) > width:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else "  ") + entry
    return "\n".join(lines)


def _drawable(point: tuple[float, float], log: bool) -> bool:
    return all(v is not None and math.isfinite(v) and (v > 0 or not log) for v in point)


def _size() -> tuple[int, int]:
    """Columns and lines to fill, the prompt's lines and the legend's left free."""
    found = shutil.get_terminal_size((WIDTH, HEIGHT))
    return min(found.columns, LARGEST_WIDTH), max(10, min(found.lines - 3, LARGEST_HEIGHT))


def _plain() -> bool:
    """Whether only ASCII is safe: no terminal, or one that is not UTF-8."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return not (utf8 and sys.stdout.isatty())


def _coloured() -> bool:
    return not _plain() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _encodable(text: str) -> str:
    """The text with "?" for what the output cannot show."""
    encoding = "ascii" if _plain() else "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
