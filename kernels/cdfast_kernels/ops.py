"""The public operations: validation of metadata, choice of a backend, docstrings.

Tensors are in flash-attn's layout, (B, N, heads, d) or packed (total, heads, d), with any strides
as long as the last dimension is contiguous. Checks read shapes, dtypes and devices only, never
values, so no operation waits for the device.
"""

import importlib.util
import math
import numbers
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cdfast_kernels import native
from cdfast_kernels.errors import bad_argument
from cdfast_kernels.layout import MAP_TILE, VisualLayout
from cdfast_kernels.reference import (
    flash_attention_ref,
    flash_attention_with_alignment_ref,
    visual_alignment_loss_ref,
    visual_attention_map_ref,
)
from cdfast_kernels.visual_map import MAP_DTYPE, MapInputs, VisualMap

OBJECTIVES = ("row", "map", "pooled", "mse", "kl")
REDUCTIONS = ("mean", "sum", "none")
STORAGES = ("auto", "map", "inputs")

# Backends of every operation, and those that only compute attention, in the order of the docs.
BACKENDS = ("triton", "cpu", "reference")
ATTENTION_BACKENDS = ("sdpa", "flash_attn", "xformers")

# What the Triton kernels are written for.
TRITON_HEAD_DIMS = (32, 64, 80, 96, 128, 256)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What the CPU kernels are written for, with any head size.
CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def available_backends() -> dict[str, str | None]:
    """Which backends can run here.

    Returns:
        {name: None if usable, else the reason}. "sdpa", "flash_attn" and "xformers" are for
        `flash_attention` only.
    """
    reasons: dict[str, str | None] = {
        name: f"the {name} backend is not part of this version"
        for name in (*BACKENDS, *ATTENTION_BACKENDS)
    }
    reasons["reference"] = None
    reasons["triton"] = _why_not_triton()
    reasons["cpu"] = native.REASON
    reasons |= {name: _libraries().why_not(name) for name in ATTENTION_BACKENDS}
    return reasons


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    layout: VisualLayout | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention that also returns its log-sum-exp, differentiable in both.

    out_h[i] = sum_j P_h[i, j] v[j],  P_h[i, j] = exp(s_h[i, j] - lse_h[i]),
    s_h = softmax_scale q_h k^T,  lse_h[i] = log sum_j exp(s_h[i, j]),  j over the visible keys.

    Args:
        q: (B, N, H, d), packed (total, H, d). float16, bfloat16, float32; float64 on "reference",
            and on "sdpa" on the CPU.
        k, v: (B, N, Hk, d), packed (total, Hk, d), dtype of q. Hk divides H; query head h reads
            head h // (H / Hk).
        softmax_scale: positive; d**-0.5 by default.
        layout: who sees whom; None is plain causal attention over (B, N).
        backend: "auto", "triton", "cpu", "reference", "sdpa", "flash_attn" or "xformers". The last
            three are the attention of these libraries (kernels/README.md, "Beside another
            attention"), whose backward is given the gradient of the LSE through its `out`.

    Returns:
        out: shape and dtype of q, 0 in rows at padding.
        lse: (B, H, N), packed (H, total), natural log, -inf in rows at padding. float32 (float64
            for float64 q).

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or the backend cannot run.

    Source: FlashAttention-2 (arXiv 2307.08691); CompoDistill (arXiv 2510.12184) for its use.
    """
    _check_backend(backend, BACKENDS + ATTENTION_BACKENDS)
    _check_qk(q, k)
    _check_v(v, k)
    scale = _check_scale(softmax_scale, q)
    if layout is None:
        layout = _plain_causal(q)
    _check_layout(layout, q)
    with torch.autocast(q.device.type, enabled=False):
        if _runs_on_triton(backend, q):
            return _triton().flash_attention_triton(q, k, v, layout, scale)
        if _runs_on_cpu(backend, q):
            return _cpu().flash_attention_cpu(q, k, v, layout, scale)
        if backend in ATTENTION_BACKENDS:
            _libraries().check_library(q, layout, backend)
            return _libraries().flash_attention_library(q, k, v, layout, scale, backend)
        return flash_attention_ref(q, k, v, layout, scale)


def visual_attention_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: VisualLayout,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
    storage: str = "auto",
) -> VisualMap:
    """The head-averaged attention on visual keys, S[b, i, v] = (1/H) sum_h exp(s_h - lse_h).

    Args:
        q: (B, N, H, d), packed (total, H, d). float16, bfloat16, float32; float64 on "reference".
        k: (B, N, Hk, d), packed (total, Hk, d), dtype of q.
        lse: (B, H, N), packed (H, total): the LSE over all visible keys, from `flash_attention`.
        layout: who sees whom, and which keys are visual.
        softmax_scale: the one given to `flash_attention`; d**-0.5 by default.
        backend: "auto", "triton", "cpu" or "reference".
        storage: "map" computes the map now; "inputs" keeps q, k and lse, from which every reader of
            the map computes it; "auto" is "inputs" on the triton backend where the map would take
            more than twice their memory.

    Returns:
        A VisualMap without gradient: scaled float16 for float16 and bfloat16 q, else q's dtype.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or the backend cannot run.

    Source: CompoDistill (arXiv 2510.12184), the visual attention maps of VAT.
    """
    _check_backend(backend, BACKENDS)
    _check_qk(q, k)
    _check_lse(lse, q)
    scale = _check_scale(softmax_scale, q)
    _check_layout(layout, q)
    _check_option("storage", storage, STORAGES)
    on_triton = _runs_on_triton(backend, q)
    make = visual_attention_map_ref
    if on_triton:
        make = _triton().visual_attention_map_triton
    elif _runs_on_cpu(backend, q):
        make = _cpu().visual_attention_map_cpu
    if storage == "inputs" or (storage == "auto" and on_triton and _is_large(layout, q, k)):
        inputs = MapInputs(q.detach(), k.detach(), lse.detach(), scale)
        return VisualMap(None, layout, (inputs,), make)
    with torch.autocast(q.device.type, enabled=False):
        return make(q, k, lse, layout, scale)


def visual_alignment_loss(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    *,
    objective: str = "row",
    softmax_scale: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Distance of the student's visual attention map from a target, differentiable in q, k, lse.

    With S the map of (q, k, lse), T the target, and rows the live rows that see a visual key, the
    loss of one sample is
        row:    mean over rows of 1 - cos(S_i, T_i)
        map:    1 - cos of the flattened maps
        pooled: 1 - cos of the column means over visual rows, after the authors' sink filter
        mse:    mean over visible visual entries of (S - T)^2
        kl:     mean over rows of KL(T^_i || S^_i), both renormalised over visible visual columns
    `row` and `kl` are 0 in rows with one visible visual key or an all-zero target; the remaining
    edge cases are in kernels/README.md.

    Args:
        q: (B, N, H, d), packed (total, H, d). float16, bfloat16, float32; float64 on "reference".
        k: (B, N, Hk, d), packed (total, Hk, d), dtype of q.
        lse: (B, H, N), packed (H, total): the LSE over all visible keys, from `flash_attention`.
            Its gradient carries the normalisation: do not detach it.
        target: a VisualMap of the same layout; any storage dtype, any number of heads behind it.
        layout: who sees whom, and which keys are visual.
        objective: "row", "map", "pooled", "mse" or "kl".
        softmax_scale: the one given to `flash_attention`; d**-0.5 by default.
        reduction: "mean" (sum over samples divided by the samples with an image), "sum" or "none".
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        float32 (float64 for float64 q): a scalar, or (B,), packed (S,), for reduction "none".
        Samples without an image contribute 0.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or the backend cannot run.

    Source: CompoDistill (arXiv 2510.12184), loss L_ADL (`row`); `pooled` is the authors' code;
        `mse` and `kl` are the paper's ablations.
    """
    _check_backend(backend, BACKENDS)
    _check_qk(q, k)
    _check_lse(lse, q)
    scale = _check_scale(softmax_scale, q)
    _check_alignment(target, layout, q, objective, reduction)
    with torch.autocast(q.device.type, enabled=False):
        run = visual_alignment_loss_ref
        if _runs_on_triton(backend, q):
            run = _triton().visual_alignment_loss_triton
        elif _runs_on_cpu(backend, q):
            run = _cpu().visual_alignment_loss_cpu
        return run(q, k, lse, target, layout, scale, objective, reduction)


def flash_attention_with_alignment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: VisualMap,
    layout: VisualLayout,
    *,
    objective: str = "row",
    softmax_scale: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention and the alignment loss of its map in one operation.

    Equal to `flash_attention` followed by `visual_alignment_loss`; in its backward the loss adds
    G / H to dP on visual columns and delta to the row constant (G = dL/dS, kernels/README.md):
        dS_h = P_h (dO_h V^T + G / H - (D_h + delta_h)),  delta_h[i] = (1/H) sum_v P_h[i, v] G[i, v]

    Args:
        q, k, v, softmax_scale: as in `flash_attention`.
        target, layout, objective, reduction: as in `visual_alignment_loss`.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        out: as in `flash_attention`.
        loss: as in `visual_alignment_loss`.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or the backend cannot run.

    Source: CompoDistill (arXiv 2510.12184), VAT.
    """
    _check_backend(backend, BACKENDS)
    _check_qk(q, k)
    _check_v(v, k)
    scale = _check_scale(softmax_scale, q)
    _check_alignment(target, layout, q, objective, reduction)
    with torch.autocast(q.device.type, enabled=False):
        run = flash_attention_with_alignment_ref
        if _runs_on_triton(backend, q):
            run = _triton().flash_attention_with_alignment_triton
        elif _runs_on_cpu(backend, q):
            run = _cpu().flash_attention_with_alignment_cpu
        return run(q, k, v, target, layout, scale, objective, reduction)


def _check_backend(backend: str, choices: tuple[str, ...]) -> None:
    """ValueError with the reason why the backend asked for cannot run, if it cannot."""
    _check_option("backend", backend, ("auto", *choices))
    if backend in ("auto", "reference"):
        return
    reason = available_backends()[backend]
    if reason is not None:
        usable = [name for name in choices if available_backends()[name] is None]
        remedy = f'Use backend="auto" or one of {usable}.'
        raise bad_argument("backend", "one that can run here", f"{backend!r}: {reason}", remedy)


def _triton() -> ModuleType:
    """The Triton backend, imported at its first use only."""
    from cdfast_kernels import triton_ops

    return triton_ops


def _cpu() -> ModuleType:
    """The CPU backend, imported at its first use only."""
    from cdfast_kernels import cpu_ops

    return cpu_ops


def _libraries() -> ModuleType:
    """The attention of other libraries, imported at its first use only."""
    from cdfast_kernels import lse_attention

    return lse_attention


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _why_not_triton() -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device, and the Triton interpreter is off (TRITON_INTERPRET=1 turns it on)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA device is older than compute capability 8.0"
    return None


def _runs_on_triton(backend: str, q: Tensor) -> bool:
    """Whether the Triton kernels take q; ValueError if they were asked for and do not."""
    supported = q.dtype in TRITON_DTYPES and q.shape[-1] in TRITON_HEAD_DIMS
    if backend == "auto":
        # A head size or dtype without a kernel is left to the reference, as is every other device.
        return q.device.type == "cuda" and supported and available_backends()["triton"] is None
    if backend != "triton":
        return False
    remedy = 'Use backend="auto" or "reference".'
    if q.dtype not in TRITON_DTYPES:
        expected = "float16, bfloat16 or float32 for the triton backend"
        raise bad_argument("q", expected, q, remedy)
    if q.shape[-1] not in TRITON_HEAD_DIMS:
        expected = f"a head size of {list(TRITON_HEAD_DIMS)} for the triton backend"
        raise bad_argument("q", expected, q, remedy)
    if q.device.type != "cuda" and not _interpreting():
        raise bad_argument("q", "a CUDA tensor for the triton backend", q, remedy)
    if q.dtype == torch.bfloat16 and _interpreting():
        # Its matrix product multiplies the bits of bfloat16 as integers.
        expected = "float16 or float32 for the triton backend in the Triton interpreter"
        raise bad_argument("q", expected, q, remedy)
    return True


def _runs_on_cpu(backend: str, q: Tensor) -> bool:
    """Whether the CPU kernels take q; ValueError if they were asked for and do not."""
    if backend == "auto":
        if q.device.type != "cpu" or q.dtype not in CPU_DTYPES:
            return False
        if native.REASON is not None:
            native.warn_once()
        return native.REASON is None
    if backend != "cpu":
        return False
    remedy = 'Use backend="auto" or "reference".'
    if q.device.type != "cpu":
        raise bad_argument("q", "a CPU tensor for the cpu backend", q, remedy)
    if q.dtype not in CPU_DTYPES:
        expected = "float16, bfloat16 or float32 for the cpu backend"
        raise bad_argument("q", expected, q, remedy)
    return True


def _is_large(layout: VisualLayout, q: Tensor, k: Tensor) -> bool:
    """Whether a map takes more than twice the memory of what it is made from.

    Twice, because a map that is kept is made once, and one that is not at every read: in a window
    of five layers and under activation recomputation ten times.
    """
    map_bytes = layout.map_rows * MAP_TILE * MAP_DTYPE[q.dtype].itemsize
    return map_bytes > 2 * (q.numel() + k.numel()) * q.element_size()


def _plain_causal(q: Tensor) -> VisualLayout:
    if q.ndim != 4:
        remedy = "Packed tensors need layout=VisualLayout.from_packed(cu_seqlens, visual_mask)."
        raise bad_argument("q", "(B, N, H, d) where no layout is given", q, remedy)
    return VisualLayout.from_mask(torch.zeros(q.shape[:2], dtype=torch.bool)).to(q.device)


def _check_option(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise bad_argument(name, f"one of {list(choices)}", repr(value), "Choose one of these.")


def _check_tensor(name: str, x: Any, shape: str, ndims: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or x.ndim not in ndims:
        raise bad_argument(
            name, f"a tensor of shape {shape}", x, "See the layouts in its docstring."
        )
    if x.dtype not in MAP_DTYPE:
        remedy = f"Cast {name}, for example to torch.float32."
        raise bad_argument(name, "float16, bfloat16, float32 or float64", x, remedy)


def _check_last_stride(name: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
        expected = "a contiguous last dimension"
        remedy = f"Call {name}.contiguous()."
        raise bad_argument(name, expected, f"strides {x.stride()} ({name})", remedy)


def _check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        expected = f"the dtype of {other_name}, {other.dtype}"
        raise bad_argument(name, expected, x, f"Cast {name} with .to({other_name}.dtype).")
    if x.device != other.device:
        expected = f"the device of {other_name}, {other.device}"
        raise bad_argument(name, expected, x, f"Move {name} with .to({other_name}.device).")


def _check_qk(q: Tensor, k: Tensor) -> None:
    _check_tensor("q", q, "(B, N, H, d) or packed (total, H, d)", (3, 4))
    _check_tensor("k", k, "(B, N, Hk, d) or packed (total, Hk, d)", (q.ndim,))
    _check_like("k", k, "q", q)
    if 0 in q.shape[-2:]:
        raise bad_argument("q", "at least one head and one channel", q, "Pass H >= 1 and d >= 1.")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        expected = f"the tokens and head size of q, {(*q.shape[:-2], 'Hk', q.shape[-1])}"
        raise bad_argument("k", expected, k, "Self-attention only: q and k come from one sequence.")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        expected = f"a number of heads that divides the {q.shape[-2]} heads of q"
        raise bad_argument("k", expected, k, "Pass k and v with Hk heads, H a multiple of Hk.")
    _check_last_stride("q", q)
    _check_last_stride("k", k)


def _check_v(v: Tensor, k: Tensor) -> None:
    _check_tensor("v", v, "(B, N, Hk, d) or packed (total, Hk, d)", (k.ndim,))
    _check_like("v", v, "k", k)
    if v.shape != k.shape:
        expected = f"the shape of k, {tuple(k.shape)}"
        raise bad_argument("v", expected, v, "Keys and values need the same heads and head size.")
    _check_last_stride("v", v)


def _check_lse(lse: Tensor, q: Tensor) -> None:
    packed = q.ndim == 3
    tokens, heads = q.shape[:-2], q.shape[-2]
    shape = (heads, *tokens) if packed else (tokens[0], heads, tokens[1])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(lse, Tensor) or lse.shape != shape or lse.dtype != dtype:
        expected = f"{dtype} of shape {shape}, {'(H, total)' if packed else '(B, H, N)'}"
        remedy = "Pass the lse that flash_attention returned for this q and k."
        raise bad_argument("lse", expected, lse, remedy)
    if lse.device != q.device:
        expected = f"the device of q, {q.device}"
        raise bad_argument("lse", expected, lse, "Move lse with .to(q.device).")


def _check_scale(softmax_scale: float | None, q: Tensor) -> float:
    if softmax_scale is None:
        return q.shape[-1] ** -0.5
    number = isinstance(softmax_scale, numbers.Real) and not isinstance(softmax_scale, bool)
    if not number or not math.isfinite(softmax_scale) or softmax_scale <= 0:
        remedy = "Pass a Python float, or None for d**-0.5."
        raise bad_argument("softmax_scale", "a positive finite number", softmax_scale, remedy)
    return float(softmax_scale)


def _check_layout(layout: VisualLayout, q: Tensor) -> None:
    if not isinstance(layout, VisualLayout):
        remedy = "Build one with VisualLayout.from_mask, from_packed or from_segments."
        raise bad_argument("layout", "a VisualLayout", layout, remedy)
    if layout.shape != tuple(q.shape[:-2]):
        expected = f"the tokens of q, {tuple(q.shape[:-2])}"
        remedy = "Build the layout from the masks of this batch; packed q needs from_packed."
        raise bad_argument("layout", expected, repr(layout), remedy)
    if layout.device != q.device:
        expected = f"the device of q, {q.device}"
        remedy = "Move the layout once per batch with layout.to(q.device)."
        raise bad_argument("layout", expected, repr(layout), remedy)


def _check_alignment(
    target: VisualMap, layout: VisualLayout, q: Tensor, objective: str, reduction: str
) -> None:
    _check_option("objective", objective, OBJECTIVES)
    _check_option("reduction", reduction, REDUCTIONS)
    _check_layout(layout, q)
    if not isinstance(target, VisualMap):
        remedy = "Make it with visual_attention_map or VisualMap.mean."
        raise bad_argument("target", "a VisualMap", target, remedy)
    if target.layout != layout:
        remedy = "Make the target with the layout of this batch."
        raise bad_argument(
            "target", f"a map with {layout!r}", f"one with {target.layout!r}", remedy
        )
    if target.device != q.device:
        remedy = "Move the target with .to(q.device)."
        raise bad_argument("target", f"a map on {q.device}", f"one on {target.device}", remedy)
