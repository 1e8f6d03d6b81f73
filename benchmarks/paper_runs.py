"""Runs of the tables as child processes: in parallel, each with a log, all of them resumable.

A run that ends well becomes a line of runs.jsonl, and its folder is removed, or put aside under
kept/. One that fails, or is stopped, keeps its folder and goes on from its last checkpoint the next
time; a file beside it has a line for every start, with the commit of the code.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.paper_records import Cost, Records, append, commit, make_record
from benchmarks.paper_resolve import Resolved
from benchmarks.steps import GRACE, ROOT, child_environment
from cdfast.config import to_dict

# Seconds per optimizer step where no run has been recorded: the miniature's 520 steps took about
# 150 seconds of one core, evaluation included.
SECONDS_PER_STEP = 0.3
POLL = 0.2
# After the limit of --minutes, for runs that take a little longer than expected.
OVERTIME = 60.0
# A run is taken to hang after so many times the seconds expected of it, and not before so many:
# other machines are slower, and share their cores with other work.
HANGS_AFTER, HANGS_NOT_BEFORE = 10.0, 1800.0
LAST_LINES = 12
# Beside the recipe's own options: they change nothing but where a stopped run goes on.
_CHECKPOINTS = ("--save-strategy", "steps", "--save-steps", "100", "--save-total-limit", "1")


class Busy(RuntimeError):
    """Another command, or runs that it has left behind, uses the same folder."""


@dataclass(frozen=True)
class Planned:
    """One run that is to be made."""

    resolved: Resolved
    seed: int
    seconds: float  # expected

    @property
    def label(self) -> str:
        return f"{self.resolved.name} seed {self.seed}"

    @property
    def slug(self) -> str:
        return f"{self.resolved.name}-{self.resolved.key}-seed{self.seed}"


@dataclass
class Outcome:
    """How a command ended: failed runs with their last lines, and those that were not started."""

    made: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: list[Planned] = field(default_factory=list)
    interrupted: bool = False


@dataclass
class _Child:
    planned: Planned
    process: subprocess.Popen
    began: float
    starts: list[str]  # commits, "" where there was none

    @property
    def hangs(self) -> bool:
        allowed = max(HANGS_NOT_BEFORE, HANGS_AFTER * self.planned.seconds)
        return time.monotonic() - self.began > allowed

    @property
    def commits(self) -> str | None:
        return " then ".join(dict.fromkeys(filter(None, self.starts))) or None


def expected_seconds(resolved: Resolved, records: Records) -> float:
    """Of the clock: that of the same runs before, else by steps from other runs."""
    same = [r["seconds"] for r in records.values() if r["key"] == resolved.key and _whole(r)]
    if same:
        return statistics.fmean(same)
    per_step = [r["seconds"] / sum(r["steps"]) for r in records.values() if _whole(r)]
    return resolved.steps * (statistics.median(per_step) if per_step else SECONDS_PER_STEP)


def _whole(record: Mapping[str, Any]) -> bool:
    return not record["interrupted"]


def plan(chosen: Sequence[Resolved], seeds: int, records: Records) -> list[Planned]:
    """What is not recorded yet; one seed of all arms before the next, so that parts compare."""
    missing: dict[tuple[str, int], Planned] = {}
    for seed in range(seeds):
        for resolved in chosen:
            key = resolved.key, seed
            if key not in records and key not in missing:
                missing[key] = Planned(resolved, seed, expected_seconds(resolved, records))
    return list(missing.values())


def arguments(planned: Planned, work: Path) -> list[str]:
    """What stands behind `python -m cdfast.train`: the arm's recipe and options, or a recipe file
    where its stages have other steps."""
    resolved = planned.resolved
    found = [resolved.arm.recipe]
    if resolved.factor == 1.0:
        for name, value in resolved.options.items():
            found += [f"--{name.replace('_', '-')}", *_words(value)]
    else:
        path = work / f"{resolved.name}-{resolved.key}.yaml"
        path.write_text(yaml.safe_dump(to_dict(resolved.recipe), sort_keys=False))
        found = [str(path)]
    return [*found, "--seed", str(planned.seed), "--output-dir", str(work / planned.slug)]


def _words(value: Any) -> list[str]:
    """An option's value as words of a command line."""
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in _words(item)]
    if value is None:
        return ["none"]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def train_command(planned: Planned, work: Path) -> list[str]:
    """The command of one run."""
    # The attention analysis that a run ends with is in no table.
    flags = ("--resume", "--disable-tqdm", "true", "--analyze-questions", "0", *_CHECKPOINTS)
    return [sys.executable, "-m", "cdfast.train", *arguments(planned, work), *flags]


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """The folder of the runs, for one command at a time: yields the lock's descriptor.

    Children inherit it, so that runs which outlive a killed command are not started twice.

    Raises:
        Busy: another process has it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"{work}: expected to be free; another command, or runs that it has left behind, "
                "use it. Wait for them, or give another --work folder."
            ) from error
        yield file.fileno()


def make_runs(
    planned: Sequence[Planned],
    work: Path,
    records: Path,
    *,
    jobs: int,
    minutes: float | None = None,
    keep: bool = False,
    command: Callable[[Planned, Path], list[str]] = train_command,
) -> Outcome:
    """Make runs, at most `jobs` at a time, and record each as it ends; stop those that hang.

    Args:
        planned: in order.
        work: folder of unfinished runs and of logs.
        records: runs.jsonl.
        jobs: processes at a time.
        minutes: start nothing that is not expected to end in them; what still goes on a minute
            later is stopped.
        keep: put the folders of finished runs, with their models, into work/kept.
        command: of one run, with `work`.
    """
    outcome, waiting, running = Outcome(), list(planned), []
    until = None if minutes is None else time.monotonic() + 60 * minutes
    (work / "logs").mkdir(parents=True, exist_ok=True)
    with locked(work) as lock, _progress(planned) as show, _terminate_as_interrupt():
        try:
            while waiting or running:
                while len(running) < jobs and (following := _next(waiting, until)):
                    waiting.remove(following)
                    running.append(_start(following, work, command, lock))
                running = [c for c in running if not _ended(c, work, records, keep, outcome, show)]
                if until is not None and time.monotonic() > until + OVERTIME:
                    outcome.left += [child.planned for child in running]
                    break
                if not running and _next(waiting, until) is None:
                    break
                show.update(running, waiting, outcome, jobs)
                time.sleep(POLL)
        except KeyboardInterrupt:
            outcome.interrupted = True
            outcome.left += [child.planned for child in running]
        finally:
            for child in running:
                _stop(child.process)
    outcome.left += waiting
    return outcome


def _next(waiting: Sequence[Planned], until: float | None) -> Planned | None:
    """The first run that is expected to end in time."""
    now = time.monotonic()
    return next((p for p in waiting if until is None or now + p.seconds <= until), None)


def _start(
    planned: Planned, work: Path, command: Callable[[Planned, Path], list[str]], lock: int
) -> _Child:
    path = _starts(work, planned)
    starts = [*(path.read_text().splitlines() if path.exists() else []), commit() or ""]
    path.write_text("".join(f"{line}\n" for line in starts))
    words = command(planned, work)
    with _log(work, planned).open("a") as log:
        log.write(" ".join(words) + "\n")
        log.flush()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            # One kind of device in one table, whatever the machine has.
            env=child_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return _Child(planned, process, time.monotonic(), starts)


def _starts(work: Path, planned: Planned) -> Path:
    return work / f"{planned.slug}.starts"


def _log(work: Path, planned: Planned) -> Path:
    return work / "logs" / f"{planned.slug}.log"


def _ended(
    child: _Child, work: Path, records: Path, keep: bool, outcome: Outcome, show: _Progress
) -> bool:
    """Whether a run has ended; if so, it is recorded or named as failed."""
    planned = child.planned
    pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
    if pid == 0 and child.hangs:
        _stop(child.process)
        _failed(planned, work, outcome, show, _hung(child))
        return True
    if pid == 0:
        return False
    child.process.returncode = os.waitstatus_to_exitcode(status)
    try:
        if child.process.returncode:
            raise RuntimeError(f"exit status {child.process.returncode}")
        results = json.loads((work / planned.slug / "results.json").read_text())
        # wait4 adds up the process and those of its children that it has waited for.
        cpu = usage.ru_utime + usage.ru_stime
        interrupted = len(child.starts) - 1
        cost = Cost(
            seconds=time.monotonic() - child.began,
            cpu_seconds=None if interrupted else cpu,
            interrupted=interrupted,
        )
        record = make_record(planned.resolved, planned.seed, results, cost, child.commits)
        append(records, record)
    except Exception as error:  # whatever is wrong with one run, the others go on
        _failed(planned, work, outcome, show, repr(error))
        return True
    outcome.made += 1
    averages = record["student"]["averages"]
    found = ", ".join(f"{group} {value:.3f}" for group, value in averages.items())
    show.line(f"{planned.label}: {found}, {cost.seconds:.0f} s, {cpu:.0f} CPU s")
    try:
        _put_away(planned, work, keep)
    except OSError as error:
        show.line(f"recorded, but its folder is left; remove it: {work / planned.slug}: {error}")
    return True


def _failed(planned: Planned, work: Path, outcome: Outcome, show: _Progress, why: str) -> None:
    reason = f"{planned.label}: {why}\n{_last_lines(_log(work, planned))}"
    outcome.failed[planned.label] = reason
    show.line(f"failed: {reason}")


def _hung(child: _Child) -> str:
    took, expected = (time.monotonic() - child.began) / 60, child.planned.seconds / 60
    return (
        f"stopped after {took:.0f} minutes, because {expected:.0f} were expected; the same command "
        "goes on from its last checkpoint"
    )


def _put_away(planned: Planned, work: Path, keep: bool) -> None:
    """The folder of a recorded run: aside, or removed."""
    if keep:
        # Aside: where its record is removed, it is to be made again, not found finished.
        kept = work / "kept" / planned.slug
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        (work / planned.slug).rename(kept)
    else:
        shutil.rmtree(work / planned.slug)
    _starts(work, planned).unlink(missing_ok=True)


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").rstrip().splitlines()[-LAST_LINES:]
    return "\n".join([f"  the last lines of {log}:", *(f"  | {line}" for line in lines)])


def _stop(process: subprocess.Popen) -> None:
    """End a run and its workers; what it has saved is whole at any time."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the command as Ctrl-C does: children are stopped, and all
    is resumable. Under nohup a closed terminal is ignored."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    ends = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.append(signal.SIGHUP)
    before = {how: signal.signal(how, interrupt) for how in ends}
    try:
        yield
    finally:
        for how, handler in before.items():
            signal.signal(how, handler)


class _Progress:
    """A bar of the runs in a terminal, and a line for each that ends, anywhere."""

    def __init__(self, bar: Progress, planned: Sequence[Planned]):
        self.bar = bar
        self.task = bar.add_task("", total=len(planned), left="")

    def update(
        self, running: list[_Child], waiting: Sequence[Planned], outcome: Outcome, jobs: int
    ) -> None:
        now = time.monotonic()
        seconds = sum(p.seconds for p in waiting)
        seconds += sum(max(0.0, c.planned.seconds - (now - c.began)) for c in running)
        self.bar.update(
            self.task,
            description=", ".join(child.planned.label for child in running),
            completed=outcome.made + len(outcome.failed),
            left=f"about {seconds / jobs / 60:.0f} min left",
        )

    def line(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(planned: Sequence[Planned]) -> Iterator[_Progress]:
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _Progress(bar, planned)
