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

# The kernels are compiled once per instruction set and chosen at run time.
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "csrc/kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx2", "-mfma", "-mf16c"),
    ],
}
SOURCES = sorted(
    str(path.relative_to(Path(__file__).resolve().parent).as_posix())
    for path in Path(__file__).resolve().parent.glob("csrc/*.cpp")
)


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
            extra_postargs=[*ext.extra_compile_args, *ISA_FLAGS.get(source, [])],
            depends=ext.depends,
        )


def extensions():
    # CDFAST_NO_EXTENSION=1 leaves it out. Only GCC and Clang have the vector types it is written in.
    if pybind11 is None or os.environ.get("CDFAST_NO_EXTENSION") == "1" or sys.platform == "win32":
        return []
    return [
        Extension(
            "cdfast_kernels._C",
            [source for source in SOURCES if X86 or source not in ISA_FLAGS],
            include_dirs=["csrc", pybind11.get_include()],
            depends=[str(p) for p in Path("csrc").glob("*.h")],
            define_macros=[("CDFAST_X86", "1")] if X86 else [],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi"],
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
