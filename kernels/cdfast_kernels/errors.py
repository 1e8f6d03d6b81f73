"""The one form of a user error: argument, expected, got, remedy."""

from typing import Any

import torch


def bad_argument(name: str, expected: str, got: Any, remedy: str) -> ValueError:
    """Build (not raise) the ValueError that every check of this package raises."""
    return ValueError(f"{name}: expected {expected}, got {describe(got)}. {remedy}")


def describe(value: Any) -> str:
    """Name a value without reading tensor contents (no device synchronisation)."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, str):
        return value
    return f"{value!r} ({type(value).__name__})"
