"""The compiled extension `cdfast_kernels._C` (csrc/): loading it, and why it is absent."""

import importlib
import os
import warnings
from typing import Any

import torch

# Forces an instruction set: "portable", "avx2" or "avx512". The best one is chosen by default.
ISA_VARIABLE = "CDFAST_CPU_ISA"


def _load() -> tuple[Any, str | None]:
    """The module and None, or None and the reason."""
    try:
        extension = importlib.import_module("cdfast_kernels._C")
    except ImportError as error:
        return None, f"the extension cdfast_kernels._C was not built or cannot be loaded ({error})"
    isa = os.environ.get(ISA_VARIABLE)
    try:
        if isa:
            extension.use_isa(isa)
    except ValueError as error:
        return None, f"{ISA_VARIABLE}: {error}"
    return extension, None


EXTENSION, REASON = _load()
_warned = False


def warn_once() -> None:
    """Say once per process that CPU tensors go to the slow reference, and why."""
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"CPU tensors use the reference backend, which is slow and materialises maps: {REASON}. "
        "Reinstall cdfast where a C++17 compiler is found to get the cpu backend.",
        RuntimeWarning,
        stacklevel=4,
    )
