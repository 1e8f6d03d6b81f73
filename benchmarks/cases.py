"""The sizes that the kernel benchmarks measure, and the tensors of one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from cdfast_kernels import VisualLayout, flash_attention, visual_attention_map

from benchmarks import peers, work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    tokens: int
    visual: int
    batch: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.tokens}, {self.visual} visual"
        return f"{shape}, H {self.heads}/{self.kv_heads}, d {self.head_dim}, {self.dtype}"


def gpu_cases(quick: bool) -> list[Case]:
    """In order of value: a run that is stopped early has the main ones."""
    shares = {1024: 729, 2048: 1458, 4096: 2880, 8192: 7000, 16384: 15000}
    batch = {n: 16384 // n for n in shares}

    def cases(sizes: Iterable[int], **shape: Any) -> list[Case]:
        return [Case(n, shares[n], batch[n], **shape) for n in sizes]

    grouped = {"heads": 28, "kv_heads": 4}
    if quick:
        return cases((4096, 2048)) + cases((4096,), **grouped)
    return [
        *cases((4096, 1024, 2048, 8192, 16384)),
        *cases((4096, 1024, 16384), **grouped),
        *cases((4096, 1024), head_dim=64),
        *cases((8192, 2048), **grouped),
        Case(4096, 1024, 4),
        *cases((4096,), dtype="fp16"),
    ]


def cpu_cases(quick: bool) -> list[Case]:
    small = {"heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "fp32"}
    sizes = ((70, 40), (40, 25)) if quick else ((512, 360), (1024, 729), (2048, 1458))
    return [Case(n, v, 1, **small) for n, v in sizes]


class Problem:
    """Inputs of one case on the device, and the target that all variants share."""

    def __init__(self, case: Case, device: str, backend: str):
        dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            shape = (case.batch, case.tokens, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.case, self.dtype = case, dtype
        self.first = first = min(20, case.tokens - case.visual)
        self.visual = torch.arange(first, first + case.visual, device=device)
        self.eager: peers.EagerInputs | None = None
        mask = torch.zeros(case.batch, case.tokens, dtype=torch.bool)
        mask[:, first : first + case.visual] = True
        self.layout = VisualLayout.from_mask(mask).to(device)
        self.q, self.k, self.v = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
        self.d_out = draw(case.heads)
        self.leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        self.one = torch.ones((), device=device)
        teacher = draw(case.heads), draw(case.kv_heads)
        with torch.no_grad():
            lse = flash_attention(*teacher, self.v, layout=self.layout, backend=backend)[1]
            self.target = visual_attention_map(*teacher, lse, self.layout, backend=backend)
            self.lse = flash_attention(*self.inputs(), layout=self.layout, backend=backend)[1]

    def inputs(self) -> list[torch.Tensor]:
        return [x.detach() for x in self.leaves]

    def prepare_eager(self) -> None:
        """The target as eager training has it; it may not fit."""
        n, device = self.case.tokens, self.q.device
        target = self.target.to_dense()[..., self.visual]
        hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        self.eager = peers.EagerInputs(target, self.visual, self.first, hidden)

    @property
    def shape(self) -> work.Shape:
        """What the work of the kernels depends on."""
        case = self.case
        return work.Shape(self.layout, case.heads, case.kv_heads, case.head_dim, self.dtype)
