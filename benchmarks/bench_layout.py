"""Time of building a `VisualLayout` on the host: python -m benchmarks.bench_layout

Every training step builds one per batch. The C++ scheduler and its Python twin in turn in every
round; both give the same layout, which is checked first. Sizes: 16 images of 729 tokens, as a batch
and packed, padded and with turns; and one sequence of 16,384 tokens with 8 images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cdfast_kernels import VisualLayout, native

from benchmarks.measure import Clock
from benchmarks.result_files import (
    RESULTS,
    described,
    headline,
    number,
    result_path,
    start,
    table,
    write_json,
)

Build = Callable[[], VisualLayout]


def builds() -> dict[str, Build]:
    images = torch.zeros(1, 16384, dtype=torch.bool)
    for i in range(8):
        images[0, 2000 * i + 30 : 2000 * i + 1500] = True
    batch = torch.zeros(16, 1024, dtype=torch.bool)
    batch[:, 20:749] = True
    right = torch.arange(1024).expand(16, 1024) < 1000
    turns = (torch.arange(1024) > 800).long().expand(16, 1024).contiguous()
    every = {n: torch.arange(0, 16385, n, dtype=torch.int32) for n in (1024, 2048, 16384)}
    mask, packed = VisualLayout.from_mask, VisualLayout.from_packed
    return {
        "from_mask, 16 x 1024": lambda: mask(batch),
        "from_mask, 16 x 1024, padded": lambda: mask(batch, right),
        "from_segments, 16 x 1024, padded": lambda: VisualLayout.from_segments(turns, batch, right),
        "from_packed, 16 sequences of 1024": lambda: packed(every[1024], batch.flatten()),
        "from_mask, 1 x 16384, 8 images": lambda: mask(images),
        "from_packed, 1 x 16384, 8 images": lambda: packed(every[16384], images[0]),
        "from_packed, 8 sequences of 2048": lambda: packed(every[2048], images[0]),
    }


@contextmanager
def without_extension():
    extension, native.EXTENSION = native.EXTENSION, None
    try:
        yield
    finally:
        native.EXTENSION = extension


def measure(build: Build, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds with the C++ scheduler, where it was built, and with the Python one."""

    def python() -> VisualLayout:
        with without_extension():
            return build()

    runs = {"python": python}
    if native.EXTENSION is not None:
        if build() != python():
            raise AssertionError("the C++ and the Python scheduler give different layouts")
        runs = {"cpp": build, **runs}
    return Clock("cpu").interleaved(runs, rounds, seconds)


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [
            row["layout"],
            number(row["cpp"], 3),
            number(row["python"]),
            number(row["python_over_cpp"]),
        ]
        for row in report["rows"]
    ]
    header = ["layout", "C++, ms", "Python, ms", "Python over C++"]
    parts = ["# Building a VisualLayout", described(report), table(header, rows)]
    return "\n\n".join(parts) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--budget-minutes", type=float, default=1.0, help="shared by the layouts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    arguments = sys.argv[1:] if argv is None else argv
    report = start("layout", "cpu", "benchmarks.bench_layout", arguments)
    path = result_path("layout", "cpu", options.output)
    report["rows"] = []
    layouts = builds()
    for name, build in layouts.items():
        found = measure(build, options.rounds, 60 * options.budget_minutes / len(layouts))
        ms = {key: found[key]["ms"] if key in found else None for key in ("cpp", "python")}
        ratio = ms["cpp"] and ms["python"] / ms["cpp"]
        report["rows"].append({"layout": name, **ms, "python_over_cpp": ratio})
        print(f"{name}: {number(ms['cpp'], 3)} ms, Python {number(ms['python'])} ms", flush=True)
    ratios = [row["python_over_cpp"] for row in report["rows"]]
    median = None if None in ratios else statistics.median(ratios)
    report["headline"] = {"layout: Python's time over C++": headline(median, "x", "more")}
    write_json(path, report)
    path.with_suffix(".md").write_text(markdown(report))
    print(f"written: {path} and .md")


if __name__ == "__main__":
    main()
