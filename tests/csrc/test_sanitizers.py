"""csrc/tests/fuzz.cpp under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), "")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# As in setup.py.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {"kernels_avx2.cpp": AVX2, "kernels_avx512.cpp": AVX512}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler found (CXX, g++, clang++)"),
]


def compile_objects(sources, folder: Path, *flags: str) -> list[str]:
    def one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, "-std=c++17", "-Wno-psabi", *flags, *ISA_FLAGS.get(source.name, [])]
        command += ["-DCDFAST_X86"] if X86 else []
        done = subprocess.run(
            [*command, "-c", source, "-o", target], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def fuzz(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    flags = ["-g", "-O1", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    program = folder / "fuzz"
    linked = subprocess.run([COMPILER, *flags, probe, "-o", program], capture_output=True)
    if linked.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} cannot build or run programs with -fsanitize={request.param}")
    sources = [s for s in sorted(CSRC.glob("*.cpp")) if s.name != "bindings.cpp"]
    sources = [s for s in sources if X86 or s.name not in ISA_FLAGS]
    objects = compile_objects([*sources, CSRC / "tests" / "fuzz.cpp"], folder, *flags)
    subprocess.run(
        [COMPILER, *flags, *objects, "-o", program, "-pthread", "-ldl"], check=True, timeout=300
    )
    return program


@pytest.mark.parametrize(
    "first, last", [(0, 60), pytest.param(60, 1500, marks=pytest.mark.full)], ids=["few", "many"]
)
def test_random_layouts(fuzz, first, last):
    done = subprocess.run(
        [fuzz, str(first), str(last)], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout == f"{last - first} layouts\n"


@pytest.mark.skipif(not X86, reason="one instruction set only")
@pytest.mark.skipif(not shutil.which("nm"), reason="nm lists the symbols")
def test_code_of_an_instruction_set_stays_in_its_namespace(tmp_path):
    """A shared inline function compiled for AVX-512 could replace the portable copy at the link."""
    sources = [CSRC / name for name in ISA_FLAGS]
    for path in compile_objects(sources, tmp_path, "-O3", "-fPIC"):
        lines = subprocess.check_output(["nm", "-C", path], text=True).splitlines()
        kinds = {line[19:]: line[17] for line in lines}
        weak = [name for name, kind in kinds.items() if kind in "WVu"]
        assert not weak, (path, weak)
        assert [name for name, kind in kinds.items() if kind == "T"] == [
            f"cdfast::{Path(path).stem.removeprefix('kernels_')}_kernels()"
        ]
