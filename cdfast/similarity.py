"""Similarity of two models' visual attention, layer by layer: calibration, logging and the report.

Source: CompoDistill, analysis of layer-wise attention similarity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cdfast_kernels import VisualLayout, VisualMap
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.attention import AlignmentContext

# Keys of a batch that are for the aligner and the trainer, not for a model's forward.
_NOT_FOR_MODEL = (
    "segment_ids",
    "cu_seqlens",
    "layout",
    "sample_ids",
    "pairs",
    "stored_targets",
)


def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers of a model's text model."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that goes to a model's forward."""
    return {k: v for k, v in batch.items() if k not in _NOT_FOR_MODEL}


@torch.no_grad()
def visual_maps(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    layout: VisualLayout,
    layers: Sequence[int] | None = None,
    backend: str = "auto",
) -> dict[int, VisualMap]:
    """Head-mean visual attention maps of the given layers (default: all) in one forward.

    The model must run cdfast attention (`use_cdfast_attention`).
    """
    wanted = range(num_layers(model)) if layers is None else layers
    context = AlignmentContext(layout, backend=backend, map_layers=frozenset(wanted))
    inputs = {k: v for k, v in model_inputs(batch).items() if k != "labels"}
    model(**inputs, alignment=context, use_cache=False)
    return context.maps


def similarity_rows(layout: VisualLayout, rows: str = "all") -> Tensor:
    """(samples, length) bool, the batch view of a layout: rows that see a visual key; with
    rows="text" only those of text tokens."""
    if rows not in ("all", "text"):
        raise ValueError(f"rows: expected 'all' or 'text'; got {rows!r}.")
    sees = (layout.visible() & layout.visual[:, None, :]).any(-1)
    return sees if rows == "all" else sees & ~layout.visual


def map_similarity(a: VisualMap, b: VisualMap, rows: Tensor) -> Tensor:
    """Mean over rows of cos(a_i, b_i); a row where either map is all zero counts as 1.

    Args:
        a, b: maps of the same layout.
        rows: (samples, length) bool, the rows to average over.

    Returns:
        Scalar float32; NaN if there is no row.
    """
    x, y = (m.to_batch(torch.float32)[rows] for m in (a, b))
    norm = x.norm(dim=-1) * y.norm(dim=-1)
    cosine = torch.where(norm > 0, (x * y).sum(-1) / norm.clamp_min(1e-30), 1.0)
    return cosine.mean()


@torch.no_grad()
def layer_similarity(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batch: Mapping[str, Any],
    layout: VisualLayout,
    *,
    teacher_layers: Sequence[int] | None = None,
    student_layers: Sequence[int] | None = None,
    rows: str = "all",
    backend: str = "auto",
) -> Tensor:
    """Similarity of every student layer's visual attention with every teacher layer's on one batch.

    Args:
        teacher, student: models that run cdfast attention.
        batch: inputs for both; labels are ignored.
        layout: the batch's layout.
        teacher_layers, student_layers: default all.
        rows: "all" rows that see a visual key, or "text": those that are no visual token.
        backend: backend of `cdfast_kernels`.

    Returns:
        (student layers, teacher layers) float32 on the CPU.
    """
    teacher_maps = visual_maps(teacher, batch, layout, teacher_layers, backend)
    student_maps = visual_maps(student, batch, layout, student_layers, backend)
    chosen = similarity_rows(layout, rows)
    return torch.stack(
        [
            torch.stack([map_similarity(s, teacher_maps[t], chosen) for t in sorted(teacher_maps)])
            for _, s in sorted(student_maps.items())
        ]
    ).cpu()


@torch.no_grad()
def matched_similarity(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batch: Mapping[str, Any],
    layout: VisualLayout,
    matches: Mapping[int, Sequence[int]],
    *,
    rows: str = "all",
    backend: str = "auto",
) -> dict[int, float]:
    """Similarity of each matched student layer with the mean map of its teacher window.

    Args:
        matches: student layer -> teacher layers; the rest as in `layer_similarity`.

    Returns:
        student layer -> mean cosine over the rows.
    """
    wanted = sorted({layer for window in matches.values() for layer in window})
    teacher_maps = visual_maps(teacher, batch, layout, wanted, backend)
    student_maps = visual_maps(student, batch, layout, sorted(matches), backend)
    chosen = similarity_rows(layout, rows)
    return {
        layer: map_similarity(
            student_maps[layer], VisualMap.mean([teacher_maps[t] for t in window]), chosen
        ).item()
        for layer, window in matches.items()
    }
