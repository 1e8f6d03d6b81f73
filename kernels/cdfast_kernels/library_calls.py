"""How the attention of PyTorch, flash-attn 2 and xformers is called: forward and backward.

Each library has forward(q, k, v, scale, mask, cu_seqlens, length) -> out, lse (natural log), and
backward(d_out, q, k, v, out, lse, scale, mask, cu_seqlens, length) -> dq, dk, dv, for causal
sequences that start at 0: batches (B, N, heads, d), and with flash_attn also (total, heads, d) with
cu_seqlens. `mask` (B, 1, N, N) is added to the scores instead of the causal mask (sdpa).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

# The flash kernels of all three libraries take head sizes that are multiples of this.
_HEAD_MULTIPLE = 8
# Memory-efficient attention reads the LSE in aligned pieces.
_LSE_MULTIPLE = 32


def _sdpa_forward(q, k, v, scale, mask, cu_seqlens, length):
    aten, n, dim = torch.ops.aten, q.shape[1], q.shape[-1]
    if q.device.type == "cpu":
        q, k, v = _heads_first(q, *_repeat(q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    elif _has_flash(q, mask):
        q, k, v = _heads_first(*_pad_heads(q, k, v))
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    else:
        q, k, v = _heads_first(*_pad_heads(q, *_repeat(q, k, v)))
        bias = None if mask is None else mask.expand(-1, q.shape[1], -1, -1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, mask is None, scale=scale
        )
    return out.transpose(1, 2)[..., :dim], lse[..., :n]


def _sdpa_backward(d_out, q, k, v, out, lse, scale, mask, cu_seqlens, length):
    aten, dim = torch.ops.aten, q.shape[-1]
    kv_heads = k.shape[2]
    if q.device.type == "cpu":
        tensors = _heads_first(d_out, q, *_repeat(q, k, v), out)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    elif _has_flash(q, mask):
        tensors = _heads_first(*_pad_heads(d_out, q, k, v, out))
        n = q.shape[1]
        # Without dropout the state of the random numbers is not read.
        state, unused = (torch.zeros(s, dtype=torch.uint64, device=q.device) for s in (2, ()))
        grads = aten._scaled_dot_product_flash_attention_backward(
            *tensors, lse, None, None, n, n, 0.0, True, state, unused, scale=scale
        )
    else:
        d_out, q, k, v, out = _heads_first(*_pad_heads(d_out, q, *_repeat(q, k, v), out))
        bias = None if mask is None else mask.expand(-1, q.shape[1], -1, -1)
        lse = F.pad(lse, (0, -lse.shape[-1] % _LSE_MULTIPLE), value=torch.inf)
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            d_out, q, k, v, bias, out, lse, seed, offset, 0.0, [True, True, True, False],
            mask is None, scale=scale,
        )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2)[..., :dim] for x in grads)
    return dq, _sum_groups(dk, kv_heads), _sum_groups(dv, kv_heads)


def _has_flash(q: Tensor, mask: Tensor | None) -> bool:
    modern = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return mask is None and q.dtype in HALF and q.shape[-1] <= 256 and modern


def _flash_attn_forward(q, k, v, scale, mask, cu_seqlens, length):
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward as forward

    shape, dim = q.shape, q.shape[-1]
    tensors, ends = _as_packed(cu_seqlens, *_pad_heads(q, k, v))
    out, lse, *_ = forward(*tensors, ends, ends, length, length, 0.0, scale, causal=True)
    out = out[..., :dim].reshape(shape)
    return out, lse if q.ndim == 3 else lse.unflatten(1, shape[:2]).transpose(0, 1)


def _flash_attn_backward(d_out, q, k, v, out, lse, scale, mask, cu_seqlens, length):
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward as backward

    dim = q.shape[-1]
    padded = _pad_heads(d_out, q, k, v, out)
    tensors, ends = _as_packed(cu_seqlens, *padded)
    lse = lse if q.ndim == 3 else lse.transpose(0, 1).flatten(1)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[1:4]]
    deterministic = torch.are_deterministic_algorithms_enabled()
    backward(
        *tensors, lse.contiguous(), *grads, ends, ends, length, length, 0.0, scale, True,
        -1, -1, 0.0, None, deterministic,
    )  # fmt: skip
    return [x[..., :dim].reshape(y.shape) for x, y in zip(grads, (q, k, v))]


def _xformers_forward(q, k, v, scale, mask, cu_seqlens, length):
    from xformers import ops

    dim = q.shape[-1]
    tensors = _pad_heads(q, *_repeat(q, k, v))
    out, lse = ops.memory_efficient_attention_forward_requires_grad(
        *tensors, ops.LowerTriangularMask(), scale=scale
    )
    return out[..., :dim], lse[..., : q.shape[1]]


def _xformers_backward(d_out, q, k, v, out, lse, scale, mask, cu_seqlens, length):
    from xformers import ops

    dim, kv_heads = q.shape[-1], k.shape[2]
    d_out, q, k, v, out = _pad_heads(d_out, q, *_repeat(q, k, v), out)
    dq, dk, dv = ops.memory_efficient_attention_backward(
        d_out, out, lse, q, k, v, ops.LowerTriangularMask(), scale=scale
    )
    grads = dq, _sum_groups(dk, kv_heads), _sum_groups(dv, kv_heads)
    return [x[..., :dim] for x in grads]


LIBRARIES = {
    "sdpa": (_sdpa_forward, _sdpa_backward),
    "flash_attn": (_flash_attn_forward, _flash_attn_backward),
    "xformers": (_xformers_forward, _xformers_backward),
}


def _as_packed(cu_seqlens: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """(total, heads, d) of batches (B, N, heads, d), and cu_seqlens."""
    if cu_seqlens is not None:
        return list(tensors), cu_seqlens
    batch, n = tensors[0].shape[:2]
    steps = torch.arange(batch + 1, dtype=torch.int32, device=tensors[0].device)
    return [x.flatten(0, 1) for x in tensors], steps * n


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _pad_heads(*tensors: Tensor) -> list[Tensor]:
    extra = -tensors[0].shape[-1] % _HEAD_MULTIPLE
    return [F.pad(x, (0, extra)) if extra else x for x in tensors]


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """k and v with one head per query head, for a library that shares none."""
    group = q.shape[2] // k.shape[2]
    return [x.repeat_interleave(group, 2) if group > 1 else x for x in (k, v)]


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """Gradient of `_repeat`, summed in float32 or wider."""
    if grad.shape[2] == kv_heads:
        return grad
    groups = grad.unflatten(2, (kv_heads, -1))
    return groups.sum(3, dtype=wide_dtype(grad.dtype)).to(grad.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and the LSE are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
