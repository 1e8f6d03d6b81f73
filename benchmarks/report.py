"""Tables and a plot of the kernel benchmark, made from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result_files import NOT_MEASURED, described, number, table, write_json

# name -> (what is better, first limit, goal); on a GPU.
GOALS: dict[str, tuple[str, float, float]] = {
    "student_over_plain": ("less", 1.6, 1.25),
    "plain_speed_over_fastest_peer": ("more", 0.85, 1.0),
    "eager_over_student": ("more", 5.0, 10.0),
    "extra_memory_over_eagers_extra": ("less", 0.05, 0.05),
}
RATIOS = (
    "student_over_plain",
    "plain_speed_over_fastest_peer",
    "eager_over_student",
    "target_over_plain_forward",
    "extra_memory_over_eagers_extra",
)


def line(case: dict[str, Any]) -> str:
    """One case on one line, for the terminal."""
    if "failed" in case:
        return f"{case['name']}: failed: {case['failed']}"
    ratios = case["ratios"]
    parts = [f"{name} {number(ratios[name], 3)}" for name in RATIOS]
    return f"{case['name']}: {', '.join(parts)} (peer: {ratios['fastest_peer']})"


def markdown(found: dict[str, Any]) -> str:
    ceiling = found["ceilings"]
    parts = [
        "# Kernels beside their peers",
        described(found),
        f"Measured ceilings: matrix product {ceiling['matmul_tflops']:.1f} TFLOP/s, copy "
        f"{ceiling['copy_gb_per_s']:.0f} GB/s (read and written).",
        "Medians of interleaved rounds; a ratio compares two medians of one case. Milliseconds "
        "are of forward and backward unless they say forward. Peak: of one forward and backward, "
        "results included, inputs not. Saved: kept for backward, inputs included.",
        "## Ratios",
    ]
    measured = [case for case in found["cases"] if "failed" not in case]
    rows = [
        [
            case["name"],
            *(number(case["ratios"][name], 3) for name in RATIOS),
            case["ratios"]["fastest_peer"] or NOT_MEASURED,
        ]
        for case in measured
    ]
    parts.append(table(["case", *RATIOS, "fastest peer"], rows))
    for case in measured:
        parts += [f"## {case['name']}", _variants(case)]
        if case["kernels"]:
            parts.append(_kernels(case))
    lines = absent_lines(measured)
    if lines:
        parts += ["## Absent", "\n".join(lines)]
    failed = [f"- {c['name']}: {c['failed']}" for c in found["cases"] if "failed" in c]
    failed += [f"- {name}: {NOT_MEASURED}" for name in found["not_measured"]]
    if failed:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def absent_lines(cases: list[dict[str, Any]]) -> list[str]:
    """Variants that were not timed, by reason, with their cases where it was not in all."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, row in case["variants"].items():
            if "absent" in row:
                found.setdefault((name, row["absent"]), []).append(case["name"])
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, reason), where in found.items():
        merged.setdefault((reason, tuple(where)), []).append(name)
    lines = []
    for (reason, where), names in merged.items():
        others = [case["name"] for case in cases if case["name"] not in where]
        at = f" (in: {'; '.join(where)})" if others else ""
        if len(others) < len(where) and others:
            at = f" (in all but: {'; '.join(others)})"
        lines.append(f"- {', '.join(f'`{name}`' for name in names)}: {reason}{at}")
    return lines


def mebibytes(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 2**20:.1f}"


def _variants(case: dict[str, Any]) -> str:
    plain = f"plain[{case['backend']}]"
    rows = []
    for name, row in case["variants"].items():
        if "absent" in row:
            continue
        base = f"{plain} forward" if name.endswith("forward") or "target" in name else plain
        over = case["variants"].get(base, {}).get("ms")
        memory = ["", ""]
        if "saved_bytes" in row:
            memory = [mebibytes(row["peak_bytes"]), mebibytes(row["saved_bytes"])]
        times = [number(row["ms"], 3), f"{100 * row['spread']:.0f}%"]
        over_plain = number(over and row["ms"] / over)
        rows.append([name, *times, over_plain, number(row["host_ms"], 3), *memory])
    header = ["variant", "ms", "spread", "over plain", "host ms", "peak MiB", "saved MiB"]
    return table(header, rows)


def _kernels(case: dict[str, Any]) -> str:
    rows = [
        [
            row["kernel"],
            number(row["ms"], 3),
            str(row["launches"]),
            number(row.get("tflops"), 0) if "tflops" in row else "",
            f"{100 * row['share_of_matmul']:.0f}%" if "tflops" in row else "",
            str(row["registers"]),
            str(row["spills"]),
        ]
        for row in case["kernels"]
    ]
    header = ["kernel", "ms", "launches", "TFLOP/s", "of the matrix product", "registers", "spills"]
    return table(header, rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """Time against tokens of the main variants, and the ratios, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [case for case in found["cases"] if "failed" not in case]
    if not measured:
        return
    shape = ("heads", "kv_heads", "head_dim", "dtype")
    main = [c for c in measured if all(c[k] == measured[0][k] for k in shape)]
    main = sorted({c["tokens"]: c for c in reversed(main)}.values(), key=lambda c: c["tokens"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = sorted({name for case in main for name in case["variants"]})
    for name in names:
        if name.endswith("forward") or name.startswith("target"):
            continue
        rows = [(c["tokens"], c["variants"][name]) for c in main if name in c["variants"]]
        points = [(n, row["ms"] / c_batch(main, n)) for n, row in rows if "ms" in row]
        if points:
            left.plot(*zip(*points), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per sample, forward+backward")
    left.legend(fontsize=7)
    for name in ("student_over_plain", "plain_speed_over_fastest_peer"):
        points = [(c["tokens"], c["ratios"][name]) for c in main if c["ratios"][name] is not None]
        if points:
            [drawn] = right.plot(*zip(*points), marker="o", label=name)
            right.axhline(GOALS[name][1], color=drawn.get_color(), linestyle=":")
    right.set(
        xscale="log", xlabel="tokens", ylabel="ratio (dotted: limit on a GPU)", ylim=(0, None)
    )
    right.legend(fontsize=7)
    figure.suptitle(f"{found['environment']['device']}: {main[0]['name'].partition(', H')[2]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def c_batch(cases: list[dict[str, Any]], tokens: int) -> int:
    return next(c["batch"] for c in cases if c["tokens"] == tokens)


def write(path: Path, found: dict[str, Any]) -> None:
    """JSON, and beside it the tables and the plot (which a machine without matplotlib lacks)."""
    write_json(path, found)
    path.with_suffix(".md").write_text(markdown(found))
    try:
        plot(found, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
