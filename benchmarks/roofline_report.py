"""Table and plot of the roofline benchmark, made from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result_files import NOT_MEASURED, described, number, table, write_json

EXPLANATION = (
    "Operations are matrix products on visible pairs, bytes every input read and every output "
    "written once (`benchmarks/work.py`). The roof is the smaller of the product's rate and the "
    "intensity times the copy's; the share is the time at the roof over the time measured. "
    "Operations of tiles: what the kernel computes in whole tiles, over the ideal. Caches can "
    "make a kernel faster than the copy's roof at small sizes: its share is then above 100%. "
    "Kernels without matrix products are in the table only."
)


def ceilings_line(ceiling: dict[str, float]) -> str:
    return (
        f"Measured ceilings: matrix product {ceiling['matmul_tflops']:.3g} TFLOP/s, copy "
        f"{ceiling['copy_gb_per_s']:.3g} GB/s (read and written)."
    )


def line(case: dict[str, Any]) -> str:
    """One case on one line, for the terminal."""
    if "failed" in case:
        return f"{case['name']}: failed: {case['failed']}"
    parts = (f"{label(row)} {100 * row['share']:.0f}%" for row in case["rows"])
    return f"{case['name']}: of the roof: {', '.join(parts)}"


def label(row: dict[str, Any]) -> str:
    """A kernel with the operation it is part of; a phase of the CPU backend as it is."""
    if not row["name"].startswith("_"):
        return row["name"]
    return f"{row['operation']}: {row['name'].strip('_').removesuffix('_kernel')}"


def markdown(found: dict[str, Any]) -> str:
    parts = ["# Roofline", described(found), ceilings_line(found["ceilings"]), EXPLANATION]
    measured = [case for case in found["cases"] if "failed" not in case]
    for case in sorted(measured, key=lambda c: (-c["tokens"], -c["batch"], c["heads"])):
        parts += [f"## {case['name']}", _rows(case)]
        if case["steps"]:
            parts.append(_steps(case))
    failed = [f"- {c['name']}: {c['failed']}" for c in found["cases"] if "failed" in c]
    failed += [f"- {name}: {NOT_MEASURED}" for name in found["not_measured"]]
    if failed:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _rows(case: dict[str, Any]) -> str:
    rows = []
    for row in case["rows"]:
        ratio = None
        if row["tile_operations"] is not None and row["operations"]:
            ratio = row["tile_operations"] / row["operations"]
        rows.append(
            [
                label(row),
                f"{row['ms']:.3g}",
                f"{100 * row['spread']:.0f}%",
                "" if row["launches"] is None else str(row["launches"]),
                f"{row['operations'] / 1e9:.3g}",
                "" if ratio is None else f"{ratio:.2f}x",
                f"{row['bytes'] / 2**20:.3g}",
                f"{row['intensity']:.3g}",
                f"{row['tflops']:.3g}",
                f"{row['gb_per_s']:.3g}",
                f"{100 * row['share']:.0f}%",
            ]
        )
    header = ["kernel or phase", "ms", "spread", "launches", "GFLOP", "in tiles", "MiB"]
    return table([*header, "FLOP/byte", "TFLOP/s", "GB/s", "of the roof"], rows)


def _steps(case: dict[str, Any]) -> str:
    rows = []
    for name, step in case["steps"].items():
        bound = NOT_MEASURED
        if step["launch_bound"] is not None:
            bound = "yes" if step["launch_bound"] else "no"
        numbers = [number(step[key], 3) for key in ("kernels_ms", "ms", "host_ms", "graph_ms")]
        rows.append([name, *numbers, bound])
    header = ["operation", "kernels, ms", "eager, ms", "host, ms", "graph, ms", "launch-bound"]
    return table(header, rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """The roofline with a point per kernel of the largest size, and the shares against size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [_drawn(case) for case in found["cases"] if "failed" not in case]
    if not measured:
        return
    largest = max(measured, key=lambda c: (c["tokens"], c["batch"]))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5.2), layout="constrained", width_ratios=(3, 2)
    )
    styles = _styles([label(row) for case in measured for row in case["rows"]])
    _draw_roof(left, found["ceilings"], largest, styles)
    shape = ("heads", "kv_heads", "head_dim", "dtype")
    alike = [c for c in measured if all(c[k] == largest[k] for k in shape)]
    # Of two batches of one length the larger: the smaller is there to be launch-bound.
    alike = sorted(
        {c["tokens"]: c for c in sorted(alike, key=lambda c: c["batch"])}.values(),
        key=lambda c: c["tokens"],
    )
    for name, (color, marker) in styles.items():
        points = [
            (c["tokens"], 100 * row["share"])
            for c in alike
            for row in c["rows"]
            if label(row) == name
        ]
        if points:
            right.plot(*zip(*points), color=color, marker=marker, markersize=6, linewidth=1)
    right.axhline(100, color="black", linewidth=1)
    right.set(xscale="log", xlabel="tokens", ylabel="share of the roof, %", ylim=(0, None))
    right.set_xticks([c["tokens"] for c in alike], [str(c["tokens"]) for c in alike])
    right.minorticks_off()
    right.grid(alpha=0.3)
    figure.suptitle(
        f"{found['environment']['processor' if largest['backend'] == 'cpu' else 'device']}"
        f": {largest['name']}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _drawn(case: dict[str, Any]) -> dict[str, Any]:
    """Of Triton kernels those of the student and of the target; the table has all."""
    if case["backend"] == "cpu":
        return case
    return {**case, "rows": [r for r in case["rows"] if r["operation"] in ("student", "target")]}


def _styles(names: list[str]) -> dict[str, tuple[Any, str]]:
    """A color and a marker of its own for up to ten names."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    unique = dict.fromkeys(names)
    return {name: (colors[i % 10], "osD^vP*X<>"[i % 10]) for i, name in enumerate(unique)}


def _draw_roof(axes: Any, ceiling: dict[str, float], case: dict[str, Any], styles: dict) -> None:
    rows = [row for row in case["rows"] if row["operations"]]
    top, slope = ceiling["matmul_tflops"], ceiling["copy_gb_per_s"] / 1e3
    ridge = top / slope
    low = min(ridge, *(row["intensity"] for row in rows)) / 8
    high = max(ridge, *(row["intensity"] for row in rows)) * 4
    axes.plot([low, ridge], [slope * low, top], color="black")
    axes.plot([ridge, high], [top, top], color="black")
    axes.annotate(
        f"matrix product, {top:.3g} TFLOP/s",
        (high, top),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
    )
    axes.annotate(
        f"copy, {ceiling['copy_gb_per_s']:.3g} GB/s",
        (1.5 * low, slope * 1.5 * low),
        xytext=(12, -4),
        textcoords="offset points",
        va="top",
    )
    for row in rows:
        color, marker = styles[label(row)]
        text = f"{label(row)}: {100 * row['share']:.0f}%"
        axes.plot(
            row["intensity"],
            row["tflops"],
            color=color,
            marker=marker,
            markersize=8,
            linestyle="none",
            label=text,
        )
    bottom = min(slope * low, *(row["tflops"] for row in rows))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 2, top * 2))
    axes.set(xlabel="operations per byte", ylabel="TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(
        title="share of the roof",
        fontsize=8,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
    )


def write(path: Path, found: dict[str, Any]) -> None:
    """JSON, and beside it the table and the plot (which a machine without matplotlib lacks)."""
    write_json(path, found)
    path.with_suffix(".md").write_text(markdown(found))
    try:
        plot(found, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
