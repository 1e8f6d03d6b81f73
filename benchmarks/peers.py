"""What the kernels are measured against: other attentions, and eager with materialised maps.

Every attention takes q (B, N, H, d), k, v (B, N, Hk, d), and is plain causal. A peer that cannot
run here raises at its first call; the benchmark then names it as absent, with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
}


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key heads as many times as query heads read them."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


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


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    heads = q.shape[2]
    k, v = repeated(k, heads), repeated(v, heads)
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())


def attentions() -> dict[str, Attention | str]:
    """name -> attention, or the reason why it is absent."""
    found: dict[str, Attention | str] = {name: sdpa(value) for name, value in SDPA.items()}
    for name, function in (("flash_attn", flash_attn), ("xformers", xformers)):
        installed = importlib.util.find_spec(name) is not None
        found[name] = function if installed else "not installed"
    return found


@dataclass(frozen=True)
class EagerInputs:
    """What eager training has at hand once per batch.

    Args:
        target: (B, N, V), the teacher's head-mean map on the visual columns.
        visual: int64 (V,), positions of the visual tokens, the same in every sample.
        first: the first of them, on the host.
        hidden: bool (N, N), True where a row does not see a key.
    """

    target: Tensor
    visual: Tensor
    first: int
    hidden: Tensor


def eager(q: Tensor, k: Tensor, v: Tensor, given: EagerInputs) -> tuple[Tensor, Tensor]:
    """out, and the `row` loss (mean over samples) on materialised maps; no code of cdfast_kernels.

    As models compute eager attention: softmax in float32 (float64 for float64), probabilities in
    the dtype of q.
    """
    n = q.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs = scores.masked_fill_(given.hidden, float("-inf")).softmax(-1, dtype=wide).to(q.dtype)
    del scores
    out = probs @ v
    # The first row sees one visual key: it counts, without a loss.
    rows = slice(given.first + 1, None)
    student = probs.mean(1)[:, rows][..., given.visual].to(wide)
    terms = 1 - F.cosine_similarity(student, given.target[:, rows].to(wide), -1)
    return out.transpose(1, 2), terms.sum(1).mean() / (n - given.first)
