"""Benchmarks of cdfast: python -m benchmarks [quick | cpu | gpu]

    quick   attention with the alignment loss beside plain attention and eager: a table and a plot,
            in the terminal and as PNG; under 2 minutes on two CPU cores, on a GPU if there is one
    cpu     everything that a CPU can show, in half an hour
    gpu     everything that a GPU shows, in 10 minutes

Results go to --output as they come (.json, .md, .png, logs): stop it at any time. Into
benchmarks/results go those to keep: `--output benchmarks/results`, then
`python -m benchmarks.page` and `python -m benchmarks.readme` for the pages made from them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench_kernels, terminal
from benchmarks.result_files import NOT_MEASURED, is_busy, result_path
from benchmarks.steps import INTERRUPTED, ROOT, Step, benchmark, run_all, shown

OUTPUT = ROOT / "runs" / "benchmarks"


def cpu_steps(output: Path) -> list[Step]:
    return [
        benchmark("bench_kernels", 9, output, "--device", "cpu", name="kernels"),
        benchmark("bench_scaling", 8, output, "--device", "cpu", name="scaling"),
        benchmark("roofline", 2, output, "--device", "cpu", name="roofline"),
        benchmark("bench_logits", 1.5, output, "--device", "cpu", name="logits"),
        benchmark("bench_text_step", 3, output, name="text_step"),
        benchmark("bench_train_step", 4, output, name="train_step"),
        benchmark("bench_packing", 3, output, "--device", "cpu", name="packing"),
        benchmark("bench_layout", 0.5, output, name="layout"),
    ]


def gpu_steps(output: Path) -> list[Step]:
    """In order of value, with limits that add up to 10 minutes."""
    return [
        benchmark("bench_kernels", 2.5, output, name="kernels", grace=0.5),
        benchmark("bench_train_step", 2, output, "--preset", "paper", name="train_step", grace=0.5),
        benchmark("bench_scaling", 1.2, output, name="scaling", grace=0.3),
        benchmark("roofline", 0.8, output, name="roofline", grace=0.3),
        benchmark("bench_logits", 0.6, output, name="logits", grace=0.3),
        benchmark("bench_text_step", 0.7, output, "--device", "cuda", name="text_step", grace=0.3),
    ]


def quick(output: Path) -> int:
    """The main ratios at a few sizes, shown in the terminal."""
    arguments = ["--quick", "--theme", "quick", "--output", str(output), "--budget-minutes", "1.5"]
    path = result_path("quick", bench_kernels.parse([]).device, output)
    try:
        bench_kernels.main(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped; results so far: {shown(path)}")
        return INTERRUPTED
    found = json.loads(path.read_text())
    cases = [case for case in found["cases"] if "failed" not in case]
    if not cases:
        sys.exit(f"nothing was measured: {path} says why")
    if is_busy(found["environment"]):
        print("the machine was busy before this began: trust the ratios more than the times")
    show(cases)
    png = path.with_suffix(".png")
    print(f"tables: {shown(path.with_suffix('.md'))}, plot: {shown(png)}")
    return 0


def show(cases: list[dict[str, Any]]) -> None:
    backend = cases[0]["backend"]
    peer = cases[0]["ratios"]["fastest_peer"]
    names = {
        f"{peer}, no alignment": peer,
        "cdfast, no alignment": f"plain[{backend}]",
        "cdfast with alignment": f"student[{backend}]",
        "eager with alignment": "eager",
    }
    columns = ["tokens, visual", *(f"{name}, ms" for name in names)]
    columns += ["alignment costs", "eager is slower", "extra memory, of eager's"]
    rows = []
    for case in cases:
        ratios = case["ratios"]
        times = (case["variants"].get(name, {}).get("ms") for name in names.values())
        rows.append(
            [
                f"{case['tokens']}, {case['visual']}",
                *(NOT_MEASURED if ms is None else f"{ms:.1f}" for ms in times),
                *(
                    NOT_MEASURED if ratios[key] is None else form(ratios[key])
                    for key, form in (
                        ("student_over_plain", lambda x: f"{100 * (x - 1):+.0f}%"),
                        ("eager_over_student", lambda x: f"{x:.1f}x"),
                        ("extra_memory_over_eagers_extra", lambda x: f"{100 * x:.1f}%"),
                    )
                ),
            ]
        )
    kind = f"H {cases[0]['heads']}, head size {cases[0]['head_dim']}, {cases[0]['dtype']}"
    terminal.show(f"Forward and backward of one attention layer, {kind}", columns, rows)
    series = {
        label: [
            (case["tokens"], case["variants"][name]["ms"])
            for case in cases
            if "ms" in case["variants"].get(name, {})
        ]
        for label, name in names.items()
    }
    terminal.plot(series, x="tokens", y="ms")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", nargs="?", choices=("quick", "cpu", "gpu"), default="quick")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps of the set")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(argv)
    options.steps = {"quick": [], "cpu": cpu_steps, "gpu": gpu_steps}[options.set]
    if options.set != "quick":
        options.steps = options.steps(options.output.resolve())
    known = [step.name for step in options.steps]
    for name in options.only or []:
        if name not in known:
            parser.error(f"--only: expected steps of the set {options.set}, {known}; got {name!r}.")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    output = options.output.resolve()
    chosen = [s for s in options.steps if options.only is None or s.name in options.only]
    if options.dry_run:
        for step in chosen:
            print(f"{step.name} ({step.minutes:g} minutes): {' '.join(step.command[1:])}")
        return 0
    if options.set == "quick":
        return quick(output)
    if options.set == "gpu":
        require_gpu()
    return run_all(chosen, output)


def require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            "python -m benchmarks gpu: expected a CUDA device; torch sees none. "
            "On a CPU: python -m benchmarks cpu"
        )


if __name__ == "__main__":
    sys.exit(main())
