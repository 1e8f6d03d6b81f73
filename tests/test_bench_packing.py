"""The benchmark of packed steps, at sizes that say nothing about speed."""

import json

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
    [headline] = found["headline"].values()
    assert headline["value"] == found["rows"]["packed"]["over_padded"]
    assert "| packed |" in path.with_suffix(".md").read_text()


def test_wrong_losses_are_not_timed(tmp_path, monkeypatch, capsys):
    sums = iter([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.1]])
    monkeypatch.setattr(bench_packing, "sums_of", lambda pair, batches: next(sums))
    code, files = run(tmp_path, monkeypatch)
    assert (code, files) == (1, [])
    assert "nothing was timed" in capsys.readouterr().out
