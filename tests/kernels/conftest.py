"""Every test that takes `backend` runs on each backend that is usable here."""

import pytest
import torch
from cdfast_kernels import available_backends

ALIGNMENT_BACKENDS = ("reference", "cpu", "triton")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[b for b in ALIGNMENT_BACKENDS if available_backends()[b] is None])
def backend(request) -> str:
    return request.param


@pytest.fixture
def exact_dtype(backend) -> torch.dtype:
    """The widest dtype a backend computes in."""
    return torch.float64 if backend == "reference" else torch.float32
