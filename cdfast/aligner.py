"""VisualAttentionAligner: the seam for any training loop.

Source: CompoDistill, "visual attention alignment"; where the authors' code differs, `official`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cdfast_kernels import VisualLayout, VisualMap, available_backends
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.attention import AlignmentContext, use_cdfast_attention
from cdfast.matching import (
    LAYER_RANGES,
    MATCHINGS,
    Matches,
    layers_in_range,
    match_adaptive,
    match_group,
    match_official,
    match_simple,
)
from cdfast.packing import check_packable
from cdfast.similarity import layer_similarity, matched_similarity, model_inputs, num_layers
from cdfast.stored_targets.pooled_vectors import STORED_OBJECTIVE, PooledVectors, pool_map

# Sizes in configurations that decide how many visual tokens a picture becomes.
_GRID_SIZES = (
    "image_size",
    "patch_size",
    "spatial_merge_size",
    "scale_factor",
    "downsample_ratio",
    "image_grid_pinpoints",
)
GRID_RESAMPLINGS = ("area",)
OBJECTIVES = ("row", "map", "pooled", "mse", "kl", STORED_OBJECTIVE)
PRESETS: dict[str, dict[str, str]] = {
    "paper": {
        "matching": "group",
        "layers": "intermediate",
        "objective": "row",
        "layer_reduction": "mean",
    },
    "official": {
        "matching": "group",
        "layers": "intermediate",
        "objective": "pooled",
        "layer_reduction": "sum",
    },
}


@dataclass(frozen=True)
class AlignmentTargets:
    """What the teacher hands to the student: one map per aligned student layer, and the layout.

    With objective "pooled_stored" vectors in place of maps. `sample_weight` (B,) multiplies the
    loss of each sample; None is 1.
    """

    maps: Mapping[int, VisualMap | PooledVectors]
    layout: VisualLayout
    sample_weight: Tensor | None = None


@dataclass(frozen=True)
class Alignment:
    """Alignment loss of one batch.

    Attributes:
        sum: sum over the batch's samples of the loss, already reduced over matched layers; float32.
        count: B_img, the number of samples that have a visual token.
        per_layer: student layer -> sum over samples of that layer's loss, detached.
    """

    sum: Tensor
    count: int
    per_layer: dict[int, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """sum / count; 0, still connected to the graph, for a batch without images."""
        return self.sum / max(self.count, 1)


def build_layout(batch: Mapping[str, Any], image_token_id: int) -> VisualLayout:
    """Layout of a batch: visual tokens are those whose id is the image token's.

    Args:
        batch: input_ids (B, N); optional attention_mask (B, N), segment_ids (B, N). Packed:
            input_ids (1, total) and cu_seqlens (S + 1,), in which no token is padding.
        image_token_id: id of the image placeholder in input_ids.
    """
    if "input_ids" not in batch:
        raise ValueError(
            f"batch: expected input_ids, in which visual tokens are found by id {image_token_id}; "
            f"got only {sorted(batch)}. Pass input_ids, or a prebuilt layout=."
        )
    visual = batch["input_ids"] == image_token_id
    if batch.get("cu_seqlens") is not None:
        return VisualLayout.from_packed(batch["cu_seqlens"], visual.squeeze(0))
    mask = batch.get("attention_mask")
    mask = None if mask is None else mask.bool()
    if batch.get("segment_ids") is not None:
        return VisualLayout.from_segments(batch["segment_ids"], visual, mask)
    return VisualLayout.from_mask(visual, mask)


def image_token_id(model: PreTrainedModel) -> int:
    """Id of the image placeholder token of a vision-language model.

    Raises:
        ValueError: the configuration names none (a text-only model).
    """
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"{model.config.model_type}: expected image_token_id in the model's configuration, by "
        "which visual tokens are found; it has none. Visual alignment needs a vision-language "
        "model."
    )


def check_visual_grids(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Refuse models that do not read one batch as the same visual tokens.

    Raises:
        ValueError: sizes of pictures, patches or tiles, or the merging of patches, differ.
    """
    theirs, ours = (_visual_grid(model.config) for model in (teacher, student))
    differing = {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}
    if differing:
        raise ValueError(
            "visual tokens: expected teacher and student to cut a picture into the same visual "
            "tokens, because both read one batch; teacher and student differ in "
            + "; ".join(f"{name} {a} and {b}" for name, (a, b) in differing.items())
            + ". Build the student with the teacher's visual grid, or give each model its own "
            "batch and resample the teacher's maps: grid_resampling='area', see cdfast.resampling."
        )


def _visual_grid(config: Any) -> dict[str, Any]:
    """What decides how many visual tokens a picture becomes; None where a family has no such."""
    places = (getattr(config, "vision_config", None), config)
    found = {n: next((getattr(p, n) for p in places if hasattr(p, n)), None) for n in _GRID_SIZES}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


class VisualAttentionAligner:
    """Aligns a student's attention over visual tokens with a teacher's, inside their own forwards.

    For a matched student layer j with teacher window G_j,

        loss_j = D(S_j, mean over l in G_j of T_l),

    with S, T head-mean attention probabilities on visual columns and D the objective of
    `cdfast_kernels`; the loss of a sample is reduced over the matched layers.

    ```python
    aligner = VisualAttentionAligner(teacher, student, preset="paper")
    with torch.no_grad():
        teacher_out, targets = aligner.teacher_forward(**batch)
    student_out, alignment = aligner.student_forward(targets, **batch)
    loss = student_out.loss + alignment.loss
    ```

    After wrapping the student in DDP, set `aligner.student` to the wrapped model, so that
    `student_forward` goes through it. Where a trainer calls the student, hand it a context:

    ```python
    context = aligner.student_context(targets)
    loss = model(**batch, alignment=context).loss + aligner.alignment(context).loss
    ```

    Args:
        teacher, student: Hugging Face vision-language models that share tokenizer and visual
            tokens. Their text attention is switched to cdfast's.
        preset: "paper" (all rows, `row`, intermediate layers, group matching, mean over layers) or
            "official" (`pooled`, the authors' layer table where it has the depths, else
            intermediate and group, sum over layers). The arguments below override it.
        matching: "group", "simple" or "adaptive" (which needs `calibrate` once).
        layers: "early", "intermediate", "later" or "all".
        objective: "row", "map", "pooled", "mse" or "kl"; "pooled_stored", close to "pooled", whose
            targets can be stored (pooled_vectors.py).
        layer_reduction: "mean" or "sum" over matched layers.
        backend: backend of `cdfast_kernels`; sdpa, flash_attn and xformers compute the attention of
            aligned layers, and the loss beside it is computed by the backend "auto".
        grid_resampling: None: both models read one batch as the same visual tokens. "area": each
            has a batch of its own, and `cdfast.resampling` brings the teacher's maps to the
            student's grid; objectives "row" and "kl" only.

    Raises:
        ValueError: an unknown option; a model whose text attention is not causal or does not go
            through AttentionInterface; unequal image tokens or visual grids. Later, a packed batch
            for a model of a family that is not in `cdfast.packing.FAMILIES`.

    Source: paper, section on visual attention alignment; `official`: the authors' code.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        *,
        preset: str = "paper",
        matching: str | None = None,
        layers: str | None = None,
        objective: str | None = None,
        layer_reduction: str | None = None,
        backend: str = "auto",
        grid_resampling: str | None = None,
    ):
        if preset not in PRESETS:
            raise ValueError(
                f"preset: expected one of {', '.join(PRESETS)}; got {preset!r}. 'paper' follows "
                "the paper, 'official' its authors' code."
            )
        chosen = PRESETS[preset]
        self.preset = preset
        self.matching = _option("matching", matching or chosen["matching"], MATCHINGS)
        self.layers = _option("layers", layers or chosen["layers"], LAYER_RANGES)
        self.objective = _option("objective", objective or chosen["objective"], OBJECTIVES)
        self.layer_reduction = _option(
            "layer_reduction", layer_reduction or chosen["layer_reduction"], ("mean", "sum")
        )
        self.backend = _option("backend", backend, ("auto", *available_backends()))
        self.teacher, self.student = teacher, student
        self.image_token_id = image_token_id(student)
        self.grid_resampling = grid_resampling
        self._check_resampling()
        if grid_resampling is None and image_token_id(teacher) != self.image_token_id:
            raise ValueError(
                f"image_token_id: expected the same id in teacher and student; got "
                f"{image_token_id(teacher)} and {self.image_token_id}. Teacher and student must "
                "see the same batch: use one tokenizer for both."
            )
        use_cdfast_attention(teacher)
        use_cdfast_attention(student)
        if grid_resampling is None:
            check_visual_grids(teacher, student)
        self._student_layers = layers_in_range(num_layers(student), self.layers)
        self._teacher_layers = layers_in_range(num_layers(teacher), self.layers)
        # The authors' table stands for preset="official" as a whole; naming layers or a matching
        # replaces it.
        use_table = preset == "official" and matching is None and layers is None
        self.matches = self._match(use_table)

    def _check_resampling(self) -> None:
        if self.grid_resampling is None:
            return
        _option("grid_resampling", self.grid_resampling, GRID_RESAMPLINGS)
        # A row without a counterpart adds nothing to the means over rows of these two; the others
        # compare rows of visual tokens, or the map as a whole.
        if self.objective not in ("row", "kl") or self.matching == "adaptive":
            raise ValueError(
                "grid_resampling: expected objective 'row' or 'kl' and matching 'group' or "
                f"'simple'; got {self.objective!r} and {self.matching!r}. Rows of visual tokens "
                "have no counterpart in another grid."
            )

    def _match(self, use_table: bool) -> Matches | None:
        if use_table:
            table = match_official(num_layers(self.student), num_layers(self.teacher))
            if table is not None:
                return table
        if self.matching == "adaptive":
            return None  # chosen by `calibrate`
        match = match_group if self.matching == "group" else match_simple
        return match(self._student_layers, self._teacher_layers)

    # -- one batch ---------------------------------------------------------------------------

    def layout(self, batch: Mapping[str, Any]) -> VisualLayout:
        """The batch's layout: its `layout` entry if it has one, else built from its ids and masks.

        Building reads input_ids on the host; a data loader that adds `layout` saves the GPU a
        synchronisation.
        """
        layout = batch.get("layout")
        layout = build_layout(batch, self.image_token_id) if layout is None else layout
        _check_packed(layout, self.teacher, self.student)
        return layout

    def teacher_context(self, layout: VisualLayout) -> AlignmentContext:
        """Context for a forward of the teacher that collects the maps of every matched layer."""
        _check_packed(layout, self.teacher)
        wanted = frozenset(layer for window in self._matches().values() for layer in window)
        return AlignmentContext(layout, backend=self.backend, map_layers=wanted)

    def targets(self, context: AlignmentContext) -> AlignmentTargets:
        """Window means of the maps that a teacher forward has collected."""
        maps = {
            layer: VisualMap.mean([context.maps[t] for t in window])
            for layer, window in self._matches().items()
        }
        if self.objective == STORED_OBJECTIVE:
            return AlignmentTargets({n: pool_map(m) for n, m in maps.items()}, context.layout)
        return AlignmentTargets(maps, context.layout)

    def student_context(self, targets: AlignmentTargets) -> AlignmentContext:
        """Context for a forward of the student that collects the loss of every matched layer."""
        if self.grid_resampling is not None and targets.sample_weight is None:
            raise ValueError(
                "targets: expected those of cdfast.resampling.resample_targets, because the "
                f"aligner has grid_resampling={self.grid_resampling!r}; got the teacher's own."
            )
        _check_packed(targets.layout, self.student)
        return AlignmentContext(
            targets.layout,
            objective=self.objective,
            backend=self.backend,
            targets=targets.maps,
            sample_weight=targets.sample_weight,
        )

    def alignment(self, context: AlignmentContext) -> Alignment:
        """Alignment loss of the batch whose student forward has filled `context`."""
        missing = sorted(set(context.targets) - set(context.losses))
        if missing:
            raise RuntimeError(
                f"layers {missing} of the student returned no alignment loss: expected the model "
                "to hand unknown keyword arguments on to its attention layers. Is it wrapped in "
                "something that drops the `alignment` argument?"
            )
        weight = 1.0 if context.sample_weight is None else context.sample_weight
        each = {layer: loss * weight for layer, loss in sorted(context.losses.items())}
        losses = torch.stack([*each.values()])
        per_sample = losses.sum(0) if self.layer_reduction == "sum" else losses.mean(0)
        return Alignment(
            sum=per_sample.sum(),
            count=context.layout.num_image_samples,
            per_layer={layer: loss.detach().sum() for layer, loss in each.items()},
        )

    def teacher_forward(self, **batch: Any) -> tuple[Any, AlignmentTargets]:
        """Run the teacher. Returns its output and the targets for `student_forward`.

        Call it under `torch.no_grad()`; a batch may carry `segment_ids` or a prebuilt `layout`.
        """
        layout = batch.get("layout")
        if layout is None:
            layout = build_layout(batch, image_token_id(self.teacher))
        context = self.teacher_context(layout)
        inputs = {**model_inputs(batch), "use_cache": False}
        output = self.teacher(**inputs, alignment=context)
        return output, self.targets(context)

    def student_forward(self, targets: AlignmentTargets, **batch: Any) -> tuple[Any, Alignment]:
        """Run the student on the batch that `targets` was made from. Returns output and loss.

        Raises:
            RuntimeError: under reentrant activation checkpointing, which would lose the gradient.
        """
        context = self.student_context(targets)
        inputs = {**model_inputs(batch), "use_cache": False}
        output = self.student(**inputs, alignment=context)
        return output, self.alignment(context)

    def similarity(self, **batch: Any) -> dict[int, float]:
        """How alike the two models look at one batch, as they are; no gradient.

        Returns:
            student layer -> cosine between its map and the mean map of its teacher window, mean
            over the text tokens that see an image: 1 where both look alike, NaN without an image.
        """
        return matched_similarity(
            self.teacher,
            self.student,
            batch,
            self.layout(batch),
            self._matches(),
            rows="text",
            backend=self.backend,
        )

    # -- adaptive matching ---------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, **batch: Any) -> Matches:
        """Choose the matches of `matching="adaptive"` on one batch, once; they are then fixed.

        Source: paper, ablation of the matching ("adaptive").
        """
        if self.matching != "adaptive":
            raise ValueError(
                f"calibrate: expected matching='adaptive'; got {self.matching!r}, whose layers are "
                "already fixed."
            )
        similarity = layer_similarity(
            self.teacher,
            self.student,
            batch,
            teacher_layers=self._teacher_layers,
            student_layers=self._student_layers,
            layout=self.layout(batch),
            backend=self.backend,
        )
        self.matches = match_adaptive(
            self._student_layers, self._teacher_layers, similarity.tolist()
        )
        return self.matches

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The aligned layers; all in range, as long as an adaptive matching has chosen none."""
        return tuple(self._student_layers if self.matches is None else self.matches)

    def _matches(self) -> Matches:
        if self.matches is None:
            raise RuntimeError(
                "matching='adaptive' has chosen no layers yet: call aligner.calibrate(**batch) on "
                "a representative batch first, or load_state_dict from a checkpoint."
            )
        return self.matches

    def state_dict(self) -> dict[str, Any]:
        """Options and matches, as JSON-serialisable values."""
        matches = self.matches
        return {
            "preset": self.preset,
            "matching": self.matching,
            "layers": self.layers,
            "objective": self.objective,
            "layer_reduction": self.layer_reduction,
            "matches": None if matches is None else {str(k): list(v) for k, v in matches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the matches of a checkpoint; every other option must agree with it.

        Raises:
            ValueError: an option of the checkpoint differs from this aligner's.
        """
        for name in ("matching", "layers", "objective", "layer_reduction"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{name}: expected {getattr(self, name)!r} as configured; the checkpoint has "
                    f"{state[name]!r}. Resume with the options the run was started with."
                )
        matches = state["matches"]
        self.matches = matches and {int(k): tuple(v) for k, v in matches.items()}


def _check_packed(layout: VisualLayout, *models: Any) -> None:
    """`check_packable` for the models, which DDP or an engine may have wrapped by now."""
    if layout.is_packed:
        for model in models:
            check_packable(getattr(model, "module", model))


def _option(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}.")
    return value
