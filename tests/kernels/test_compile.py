"""Ahead-of-time compilation of the Triton kernels: no GPU needed, so it runs everywhere.

A spill, or a matrix instruction that disappears, costs a factor and changes no result: it must fail
here. The figures, from Triton 3.9, are in benchmarks/results/kernels_resources_bf16.md.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}
# The kernels that have no dot.
NO_DOT = ("delta",)
# Bytes that Triton before 3.9 spills (measured with 3.6.0). Shapes without would have half the keys
# in a tile or no pipeline, for 3.9 too.
SPILLS_BEFORE_3_9 = {
    ("dkdv", 80, 64): 8,
    ("dkdv+align", 80, 64): 40,
    ("dkdv+align", 90, 128): 32,
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (not Linux)"
)


def compile_all(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "compile_resources.py", *arguments]
    # Interpreted functions do not compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", MATRIX)
def test_no_spills_and_matrix_instructions(arch, dim):
    rows = compile_all("--arch", str(arch), "--dim", str(dim))
    assert len(rows) == 11
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    for row in rows:
        known = SPILLS_BEFORE_3_9.get((row["kernel"], arch, dim), 0) if version < (3, 9) else 0
        assert row["spill_bytes"] <= known, row
        assert row["matrix"] == ("-" if row["kernel"] in NO_DOT else MATRIX[arch]), row


@pytest.mark.full
@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("segments", [False, True])
def test_every_head_size_compiles(dtype, segments, arch):
    options = ["--arch", str(arch), "--head-size", "32", "64", "80", "96", "128", "256"]
    rows = compile_all(*options, "--dtype", dtype, *(["--segments"] if segments else []))
    assert len(rows) == 6 * 11
    for row in rows:
        # 227 KiB is the most that a program can have on sm_90 and sm_100, 163 on sm_80.
        assert row["shared_kib"] <= (163 if arch == 80 else 227), row


def test_the_table_is_made_in_parts(tmp_path):
    """Rows are kept as they come and not made again; other sources make them again."""
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    one = ["--arch", "90", "--head-size", "64", "--kernel", "delta", "--rows", str(rows)]
    [first] = compile_all(*one)
    kept = rows.read_text()
    assert json.loads(kept)["registers"] == first["registers"]
    both = [*one[:-2], "--dtype", "bf16", "fp16", "--write", str(table)]
    assert compile_all(*both, "--minutes", "0", "--rows", str(rows)) == [first]
    assert rows.read_text() == kept
    assert not table.exists()
    assert [row["dtype"] for row in compile_all(*both, "--rows", str(rows))] == ["bf16", "fp16"]
    assert rows.read_text().startswith(kept)
    assert "| delta | 90 | 64 | fp16 |" in table.read_text()
    rows.write_text(kept.replace(json.loads(kept)["source"], "another") + '\n{"cut')
    assert compile_all(*one) == [first]
    assert len(rows.read_text().split()) > len(kept.split())
