"""Every test that takes `backend` runs on each backend that is usable here.

On CPU tensors the Triton kernels run with TRITON_INTERPRET=1. The interpreter needs about a second
per case: of the shared tests it runs those that INTERPRETED selects, and the rest with `-m full`.

With a GPU the same tests run on it: see tests/kernels/on_device.py.
"""

import os
import re
import sys

# Before CUDA starts: without it cuBLAS is not deterministic, and says so in every test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from cdfast_kernels import available_backends

from tests.kernels.on_device import DEVICE, put_on_device

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ALIGNMENT_BACKENDS = ("reference", "cpu", "triton")
ALIGNMENT_BACKENDS = [b for b in ALIGNMENT_BACKENDS if b != "cpu" or DEVICE == "cpu"]
USABLE_BACKENDS = [b for b in ALIGNMENT_BACKENDS if available_backends()[b] is None]

# Of a test with many cases, those that the interpreter runs by default. Tests not named run whole.
INTERPRETED = {
    "test_loss_and_gradients": r"(turns|packed).*-mean\]|left.*row-none|left.*kl-sum|turns-.*float",
    "test_random_layouts": r"-0\]$",
    "test_pooled_is_the_authors_loss": r"-0-|0-left",
    "test_all_zero_maps_give_a_finite_loss_and_gradient": r"both|row",
    "test_nan_at_a_live_position_shows_in_the_loss": r"-row\]|lse|teacher",
    "test_empty_batch": r"row|flash|shape",
    "test_batch_without_images": r"row|none",
    "test_map_is_the_head_mean": r"-11\]|packed|turns",
    "test_out_lse_and_gradients": r"gqa|mqa-packed",
}


def pytest_collection_modifyitems(items):
    if DEVICE != "cpu":
        for name, module in list(sys.modules.items()):
            # A module with a DEVICE makes its tensors there itself.
            if name.startswith("tests.kernels.test_") and not hasattr(module, "DEVICE"):
                put_on_device(module)
    for item in items:
        if DEVICE == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: there is none"))
        chosen = INTERPRETED.get(getattr(item, "originalname", ""), "")
        if INTERPRETING and "triton" in item.name and not re.search(chosen, item.name):
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty comes back filled with NaN, so that an output a kernel skips is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=USABLE_BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def exact_dtype(backend) -> torch.dtype:
    """The widest dtype a backend computes in."""
    return torch.float64 if backend == "reference" else torch.float32


def _patch_once_per_launch():
    """The interpreter patches triton.language again at every call of a device function, which is
    half of its time; the patch of the launch is still in place then."""
    from triton.runtime import interpreter

    def languages(function):
        known = (interpreter.tl, interpreter.tl.core)
        return [x for x in function.__globals__.values() if any(x is module for module in known)]

    def call(self, *args, **kwargs):
        if self.fn not in modules:
            modules[self.fn] = languages(self.fn)
        if any(getattr(m.load, "__triton_builtin__", False) for m in modules[self.fn]):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def patch_tensor(tensor, scope):
        patch_tensor_first(tensor, scope)
        # Triton 3.6 calls int() on arrays of one element, which NumPy refuses since 2.4.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    modules = {}
    patch_tensor_first = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpretedFunction.__call__ = call


if INTERPRETING:
    _patch_once_per_launch()
