"""The results over the months: python -m benchmarks.page [--results DIR] [--check]

Writes, from every result file of the folder with a headline,

    index.html   one page that opens offline: per theme and device the numbers of each month, their
                 change and trend, what else changed, versions, device and command
    README.md    the newest numbers per theme and device, for who browses the folder

--check writes nothing and exits with 1 if either is not what the files say.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.history import (
    BrokenResult,
    Result,
    change,
    differences,
    groups,
    load,
    machine,
    on_the_newest_machine,
    said,
    shown,
)
from benchmarks.result_files import RESULTS, table

REMEDY = "run python -m benchmarks.page"
BETTER = {"less": "less is better", "more": "more is better"}
TREND_WIDTH, TREND_HEIGHT, TREND_EDGE = 120, 32, 4
CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fafafa; --line: #cfcfcf;
  --soft: #efefef; --link: #0b57a4; --caveat: #fff4d6; --edge: #b07a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --page: #16181b; --line: #44484e;
  --soft: #23262b; --link: #8ec5ff; --caveat: #352b10; --edge: #e0ad3c; } }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; max-width: 64rem; padding: 1rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
a { color: var(--link); } nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  list-style: none; padding: 0; }
.caveat { background: var(--caveat); border-left: .3rem solid var(--edge); padding: .5rem 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; font-weight: 600; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left;
  vertical-align: top; } thead th { background: var(--soft); white-space: nowrap; }
td { white-space: nowrap; } tbody th { font-weight: 500; min-width: 8rem; }
td.number, th.number { text-align: right; } svg { display: block; color: var(--link); }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; }
code { font-size: .85rem; background: var(--soft); }
summary { cursor: pointer; padding: .25rem 0; }
:focus-visible { outline: .15rem solid var(--link); outline-offset: .1rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>cdfast: benchmark results</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>cdfast: benchmark results over time</h1>
<p>Made from the JSON files of this folder by <code>python -m benchmarks.page</code>. Numbers of
different devices are never compared. A change is against the measurement before; what a repeat
alone changes is not taken off.</p>
{navigation}
</header>
<main>
{body}
</main>
</body>
</html>
"""


def text(value: Any) -> str:
    """`value` as HTML text, safe in attributes too."""
    return html.escape(str(value))


def html_page(results: Sequence[Result], left_out: Sequence[str]) -> str:
    """index.html"""
    links, sections = [], []
    for i, ((theme, device), runs) in enumerate(groups(list(results)).items()):
        links.append(f'<li><a href="#results-{i}">{text(f"{theme}, {device}")}</a></li>')
        sections.append(_section(f"results-{i}", f"{theme}, {device}", runs))
    if not results:
        sections.append("<p>No results yet.</p>")
    if left_out:
        lines = "".join(f"<li>{text(line)}</li>" for line in left_out)
        sections.append(
            '<section aria-labelledby="left-out"><h2 id="left-out">Files not shown</h2>'
            f"<ul>{lines}</ul></section>"
        )
    navigation = f'<nav aria-label="Results"><ul>{"".join(links)}</ul></nav>' if links else ""
    return PAGE.format(css=CSS, navigation=navigation, body="\n".join(sections))


def _section(anchor: str, name: str, runs: list[Result]) -> str:
    """One theme on one device, newest first."""
    newest = runs[-1]
    parts = [
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{text(name)}</h2>',
        f"<p>Newest: {text(newest.date)}, {text(machine(newest.environment))}.</p>",
    ]
    if newest.environment.get("interpreter"):
        parts.append(
            '<p class="caveat">Triton ran in its interpreter: no time here is that of a GPU.</p>'
        )
    if len(runs) > 1 and (lines := differences(runs[-2], newest)):
        items = "".join(f"<li>{text(line)}</li>" for line in lines)
        parts.append(
            f'<div class="caveat"><p>Besides the numbers, since {text(runs[-2].date)}:</p>'
            f"<ul>{items}</ul></div>"
        )
    parts.append(_numbers(name, runs))
    parts.append("<h3>How it was measured</h3>")
    before = [None, *runs]
    parts += [_run(run, old, run is newest) for run, old in reversed(list(zip(runs, before)))]
    return "\n".join(parts) + "\n</section>"


def _numbers(name: str, runs: list[Result]) -> str:
    """The headline's numbers over the months: newest, change, trend, then the older ones."""
    newest, older = runs[-1], runs[-2::-1]
    names = list(dict.fromkeys(n for run in (newest, *older) for n in run.headline))
    if not names:
        return "<p>These files have no headline numbers.</p>"
    heads = [("what", ""), (newest.date, "number"), ("unit", "")]
    heads += [("change", ""), ("trend", "")] if older else []
    heads += [(run.date, "number") for run in older]
    rows = []
    for row in names:
        entry = next(run.headline[row] for run in (newest, *older) if row in run.headline)
        unit = ", ".join(filter(None, (entry["unit"], BETTER[entry["better"]])))
        cells = [_cell(newest, row), f"<td>{text(unit)}</td>"]
        if older:
            changed = (
                change(older[0], newest, row) if row in newest.headline else "not measured in both"
            )
            cells += [f"<td>{text(changed)}</td>", f"<td>{_trend(row, runs)}</td>"]
        cells += [_cell(run, row) for run in older]
        rows.append(f'<tr><th scope="row">{text(row)}</th>{"".join(cells)}</tr>')
    return _table(f"{name}: numbers over time", heads, rows)


def _cell(run: Result, row: str) -> str:
    return f'<td class="number">{text(shown(run.value(row)))}</td>'


def _table(caption: str, heads: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    top = "".join(
        f'<th scope="col"{f" class={kind}" if kind else ""}>{text(head)}</th>'
        for head, kind in heads
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead>\n"
        "<tbody>" + "\n".join(rows) + "</tbody></table></div>"
    )


def _trend(row: str, runs: list[Result]) -> str:
    """A line over the dates of the newest machine; words where there are not two values."""
    entry = runs[-1].headline.get(row)
    points = [
        (run.date, value)
        for run in on_the_newest_machine(runs)
        if (value := run.value(row)) is not None
        and entry
        and run.headline[row]["unit"] == entry["unit"]
    ]
    if len(points) < 2:
        return "one value on this machine" if points else "not measured"
    values = [value for _, value in points]
    low, span = min(values), (max(values) - min(values)) or 1.0
    step = (TREND_WIDTH - 2 * TREND_EDGE) / (len(points) - 1)
    room = TREND_HEIGHT - 2 * TREND_EDGE
    at = [
        (TREND_EDGE + i * step, TREND_HEIGHT - TREND_EDGE - room * (value - low) / span)
        for i, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in at)
    said_aloud = f"{row}: " + "; ".join(f"{date} {shown(value)}" for date, value in points)
    return (
        f'<svg role="img" aria-label="{text(said_aloud)}" width="{TREND_WIDTH}" '
        f'height="{TREND_HEIGHT}" viewBox="0 0 {TREND_WIDTH} {TREND_HEIGHT}" fill="currentColor">'
        f"<title>{text(said_aloud)}</title>"
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f"{dots}</svg>"
    )


def _run(run: Result, before: Result | None, unfolded: bool) -> str:
    """Device, versions, command and files of one measurement, and what differs from the last."""
    environment = run.environment
    versions = environment.get("versions") or {}
    present = [f"{name} {version}" for name, version in sorted(versions.items()) if version]
    missing = [name for name, version in sorted(versions.items()) if not version]
    entries = [
        ("Device", text(machine(environment))),
        ("Python", text(said(environment.get("python")))),
        ("Versions", text(", ".join(present) or said(None))),
        *([("Not installed", text(", ".join(missing)))] if missing else []),
        ("Command", f"<code>{text(run.report['command'])}</code>"),
        ("Files", ", ".join(f'<a href="{quote(f.name)}">{text(f.name)}</a>' for f in run.beside())),
    ]
    if before and (lines := differences(before, run)):
        entries.append((f"Changed since {text(before.date)}", text("; ".join(lines))))
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries)
    state = " open" if unfolded else ""
    return f"<details{state}><summary>{text(run.date)}</summary><dl>{listed}</dl></details>"


def markdown(results: Sequence[Result], left_out: Sequence[str]) -> str:
    """README.md of the folder: the newest numbers of every theme and device."""
    parts = [
        "# Benchmark results",
        "Made from the JSON files of this folder by `python -m benchmarks.page`, which also writes "
        "[index.html](index.html): the same over the months, with versions and commands.",
    ]
    for (theme, device), runs in groups(list(results)).items():
        newest = runs[-1]
        parts.append(f"## {_plain(theme)}, {_plain(device)}")
        rows = [
            [_plain(name), shown(entry["value"]), _plain(entry["unit"]), entry["better"]]
            for name, entry in newest.headline.items()
        ]
        if rows:
            parts.append(table(["what", newest.date, "unit", "better"], rows))
        else:
            parts.append("No headline numbers.")
        files = ", ".join(f"[{_plain(f.name)}]({quote(f.name)})" for f in newest.beside())
        command = " ".join(newest.report["command"].split()).replace("`", "'")
        parts.append(
            f"{newest.date}, {_plain(machine(newest.environment))}. `{command}`. Files: {files}."
        )
    if left_out:
        parts += ["## Files not shown", "\n".join(f"- {_plain(line)}" for line in left_out)]
    return "\n\n".join(parts) + "\n"


def _plain(value: str) -> str:
    """Text that is nothing but text in Markdown, in a table's cell too."""
    escaped = html.escape(" ".join(value.split()), quote=False)
    for character in "\\|[]*`":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def pages(folder: Path) -> dict[Path, str]:
    """File -> what it must contain."""
    results, left_out = load(folder)
    return {
        folder / "index.html": html_page(results, left_out),
        folder / "README.md": markdown(results, left_out),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is stale")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not options.results.is_dir():
        sys.exit(f"--results: expected a folder; got {str(options.results)!r}.")
    try:
        wanted = pages(options.results)
    except BrokenResult as error:
        print(error, file=sys.stderr)
        return 1
    stale = [
        path
        for path, content in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    for path in stale:
        if options.check:
            print(f"{path} is not what the result files say: {REMEDY}", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"written: {path}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
