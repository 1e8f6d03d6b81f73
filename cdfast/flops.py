"""Floating-point operations of a distillation step, and the peak of the device they run on.

Counted are matrix products of the models as they are defined, two operations per multiply-add:

    student    forward; input gradients of every matrix behind the first trained one; weight
               gradients of trained matrices only
    teacher    forward
    vision     forward, once for both models where they share the tower
    attention  q k^T and P v over the pairs a causal row sees (half the square), and their backward
    lm_head    answer rows only; with a visual KL the visual rows of both models
    hidden     the student-to-teacher MLP of the hidden-state loss, on answer rows
    relation   H G H^T and G = W^T W where W is trained, with their backward; see losses.py

Not counted: recomputation under gradient checkpointing, the alignment loss, the second projection
to logits that the KL term makes of rows the LM loss has projected too, and soft cross-entropy of
the teacher's, G of a frozen W, embeddings, norms, softmax, padding. So MFU falls when any of them
takes time. The vision tower is counted where pixel_values
are images (..., C, H, W), as in LLaVA.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from cdfast_kernels import VisualLayout
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdfast.adapters import SharedVisionTower, vision_tower
from cdfast.hidden_projector import NAME, has_hidden_projector, hidden_projector

# What the operations of a step are proportional to; the order of `step_counts`.
COUNTS = (
    "samples",
    "tokens",
    "pairs",
    "lm_rows",
    "kl_rows",
    "visual_tokens",
    "patches",
    "patch_pairs",
    "visual_pairs",
    "batches",
)

# Dense peaks in TFLOP/s by a part of the device's name, the first that fits: (label, bfloat16 and
# float16 with float32 accumulation, TF32, float32). Data sheets often print twice as much, with
# sparsity.
_PEAKS: dict[str, tuple[str, float, float, float]] = {
    "B200": ("B200", 2250.0, 1125.0, 75.0),  # NVIDIA HGX B200 data sheet
    "GH200": ("GH200", 989.4, 494.7, 66.9),  # NVIDIA GH200 data sheet
    "H200 NVL": ("H200 NVL", 835.5, 417.5, 60.0),  # NVIDIA H200 data sheet
    "H200": ("H200 SXM", 989.4, 494.7, 66.9),  # NVIDIA H200 data sheet
    "H100 PCIe": ("H100 PCIe", 756.0, 378.0, 51.2),  # NVIDIA H100 data sheet
    "H100 NVL": ("H100 NVL", 835.5, 417.5, 60.0),  # NVIDIA H100 NVL data sheet
    "H100": ("H100 SXM", 989.4, 494.7, 66.9),  # NVIDIA H100 white paper, H100 SXM5
    "A100": ("A100", 312.0, 156.0, 19.5),  # NVIDIA A100 data sheet, PCIe and SXM alike
    "L40S": ("L40S", 362.0, 183.0, 91.6),  # NVIDIA L40S data sheet
    "NVIDIA L4": ("L4", 121.0, 60.0, 30.3),  # NVIDIA L4 data sheet; L40 comes before
    "RTX A6000": ("RTX A6000", 154.8, 77.4, 38.7),  # NVIDIA GA102 white paper
    "RTX 4090": ("RTX 4090", 165.2, 82.6, 82.6),  # NVIDIA Ada white paper
    "RTX 3090": ("RTX 3090", 71.0, 35.6, 35.6),  # NVIDIA GA102 white paper
}


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(operations per second, what they are of) of matrix products in `dtype`.

    From the table above; for a CPU and any device it does not have, measured once per process by a
    large matmul, so that MFU then is a share of what this machine's own matmul reaches.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    # NVIDIA L40 has other numbers than L4, whose name its own begins with.
    found = next((k for k in _PEAKS if k in name and not (k == "NVIDIA L4" and "L40" in name)), "")
    if found and dtype in (torch.bfloat16, torch.float16, torch.float32):
        label, half, tf32, single = _PEAKS[found]
        if dtype != torch.float32:
            kind = "BF16" if dtype == torch.bfloat16 else "FP16"
            return half * 1e12, f"{label} dense {kind}"
        if torch.get_float32_matmul_precision() != "highest":
            return tf32 * 1e12, f"{label} dense TF32"
        return single * 1e12, f"{label} FP32"
    return _measured_peak(device.type, dtype), "measured matmul"


@functools.cache
def _measured_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of five large square products."""
    n = 8192 if device == "cuda" else 1024
    own = torch.Generator(device)  # a run's random numbers must not depend on this
    a, b = (torch.rand(n, n, device=device, generator=own).to(dtype) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    seconds()
    return 2 * n**3 / min(seconds() for _ in range(5))


def step_flops(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    teacher_logits: bool = True,
    losses: Collection[str] = (),
) -> dict[str, float]:
    """Operations per unit of each of `COUNTS`, of a step with these models as they are trained.

    Args:
        student: what is trained is read from requires_grad; LoRA adapters inside are counted.
        teacher: None for a step without one.
        teacher_logits: whether the teacher's answer rows are projected (KL).
        losses: names of further terms: hidden, visual_kl and relation are counted.

    Raises:
        ValueError: a decoder layer has matrices that are no torch.nn.Linear, such as fused experts.
    """
    per = dict.fromkeys(COUNTS, 0.0)
    flows = _count_model(per, student, "lm_rows")
    if has_hidden_projector(student):
        per["lm_rows"] += _matrices(hidden_projector(student), flows, False)[0]
    _count_visual_losses(per, student, losses, flows)
    if teacher is not None:
        shared = _tower(teacher) is _tower(student)
        rows = "kl_rows" if teacher_logits else None
        _count_model(per, teacher, rows, with_tower=not shared, frozen=True)
        _count_visual_losses(per, teacher, losses, flows=False, frozen=True)
    return per


def _count_visual_losses(
    per: dict[str, float],
    model: PreTrainedModel,
    losses: Collection[str],
    flows: bool,
    frozen: bool = False,
) -> None:
    """Add what the visual KL and the relation loss do with a model's last hidden states."""
    head: Any = model.get_output_embeddings()
    if "visual_kl" in losses:
        per["visual_tokens"] += _matrix(head, flows, frozen)[0]
    if "relation" in losses:
        trained = not frozen and head.weight.requires_grad
        width, backward = head.in_features, flows and not frozen
        per["visual_tokens"] += 2.0 * width**2 * (1 + backward + trained)
        per["visual_pairs"] += 2.0 * width * (1 + (2 if backward else trained))
        per["batches"] += 4.0 * head.out_features * width**2 * trained


def _count_model(
    per: dict[str, float],
    model: PreTrainedModel,
    head_rows: str | None,
    with_tower: bool = True,
    frozen: bool = False,
) -> bool:
    """Add a model's operations; whether gradients flow to its last hidden states.

    Goes through it in the order of its forward pass.
    """
    tower, decoder, head = _tower(model), model.get_decoder(), model.get_output_embeddings()
    parts = [tower, decoder, head, getattr(model, NAME, None)]
    flows = False  # whether a trained parameter came before, so that gradients flow back this far
    if with_tower and tower is not None:
        patches, flows = _matrices(tower, flows, frozen)
        config: Any = tower.config
        per["patches"] += patches
        attention = 4 * config.hidden_size * config.num_hidden_layers
        per["patch_pairs"] += attention * (3 if flows else 1)
    apart = {id(m) for part in parts if part is not None for m in part.modules()}
    flops, flows = _matrices(model, flows, frozen, apart)  # the adapter between tower and decoder
    per["visual_tokens"] += flops
    flows = flows or (not frozen and _trained(model.get_input_embeddings()))
    text = model.config.get_text_config(decoder=True)
    width = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    layers: Any = decoder.layers
    for layer in layers:
        _refuse_uncounted(layer)
        attends = flows or (not frozen and any(map(_trained, _attention_parts(layer))))
        per["pairs"] += 4 * width * (3 if attends else 1)
        flops, flows = _matrices(layer, flows, frozen)
        per["tokens"] += flops
    if head_rows is not None and isinstance(head, nn.Module):
        per[head_rows] += _matrix(head, flows, frozen)[0]
    return flows


def _tower(model: PreTrainedModel) -> nn.Module | None:
    try:
        tower = vision_tower(model)[2]
    except ValueError:  # a text model
        return None
    return tower.tower if isinstance(tower, SharedVisionTower) else tower


def _attention_parts(layer: nn.Module) -> Iterator[nn.Module]:
    return (m for name, m in layer.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj")))


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _matrices(
    root: nn.Module, flows: bool, frozen: bool, apart: Collection[int] = ()
) -> tuple[float, bool]:
    """(operations per row of the matrices in `root`, whether gradients flow behind it)."""
    total = 0.0
    for name, module in root.named_modules():
        # PEFT keeps the frozen original beside a trained copy; a tower's pooling head sees one row.
        skipped = id(module) in apart or {"original_module", "head"} & {*name.split(".")}
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not skipped:
            flops, flows = _matrix(module, flows, frozen)
            total += flops
    return total, flows


def _matrix(module: Any, flows: bool, frozen: bool) -> tuple[float, bool]:
    trained = not frozen and module.weight.requires_grad
    # Not weight.numel(), which ZeRO-3 sets to 0.
    if isinstance(module, nn.Conv2d):
        size = module.in_channels * module.out_channels * math.prod(module.kernel_size)
    else:
        size = module.in_features * module.out_features
    return 2.0 * size * (1 + (flows and not frozen) + trained), flows or trained


def _refuse_uncounted(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for name, p in module.named_parameters(recurse=False):
            if len(getattr(p, "ds_shape", p.shape)) > 1:
                kind = f"{type(module).__name__}.{name}"
                raise ValueError(f"{kind} is a matrix outside torch.nn.Linear")


def step_counts(
    batch: Mapping[str, Any], lm_rows: Tensor, kl_rows: Tensor, patch: tuple[int, int, int]
) -> Tensor:
    """int64 (len(COUNTS),) of a batch with `layout`, on its device; nothing waits for it.

    Args:
        batch: input_ids, layout, and pixel_values where it has images.
        lm_rows, kl_rows: number of answer rows, and of rows whose logits are distilled.
        patch: height and width of a patch, and tokens besides patches (class token) per image.
    """
    layout: VisualLayout = batch["layout"]
    patches = patch_pairs = 0
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.ndim >= 4:
        images = math.prod(pixels.shape[:-3])
        each = (pixels.shape[-2] // patch[0]) * (pixels.shape[-1] // patch[1]) + patch[2]
        patches, patch_pairs = images * each, images * each**2
    tokens, pairs = layout.live.sum(), visible_pairs(layout)
    known = [batch.get("pairs") or layout.num_samples, patches, patch_pairs, 1]
    # Filled on the device: copying a number there would wait for all that is queued.
    samples, *vision, batches = (tokens.new_full((), n) for n in known)
    visual = layout.visual.sum(1)
    rows = [lm_rows, kl_rows, visual.sum()]
    counts = [samples, tokens, pairs, *rows, *vision, visual.square().sum(), batches]
    return torch.stack(counts).to(torch.int64)


def visible_pairs(layout: VisualLayout) -> Tensor:
    """Number of (row, key) pairs that attention computes: a causal row sees its own segment and
    segment 0."""
    # Padding takes the segment before it, so that ids never decrease along a row.
    segment = layout.segment.masked_fill(~layout.live, 0).cummax(1).values
    rank = segment.diff(dim=1, prepend=segment.new_zeros(len(segment), 1)).ne(0).cumsum(1)
    sizes = torch.zeros(len(segment), layout.length + 1, dtype=torch.int64, device=layout.device)
    sizes.scatter_add_(1, rank, layout.live.long())
    prefix, own = sizes[:, :1], sizes[:, 1:]
    return (sizes * (sizes + 1) // 2).sum() + (prefix * own).sum()


def patch_size(model: PreTrainedModel) -> tuple[int, int, int]:
    """(height, width) of a patch of the vision tower and its tokens besides patches."""
    tower = _tower(model)
    size = getattr(getattr(tower, "config", None), "patch_size", None) or 1
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    names = [] if tower is None else [name for name, _ in tower.named_parameters()]
    return height, width, int(any(name.endswith("class_embedding") for name in names))
