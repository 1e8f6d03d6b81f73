"""Everything that a GPU is needed for, in order of value: python -m benchmarks.gpu_session

    suite        the shared tests on the GPU, in several processes where pytest-xdist is installed
    gpu_tests    tests marked gpu: large tensors, graphs, inductor, memory, training
    bench_quick  the main ratios
    sanitizer    compute-sanitizer, where it is installed
    tune         launch settings for launch.py
    bench        all cases of the kernel benchmark
    train_step   the DFT step at the paper's sizes; only where it is named: --only train_step

Each step has a time limit of its own, together 25 minutes (train_step: 9.5 more); a step that fails
or is stopped does not stop the next. Logs, JUnit files and results are written to --output as they
come, session.json says how each step ended, and --archive keeps all of it in one .tar.gz.
"""

from __future__ import annotations

import argparse
import importlib.util
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


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    minutes: float
    by_default: bool = True


def steps(output: Path) -> list[Step]:
    python = [sys.executable]
    pytest = [
        *python,
        "-m",
        "pytest",
        "tests/kernels",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    xdist = importlib.util.find_spec("xdist") is not None

    def tests(name: str, marks: str, processes: int, *extra: str) -> list[str]:
        report = f"--junitxml={output / f'{name}.xml'}"
        parallel = ["-n", str(processes)] if xdist and processes > 1 else []
        return [*pytest, "-m", marks, report, "--durations=15", *parallel, *extra]

    def benchmark(module: str, minutes: float, *extra: str) -> list[str]:
        budget = ["--budget-minutes", str(minutes), "--output", str(output)]
        return [*python, "-m", f"benchmarks.{module}", *budget, *extra]

    return [
        Step("suite", tests("suite", "not gpu and not full and not slow", 8), 6),
        # Some of them take most of the memory: one after another.
        Step("gpu_tests", tests("gpu_tests", "gpu and not full", 1, "-k", "not sanitizer"), 3.5),
        Step("bench_quick", benchmark("bench_kernels", 1.5, "--quick", "--theme", "quick"), 2.5),
        Step("sanitizer", tests("sanitizer", "gpu", 4, "-k", "sanitizer"), 2.5),
        Step("tune", benchmark("tune_kernels", 3.5, "--table", str(output / "table.json")), 4),
        Step("bench", benchmark("bench_kernels", 5.5), 6.5),
        Step(
            "train_step",
            benchmark("bench_train_step", 8.5, "--preset", "paper", "--max-micro-batch"),
            9.5,
            by_default=False,
        ),
    ]


def run(step: Step, output: Path) -> dict[str, Any]:
    """One step in a process group of its own, its output in <name>.log."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    begin = time.monotonic()
    stopped = False
    with (output / f"{step.name}.log").open("w") as log:
        log.write(" ".join(step.command) + "\n")
        log.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(60 * step.minutes)
        except subprocess.TimeoutExpired:
            stopped = True
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


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def keep(output: Path, archive: Path | None) -> None:
    if archive is None:
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(output, arcname=output.name)
    os.replace(partial, archive)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    known = steps(Path())
    names, default = ([s.name for s in known if s.by_default or every] for every in (True, False))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_session")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of the output, after every step")
    parser.add_argument("--only", nargs="+", choices=names, default=default, help="these steps")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    output = options.output.resolve()
    chosen = [step for step in steps(output) if step.name in options.only]
    if options.dry_run:
        for step in chosen:
            print(f"{step.name} ({step.minutes} minutes): {' '.join(step.command)}")
        return 0
    import torch

    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {"environment": environment(device), "steps": []}
    if device == "cpu":
        print("no CUDA device: the tests will skip what needs one, the benchmarks run on the CPU")
    for step in chosen:
        print(f"{step.name}: at most {step.minutes} minutes", flush=True)
        report["steps"].append(run(step, output))
        write_json(output / "session.json", report)
        keep(output, options.archive)
        print(tail(output / f"{step.name}.log", 12), flush=True)
    for row in report["steps"]:
        ended = "stopped at its limit" if row["stopped_at_limit"] else f"exit {row['returncode']}"
        print(f"{row['name']}: {ended}, {row['seconds']} s")
    return max(abs(row["returncode"]) for row in report["steps"])


if __name__ == "__main__":
    sys.exit(main())
