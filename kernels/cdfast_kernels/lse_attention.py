"""Attention of other libraries with a differentiable LSE: the backends sdpa, flash_attn, xformers.

Their backward takes no gradient of the LSE, but it recomputes D = rowsum(dO * out) from the `out`
that it is given. dS = P * (dO V^T - D + dlse), so an `out` with rowsum(dO * out) = D - dlse gives
the missing term (`carry_dlse`). The library never sees padding or NaN stored there: samples are
moved to the front of their row and padding is zeroed, by torch operations that autograd knows.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from cdfast_kernels.errors import bad_argument
from cdfast_kernels.layout import VisualLayout
from cdfast_kernels.library_calls import HALF, LIBRARIES, wide_dtype

# Memory-efficient attention reads the rows of a mask in aligned pieces.
_MASK_MULTIPLE = 16

_CUDA_DTYPES = {
    "sdpa": (*HALF, torch.float32),
    "flash_attn": HALF,
    "xformers": (*HALF, torch.float32),
}


def _is_installed(package: str, file: str) -> bool:
    """Whether the package has the file, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return any((Path(folder) / file).is_file() for folder in folders)


_INSTALLED = {
    # FlashAttention-4 alone also makes a package `flash_attn`, without this file.
    "flash_attn": _is_installed("flash_attn", "flash_attn_interface.py"),
    "xformers": _is_installed("xformers", "ops/__init__.py"),
}

# |dlse| / |dO| up to which `out` can carry dlse, as a power of two: what the dtype can hold.
_REACH = {torch.float16: 15, torch.bfloat16: 60, torch.float32: 60, torch.float64: 400}

# Numbers of `out` that are worked on at a time.
_CHUNK = 2**22


def why_not(library: str) -> str | None:
    """None if the library can run here, else the reason; imports nothing."""
    if library == "sdpa":
        return None
    if not _INSTALLED[library]:
        return f"{library} is not installed"
    if not torch.cuda.is_available():
        return f"no CUDA device, and {library} runs on CUDA only"
    if library == "flash_attn" and torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA device is older than compute capability 8.0"
    return None


def check_library(q: Tensor, layout: VisualLayout, library: str) -> None:
    """ValueError for a device, dtype, head size or layout that the library does not take."""
    name, remedy = f"the {library} backend", 'Use backend="auto" or "reference".'
    devices = ("cpu", "cuda") if library == "sdpa" else ("cuda",)
    if q.device.type not in devices:
        expected = f"a tensor on {' or '.join(devices)} for {name}"
        raise bad_argument("q", expected, q, remedy)
    if q.is_cuda and q.dtype not in _CUDA_DTYPES[library]:
        known = " or ".join(str(d).removeprefix("torch.") for d in _CUDA_DTYPES[library])
        raise bad_argument("q", f"{known} for {name} on CUDA", q, remedy)
    if library == "flash_attn" and q.shape[-1] > 256:
        raise bad_argument("q", f"a head size of at most 256 for {name}", q, remedy)
    if library != "sdpa" and not _is_contiguous(layout):
        expected = f"one segment without holes per sample for {name}"
        remedy = 'Use backend="sdpa" (with a dense mask), "triton" or "reference".'
        raise bad_argument("layout", expected, repr(layout), remedy)


def _is_contiguous(layout: VisualLayout) -> bool:
    """Every sample is one run of live tokens, each of which sees all before it."""
    return layout.is_packed or layout.schedule.contiguous


def flash_attention_library(
    q: Tensor, k: Tensor, v: Tensor, layout: VisualLayout, scale: float, library: str
) -> tuple[Tensor, Tensor]:
    """out and the natural-log LSE by the library's attention; see ops.flash_attention."""
    if 0 in q.shape:
        # Kernels do not take grids of size 0.
        out, lse = q * 0, q.new_zeros(_lse_shape(q), dtype=wide_dtype(q.dtype))
        return out, lse
    if layout.is_packed and library == "flash_attn":
        ends = layout.schedule.samples[:, 1]
        cu_seqlens = torch.cat((ends.new_zeros(1), ends))
        return library_attention(q, k, v, scale, library, None, cu_seqlens, layout.length)
    view = _View.of(layout)
    mask = None if _is_contiguous(layout) else _additive_mask(layout, q.dtype)
    inputs = (view.enter(x) for x in (q, k, v))
    out, lse = library_attention(*inputs, scale, library, mask, None, layout.length)
    return view.leave(out, lse, layout)


class _View(NamedTuple):
    """How tokens get to a batch (samples, length) of sequences that start at 0, and back.

    Attributes:
        take: flat token of each place of the batch; None if tokens stay where they are.
        put: the inverse, flat place of each token.
        live: bool (samples, length); None if every place is live.
    """

    take: Tensor | None
    put: Tensor | None
    live: Tensor | None

    @classmethod
    def of(cls, layout: VisualLayout) -> "_View":
        if layout.gather is not None:
            return cls(layout.gather.flatten(), layout.scatter, layout.live)
        if layout.is_causal:
            return cls(None, None, None)
        if layout.is_prefix_causal or not _is_contiguous(layout):
            return cls(None, None, layout.live)
        # Padding before the first live token goes to the end.
        n_samples, length = layout.live.shape
        first = layout.live.to(torch.uint8).argmax(1, keepdim=True)
        place = torch.arange(length, device=layout.device)
        sample = torch.arange(n_samples, device=layout.device)[:, None] * length
        take, put = (place + first) % length, (place - first) % length
        live = layout.live.gather(1, take)
        return cls((sample + take).flatten(), (sample + put).flatten(), live)

    def enter(self, x: Tensor) -> Tensor:
        """(samples, length, heads, d) of (B, N, heads, d) or (total, heads, d), 0 at padding."""
        if self.live is None:
            return x
        if self.take is not None:
            x = x.flatten(0, -3).index_select(0, self.take)
            x = x.reshape(*self.live.shape, *x.shape[1:])
        return torch.where(self.live[:, :, None, None], x, 0)

    def leave(self, out: Tensor, lse: Tensor, layout: VisualLayout) -> tuple[Tensor, Tensor]:
        """out and lse in the layout of the public function, 0 and -inf at padding."""
        if self.live is None:
            return out, lse
        out = torch.where(self.live[:, :, None, None], out, 0)
        lse = torch.where(self.live[:, None], lse, -torch.inf)
        if self.put is None:
            return out, lse
        rows = lse.transpose(1, 2).flatten(0, 1).index_select(0, self.put)
        out = out.flatten(0, 1).index_select(0, self.put)
        shape = layout.shape
        lse = rows.reshape(*shape, rows.shape[1]).transpose(-1, -2).contiguous()
        return out.reshape(*shape, *out.shape[1:]), lse


def _additive_mask(layout: VisualLayout, dtype: torch.dtype) -> Tensor:
    """(B, 1, N, N): 0 where visible, else -inf."""
    seen = layout.visible()
    # A padding row sees nothing, and softmax over nothing is undefined: let it see itself.
    seen |= torch.eye(layout.length, dtype=torch.bool, device=layout.device)
    width = -(-layout.length // _MASK_MULTIPLE) * _MASK_MULTIPLE
    mask = torch.zeros(*seen.shape[:2], width, dtype=dtype, device=layout.device)
    return mask[..., : layout.length].masked_fill_(~seen, -torch.inf)[:, None]


# The operator: sequences that start at 0, packed with cu_seqlens or as a batch


@custom_op("cdfast::library_attention", mutates_args=())
def library_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    library: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    forward, _ = LIBRARIES[library]
    out, lse = forward(q, k, v, scale, mask, cu_seqlens, length)
    return out.contiguous(), lse.contiguous()


@library_attention.register_fake
def _(q, k, v, scale, library, mask, cu_seqlens, length):
    return _empty(q), q.new_empty(_lse_shape(q), dtype=wide_dtype(q.dtype))


@custom_op("cdfast::library_attention_backward", mutates_args=())
def library_attention_backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    library: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _, backward = LIBRARIES[library]

    def run(d_out: Tensor, out: Tensor) -> list[Tensor]:
        d_out = d_out.contiguous()
        grads = backward(d_out, q, k, v, out, lse, scale, mask, cu_seqlens, length)
        return [grad.contiguous() for grad in grads]

    dq, dk, dv = _gradients(run, d_out, d_lse, out)
    return dq, dk, dv


@library_attention_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, scale, library, mask, cu_seqlens, length):
    return _empty(q), _empty(k), _empty(v)


def _setup(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.library, mask, cu_seqlens, ctx.length = inputs
    ctx.save_for_backward(q, k, v, *output, mask, cu_seqlens)
    ctx.set_materialize_grads(False)


def _vjp(ctx, d_out, d_lse):
    none = (None,) * 5
    if d_out is None and d_lse is None:
        return None, None, None, *none
    *saved, mask, cu_seqlens = ctx.saved_tensors
    options = (ctx.scale, ctx.library, mask, cu_seqlens, ctx.length)
    return *library_attention_backward(d_out, d_lse, *saved, *options), *none


library_attention.register_autograd(_vjp, setup_context=_setup)


def _gradients(
    run: Callable[[Tensor, Tensor], list[Tensor]],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    out: Tensor,
) -> list[Tensor]:
    """dq, dk, dv by `run(d_out, out)`, a backward that has no gradient of the LSE."""
    if d_lse is None:
        assert d_out is not None
        return run(d_out, out)
    if d_out is None:
        d_out, out, _ = carry_dlse(torch.zeros_like(out), out, d_lse)
        dq, dk, dv = run(d_out, out)
        return [dq, dk, torch.zeros_like(dv)]
    carrier, carried, stuck = carry_dlse(d_out, out, d_lse)
    # What float16 adds to d_out in these rows is not negligible in dv: dlse gets a pass of its own.
    # Asking for it waits for the device; the other dtypes never do.
    if d_out.dtype == torch.float16 and bool(stuck.any()):
        dq, dk, dv = run(d_out, out)
        extra_q, extra_k, _ = _gradients(run, None, d_lse, out)
        return [dq + extra_q, dk + extra_k, dv]
    return run(carrier, carried)


def carry_dlse(d_out: Tensor, out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_out' and out' with rowsum(d_out' out') = rowsum(d_out out) - d_lse, changed in one channel.

    In channel c, out'_c = (d_out_c out_c - d_lse) / d_out_c. Rounding it costs half a unit in the
    last place of d_out_c out_c - d_lse, so of the channels in which out' is in range the one is
    taken where that is smallest; the others keep all digits of out. Adding a multiple of d_out to
    all of out instead loses d_lse where it is below the rounding of out.

    Where d_out_c = 0, and where no channel is in range, d_out'_c is |d_lse| / 2^_REACH, as a power
    of two: next to d_lse, what that adds to dP and dv is lost in rounding. float16 does not reach
    far enough, so it changes d_out only where no channel is in range.

    Args:
        d_out, out: (..., H, d).
        d_lse: (H, ...) or (B, H, N).

    Returns:
        d_out', out', and bool (..., H, 1), True where d_out was changed.
    """
    outputs = _empty(d_out), _empty(out), d_out.new_empty(*d_out.shape[:-1], 1, dtype=torch.bool)
    d_lse = d_lse.transpose(-1, -2)[..., None]
    # Float32 temporaries of some tokens only: all would be several times as large as out.
    tokens = max(1, _CHUNK // d_out.shape[-2:].numel())
    flat = (x.flatten(0, -3).split(tokens) for x in (d_out, out, d_lse, *outputs))
    for *inputs, carrier, carried, stuck in zip(*flat):
        for to, result in zip((carrier, carried, stuck), _carry_chunk(*inputs)):
            to.copy_(result)
    return outputs


def _carry_chunk(d_out: Tensor, out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`carry_dlse` of (tokens, H, d), with d_lse (tokens, H, 1)."""
    wide, reach = wide_dtype(d_out.dtype), _REACH[d_out.dtype]
    d_lse = d_lse.to(wide)
    grad = d_out.to(wide)
    product = grad * out.to(wide) - d_lse
    size = product.abs()
    in_range = size <= grad.abs() * 2.0**reach
    if d_out.dtype != torch.float16:
        in_range |= grad == 0
    least, channel = torch.where(in_range, size, torch.inf).min(-1, keepdim=True)
    product, grad = product.gather(-1, channel), grad.gather(-1, channel)
    stuck = (least.isinf() | (grad == 0)) & (d_lse != 0)
    limits = torch.finfo(d_out.dtype)
    smallest = limits.tiny * (limits.eps if d_out.dtype == torch.float16 else 1)
    step = torch.exp2(product.abs().frexp().exponent.to(wide) - reach).clamp(min=smallest)
    grad = torch.where(stuck, step.to(d_out.dtype).to(wide), grad)
    here = torch.arange(d_out.shape[-1], device=d_out.device) == channel
    carrier = torch.where(here & stuck, grad.to(d_out.dtype), d_out)
    carried = torch.where(here & (d_lse != 0), (product / grad).to(out.dtype), out)
    return carrier, carried, stuck


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    """(B, H, N) or (H, total)."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])
