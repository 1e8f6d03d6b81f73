"""The scaling benchmark on a CPU: fits, ends, what is measured, and what is only extrapolated."""

import argparse
import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_scaling,
    memory,
    scaling_cases,
    scaling_fit,
    scaling_plot,
    scaling_report,
    variants,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of a CPU is measured on Linux")
SIZES = [256 * 2**i for i in range(8)]
SHAPE = {"heads": 6, "head_dim": 16}


# Fits


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_fit_recovers_the_exponent(exponent):
    fitted = scaling_fit.fit(SIZES, [3 * n**exponent for n in SIZES])
    assert fitted["exponent"] == pytest.approx(exponent)
    assert fitted["low"] == pytest.approx(exponent)
    assert fitted["high"] == pytest.approx(exponent)
    assert scaling_fit.value_at(fitted, 1000) == pytest.approx(3 * 1000**exponent)
    assert scaling_fit.size_at(fitted, 3 * 1000**exponent) == pytest.approx(1000)


def test_fixed_costs_of_small_sizes_do_not_count():
    values = [n**2 + 1000**2 for n in SIZES]
    fitted = scaling_fit.fit(SIZES, values)
    assert (fitted["points"], fitted["first"], fitted["last"]) == (4, SIZES[4], SIZES[-1])
    assert fitted["exponent"] == pytest.approx(2, abs=0.06)
    whole = np.polyfit(np.log(SIZES), np.log(values), 1)[0]
    assert abs(fitted["exponent"] - 2) < abs(whole - 2) / 5


@pytest.mark.parametrize("count", [5, 8, 40])
def test_the_interval_covers_the_exponent_as_often_as_it_says(count):
    random = np.random.default_rng(0)
    sizes = np.geomspace(256, 2**16, count)
    trials = 1000
    covered = 0
    for _ in range(trials):
        fitted = scaling_fit.fit(sizes, sizes**1.5 * np.exp(0.1 * random.standard_normal(count)))
        covered += fitted["low"] <= 1.5 <= fitted["high"]
    assert 0.93 <= covered / trials <= 0.98


def test_too_few_points_have_no_exponent():
    assert scaling_fit.fit(SIZES[:2], [1.0, 2.0]) is None
    assert scaling_fit.fit(SIZES[:4], [1.0, None, 2.0, 0]) is None
    assert scaling_fit.fit(SIZES[:3], [1.0, 2.0, 4.0])["points"] == 3
    assert scaling_fit.fit(SIZES, SIZES, 1.0)["points"] == 8


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1e-9, 0.2])
def test_a_curve_reaches_nothing_far_away(exponent):
    fitted = scaling_fit.fit(SIZES, [n**exponent for n in SIZES])
    assert scaling_fit.size_at(fitted, 10 * SIZES[-1] ** exponent) is None


def test_the_next_value_follows_the_last_two():
    assert scaling_fit.predicted([1, 2, 4], [7.0, 1.0, 8.0], 8) == pytest.approx(64)
    assert scaling_fit.predicted([1, 2, 4], [1.0, 8.0, None], 8) == pytest.approx(8 * 4**3)
    assert scaling_fit.predicted([1], [3.0], 2) == pytest.approx(12)
    assert scaling_fit.predicted([1], [None], 2) is None


# What is measured


@pytest.mark.parametrize("layers", [1, 3])
def test_the_variants_compute_the_same(layers):
    size = scaling_cases.Size(70, 45, layers=layers, batch=2, **SHAPE)
    problem = scaling_cases.Layers(size, "cpu", tuple(scaling_cases.RUNS))
    assert variants.check_full(problem, scaling_cases.RUNS) == dict.fromkeys(scaling_cases.RUNS)
    student, eager = (
        variants.whole(problem, scaling_cases.RUNS[name]) for name in ("student", "eager")
    )
    for a, b in zip(student, eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Every layer takes part, with weights of its own.
    for gradient in student[3:]:
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_every_layer_has_inputs_of_its_own_and_keeps_them():
    def kept(layers):
        size = scaling_cases.Size(128, 90, layers=layers, **SHAPE)
        problem = scaling_cases.Layers(size, "cpu", ("plain",))
        return memory.saved_bytes(lambda: scaling_cases.plain(problem, problem.leaves))

    one_tensor = 4 * 128 * SHAPE["heads"] * SHAPE["head_dim"]
    # q, k and v at least.
    assert kept(4) - kept(1) >= 3 * 3 * one_tensor


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_axes(device, quick):
    axes = scaling_cases.axes(device, quick)
    assert [axis.field for axis in axes] == ["tokens", "layers", "batch", "visual"]
    for axis in axes:
        sizes = [axis.value(size) for size in axis.sizes]
        assert sizes == sorted(set(sizes))
        assert all(1 < size.visual < size.tokens for size in axis.sizes)
        others = {(s.tokens, s.layers, s.batch) for s in axis.sizes}
        assert len(others) == (1 if axis.field == "visual" else len(sizes))
    assert axes[0].sizes[0].tokens == 256
    assert all(abs(s.visual / s.tokens - 0.71) < 0.005 for s in axes[0].sizes)
    shares = [s.visual / s.tokens for s in axes[3].sizes]
    assert shares[0] == pytest.approx(0.25, abs=0.01)
    assert quick or shares[-1] == pytest.approx(0.95, abs=0.01)


def tiny_axes(device, quick):
    base = scaling_cases.with_visual(128, **SHAPE)
    tokens = tuple(scaling_cases.with_visual(128 * 2**i, **SHAPE) for i in range(4))
    layers = (base, scaling_cases.with_visual(128, layers=4, **SHAPE))
    return (
        scaling_cases.Axis("tokens", "N", "tokens", 0.6, tokens),
        scaling_cases.Axis("layers", "L", "layers", 0.4, layers),
    )


def run(folder, *arguments, axes=tiny_axes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scaling, "axes", axes)
        bench_scaling.main(["--device", "cpu", "--quick", "--output", str(folder), *arguments])
    [path] = folder.glob("scaling_cpu_*.json")
    return path, json.loads(path.read_text())


# Eager's maps of 1024 tokens take 24 MiB each; a call with its inputs gets 64.
LIMITED = ("--memory-limit", "0.0625", "--budget-minutes", "3")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run(tmp_path_factory.mktemp("scaling"), *LIMITED)


@linux
def test_a_run_writes_everything(ran):
    path, report = ran
    assert path.with_suffix(".png").stat().st_size > 20_000
    text = path.with_suffix(".md").read_text()
    tokens, layers = report["axes"]
    assert [point["size"] for point in tokens["points"]] == [128, 256, 512, 1024]
    assert [point["size"] for point in layers["points"]] == [1, 4]
    for axis in report["axes"]:
        for point in axis["points"]:
            for row in point["variants"].values():
                assert row["ms"] > 0
                assert row["rounds"] >= 3
                assert row["peak_bytes"] > 0
                assert row["saved_bytes"] > 0
    # The memory of the size that two axes share was measured once, its time on each axis.
    for name, row in layers["points"][0]["variants"].items():
        other = tokens["points"][0]["variants"][name]
        assert (row["peak_bytes"], row["saved_bytes"]) == (
            other["peak_bytes"],
            other["saved_bytes"],
        )
        assert row["ms"] != other["ms"]
    fitted = tokens["fits"]["student"]["time"]
    assert report["headline"]["time exponent in N, student"]["value"] == fitted["exponent"]
    assert f"{fitted['exponent']:.2f} [" in text
    assert report["headline"]["largest N measured, student"]["value"] == 1024
    assert tokens["ends"]["student"]["text"] == "every size measured"


@linux
def test_more_tokens_and_more_layers_take_more(ran):
    tokens, layers = ran[1]["axes"]
    for axis in (tokens, layers):
        for variant in scaling_cases.RUNS:
            for quantity in ("memory", "kept"):
                found = [x for x in scaling_report.values(axis, variant, quantity) if x]
                assert len(found) >= 2
                # The resident size of the smallest calls is a matter of some pages.
                assert found[-1] > found[0] if quantity == "memory" else found == sorted(found)
    first, last = (tokens["points"][i]["variants"]["student"]["ms"] for i in (0, -1))
    assert last > first
    eager, plain = (tokens["fits"][name]["kept"]["exponent"] for name in ("eager", "plain"))
    assert plain == pytest.approx(1, abs=0.05)
    assert eager > 1.4


@linux
def test_eager_runs_out_of_memory_in_its_child(ran):
    path, report = ran
    tokens = report["axes"][0]
    end = tokens["ends"]["eager"]
    assert end == {
        "kind": "memory",
        "at": 1024,
        "text": "out of memory at N = 1024 (limit 0.0625 GiB)",
    }
    assert "eager" not in tokens["points"][-1]["variants"]
    assert report["headline"]["N at which eager is out of memory"]["value"] == 1024
    assert report["headline"]["largest N measured, eager"]["value"] == 512
    # It was measured: there is nothing to extrapolate.
    assert tokens["extrapolated"] is None
    text = path.with_suffix(".md").read_text()
    assert end["text"] in text
    assert "extrapolated" not in text.partition("## Layers")[0]


@linux
def test_without_a_budget_nothing_is_measured(tmp_path):
    path, report = run(tmp_path, "--budget-minutes", "0")
    for axis in report["axes"]:
        assert axis["points"] == []
        assert {end["kind"] for end in axis["ends"].values()} == {"budget"}
    assert scaling_report.NOTHING in path.with_suffix(".md").read_text()
    assert not path.with_suffix(".png").exists()
    assert all(found["value"] is None for found in report["headline"].values())


@linux
def test_an_interrupted_run_leaves_what_was_measured(tmp_path, monkeypatch):
    def measured_once(axis, size, found, session, deadline):
        if found["points"]:
            raise KeyboardInterrupt
        return {"plain": {"ms": 2.0, "spread": 0.1, "peak_bytes": 2**20, "saved_bytes": 2**19}}

    monkeypatch.setattr(bench_scaling, "measure_point", measured_once)
    path, report = run(tmp_path)
    tokens, layers = report["axes"]
    assert [point["size"] for point in tokens["points"]] == [128]
    assert layers["points"] == []
    for axis in (tokens, layers):
        assert {end["text"] for end in axis["ends"].values()} == {"stopped: interrupted"}
    assert "2.0 ± 10%" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()


@linux
def test_a_wrong_variant_is_not_timed(tmp_path, monkeypatch):
    student = scaling_cases.student

    def wrong(problem, leaves):
        out, loss = student(problem, leaves)
        return out, 1.01 * loss

    monkeypatch.setitem(scaling_cases.RUNS, "student", wrong)
    one = dataclasses.replace(
        tiny_axes("cpu", True)[0], sizes=(scaling_cases.Size(64, 40, **SHAPE),)
    )
    _, report = run(tmp_path, axes=lambda *_: (one,))
    [tokens] = report["axes"]
    assert tokens["ends"]["student"]["kind"] == "failed"
    assert tokens["ends"]["student"]["text"].startswith("failed at N = 64: wrong at full size")
    [point] = tokens["points"]
    assert list(point["variants"]) == ["plain", "eager"]
    assert all(row["ms"] > 0 for row in point["variants"].values())


# Ends and extrapolation


def points_of(ms, peaks, variant="eager"):
    return [
        {
            "size": n,
            "variants": {variant: {"ms": t, "spread": 0.0, "peak_bytes": m, "saved_bytes": m // 2}},
        }
        for n, t, m in zip(SIZES, ms, peaks)
    ]


@pytest.mark.parametrize(
    "peaks, deadline, kind",
    [
        ([2**28, 2**30], 1000, "time"),
        # Three quarters of a call at most are made until it is out of memory.
        ([2**32, 2**34], 1000, None),
        ([2**28, 2**30], 30, "budget"),
    ],
    ids=["too-slow", "out-of-memory-on-its-way", "budget"],
)
def test_why_a_variant_does_not_go_on(peaks, deadline, kind):
    axis = scaling_cases.axes("cpu", False)[0]
    session = SimpleNamespace(cuda=False, memory_limit=2**34, call_limit=30.0, elapsed=lambda: 1.0)
    points = points_of([2500.0, 10_000.0], peaks)
    end = bench_scaling.end_before(axis, points, "eager", axis.sizes[2], session, deadline)
    assert (end and end["kind"]) == kind
    if kind == "time":
        assert end["text"] == "stopped: at N = 1024 one call would take about 40 s (limit 30 s)"


@pytest.mark.parametrize(
    "peaks, deadline, kept",
    [
        # 40 s of a call at N = 1024 and half of it until 2^34 of 2^35 bytes are taken.
        ([2**31, 2**33], 100, 20.5),
        ([2**31, 2**33], 15, 0),
        ([2**28, 2**30], 100, 0),
    ],
    ids=["kept", "out-of-reach", "will-fit"],
)
def test_time_is_kept_for_where_eager_runs_out_of_memory(peaks, deadline, kept):
    axis = scaling_cases.axes("cpu", False)[0]
    session = SimpleNamespace(cuda=False, memory_limit=2**34, call_limit=80.0, elapsed=lambda: 1.0)
    points = points_of([2500.0, 10_000.0], peaks)
    found = bench_scaling.reserve(axis, points, axis.sizes[1], session, deadline)
    assert found == pytest.approx(kept)


def stopped_for_time():
    """Eager with 100 bytes per pair of tokens, measured up to 2048 tokens."""
    points = points_of([1.0, 4.0, 16.0, 64.0], [100 * n**2 for n in SIZES[:4]])
    end = {"kind": "time", "at": None, "text": "stopped: at N = 4096 one call would take ..."}
    axis = bench_scaling.empty(scaling_cases.axes("cpu", False)[0])
    axis |= {"points": points, "ends": {"eager": end}}
    axis["fits"] = scaling_report.fits(axis)
    return axis


def test_an_extrapolated_size_is_called_so():
    axis = stopped_for_time()
    limit = 100 * 12_345**2
    axis["extrapolated"] = found = scaling_report.extrapolated(axis, limit)
    assert found["size"] == pytest.approx(12_345, rel=1e-6)
    assert found["text"].startswith("extrapolated, not measured: ")
    assert "at about N = 12,345 (12,345 to 12,345, by the exponent's interval)" in found["text"]
    report = {"axes": [axis]}
    headlines = scaling_report.headlines(report)
    assert headlines["N at which eager is out of memory"]["value"] is None
    assert headlines["largest N measured, eager"]["value"] == 2048


def test_an_extrapolation_is_as_wide_as_the_exponents_interval():
    axis = stopped_for_time()
    fitted = axis["fits"]["eager"]["memory"] | {"low": 0.0, "high": 4.0}
    axis["fits"]["eager"]["memory"] = fitted
    found = scaling_report.extrapolated(axis, 16 * 100 * 2048**2)
    assert found["near"] == pytest.approx(2 * 2048)
    assert found["size"] == pytest.approx(4 * 2048)
    assert found["far"] is None
    assert "(4,096 or more, by the exponent's interval)" in found["text"]


def test_nothing_is_extrapolated_from_two_sizes_or_beyond_an_axis():
    axis = stopped_for_time()
    assert scaling_report.fits(axis)["eager"]["memory"]["points"] == 3
    axis["bounded"] = True
    assert scaling_report.extrapolated(axis, 2**34) is None
    # All of an axis that has an end is fitted.
    assert scaling_report.fits(axis)["eager"]["memory"]["points"] == 4
    axis |= {"bounded": False, "points": axis["points"][:2]}
    axis["fits"] = scaling_report.fits(axis)
    found = scaling_report.extrapolated(axis, 2**34)
    assert found["size"] is None
    assert found["text"].startswith("not extrapolated")


def test_the_plot_draws_what_was_not_measured_hollow_and_dashed():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axis = stopped_for_time()
    axis["extrapolated"] = scaling_report.extrapolated(axis, 100 * 12_345**2)
    panel = Figure().subplots()
    scaling_plot._curves(panel, axis, "memory", 1.0)
    measured = [line for line in panel.lines if line.get_marker() == "^"]
    assert [list(line.get_xdata()) for line in measured] == [SIZES[:4]]
    assert measured[0].get_markerfacecolor() != "none"
    scaling_plot._limit(panel, axis, 2**14)
    way, end = panel.lines[-3:-1]
    assert (way.get_linestyle(), way.get_xdata()[0]) == ("--", SIZES[3])
    assert end.get_markerfacecolor() == "none"
    assert list(end.get_xdata()) == [pytest.approx(12_345, rel=1e-6)]
    assert end.get_label() == "eager, extrapolated: limit at N = 12,345"


@pytest.mark.parametrize("given", ["0", "-1", "nan"])
def test_a_memory_limit_is_positive(given, capsys):
    with pytest.raises(SystemExit):
        bench_scaling.parse(["--device", "cpu", "--memory-limit", given])
    assert "--memory-limit: expected a positive number" in capsys.readouterr().err


def test_the_defaults_of_a_run():
    def options(*given) -> argparse.Namespace:
        return bench_scaling.parse(list(given))

    assert options("--device", "cpu").budget_minutes == 8
    assert options("--device", "cuda").budget_minutes <= 3
    assert options("--device", "cpu", "--quick").budget_minutes == 0.5
