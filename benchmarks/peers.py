"""What the kernels are measured against: attention of other libraries.

Every attention takes q (B, N, H, d), k, v (B, N, Hk, d), and is plain causal, but for
FlexAttention, which takes any layout. A peer that cannot run here raises at its first call; the
benchmark then names it as absent, with the reason. Eager attention is in eager.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Problem
from benchmarks.eager import repeated

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
}


def sdpa(backend: str) -> Attention:
    """torch's scaled_dot_product_attention on one of its kernels and no other.

    Grouped heads go in as they are where the kernel takes them, else repeated.
    """
    chosen = getattr(SDPBackend, backend)
    grouped = True

    def run(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
        if not grouped:
            k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
        with sdpa_kernel(chosen):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                is_causal=True,
                enable_gqa=k.shape[2] != q.shape[2],
            )
        return out.transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal grouped
        if grouped and k.shape[2] != q.shape[2]:
            try:
                return run(q, k, v, True)
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                grouped = False
        return run(q, k, v, grouped)

    return attention


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return first(flash_attn_func(q, k, v, causal=True))


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return first(flash_attn_func(q, k, v, causal=True))


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return the LSE as well."""
    return out[0] if isinstance(out, tuple) else out


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    heads = q.shape[2]
    k, v = repeated(k, heads), repeated(v, heads)
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())


# name -> attention, and the module that it needs.
LIBRARIES: dict[str, tuple[Attention, str]] = {
    "flash_attn": (flash_attn, "flash_attn.flash_attn_interface"),
    "flash_attn_3": (flash_attn_3, "flash_attn_interface"),
    "flash_attn_4": (flash_attn_4, "flash_attn.cute"),
    "xformers": (xformers, "xformers.ops"),
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is absent
        return False


def attentions() -> dict[str, Attention | str]:
    """name -> attention, or the reason why it is absent."""
    found: dict[str, Attention | str] = {name: sdpa(value) for name, value in SDPA.items()}
    for name, (function, module) in LIBRARIES.items():
        found[name] = function if installed(module) else "not installed"
    return found


class Flex:
    """torch's FlexAttention, compiled, on the layout of a problem: (q, k, v) -> out, lse.

    Its LSE has a gradient, so the alignment loss may stand beside it.
    """

    def __init__(self, problem: Problem):
        # CPU tensors that need a gradient are refused by FlexAttention itself, at the call.
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.packed = problem.layout.is_packed
        device, batch = problem.q.device, problem.case.batch
        sample, position, segment = self._labels(problem)
        length = position.shape[-1]

        def visible(b, h, i, j):
            same = (segment[b, i] == segment[b, j]) | (segment[b, j] == 0)
            return (sample[b, i] == sample[b, j]) & same & (position[b, i] >= position[b, j])

        def causal(b, h, i, j):
            return i >= j

        plain = problem.case.layout == "causal"
        rows = None if plain else (1 if self.packed else batch)
        mask_mod = causal if plain else visible
        sample, position, segment = (x.to(device) for x in (sample, position, segment))
        self.mask = create_block_mask(mask_mod, rows, None, length, length, device=str(device))
        self.attention = torch.compile(flex_attention, dynamic=False)

    def _labels(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, position and segment of every token; padding is a sample of its own."""
        shape = problem.live.shape
        samples = torch.arange(shape[0])[:, None].expand(shape)
        samples = torch.where(problem.live, samples, -1)
        positions = torch.arange(shape[1]).expand(shape)
        labels = samples, positions, problem.segment
        if self.packed:
            labels = tuple(x[problem.live][None] for x in labels)  # type: ignore[assignment]
        return labels

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import AuxRequest

        if self.packed:
            q, k, v = (x[None] for x in (q, k, v))
        out, extra = self.attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            block_mask=self.mask,
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=AuxRequest(lse=True),
        )
        out, lse = out.transpose(1, 2), extra.lse
        return (out[0], lse[0]) if self.packed else (out, lse)
