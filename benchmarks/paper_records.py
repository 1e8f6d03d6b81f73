"""One line per finished run in runs.jsonl: what the tables are made of, and what is not run again.

A line holds the arm and the key of what it resolved to, the seed, accuracy by kind, similarity,
curves, time, versions and commit. Lines whose key no arm has now are of another version: they are
named and left out.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.result_files import processor
from benchmarks.steps import ROOT

if TYPE_CHECKING:
    from benchmarks.paper_resolve import Resolved

DIGITS = 6
# What the numbers come from; a commit with changes here that are not committed is no commit.
SOURCES = ("cdfast", "kernels", "csrc")
Records = dict[tuple[str, int], dict[str, Any]]


class BrokenRecords(ValueError):
    """A line of runs.jsonl that is no record."""


@dataclass(frozen=True)
class Cost:
    """What a run cost.

    Args:
        seconds: of the clock, of the last process.
        cpu_seconds: user and system, of the training process and its children; None for a run that
            was interrupted, whose parts are not known or partly done twice.
        interrupted: how often.
    """

    seconds: float
    cpu_seconds: float | None
    interrupted: int


def read(path: Path) -> Records:
    """(key, seed) -> record. A last line that a kill has cut short is left out; one that only lacks
    its end of line, as some editors write it, is a record.

    Raises:
        BrokenRecords: any other line that is no record, or a second one of a run with other
            accuracies; it is named.
    """
    found: Records = {}
    if not path.exists():
        return found
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    if _is_whole(last):
        lines.append(last)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            run = record["key"], record["seed"]
            same = found.setdefault(run, record)["student"] == record["student"]
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenRecords(
                f"{path.name}, line {number}: expected a record of a run as JSON; got "
                f"{line[:60]!r} ({error!r}). Remove the line: that run is then made again."
            ) from error
        if not same:
            raise BrokenRecords(
                f"{path.name}, line {number}: expected one record of {record['arm']} seed "
                f"{record['seed']} ({run[0]}); got a second one with other accuracies, as another "
                "kind of processor makes it. Keep one of the two lines."
            )
    return found


def _is_whole(last: str | bytes) -> bool:
    """Whether what stands behind the last end of line is a record."""
    try:
        return isinstance(json.loads(last), dict)
    except ValueError:
        return False


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, on the disk when this returns; what a kill has left of another is cut off.

    Other commands, with work folders of their own, may do the same at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _is_whole(content[end:]):
            file.write(b"\n")
        else:
            file.truncate(end)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def stale(records: Records, keys: Iterable[str]) -> list[dict[str, Any]]:
    """Records of another version of package, teacher or recipe: no arm has their key now."""
    known = set(keys)
    return [record for record in records.values() if record["key"] not in known]


def make_record(
    resolved: Resolved, seed: int, results: Mapping[str, Any], cost: Cost, begun_at: str | None
) -> dict[str, Any]:
    """A run's line, from its results.json.

    Args:
        begun_at: `commit()` when the run began, whose code it has loaded; of a run that was
            interrupted all of them, in order.
    """
    evaluation, environment = results["evaluation"], results["environment"]
    models, similarity = evaluation["models"], results.get("similarity")
    return _rounded(
        {
            "arm": resolved.name,
            "key": resolved.key,
            "seed": seed,
            "recipe": resolved.arm.recipe,
            "options": resolved.options,
            "factor": resolved.factor,
            "steps": [stage["steps"] for stage in results["stages"]],
            "scenes": {name: evaluation[name] for name in ("suite", "split", "seed")},
            "student": _accuracy(models["student"]),
            "shuffled": models["student, shuffled images"]["averages"],
            "teacher_name": resolved.recipe.teacher,
            "teacher": _accuracy(models["teacher"]) if "teacher" in models else None,
            "similarity": similarity
            and {when: similarity[when]["matched"] for when in ("before", "after")},
            "matches": similarity and similarity["matches"],
            "curve": curve(results["stages"]),
            "seconds": cost.seconds,
            "cpu_seconds": cost.cpu_seconds,
            "interrupted": cost.interrupted,
            "environment": {
                "device": "cpu",
                "processor": processor(),
                **{name: environment[name] for name in ("python", "cores", "threads", "versions")},
            },
            "commit": begun_at,
            "date": f"{datetime.date.today():%Y-%m-%d}",
        }
    )


def _accuracy(report: Mapping[str, Any]) -> dict[str, Any]:
    """Averages, and of each kind accuracy, chance, number of questions and of independent ones."""
    kinds = {
        name: {field: kind[field] for field in ("accuracy", "both_orders", "chance", "n", "group")}
        for name, kind in report["kinds"].items()
    }
    return {"averages": report["averages"], "kinds": kinds}


def curve(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured during training, with steps counted from the start of the run."""
    points, before = [], 0
    for stage in stages:
        for entry in stage.get("evaluations", []):
            point = {"step": before + entry["step"]}
            for name, measured in (
                ("CR", "eval_CR"),
                ("VQA", "eval_VQA"),
                ("similarity", "eval_similarity/mean"),
            ):
                if entry.get(measured) is not None:
                    point[name] = entry[measured]
            points.append(point)
        before += stage["steps"]
    return points


def commit() -> str | None:
    """The commit of this checkout now, "+" behind it where the sources differ from it; None
    outside of a git checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value
