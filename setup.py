"""Package layout, and the optional extension `cdfast_kernels._C` (csrc/).

`kernels/` itself is not a package: PyPI has a package `kernels` that transformers imports, and an
`__init__.py` here would shadow it for anyone running from the repository root.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
except ImportError:  # built without isolation: the package works without the extension
    pybind11 = None

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# The kernels are compiled once per instruction set and chosen at run time.
ISA_FLAGS = {"csrc/kernels_avx2.cpp": AVX2, "csrc/kernels_avx512.cpp": AVX512}
# Of the bindings nothing is hot, and they are most of the compile time.
FLAGS = {"csrc/bindings.cpp": ["-O1"], **ISA_FLAGS}
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp"))


class BuildExtension(build_ext):
    """Compiles sources side by side, those of an instruction set with its flags.

    The extension is optional: what goes wrong here is reported, and the install goes on.
    """

    def build_extension(self, ext):
        objects = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(self._compile, source, ext) for source in ext.sources]
            for job in jobs:
                objects += job.result()
        path = self.get_ext_fullpath(ext.name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, path, extra_postargs=ext.extra_link_args, target_lang="c++"
        )

    def _compile(self, source, ext):
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *FLAGS.get(source, [])],
            depends=ext.depends,
        )


def extensions():
    # CDFAST_NO_EXTENSION=1 leaves it out. Its vector types exist in GCC and Clang only.
    if pybind11 is None or os.environ.get("CDFAST_NO_EXTENSION") == "1" or sys.platform == "win32":
        return []
    return [
        Extension(
            "cdfast_kernels._C",
            [source for source in SOURCES if X86 or source not in ISA_FLAGS],
            include_dirs=["csrc", pybind11.get_include()],
            depends=[path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.h")],
            define_macros=[("CDFAST_X86", "1")] if X86 else [],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"],
            extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
            optional=True,
        )
    ]


setup(
    packages=["cdfast_kernels", *find_packages(include=["cdfast", "cdfast.*"])],
    package_dir={"cdfast_kernels": "kernels/cdfast_kernels"},
    package_data={"cdfast": ["recipes/*.yaml", "assets/**/*"], "cdfast_kernels": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
