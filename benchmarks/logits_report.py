"""Tables, sentences and a plot of the benchmark of losses on logits, made from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result_files import (
    NOT_MEASURED,
    described,
    headline,
    number,
    table,
    write_json,
)

BASE = "dense"
# A difference below this is not called one.
NOTABLE = 0.05


def ratios(rows: dict[str, dict[str, Any]], ours: str) -> dict[str, float | None]:
    """Of `ours` to `dense`; None where one of them was not measured."""

    def over(field: str) -> float | None:
        a, b = rows.get(ours, {}).get(field), rows.get(BASE, {}).get(field)
        return a / b if a is not None and b else None

    return {
        "time_over_dense": over("ms"),
        "peak_over_dense": over("peak_bytes"),
        "kept_over_dense": over("kept_bytes"),
    }


def headlines(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the case with most rows, in which chunks matter most."""
    measured = [case for case in cases if "failed" not in case]
    if not measured:
        return {}
    case = max(measured, key=lambda c: c["rows"])
    return {
        f"chunked {what} over dense, {case['name']}": headline(
            case["ratios"][f"{key}_over_dense"], "x", "less"
        )
        for what, key in (("time", "time"), ("peak memory", "peak"))
    }


def line(case: dict[str, Any]) -> str:
    """One case on one line, for the terminal."""
    if "failed" in case:
        return f"{case['name']}: failed: {case['failed']}"
    found = case["ratios"]
    return (
        f"{case['name']}: chunked over dense: time {number(found['time_over_dense'])}, "
        f"peak memory {number(found['peak_over_dense'])}"
    )


def compared(ratio: float | None, less: str, more: str) -> str:
    """A ratio in words: "1.52x (slower)"."""
    if ratio is None:
        return NOT_MEASURED
    word = less if ratio < 1 - NOTABLE else more if ratio > 1 + NOTABLE else "no difference"
    return f"{ratio:.2f}x ({word})"


def sentence(case: dict[str, Any]) -> str:
    """What the numbers of a case say about the trainer's loss, good or bad."""
    found = case["ratios"]
    time = compared(found["time_over_dense"], "faster", "**slower**")
    peak = compared(found["peak_over_dense"], "less", "**more**")
    text = f"`chunked` takes {time} the time of `dense` and {peak} its peak memory. "
    if case["rows_at_once"] == case["rows"]:
        text += "All rows are one chunk here: nothing is saved by chunks."
    else:
        text += f"Its KL holds logits of {case['rows_at_once']} rows at once."
    return text + less_exact(case)


def less_exact(case: dict[str, Any]) -> str:
    """Where the KL's gradient is less exact than dense's in float32; nothing where it is not."""
    name = "d_hidden of kl alone"
    errors = [case["checked"][v]["errors"].get(name) for v in ("chunked", BASE)]
    if None in errors or errors[0] <= 2 * errors[1]:
        return ""
    return (
        f" **The gradient of its KL alone is off by {errors[0]:.1e} of the largest entry, "
        f"{errors[0] / errors[1]:.1f} times as much as that of `dense`**, whose softmax is in "
        f"float32 and not in {case['dtype']}."
    )


def rows_of(case: dict[str, Any]) -> list[list[str]]:
    base = case["variants"].get(BASE, {})
    rows = []
    for name, row in case["variants"].items():
        if "absent" in row:
            reason = row["absent"].replace("|", "/")
            rows.append([name, f"absent: {reason}", "", "", "", "", ""])
            continue
        cells = [name, number(row["ms"], 1), f"{100 * row['spread']:.0f}%"]
        cells.append(number(row["ms"] / base["ms"] if base.get("ms") else None))
        peak, base_peak = row["peak_bytes"], base.get("peak_bytes")
        cells.append(number(None if peak is None else peak / 2**20, 0))
        cells.append(number(peak / base_peak if peak is not None and base_peak else None))
        kept = row["kept_bytes"]
        cells.append(number(None if kept is None else kept / 2**20, 0))
        rows.append(cells)
    return rows


HEADER = ["variant", "ms", "spread", "over dense", "peak MiB", "over dense", "kept MiB"]


def markdown(found: dict[str, Any]) -> str:
    from cdfast.losses import KL_ROWS

    cuda = found["environment"]["device"] != "cpu"
    lm = (
        "its LM loss is Liger's, in chunks of a size of its own"
        if cuda
        else "its LM loss is not chunked on a CPU"
    )
    parts = [
        "# Losses on logits: dense and chunked",
        described(found),
        "LM + KL on answer rows, forward and backward to the hidden states of all tokens and to "
        "the output embedding. Medians of interleaved rounds; every ratio is to `dense` of the "
        "same case. Kept is the memory held between forward and backward. Each was checked first, "
        "within the error budget of the tests: against float64, beside eager PyTorch with every "
        "operation in the dtype of the inputs.",
        "`chunked` is what the trainer computes: answer rows only, and KL in chunks of "
        f"{KL_ROWS} rows, of which no logits are saved; {lm}. LM and KL each project the student's "
        "rows, where `dense` projects them once for both.",
    ]
    for case in found["cases"]:
        if "failed" not in case:
            parts += [f"## {case['name']}", table(HEADER, rows_of(case)), sentence(case)]
    failed = [f"- {c['name']}: {c['failed']}" for c in found["cases"] if "failed" in c]
    failed += [f"- {name}: {NOT_MEASURED}" for name in found["not_measured"]]
    if failed:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Time and peak memory of every variant over dense's, a group of bars per case, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [case for case in found["cases"] if "failed" not in case]
    if not cases:
        return
    names = list(cases[0]["variants"])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    height = 0.8 / len(names)
    for axis, field, label in zip(axes, ("ms", "peak_bytes"), ("time", "peak memory")):
        for i, name in enumerate(names):
            points = [
                (y + i * height, row[field] / base[field])
                for y, case in enumerate(cases)
                for row, base in [(case["variants"][name], case["variants"].get(BASE, {}))]
                if row.get(field) is not None and base.get(field)
            ]
            if points:
                axis.barh(*zip(*points), height=height, label=name)
        axis.axvline(1, color="grey", linestyle=":")
        axis.set(xlabel=f"{label} over dense")
    labels = [case["name"].replace(", d", "\nd") for case in cases]
    axes[0].set_yticks([y + 0.4 - height / 2 for y in range(len(cases))], labels)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    figure.suptitle(f"LM + KL, forward and backward; {found['environment']['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, found: dict[str, Any]) -> None:
    """JSON, and beside it the tables and the plot (which a machine without matplotlib lacks)."""
    write_json(path, found)
    path.with_suffix(".md").write_text(markdown(found))
    try:
        plot(found, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
