"""The shared tests on a GPU: tensors are made and compared on the CPU, operations run over there.

Every operation a test module has imported is replaced by one that moves its CPU arguments to
DEVICE (tensors with their strides, layouts, maps) and its results back. Gradients take the same way
through autograd. So no tensor can be forgotten, the oracle stays where it is, and on a machine
without a GPU nothing is replaced. Modules that have a DEVICE of their own are left alone.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from cdfast_kernels import VisualLayout, VisualMap
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = (
    "flash_attention",
    "flash_attention_with_alignment",
    "visual_alignment_loss",
    "visual_attention_map",
)


def moved(x: Any, device: str) -> Any:
    """x on `device` if it is a tensor, layout or map; a tensor keeps its strides."""
    if isinstance(x, (VisualLayout, VisualMap)):
        return x.to(device)
    if not isinstance(x, Tensor):
        return x
    y = x.to(device)
    if y.stride() != x.stride() and 0 not in x.stride():
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(y)
    return y


def on_device(operation, device: str):
    @functools.wraps(operation)
    def run(*args, **kwargs):
        first = args[0] if args else kwargs.get("q")
        # The CPU backend, and tensors that are on a device already, stay where they are.
        stays = not isinstance(first, Tensor) or first.device.type != "cpu"
        if stays or kwargs.get("backend") == "cpu":
            return operation(*args, **kwargs)

        def there(x):
            # Arguments on another device are there to be refused.
            return moved(x, device) if getattr(x, "device", None) == first.device else x

        result = operation(
            *(there(x) for x in args), **{name: there(x) for name, x in kwargs.items()}
        )
        if isinstance(result, tuple):
            return tuple(moved(x, "cpu") for x in result)
        return moved(result, "cpu")

    return run


def put_on_device(module: ModuleType, device: str = DEVICE) -> None:
    for name in OPERATIONS:
        if hasattr(module, name):
            setattr(module, name, on_device(getattr(module, name), device))
