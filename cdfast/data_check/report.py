"""The tables that `--dry-run` prints about data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cdfast.records import printable

# Characters of a long text in the example (its beginning and end), and parts of it.
_SHOWN = 300
_PARTS = 8
_STATISTICS = ("min", "median", "mean", "p95", "max")
_STYLES = {"prompt": "dim", "answer": "bold green", "rejected": "bold red"}

Result = Mapping[str, Any]


def print_data(content: Mapping[str, Any], console: Console) -> None:
    """Print what `check_recipe_data` has found.

    Args:
        content: what it writes as JSON.
        console: where to.
    """
    results: Sequence[Result] = content["data_sets"]
    console.print(_numbers(results))
    if any("tokens" in result for result in results):
        console.print(_tokens(results))
    if content["not_checked"]:
        console.print(f"not checked: {content['not_checked']}", markup=False)
    for result in results:
        for line in result["warnings"]:
            console.print(f"warning: {printable(line)}", markup=False)
        for line in result["duplicates"]["first"]:
            console.print(f"duplicate: {printable(line)}", markup=False)
    broken = [r for r in results if r["broken"]]
    if broken:
        console.print(_broken(broken))
    shown = next((r["example"] for r in results if r["example"]), None)
    if shown:
        console.print(_example(shown))
    stops = [(_name(result), reason) for result in results for reason in result["stops"]]
    for name, reason in [*(("processor", reason) for reason in content["stops"]), *stops]:
        console.print(
            f"[bold red]the run would stop:[/] {escape(name)}: {escape(printable(reason))}"
        )
    if not results[-1]["complete"]:
        console.print("the check was stopped before its end", markup=False)
    if content["would_run"]:
        console.print("data: the run would not stop on what was checked", markup=False)


def _name(result: Result) -> str:
    return ", ".join(result["data"])


def _numbers(results: Sequence[Result]) -> Table:
    """Quantities down, data sets across."""
    table = Table(title="data")
    table.add_column("")
    for result in results:
        users = result["used_by"]
        stage = "" if users == ["held out"] else "stages " if len(users) > 1 else "stage "
        table.add_column(escape(f"{_name(result)}\n{stage}{', '.join(users)}"), overflow="fold")
    for heading, cell in _ROWS.items():
        cells = [cell(result) for result in results]
        if any(cells):
            table.add_row(heading, *(escape(text or "-") for text in cells))
    return table


def _records(result: Result) -> str:
    return "streamed" if result["records"] is None else f"{result['records']:,}"


def _checked(result: Result) -> str:
    if not result["complete"]:
        return f"{result['checked']:,}, then stopped"
    if result["selection"] == "all":
        return f"{result['checked']:,}: all"
    kind = ", generated" if result["generated"] else ""
    return f"{result['checked']:,}, {result['selection']}{kind}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})" if part else "0"


def _truncated(field: str) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        found = result.get("truncation")
        if not found or found["max_length"] is None:
            return ""
        count = found[field]
        return f"{count:,}" if field == "tokens_lost" else _share(count, result["checked"])

    return cell


def _reason(reason: str) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        return _share(result["broken"].get(reason, {}).get("records", 0), result["checked"])

    return cell


def _images(result: Result) -> str:
    counts = result["images_per_record"]
    return "; ".join(f"{n}: {c:,}" for n, c in counts.items())


_ROWS: dict[str, Callable[[Result], str]] = {
    "records": lambda r: _records(r) + (" pairs" if r["pairs"] else ""),
    "looked at": _checked,
    "usable": lambda r: _share(r["usable"], r["checked"]),
    "broken": lambda r: _share(r["checked"] - r["usable"], r["checked"]),
    "  image missing": _reason("image missing"),
    "  no answer or image left": _reason("nothing left within max_length"),
    "repeats of another": lambda r: _share(r["duplicates"]["records"], r["checked"]),
    "images per record: records": _images,
    "longer than max_length": _truncated("sequences"),
    "  tokens cut": _truncated("tokens_lost"),
    "  losing answer tokens": _truncated("answer_shortened"),
    "  losing a whole answer": _truncated("whole_answer_lost"),
    "seconds": lambda r: f"{r['seconds']:,.1f}",
}


def _tokens(results: Sequence[Result]) -> Table:
    """Token counts of the sequences before anything is cut."""
    table = Table(title="tokens per sequence, uncut")
    table.add_column("data", overflow="fold")
    table.add_column("tokens")
    for name in _STATISTICS:
        table.add_column(name, justify="right")
    for result in results:
        for kind, found in result.get("tokens", {}).items():
            numbers = (f"{found[name]:,.10g}" for name in _STATISTICS)
            table.add_row(escape(_name(result)), kind, *numbers)
    return table


def _broken(results: Sequence[Result]) -> Table:
    table = Table(title="broken records, the first of each kind", show_lines=True)
    for name in ("reason", "records", "first"):
        table.add_column(name, overflow="fold")
    for result in results:
        for reason, found in result["broken"].items():
            first = "\n".join(printable(message) for message in found["first"])
            table.add_row(reason, f"{found['records']:,}", escape(first))
    return table


def _example(example: Mapping[str, Any]) -> Table:
    """What is trained on beside what is only read, in words and not by colour alone."""
    table = Table(title=f"answer mask: {escape(printable(example['source']))}", show_lines=True)
    table.add_column("part")
    table.add_column("text", overflow="fold")
    parts = example["parts"]
    for kind, text in parts[:_PARTS]:
        half = _SHOWN // 2
        short = text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
        heading = kind if kind == "prompt" else f"{kind} (trained)"
        table.add_row(heading, escape(printable(short)), style=_STYLES[kind])
    if len(parts) > _PARTS:
        table.add_row("", f"and {len(parts) - _PARTS} more parts")
    return table
