"""The one error budget of the project.

Rule (flash-attention's): the error of a backend against float64 is at most 2 times (forward) or
3 times (gradients) the error of eager PyTorch in the same dtype, plus a floor of about one rounding
of the largest value. It is the same for every backend and is never relaxed.
"""

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0

# Relative to the largest exact value: half a unit in the last place, and a little more in float32
# and float64, where the eager error of a single number can be zero by luck.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def max_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; entries that are infinite must agree."""
    got, exact = got.detach().double(), exact.detach().double()
    assert got.shape == exact.shape, (got.shape, exact.shape)
    if exact.numel() == 0:
        return 0.0
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite]), "infinite entries differ"
    assert bool(got[finite].isfinite().all()), "non-finite entries where the exact value is finite"
    return float((got - exact)[finite].abs().max()) if finite.any() else 0.0


def assert_within_budget(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, factor: float
) -> None:
    """Assert error(got) <= factor * error(eager) + floor, both against `exact` in float64.

    Args:
        name: what is compared, for the message.
        got: the backend's result from inputs of `dtype`.
        eager: eager PyTorch's result in `dtype` from the same inputs.
        exact: the same computed in float64 from the same inputs.
        dtype: dtype of the inputs.
        factor: FORWARD or GRADIENT.
    """
    finite = exact.detach().double()
    finite = finite[finite.isfinite()]
    floor = FLOOR[dtype] * (float(finite.abs().max()) if finite.numel() else 0.0)
    budget = factor * max_error(eager, exact) + floor
    error = max_error(got, exact)
    assert error <= budget, f"{name}: error {error:.3e} is over the budget {budget:.3e}"
