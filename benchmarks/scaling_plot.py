"""The plot of the scaling benchmark: time and memory against four axes, log-log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.scaling_fit import value_at
from benchmarks.scaling_report import VARIANTS, values

COLOURS = {"plain": "tab:blue", "student": "tab:green", "eager": "tab:red"}
MARKERS = {"plain": "s", "student": "o", "eager": "^"}
# Quantity, its unit in that of the rows, label.
ROWS = (("time", 1.0, "ms, forward + backward"), ("memory", 2.0**20, "peak MiB beyond the inputs"))


def draw(path: Path, report: dict[str, Any]) -> None:
    """As PNG; none where nothing was measured or matplotlib is not installed."""
    drawn = [axis for axis in report["axes"] if axis["points"]]
    if not drawn:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        2,
        len(drawn),
        figsize=(4.4 * len(drawn), 8),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for column, axis in zip(grid.T, drawn):
        for panel, (quantity, unit, label) in zip(column, ROWS):
            _curves(panel, axis, quantity, unit)
            if axis is drawn[0]:
                panel.set_ylabel(label)
        _limit(column[1], axis, report["memory_limit_bytes"] / ROWS[1][1])
        for panel in column:
            _finish(panel, axis)
        column[0].set_title(f"{axis['title']} ({axis['symbol']})\n{axis['fixed']}", fontsize=9)
        column[1].set_xlabel(axis["title"])
    environment = report["environment"]
    device = environment["device"]
    if device == "cpu":
        device = f"{environment['processor']}, threads: {environment['threads']}"
    figure.suptitle(
        f"{device}\nfilled: measured; line: fitted over its range, with the 95% interval of the "
        "exponent; x: out of memory; hollow and dashed: extrapolated, not measured",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curves(panel: Any, axis: dict[str, Any], quantity: str, unit: float) -> None:
    sizes = [point["size"] for point in axis["points"]]
    for name in VARIANTS:
        colour = COLOURS[name]
        points = [(s, v / unit) for s, v in zip(sizes, values(axis, name, quantity)) if v]
        fitted = axis["fits"][name][quantity]
        label = name
        if fitted:
            ends = fitted["first"], fitted["last"]
            panel.plot(ends, [value_at(fitted, s) / unit for s in ends], color=colour, lw=1.2)
            label += f": {axis['symbol']}^{fitted['exponent']:.2f}"
            label += f" [{fitted['low']:.2f}, {fitted['high']:.2f}]"
        if points:
            panel.plot(
                *zip(*points), color=colour, marker=MARKERS[name], ms=6, ls="none", label=label
            )
        end = axis["ends"].get(name, {})
        if end.get("kind") == "memory":
            label = f"{name}: out of memory at {axis['symbol']} = {digits(end['at'])}"
            panel.axvline(end["at"], color=colour, ls=":", lw=1, label=label)
            # At the upper edge: there is no value there.
            top = panel.get_xaxis_transform()
            panel.plot(end["at"], 0.97, "x", color=colour, ms=10, mew=2.5, transform=top)


def _limit(panel: Any, axis: dict[str, Any], limit: float) -> None:
    """The memory limit, and the way of eager's fit to it, on the axes where either matters."""
    beyond = axis["extrapolated"] or {"size": None}
    if beyond["size"]:
        fitted = axis["fits"]["eager"]["memory"]
        sizes = fitted["last"], beyond["size"]
        heights = [value_at(fitted, s) / ROWS[1][1] for s in sizes]
        panel.plot(sizes, heights, color=COLOURS["eager"], ls="--", lw=1)
        label = f"eager, extrapolated: limit at {axis['symbol']} = {digits(beyond['size'])}"
        panel.plot(sizes[1], heights[1], "^", color=COLOURS["eager"], mfc="none", ms=9, label=label)
    if beyond["size"] or any(end["kind"] == "memory" for end in axis["ends"].values()):
        panel.axhline(limit, color="0.4", ls="-.", lw=1, label=f"limit, {limit / 1024:.3g} GiB")


def _finish(panel: Any, axis: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    sizes = [point["size"] for point in axis["points"]]
    sizes += [end["at"] for end in axis["ends"].values() if end["kind"] == "memory"]
    sizes = sorted(set(sizes))
    panel.set(xscale="log", yscale="log")
    ticks = apart(sizes)
    panel.set_xticks(ticks, [digits(s) for s in ticks])
    panel.minorticks_off()
    low, high = panel.get_ylim()
    if high / low < 1000:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    panel.grid(alpha=0.3)
    # Room for the legend above the curves.
    panel.set_ylim(low, high * (high / low) ** 0.45)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7.5, loc="upper left")


def apart(sizes: list[float], least: float = 0.12) -> list[float]:
    """Those at least a share of the axis from the one before, so that labels do not overlap."""
    found = sizes[:1]
    for size in sizes[1:]:
        if math.log(size / found[-1]) >= least * math.log(sizes[-1] / sizes[0]):
            found.append(size)
    return found


def digits(size: float) -> str:
    """A size in digits, as in the tables."""
    return f"{size:,.0f}"
