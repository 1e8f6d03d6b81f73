"""Exponents, ends and tables of the scaling benchmark, made from what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result_files import NOT_MEASURED, described, headline, number, table, write_json
from benchmarks.scaling_fit import fit, size_at, through

VARIANTS = ("plain", "student", "eager")
# Name in a report -> (key of a row, what it is)
QUANTITIES = {
    "time": ("ms", "time"),
    "memory": ("peak_bytes", "peak memory"),
    "kept": ("saved_bytes", "kept for backward"),
}
NOTHING = "Nothing was measured: the budget ended before the first size."


def values(axis: dict[str, Any], variant: str, quantity: str) -> list[float | None]:
    """One per point of the axis; None where it was not measured."""
    key = QUANTITIES[quantity][0]
    return [point["variants"].get(variant, {}).get(key) for point in axis["points"]]


def fits(axis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """variant -> quantity -> fit, over the upper half of an axis, or all of one that has an end."""
    sizes = [point["size"] for point in axis["points"]]
    share = 1.0 if axis["bounded"] else 0.5
    return {
        variant: {name: fit(sizes, values(axis, variant, name), share) for name in QUANTITIES}
        for variant in VARIANTS
    }


def extrapolated(axis: dict[str, Any], limit: int) -> dict[str, Any] | None:
    """Where eager's fitted memory passes the limit, if it stopped for another reason."""
    end = axis["ends"].get("eager")
    if axis["bounded"] or end is None or end["kind"] not in ("time", "budget", "interrupted"):
        return None
    fitted = axis["fits"]["eager"]["memory"]
    if not fitted:
        text = "not extrapolated: eager's memory was measured at fewer than 3 sizes"
        return {"size": None, "text": text}
    size, symbol = size_at(fitted, limit), axis["symbol"]
    if not size:
        text = "not extrapolated: eager's fitted memory is too far from the limit"
        return {"size": None, "text": text}
    text = f"extrapolated, not measured: eager's fitted memory, {symbol}^{fitted['exponent']:.2f}, "
    text += f"would pass the limit of {limit / 2**30:.3g} GiB at about {symbol} = {size:,.0f}"
    # How far the ends of the exponent's interval put it, from the last size on.
    near, far = (size_at(through(fitted, fitted[end]), limit) for end in ("high", "low"))
    upper = f"{near:,.0f} or more" if far is None else f"{near:,.0f} to {far:,.0f}"
    text += f" ({upper}, by the exponent's interval)"
    return {"size": size, "near": near, "far": far, "text": text}


def largest(axis: dict[str, Any], variant: str) -> int | None:
    """The largest size at which a variant ran."""
    return max((p["size"] for p in axis["points"] if variant in p["variants"]), default=None)


def headlines(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tokens = next(axis for axis in report["axes"] if axis["field"] == "tokens")
    found = {
        f"largest N measured, {variant}": headline(largest(tokens, variant), "tokens", "more")
        for variant in ("eager", "student")
    }
    end = tokens["ends"].get("eager", {})
    at = end["at"] if end.get("kind") == "memory" else None
    found["N at which eager is out of memory"] = headline(at, "tokens", "more")
    for variant in ("student", "eager"):
        for quantity in ("time", "memory"):
            fitted = tokens["fits"][variant][quantity]
            exponent = fitted and fitted["exponent"]
            found[f"{quantity} exponent in N, {variant}"] = headline(exponent, "", "less")
    return found


def write(path: Path, report: dict[str, Any]) -> None:
    """JSON with what follows from the points, and beside it the tables."""
    for axis in report["axes"]:
        axis["fits"] = fits(axis)
        axis["extrapolated"] = extrapolated(axis, report["memory_limit_bytes"])
    report["headline"] = headlines(report)
    write_json(path, report)
    path.with_suffix(".md").write_text(markdown(report))


def line(symbol: str, point: dict[str, Any]) -> str:
    """A point on one line, for the terminal."""
    parts = []
    for name, row in point["variants"].items():
        ms = f"{row['ms']:.1f} ms" if "ms" in row else f"not timed ({row['not_timed']})"
        parts.append(f"{name} {ms}, {mebibytes(row['peak_bytes'])} MiB")
    return f"{symbol} = {point['size']}: {'; '.join(parts)}"


def mebibytes(count: int | None) -> str:
    if count is None:
        return NOT_MEASURED
    return number(count / 2**20, 1 if count < 100 * 2**20 else 0)


def interval(fitted: dict[str, Any] | None) -> str:
    """An exponent with its 95% interval."""
    if fitted is None:
        return "fewer than 3 sizes"
    return f"{fitted['exponent']:.2f} [{fitted['low']:.2f}, {fitted['high']:.2f}]"


def markdown(report: dict[str, Any]) -> str:
    limit = report["memory_limit_bytes"] / 2**30
    parts = [
        "# Scaling",
        described(report),
        f"Load of the machine at the start: {report['load']:.1f}. Backend of `plain` and "
        f"`student`: {report['backend']}. Memory limit of a call with its inputs: {limit:.3g} GiB; "
        f"longest call allowed: {report['call_limit_seconds']:.0f} s; budget: "
        f"{report['budget_seconds']:.0f} s, used: {report['seconds']:.0f} s.",
        "Forward and backward of attention layers whose activations all live until one backward; "
        "each has q, k and v of its own, made from one small input. `plain` has no alignment, "
        "`student` has the alignment loss, `eager` the same loss with every map materialised. "
        "Times are medians of interleaved rounds (with half of the distance of the quartiles); "
        "outputs and losses were compared at every size that was timed. Peak: the most memory "
        "beyond the inputs. Kept: bytes held for the backward, inputs included.",
    ]
    if not any(axis["points"] for axis in report["axes"]):
        parts.append(f"**{NOTHING}**")
    for axis in report["axes"]:
        parts += [f"## {axis['title'].capitalize()} ({axis['symbol']})", f"{axis['fixed']}."]
        if axis["points"]:
            parts += [_points(axis), "Exponents, with 95% intervals:", _exponents(axis)]
        ends = [
            f"- {name}: {axis['ends'][name]['text']}" for name in VARIANTS if name in axis["ends"]
        ]
        if axis["extrapolated"]:
            ends.append(f"- {axis['extrapolated']['text']}")
        parts.append("\n".join(ends) or NOT_MEASURED)
    return "\n\n".join(parts) + "\n"


def _points(axis: dict[str, Any]) -> str:
    header = [axis["symbol"]]
    for name in VARIANTS:
        header += [f"{name}, ms", "peak, MiB", "kept, MiB"]
    rows = []
    for point in axis["points"]:
        cells = [f"{point['size']}"]
        for name in VARIANTS:
            row = point["variants"].get(name)
            if row is None:
                cells += ["", "", ""]
                continue
            ms = "not timed"
            if "ms" in row:
                ms = f"{number(row['ms'], 1)} ± {100 * row['spread']:.0f}%"
            cells += [ms, mebibytes(row["peak_bytes"]), mebibytes(row["saved_bytes"])]
        rows.append(cells)
    return table(header, rows)


def _exponents(axis: dict[str, Any]) -> str:
    rows = []
    for name in VARIANTS:
        found = axis["fits"][name]
        fitted = found["memory"] or found["time"]
        sizes = f"{fitted['first']} to {fitted['last']}" if fitted else ""
        rows.append([name, *(interval(found[quantity]) for quantity in QUANTITIES), sizes])
    return table(["variant", *(what for _, what in QUANTITIES.values()), "sizes fitted"], rows)
