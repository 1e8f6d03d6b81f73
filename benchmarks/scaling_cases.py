"""The axes of the scaling benchmark, and one call of a model's attention layers at a size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cdfast_kernels import (
    VisualLayout,
    flash_attention,
    flash_attention_with_alignment,
    visual_attention_map,
)
from torch import Tensor

from benchmarks import memory
from benchmarks.cases import DTYPES, Case
from benchmarks.eager import Dense
from benchmarks.eager import eager as eager_attention
from benchmarks.variants import whole

DOUBLINGS = 16  # no machine goes that far: an axis ends for memory, time or budget
LLAVA_SHARE = 729 / 1024  # of a LLaVA sample's tokens, the visual ones
VISUAL_SHARES = (0.25, 0.40, 0.55, LLAVA_SHARE, 0.83, 0.95)
BEFORE_IMAGE = 20  # text tokens before the first visual one


@dataclass(frozen=True)
class Size:
    """One point: a batch of sequences through some attention layers."""

    tokens: int
    visual: int
    layers: int = 1
    batch: int = 1
    heads: int = 6
    head_dim: int = 64
    dtype: str = "fp32"


@dataclass(frozen=True)
class Axis:
    """What varies, and its sizes in order.

    Args:
        field: of Size.
        symbol, title: of the field, for tables and plots.
        share: of the budget.
        sizes: ascending.
        bounded: whether they end by themselves; otherwise they go on as far as the machine.
    """

    field: str
    symbol: str
    title: str
    share: float
    sizes: tuple[Size, ...]
    bounded: bool = False

    @property
    def fixed(self) -> str:
        size = self.sizes[0]
        parts = [f"H {size.heads}, d {size.head_dim}, {size.dtype}"]
        if self.field != "tokens":
            parts.append(f"N = {size.tokens}")
        if self.field == "tokens":
            parts.append(f"V = {size.visual / size.tokens:.0%} of N")
        elif self.field != "visual":
            parts.append(f"V = {size.visual}")
        parts += [f"{symbol} = 1" for field, symbol in LATER if field != self.field]
        return ", ".join(parts)

    def value(self, size: Size) -> int:
        return getattr(size, self.field)


LATER = (("layers", "L"), ("batch", "B"))


def with_visual(tokens: int, share: float = LLAVA_SHARE, **shape: Any) -> Size:
    return Size(tokens, round(tokens * share), **shape)


def axes(device: str, quick: bool) -> tuple[Axis, ...]:
    """In order of value."""
    shape: dict[str, Any] = {}
    tokens, wide = (256, 512) if quick else (1024, 2048)
    if device.startswith("cuda"):
        shape = {"heads": 16, "head_dim": 128, "dtype": "bf16"}
        tokens, wide = (1024, 2048) if quick else (2048, 4096)
    base = with_visual(tokens, **shape)
    powers = [2**i for i in range(DOUBLINGS)]
    shares = VISUAL_SHARES[::2] if quick else VISUAL_SHARES
    return (
        Axis(
            "tokens",
            "N",
            "tokens",
            (0.4 if quick else 0.55),
            tuple(with_visual(256 * p, **shape) for p in powers),
        ),
        Axis("layers", "L", "layers", 0.15, tuple(replace(base, layers=p) for p in powers)),
        Axis("batch", "B", "batch", 0.15, tuple(replace(base, batch=p) for p in powers)),
        Axis(
            "visual",
            "V",
            "visual tokens",
            0.16,
            tuple(with_visual(wide, share, **shape) for share in shares),
            bounded=True,
        ),
    )


class Layers:
    """Inputs of some attention layers whose activations all live until one backward.

    Layer l has q, k, v = x w_q[l], x w_k[l], x w_v[l] of its own, element by element: x is
    (B, N, 1, d) and a weight (H, d), so the inputs stay small and what a call allocates is what
    its layers keep. The teacher's map (of one head) is the target of every layer; it is an input,
    and not counted.
    """

    leaf_names = ("x", "w_q", "w_k", "w_v")

    def __init__(self, size: Size, device: str, variants: Sequence[str]):
        self.size, self.dtype = size, DTYPES[size.dtype]
        heads = (size.heads, size.heads, size.head_dim, size.dtype)
        self.case = Case(size.tokens, size.visual, size.batch, *heads)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=self.dtype)

        batch, n, first = size.batch, size.tokens, min(BEFORE_IMAGE, size.tokens - size.visual)
        mask = torch.zeros(batch, n, dtype=torch.bool)
        mask[:, first : first + size.visual] = True
        self.layout = VisualLayout.from_mask(mask).to(device)
        weights = [draw(size.layers, size.heads, size.head_dim) for _ in range(3)]
        self.leaves = [x.requires_grad_() for x in (draw(batch, n, 1, size.head_dim), *weights)]
        self.d_out = draw(batch, n, size.heads, size.head_dim).to(self.stream)
        self.one = torch.ones((), device=device)
        if set(variants) == {"plain"}:
            return
        q, k = draw(batch, n, 1, size.head_dim), draw(batch, n, 1, size.head_dim)
        with torch.no_grad():
            _, lse = flash_attention(q, k, k, layout=self.layout)
            # A teacher's map is held, not made again by each of its readers.
            self.target = visual_attention_map(q, k, lse, self.layout, storage="map")
        if "eager" in variants:
            visual = torch.arange(first, first + size.visual, device=device)
            dense = self.target.to_dense()[..., visual]
            hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
            self.eager = Dense(
                objective="row",
                hidden=hidden[None, None],
                target=dense,
                columns=visual,
                entries=~hidden[None, :, visual],
                live=None,
            )
        if "student" not in variants:
            del self.target

    def live_rows(self, x: Tensor) -> Tensor:
        """All of them: there is no padding."""
        return x

    @property
    def stream(self) -> torch.dtype:
        """Of the sum over layers, which must not round more the more of them there are."""
        return self.dtype if self.size.layers == 1 else torch.float32

    def forward(self, leaves: list[Tensor], attend: Callable[..., tuple]) -> tuple:
        """The sum of the layers' outputs and, where there are losses, their mean."""
        x, *weights = leaves
        total, losses = None, []
        for parts in zip(*(w.unbind() for w in weights)):
            out, *loss = attend(*(x * part for part in parts))
            total = out.to(self.stream) if total is None else total + out
            losses += loss
        return (total, torch.stack(losses).mean()) if losses else (total,)


def plain(p: Layers, leaves: list[Tensor]) -> tuple:
    return p.forward(leaves, lambda q, k, v: flash_attention(q, k, v, layout=p.layout)[:1])


def student(p: Layers, leaves: list[Tensor]) -> tuple:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        return flash_attention_with_alignment(q, k, v, p.target, p.layout)

    return p.forward(leaves, attend)


def eager(p: Layers, leaves: list[Tensor]) -> tuple:
    return p.forward(leaves, lambda q, k, v: eager_attention(q, k, v, p.eager))


# In the order of their cost.
RUNS: dict[str, Callable[..., tuple]] = {"plain": plain, "student": student, "eager": eager}


def memory_of(size: Size, variant: str, device: str) -> dict[str, float | None]:
    """Peak of a forward and backward beyond its inputs, its time, bytes kept for the backward.

    On a CPU to be called in a process of its own (memory.in_child).
    """
    run = RUNS[variant]
    if device == "cpu":
        small = with_visual(128, heads=size.heads, head_dim=size.head_dim, dtype=size.dtype)
        whole(Layers(small, device, (variant,)), run)
    problem = Layers(size, device, (variant,))
    if device != "cpu":
        # Compiles kernels and fills the workspaces of libraries, which are no part of the call.
        whole(problem, run)
    begin = time.perf_counter()
    peak = memory.peak_bytes(lambda: whole(problem, run), device)
    return {
        "memory_call_seconds": time.perf_counter() - begin,
        "peak_bytes": peak,
        "saved_bytes": memory.saved_bytes(lambda: run(problem, problem.leaves)),
    }
