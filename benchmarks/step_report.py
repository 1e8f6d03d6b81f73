"""Table and plot of the training step's benchmark, made from its JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.result_files import described, headline, number, table, write_json


def headlines(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Time and memory of the variants with alignment against `kd`."""
    names = {"seconds_over_kd": "time", "peak_bytes_of_step_over_kd": "memory of the step"}
    return {
        f"{names[field]}, {row['variant']} over kd": headline(row[field], "x", "less")
        for row in rows
        if row["variant"] != "kd"
        for field in names
    }


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [
            row["variant"],
            number(row["seconds"]),
            f"{row['seconds_over_kd']:.2f}x",
            number(row["peak_bytes"] / 2**30),
            number(row["peak_bytes_of_step"] / 2**30),
            f"{row['peak_bytes_of_step_over_kd']:.2f}x",
        ]
        for row in report["rows"]
    ]
    columns = ["variant", "s per step", "over kd", "peak GiB", "step's own GiB", "over kd"]
    sizes = ", ".join(f"{k} {v}" for k, v in report["sizes"].items())
    parts = ["# One distillation step", described(report), f"Sizes: {sizes}.", table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds and memory of a step, side by side, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["variant"] for row in report["rows"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axes, field, scale, what in (
        (left, "seconds", 1, "s per step"),
        (right, "peak_bytes_of_step", 2**30, "memory of the step, GiB"),
    ):
        bars = axes.barh(names, [row[field] / scale for row in report["rows"]])
        axes.bar_label(bars, [f"{row[f'{field}_over_kd']:.2f}x" for row in report["rows"]])
        axes.set(xlabel=f"{what} (over kd)")
        axes.margins(x=0.15)
        axes.invert_yaxis()
    figure.suptitle(report["environment"]["device"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, report: dict[str, Any]) -> None:
    """JSON, and beside it the table and the plot (which a machine without matplotlib lacks)."""
    write_json(path, report)
    path.with_suffix(".md").write_text(markdown(report))
    try:
        plot(report, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
