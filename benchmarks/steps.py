"""Commands one after another, each with a time limit and a log of its own.

A command that fails or is stopped does not stop the next; logs/session.json says how each ended,
after every one of them. Used by `python -m benchmarks` and `python -m benchmarks.gpu_session`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result_files import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
# After the limit: seconds to write reports in, before the step is killed.
GRACE = 20
INTERRUPTED = 130  # as shells have it


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    minutes: float
    by_default: bool = True


def benchmark(
    module: str,
    minutes: float,
    output: Path,
    *extra: str,
    name: str,
    grace: float = 1.0,
    by_default: bool = True,
) -> Step:
    """A benchmark that begins nothing new after `minutes`, and is stopped `grace` later."""
    budget = ["--budget-minutes", f"{minutes:g}", "--output", str(output)]
    command = [sys.executable, "-m", f"benchmarks.{module}", *budget, *extra]
    return Step(name, command, minutes + grace, by_default)


def run_all(chosen: list[Step], output: Path, archive: Path | None = None) -> int:
    """All steps in turn; the largest exit status of them, or INTERRUPTED after Ctrl-C.

    Args:
        archive: a .tar.gz that holds everything in `output`, written anew after every step.
    """
    import torch

    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {"environment": environment(device), "steps": []}
    for number, step in enumerate(chosen, 1):
        limit = f"at most {step.minutes:g} minutes"
        print(f"== {number}/{len(chosen)} {step.name}: {limit}", flush=True)
        try:
            report["steps"].append(run(step, logs))
        except KeyboardInterrupt:
            print(f"\nstopped in {step.name}; results and logs so far: {shown(output)}")
            return INTERRUPTED
        write_json(logs / "session.json", report)
        keep(output, archive)
    for row in report["steps"]:
        ended = "stopped at its limit" if row["stopped_at_limit"] else f"exit {row['returncode']}"
        print(f"{row['name']}: {ended}, {row['seconds']} s")
    print(f"results and logs: {shown(output)}")
    return max(abs(row["returncode"]) for row in report["steps"])


def shown(path: Path) -> Path:
    """Relative to where the user is, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def child_environment(**more: str) -> dict[str, str]:
    """Of a child: this checkout's packages, output as it comes, nothing from a hub; and `more`."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **settings, **more}


def run(step: Step, output: Path) -> dict[str, Any]:
    """One step in a process group of its own, its output in <name>.log."""
    begin = time.monotonic()
    with (output / f"{step.name}.log").open("w") as log:
        log.write(" ".join(step.command) + "\n")
        log.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=child_environment(PYTHONFAULTHANDLER="1"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            stopped = not follow(process, Path(log.name), begin + 60 * step.minutes)
            if stopped:
                # As Ctrl-C: pytest then writes its reports.
                end(process, signal.SIGINT)
        finally:
            end(process, signal.SIGKILL)
    return {
        "name": step.name,
        "command": step.command[1:],
        "returncode": process.returncode,
        "stopped_at_limit": stopped,
        "seconds": round(time.monotonic() - begin, 1),
    }


def follow(process: subprocess.Popen, path: Path, until: float) -> bool:
    """Print what it writes until it ends (True) or its time is over (False)."""
    with path.open(errors="replace") as log:
        while True:
            ended = process.poll() is not None
            print(log.read(), end="", flush=True)
            if ended or time.monotonic() > until:
                return ended
            time.sleep(0.2)


def end(process: subprocess.Popen, how: signal.Signals) -> None:
    """Signal the group of the step, whose leader may have ended already."""
    try:
        os.killpg(process.pid, how)
        process.wait(GRACE)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def keep(output: Path, archive: Path | None) -> None:
    if archive is None:
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(output, arcname=output.name)
    os.replace(partial, archive)
