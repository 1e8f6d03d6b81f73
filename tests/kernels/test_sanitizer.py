"""compute-sanitizer on every kernel: out-of-bounds accesses, races, reads of unwritten memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.on_device import DEVICE
from tests.kernels.test_gpu import everything, problem, random_like

ROOT = Path(__file__).parents[2]
SANITIZER_PLACES = (
    "/usr/local/cuda/bin/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
)
OWN_KERNELS = ("_attn_fwd", "_attn_bwd", "_visual_map", "_alignment_")


def find_sanitizer():
    """compute-sanitizer on the PATH, in the CUDA toolkit, or in an nvidia package of Python."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [shutil.which("compute-sanitizer"), *SANITIZER_PLACES]
    if home:
        places += [Path(home, "bin", "compute-sanitizer")]
        places += [Path(home, "compute-sanitizer", "compute-sanitizer")]
    for folder in sys.path:
        places += sorted(Path(folder or ".").glob("nvidia/*/**/compute-sanitizer"))
    return next((str(p) for p in places if p and os.access(p, os.X_OK) and Path(p).is_file()), None)


def run_sanitized():
    """What runs under the sanitizer: every kernel, small, in layouts with edges."""
    for kind in ("left", "packed", "turns"):
        layout, inputs, target = problem(kind, 70, 2, 1, 64)
        for objective in ("row", "kl"):
            everything(layout, inputs, target, random_like(inputs[0]), objective)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("finished")


PLANTED = """
import torch, triton
import triton.language as tl

@triton.jit
def _attn_fwd_planted(X, n, BLOCK: tl.constexpr):
    tl.store(X + n + tl.arange(0, BLOCK), 1.0)

x = torch.zeros(128, device="cuda")
_attn_fwd_planted[(1,)](x, 100000, BLOCK=128)
torch.cuda.synchronize()
"""


def reports(text):
    """The reports in a sanitizer's output: each begins with a line that is not indented."""
    found, current = [], []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        body = line.removeprefix("=========")
        if body.startswith("     ") and current:
            current.append(body)
        else:
            current = [body]
            found.append(current)
    # A race can be reported on one line.
    kinds = (" Error", " Warning", " Race")
    return ["\n".join(block) for block in found if len(block) > 1 or block[0].startswith(kinds)]


def sanitize(tool, *arguments):
    binary = find_sanitizer()
    if binary is None:
        pytest.skip("compute-sanitizer (of the CUDA toolkit) was not found")
    command = [binary, "--tool", tool, "--target-processes", "application-only"]
    command += ["--print-limit", "20", sys.executable, *arguments]
    # Without torch's cache every tensor is an allocation of its own, with edges that can be seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(["kernels", ".", *sys.path])
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    text = done.stdout + done.stderr
    if "Device not supported" in text or "not supported on this" in text:
        pytest.skip(f"compute-sanitizer does not work on this machine: {text[-300:]}")
    return text


@pytest.mark.gpu
def test_the_sanitizer_finds_a_planted_error(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    text = sanitize("memcheck", str(tmp_path / "planted.py"))
    assert any("_attn_fwd_planted" in r for r in reports(text)), text[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    code = "from tests.kernels.test_sanitizer import run_sanitized; run_sanitized()"
    text = sanitize(tool, "-c", code)
    assert "finished" in text, text[-3000:]
    own = [r for r in reports(text) if any(name in r for name in OWN_KERNELS)]
    assert not own, "\n\n".join(own)[:3000]


def test_sanitizer_reports_are_read():
    text = (
        "========= COMPUTE-SANITIZER\nfinished\n"
        "========= Invalid __global__ write of size 4 bytes\n"
        "=========     at _attn_bwd_dq_kernel+0x10\n=========     by thread (0,0,0)\n"
        "========= Error: Race reported between Write access at _visual_map_fwd_kernel+0x20\n"
        "========= ERROR SUMMARY: 2 errors\n"
    )
    write, race = reports(text)
    assert "_attn_bwd_dq_kernel" in write
    assert "_visual_map_fwd_kernel" in race
    assert not reports("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
