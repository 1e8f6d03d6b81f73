"""The result files of a folder over the months: what page.py and readme.py are made from.

Numbers are compared inside one theme and one device only, and a change is given only where the
files say that the machine is the same.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What must be equal for two files of one device to be of one machine.
MACHINE = ("device", "processor", "cores", "multiprocessors", "memory_gib", "capability")
# What may change a number on the same machine.
SETTING = ("threads", "instruction_set", "python", "cuda", "cudnn", "interpreter")
HEAD = {"theme": str, "command": str, "date": str, "environment": dict, "headline": dict}
NOT_RECORDED = "not recorded"


class BrokenResult(ValueError):
    """A file that is no result file although its name says so."""


@dataclass(frozen=True)
class Result:
    """One result file: `path`, and its content with the common head (result_files.start)."""

    path: Path
    report: dict[str, Any]

    @property
    def theme(self) -> str:
        return self.report["theme"]

    @property
    def environment(self) -> dict[str, Any]:
        return self.report["environment"]

    @property
    def device(self) -> str:
        return self.environment["device"]

    @property
    def date(self) -> str:
        return self.report["date"]

    @property
    def headline(self) -> dict[str, dict[str, Any]]:
        return self.report["headline"]

    def value(self, name: str) -> float | None:
        """A number of the headline; None where it was not measured."""
        return self.headline.get(name, {}).get("value")

    def beside(self) -> list[Path]:
        """The file itself and the tables and plot of the same name that are there."""
        files = [self.path.with_suffix(suffix) for suffix in (".md", ".png")]
        return [*(file for file in files if file.exists()), self.path]


def load(folder: Path) -> tuple[list[Result], list[str]]:
    """All results of a folder, by theme, device and date, and a line for each file left out.

    Raises:
        BrokenResult: a file is no JSON, or its head is not that of result_files.start.
    """
    found, left_out = [], []
    for path in sorted(folder.glob("*.json")):
        report = _parse(path)
        if not isinstance(report, dict) or "headline" not in report:
            left_out.append(f"{path.name}: has no `headline`, is not shown")
            continue
        _check(path, report)
        found.append(Result(path, report))
    return sorted(found, key=lambda r: (r.theme, r.device, r.date, r.path.name)), left_out


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenResult(
            f"{path.name}: expected JSON; got {error}. Measure it again or remove the file."
        ) from error


def _check(path: Path, report: dict[str, Any]) -> None:
    def expect(holds: bool, field: str, expected: str, got: Any) -> None:
        if not holds:
            raise BrokenResult(
                f"{path.name}: {field}: expected {expected}; got {got!r}. "
                "Begin it with benchmarks.result_files.start, or remove the file."
            )

    for field, kind in HEAD.items():
        got = report.get(field)
        expect(isinstance(got, kind), field, f"a JSON value of Python's type {kind.__name__}", got)
    date = report["date"]
    expect(re.fullmatch(r"\d{4}-\d\d-\d\d", date) is not None, "date", "YYYY-MM-DD", date)
    device, versions = (report["environment"].get(key) for key in ("device", "versions"))
    expect(isinstance(device, str), "environment.device", "a name", device)
    expect(isinstance(versions, dict | None), "environment.versions", "name: version", versions)
    for name, entry in report["headline"].items():
        where = f"headline[{name!r}]"
        expect(isinstance(entry, dict), where, "value, unit and better", entry)
        value, unit, better = (entry.get(key) for key in ("value", "unit", "better"))
        number = type(value) in (int, float) and math.isfinite(value)
        expect(value is None or number, f"{where}.value", "a finite number or null", value)
        expect(isinstance(unit, str), f"{where}.unit", "text", unit)
        expect(better in ("less", "more"), f"{where}.better", '"less" or "more"', better)


def groups(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """(theme, device) -> its results, oldest first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.theme, result.device), []).append(result)
    return found


def newest(results: list[Result], theme: str) -> list[Result]:
    """The newest result of a theme on each device."""
    return [runs[-1] for (name, _), runs in groups(results).items() if name == theme]


def same_machine(a: Result, b: Result) -> bool:
    """Whether two files of one device describe the same machine, as far as they say."""
    return all(a.environment.get(k) == b.environment.get(k) for k in MACHINE)


def on_the_newest_machine(runs: list[Result]) -> list[Result]:
    """The last runs without a change of machine: the only ones that make a trend."""
    first = len(runs) - 1
    while first > 0 and same_machine(runs[first - 1], runs[-1]):
        first -= 1
    return runs[first:]


def differences(old: Result, new: Result) -> list[str]:
    """What differs between two files besides the numbers, one line each; machine first."""
    before, after = old.environment, new.environment
    lines = [] if same_machine(old, new) else ["not the same machine"]
    pairs = [(key, before.get(key), after.get(key)) for key in (*MACHINE, *SETTING)]
    theirs, ours = (env.get("versions") or {} for env in (before, after))
    pairs += [(name, theirs.get(name), ours.get(name)) for name in sorted({*theirs, *ours})]
    lines += [f"{key}: {said(a)}, then {said(b)}" for key, a, b in pairs if a != b]
    if old.report["command"] != new.report["command"]:
        lines.append("another command")
    return lines


def said(value: Any) -> str:
    return NOT_RECORDED if value is None else str(value)


def change(old: Result, new: Result, name: str) -> str:
    """How a number of the headline changed: "+3.1%, worse"; why there is none otherwise."""
    if not same_machine(old, new):
        return "not the same machine"
    a, b = old.value(name), new.value(name)
    if name not in old.headline or a is None or b is None:
        return "not measured in both"
    entry = new.headline[name]
    if any(old.headline[name].get(key) != entry[key] for key in ("unit", "better")):
        return "not the same unit"
    if a == b:
        return "none"
    if a == 0:
        return f"from 0 to {b:g}"
    better = (b < a) == (entry["better"] == "less")
    return f"{100 * (b - a) / abs(a):+.1f}%, {'better' if better else 'worse'}"


def machine(environment: dict[str, Any]) -> str:
    """The device in words."""
    if environment["device"] != "cpu":
        return environment["device"]
    threads = environment.get("threads")
    count = f"threads: {said(threads)}"
    return f"CPU ({environment.get('processor') or 'model not recorded'}), {count}"


def shown(value: float | None) -> str:
    """A number with four significant digits; "not measured" for None."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
