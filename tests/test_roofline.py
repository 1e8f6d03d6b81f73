"""The roofline benchmark at tiny sizes: what it computes and writes. No time is tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cdfast_kernels import available_backends

from benchmarks import cases, measure, roofline, roofline_report, work

ROOT = Path(__file__).parents[1]
CASE = cases.Case(70, 40, 1, 4, 2, 32, "fp32")
NO_CPU = available_backends()["cpu"]
on_cpu = pytest.mark.skipif(NO_CPU is not None, reason=f"cpu backend: {NO_CPU}")
CEILING = {"matmul_tflops": 0.1, "copy_gb_per_s": 10.0}


@pytest.fixture
def quick(monkeypatch):
    """One tiny case, ceilings that cost nothing; `main` writes what it would write of any."""
    monkeypatch.setattr(roofline, "cases", lambda device, quick: [CASE])
    monkeypatch.setattr(roofline, "ceilings", lambda clock, dtype: dict(CEILING))


@on_cpu
def test_a_run_on_a_cpu(quick, tmp_path, capsys):
    roofline.main(["--device", "cpu", "--quick", "--rounds", "3", "--output", str(tmp_path)])
    [path] = tmp_path.glob("roofline_cpu_*.json")
    found = json.loads(path.read_text())
    assert found["theme"] == "roofline"
    assert found["not_measured"] == []
    # The size that is followed was not measured, and is not made up.
    assert {x["value"] for x in found["headline"].values()} == {None}
    [case] = found["cases"]
    problem = cases.Problem(CASE, "cpu", "cpu")
    ideal = work.cpu_phases(problem.shape)
    assert [row["name"] for row in case["rows"]] == list(ideal)
    for row in case["rows"]:
        expected = ideal[row["name"]]
        assert (row["operations"], row["bytes"]) == (expected.flops, expected.bytes)
        roof = min(0.1, row["intensity"] * 10 / 1e3)
        assert row["share"] == pytest.approx(row["tflops"] / roof)
    text = path.with_suffix(".md").read_text()
    assert "aligned backward" in text
    assert path.with_suffix(".png").stat().st_size > 5000
    assert CASE.name in capsys.readouterr().out


@on_cpu
def test_wrong_results_are_not_timed(quick, tmp_path, monkeypatch):
    full = roofline.check_full

    def wrong(problem, runs):
        return full(problem, runs) | {"student[cpu]": "wrong at full size: the loss"}

    monkeypatch.setattr(roofline, "check_full", wrong)
    roofline.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    [path] = tmp_path.glob("*.json")
    [case] = json.loads(path.read_text())["cases"]
    assert "rows" not in case
    assert "wrong at full size: the loss" in case["failed"]
    assert "wrong at full size: the loss" in path.with_suffix(".md").read_text()


@on_cpu
def test_no_case_begins_after_the_budget(quick, tmp_path):
    arguments = ["--device", "cpu", "--budget-minutes", "0", "--output", str(tmp_path)]
    roofline.main(arguments)
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["cases"] == []
    assert found["not_measured"] == [CASE.name]


def test_the_triton_rows_in_the_interpreter(tmp_path):
    """The way a GPU takes, but for events and graphs; the times mean nothing."""
    code = """
import json, sys, types
import tests.kernels.conftest  # makes the interpreter faster, and fit for any version
from benchmarks import cases, measure, roofline, roofline_report
case = cases.Case(40, 25, 1, 2, 1, 32, "fp32")
problem = cases.Problem(case, "cpu", "triton")
options = types.SimpleNamespace(rounds=3, case_seconds=0.1)
rows, steps = roofline.triton_rows(problem, measure.Clock("cpu"), options)
found = {"rows": rows, "steps": steps, "tokens": 4096}
roofline.set_roofs([found], {"matmul_tflops": 0.1, "copy_gb_per_s": 10.0})
print(json.dumps({**found, "headline": roofline.headlines([found])}))
print(roofline_report._rows(found), roofline_report._steps(found), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    problem = cases.Problem(cases.Case(40, 25, 1, 2, 1, 32, "fp32"), "cpu", "reference")
    for operation in work.OPERATIONS:
        rows = {r["name"]: r for r in found["rows"] if r["operation"] == operation}
        ideal = work.ideal(problem.shape, operation)
        assert {name: row["operations"] for name, row in rows.items()} == {
            name: each.flops for name, each in ideal.items()
        }
        assert all(row["launches"] == 1 for row in rows.values())
        step = found["steps"][operation]
        assert step["kernels_ms"] == pytest.approx(sum(row["ms"] for row in rows.values()))
        # Nothing is launched on a CPU: not measured, and not made up.
        assert step["host_ms"] is step["launch_bound"] is step["graph_ms"] is None
    student = [r for r in found["rows"] if r["operation"] == "student"]
    backward = [r for r in student if "bwd" in r["name"]]
    assert len(backward) == 3
    [share] = [x["value"] for name, x in found["headline"].items() if "backward" in name]
    assert share == pytest.approx(
        sum(r["roof_ms"] for r in backward) / sum(r["ms"] for r in backward)
    )
    assert "student: attn_bwd_dkdv" in done.stderr
    assert "not measured" in done.stderr


def test_the_roof_is_the_lower_ceiling():
    def at(flops, size):
        ideal = work.Ideal(flops, size, 0)
        found = {"rows": [roofline.row("forward", {"ms": 2.0, "spread": 0.0}, ideal)]}
        roofline.set_roofs([found], CEILING)
        return found["rows"][0]

    # 1e8 operations take 1 ms at 0.1 TFLOP/s, 1e7 bytes take 1 ms at 10 GB/s.
    assert at(10**8, 10**5)["share"] == pytest.approx(0.5)
    assert at(10**6, 10**7)["share"] == pytest.approx(0.5)
    assert at(0, 10**7)["share"] == pytest.approx(0.5)  # an element-wise kernel
    assert at(10**8, 2 * 10**7)["roof_ms"] == pytest.approx(2.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_size_that_is_followed_is_measured_first(device):
    listed = roofline.cases(device, quick=False)
    assert listed[0].tokens == roofline.FOLLOWED_TOKENS
    assert len({case.name for case in listed}) == len(listed)
    assert max(case.tokens for case in listed) >= 4096


def test_the_copy_of_the_ceiling_fits_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CACHES", tmp_path)
    assert measure.copy_bytes() == 2**28  # not known
    for i, size in enumerate(("48K", "2048K", "266240K")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert measure.copy_bytes() == 2 * 266240 * 1024
    (tmp_path / "index2" / "size").write_text("1048576K\n")
    assert measure.copy_bytes() == 2**30


def test_a_launch_bound_operation_is_replayed_only_on_a_gpu():
    def fail():
        raise AssertionError("captured without a GPU")

    assert measure.graph_ms(fail, measure.Clock("cpu"), 3, 1.0) is None


def test_rounds_too_few_for_a_median_are_refused(capsys):
    with pytest.raises(SystemExit):
        roofline.parse(["--device", "cpu", "--rounds", "2"])
    assert "--rounds: expected at least 3" in capsys.readouterr().err


def test_kernels_without_products_are_not_drawn(tmp_path):
    rows = [
        {
            "operation": "student",
            "launches": 1,
            "tile_operations": None,
            **roofline.row(name, {"ms": 1.0, "spread": 0.1}, work.Ideal(flops, 10**6, 0)),
        }
        for name, flops in (("_attn_fwd_kernel", 10**7), ("_row_loss_kernel", 0))
    ]
    case = {
        "tokens": 70,
        "batch": 1,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "dtype": "bf16",
        "name": "one",
        "backend": "triton",
        "rows": rows,
        "steps": {},
    }
    roofline.set_roofs([case], CEILING)
    found = {"cases": [case], "ceilings": CEILING, "environment": {"device": "some GPU"}}
    roofline_report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
