"""The benchmark of packed steps, at sizes that say nothing about speed."""

import json

import pytest

from benchmarks import bench_packing
from benchmarks.preset_step import TINY


def run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_packing, "CPU", TINY)
    few = ["--device", "cpu", "--samples", "9", "--batch", "3", "--rounds", "1"]
    code = bench_packing.main([*few, "--output", str(tmp_path)])
    return code, list(tmp_path.glob("packing_cpu_*.json"))


def test_all_forms_are_measured_on_the_same_samples(tmp_path, monkeypatch):
    code, [path] = run(tmp_path, monkeypatch)
    found = json.loads(path.read_text())
    assert code == 0
    assert set(found["rows"]) == set(bench_packing.FORMS)
    assert found["rows"]["packed"]["filled"] == 1.0 > found["rows"]["padded"]["filled"]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"].values())
    most = found["sizes"]["batch"] * found["sizes"]["longest"]
    assert max(row["most_places"] for row in found["rows"].values()) <= most
    packed, shared = found["headline"].values()
    assert packed["value"] == found["rows"]["packed"]["over_first"]
    alone, together = (found["shared_rows"][form] for form in bench_packing.SHARED_FORMS)
    assert shared["value"] == together["over_first"]
    # An image of n records stands once, not n times, and so does the token before it.
    saved = found["shared_sizes"]["samples"] - found["shared_sizes"]["images"]
    assert alone["tokens"] - together["tokens"] == saved * (1 + found["sizes"]["visual"]) > 0
    text = path.with_suffix(".md").read_text()
    assert "| packed |" in text
    assert "| images shared |" in text


@pytest.mark.parametrize("wrong", [2, 4], ids=["packed", "images shared"])
def test_wrong_losses_are_not_timed(tmp_path, monkeypatch, capsys, wrong):
    sums = [[1.0, 2.0, 3.0] for _ in range(5)]
    sums[wrong][1] = 2.1
    given = iter(sums)
    monkeypatch.setattr(bench_packing, "sums_of", lambda pair, batches: next(given))
    code, files = run(tmp_path, monkeypatch)
    assert (code, files) == (1, [])
    assert "nothing was timed" in capsys.readouterr().out


def test_the_alignment_of_shared_images_is_not_compared(tmp_path, monkeypatch):
    given = iter([[1.0, 2.0, 3.0] for _ in range(4)] + [[1.0, 2.0, 4.0]])
    monkeypatch.setattr(bench_packing, "sums_of", lambda pair, batches: next(given))
    assert run(tmp_path, monkeypatch)[0] == 0
