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
        "are of forward and backward unless they say forward.",
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
    failed = [f"- {c['name']}: {c['failed']}" for c in found["cases"] if "failed" in c]
    failed += [f"- {name}: {NOT_MEASURED}" for name in found["not_measured"]]
    if failed:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _variants(case: dict[str, Any]) -> str:
    rows = []
    for name, row in case["variants"].items():
        if "absent" in row:
            rows.append([name, f"absent: {row['absent']}".replace("|", "/"), "", "", ""])
            continue
        peak = row.get("peak_bytes")
        rows.append(
            [
                name,
                number(row["ms"], 3),
                f"{100 * row['spread']:.0f}%",
                number(row["host_ms"], 3),
                NOT_MEASURED if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    return table(["variant", "ms", "spread", "host ms", "peak MiB"], rows)


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
