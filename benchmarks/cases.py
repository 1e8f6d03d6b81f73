"""Sizes that the kernel benchmarks run, and the inputs of one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cdfast_kernels import VisualLayout, flash_attention, visual_attention_map

from benchmarks import work
from benchmarks.eager import Dense

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("causal", "padded", "packed", "segments")
OBJECTIVES = ("row", "map", "pooled", "mse", "kl")
PREFIX = 20  # text tokens before the image
TURNS = 4  # of a sample in the layout "segments": questions about the same image


@dataclass(frozen=True)
class Case:
    """One size.

    Args:
        tokens: of the longest sample.
        visual: of them, from position PREFIX on (or as many positions as the text leaves).
        layout: "causal": all samples have `tokens`; "padded": lengths fall to half of that,
            padding on the right; "packed": the same samples on one axis; "segments": after the
            image, TURNS turns that see it and themselves only.
    """

    tokens: int
    visual: int
    batch: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bf16"
    layout: str = "causal"
    objective: str = "row"

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.tokens}, {self.visual} visual"
        name = f"{shape}, H {self.heads}/{self.kv_heads}, d {self.head_dim}, {self.dtype}"
        for value, default in ((self.layout, "causal"), (self.objective, "row")):
            name += "" if value == default else f", {value}"
        return name

    @property
    def share(self) -> float:
        return self.visual / self.tokens


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
        *(case for name in LAYOUTS[1:] for case in cases((4096,), layout=name)),
        *(case for name in OBJECTIVES[1:] for case in cases((4096,), objective=name)),
        Case(512, 364, 32),
    ]


def cpu_cases(quick: bool) -> list[Case]:
    if quick:
        small: dict[str, Any] = {"heads": 8, "kv_heads": 8, "head_dim": 64, "dtype": "fp32"}
        return [Case(n, 89 * n // 125, 1, **small) for n in (256, 512, 1024, 2048)]
    main = Case(1024, 729, 1, dtype="fp32")
    small_main = replace(main, heads=8, kv_heads=8, head_dim=64)
    return [
        main,
        replace(main, tokens=2048, visual=1458),
        replace(main, head_dim=64),
        replace(main, kv_heads=4),
        replace(small_main, tokens=512, visual=364),
        replace(small_main, tokens=4096, visual=2880),
        replace(small_main, visual=256),
        replace(small_main, visual=972),
        *(replace(small_main, batch=2, layout=name) for name in LAYOUTS[1:]),
        *(replace(small_main, objective=name) for name in OBJECTIVES[1:]),
        replace(small_main, dtype="bf16"),
    ]


def lengths_of(case: Case) -> list[int]:
    """Live tokens of each sample."""
    if case.layout not in ("padded", "packed"):
        return [case.tokens] * case.batch
    low = case.tokens // 2
    steps = max(case.batch - 1, 1)
    return [case.tokens - (case.tokens - low) * i // steps for i in range(case.batch)]


class Problem:
    """Inputs of one case on the device, and the target that all variants share.

    q, k, v and d_out are (B, N, H, d), (sum of lengths, H, d) in the layout "packed".
    """

    leaf_names = ("q", "k", "v")

    def __init__(self, case: Case, device: str, backend: str):
        dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)
        self.case, self.dtype, self.backend = case, dtype, backend
        self._lay_out(device)

        def draw(heads: int) -> torch.Tensor:
            shape = (*self.tokens_shape, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.eager: Dense | None = None
        self.q, self.k, self.v = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
        self.d_out = draw(case.heads)
        if case.layout == "padded":
            self.d_out[~self.live.to(device)] = 0
        self.leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        self.one = torch.ones((), device=device)
        teacher = draw(case.heads), draw(case.kv_heads)
        with torch.no_grad():
            lse = flash_attention(*teacher, self.v, layout=self.layout, backend=backend)[1]
            self.target = visual_attention_map(*teacher, lse, self.layout, backend=backend)
            self.lse = flash_attention(*self.inputs(), layout=self.layout, backend=backend)[1]

    def _lay_out(self, device: str) -> None:
        """Who sees whom: the layout, and (B, N) masks of the same on the host."""
        case = self.case
        lengths = lengths_of(case)
        position = torch.arange(case.tokens).expand(case.batch, -1)
        self.live = position < torch.tensor(lengths)[:, None]
        self.first = first = min(PREFIX, case.tokens - case.visual)
        shares = [max(1, case.visual * n // case.tokens) for n in lengths]
        self.visual = (position >= first) & (position < first + torch.tensor(shares)[:, None])
        # 0 is the prefix that everybody sees.
        self.segment = torch.zeros_like(position)
        if case.layout == "segments":
            text = case.tokens - first - case.visual
            turn = (position - first - case.visual) * TURNS // max(text, 1) + 1
            self.segment = torch.where(position < first + case.visual, 0, turn)
        self.tokens_shape: tuple[int, ...] = (case.batch, case.tokens)
        if case.layout == "packed":
            self.tokens_shape = (sum(lengths),)
            ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            layout = VisualLayout.from_packed(ends, self.visual[self.live])
        elif case.layout == "segments":
            layout = VisualLayout.from_segments(self.segment, self.visual)
        else:
            mask = self.live if case.layout == "padded" else None
            layout = VisualLayout.from_mask(self.visual, mask)
        self.layout = layout.to(device)

    def inputs(self) -> list[torch.Tensor]:
        return [x.detach() for x in self.leaves]

    def live_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of an output that are no padding: what others write there does not count."""
        return x[self.live.to(x.device)] if self.case.layout == "padded" else x

    def visible(self) -> torch.Tensor:
        """bool (B, N, N) on the host, (1, N, N) where all samples are alike: i sees j."""
        causal = torch.ones(self.case.tokens, self.case.tokens, dtype=torch.bool).tril()[None]
        if self.case.layout == "causal":
            return causal
        if self.case.layout == "segments":
            ids = self.segment[:1]
            return causal & ((ids[:, :, None] == ids[:, None]) | (ids[:, None] == 0))
        return causal & self.live[:, None] & self.live[:, :, None]

    def prepare_eager(self) -> None:
        """What eager training has at hand once per batch; it may not fit."""
        columns = self.visual.any(0).nonzero().flatten()
        visible, device = self.visible(), self.q.device
        target = self.target.to_dense()
        if self.layout.is_packed:
            target = _stacked(target, self.case.tokens)
        self.eager = Dense(
            objective=self.case.objective,
            hidden=~(visible | torch.eye(self.case.tokens, dtype=torch.bool)).to(device)[:, None],
            target=target[..., columns.to(device)],
            columns=columns.to(device),
            entries=(visible[..., columns] & self.visual[:, None, columns]).to(device),
            live=self.live.to(device) if self.layout.is_packed else None,
        )

    @property
    def shape(self) -> work.Shape:
        """What the work of the kernels depends on."""
        case = self.case
        return work.Shape(self.layout, case.heads, case.kv_heads, case.head_dim, self.dtype)


def _stacked(maps: list[torch.Tensor], length: int) -> torch.Tensor:
    """Maps (n, n) of unequal samples as one (B, N, N), zero elsewhere."""
    found = maps[0].new_zeros(len(maps), length, length)
    for row, x in zip(found, maps):
        row[: x.shape[0], : x.shape[1]] = x
    return found
