"""Everything that a GPU is needed for, in order of value: python -m benchmarks.gpu_session

    suite        the shared tests on the GPU, in several processes where pytest-xdist is installed
    gpu_tests    tests marked gpu: large tensors, graphs, inductor, memory, training
    bench_quick  the main ratios
    sanitizer    compute-sanitizer, where it is installed
    tune         launch settings for launch.py
    bench        all cases of the kernel benchmark
    train_step   the DFT step at the paper's sizes; only where it is named: --only train_step
    packing      the same on samples of unequal lengths, padded, packed, shared images; as above

Each step has a time limit of its own, together 25 minutes (train_step 9.5 and packing 4 more); a
step that fails or is stopped does not stop the next. Logs, JUnit files and results are written to
--output as they come, logs/session.json says how each step ended, and --archive keeps all of it in
one .tar.gz.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from benchmarks.steps import ROOT, Step, benchmark, run_all


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

    return [
        Step("suite", tests("suite", "not gpu and not full and not slow", 8), 6),
        # Some of them take most of the memory: one after another.
        Step("gpu_tests", tests("gpu_tests", "gpu and not full", 1, "-k", "not sanitizer"), 3.5),
        benchmark("bench_kernels", 1.5, output, "--quick", "--theme", "quick", name="bench_quick"),
        Step("sanitizer", tests("sanitizer", "gpu", 4, "-k", "sanitizer"), 2.5),
        benchmark(
            "tune_kernels",
            3.5,
            output,
            *("--table", str(output / "table.json")),
            name="tune",
            grace=0.5,
        ),
        benchmark("bench_kernels", 5.5, output, name="bench"),
        benchmark(
            "bench_train_step",
            8.5,
            output,
            *("--preset", "paper", "--max-micro-batch"),
            name="train_step",
            by_default=False,
        ),
        benchmark("bench_packing", 3, output, name="packing", by_default=False),
    ]


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
    return run_all(chosen, output, options.archive)


if __name__ == "__main__":
    sys.exit(main())
