"""What the Triton kernels do, counted while the Triton interpreter runs them.

The interpreter calls one builder for every load, store and product of every program: the counter
stands in front of those three. It counts nothing on a GPU, where no such builder runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.measure import kernels


@dataclass
class Counted:
    """One kernel, over all its launches; bytes under masks count where the mask is true."""

    launches: int = 0
    programs: int = 0
    flops: int = 0  # 2 m n k of every product, by its shapes
    read: int = 0  # bytes of floating-point numbers loaded
    written: int = 0
    table_read: int = 0  # bytes of integers loaded: tables of the layout


@dataclass
class Counter:
    kernels: dict[str, Counted] = field(default_factory=dict)
    running: Counted | None = None

    def add(self, name: str, amount: int) -> None:
        assert self.running is not None, "a load, store or product outside of a kernel"
        setattr(self.running, name, getattr(self.running, name) + amount)


@contextmanager
def counted() -> Iterator[Counter]:
    """Counts every launch of every kernel of cdfast_kernels inside, by the kernel's name.

    Raises:
        RuntimeError: not in the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "counted(): expected the Triton interpreter; TRITON_INTERPRET is not 1. "
            "Set it before the first import of triton."
        )
    from triton.runtime.interpreter import interpreter_builder as builder

    counter = Counter()
    replaced = list(kernels().items())
    for (module, name), kernel in replaced:
        setattr(module, name, _Watched(name, kernel, counter))
    functions = {
        "create_dot": _count_dot,
        "create_masked_load": _count_load,
        "create_masked_store": _count_store,
    }
    for name, count in functions.items():
        setattr(builder, name, _before(getattr(builder, name), count, counter))
    try:
        yield counter
    finally:
        for name in functions:
            delattr(builder, name)  # the class's own shows again
        for (module, name), kernel in replaced:
            setattr(module, name, kernel)


class _Watched:
    """A kernel whose launches are counted."""

    def __init__(self, name: str, kernel: Any, counter: Counter):
        self.name, self.kernel, self.counter = name, kernel, counter

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.kernel, attribute)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.counter.running = self.counter.kernels.setdefault(self.name, Counted())
            self.counter.add("launches", 1)
            self.counter.add("programs", int(np.prod(grid)))
            try:
                return self.kernel[grid](*args, **kwargs)
            finally:
                self.counter.running = None

        return launch


def _before(function: Any, count: Any, counter: Counter) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        count(counter, *args)
        return function(*args, **kwargs)

    return run


def _count_dot(counter: Counter, a: Any, b: Any, *_: Any) -> None:
    counter.add("flops", 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1])


def _count_load(counter: Counter, pointers: Any, mask: Any, *_: Any) -> None:
    name = "read" if pointers.get_element_ty().is_floating() else "table_read"
    counter.add(name, _bytes(pointers, mask))


def _count_store(counter: Counter, pointers: Any, _value: Any, mask: Any, *_: Any) -> None:
    counter.add("written", _bytes(pointers, mask))


def _bytes(pointers: Any, mask: Any) -> int:
    number = pointers.get_element_ty().primitive_bitwidth // 8
    return int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))) * number
