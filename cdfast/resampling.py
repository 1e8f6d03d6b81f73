"""Alignment across different visual grids: the teacher's maps resampled to the student's tokens.

Teacher and student see the same pictures and text, each through its own processor. Of a row i of
the student, with r(i) the same text token in the teacher's sequence,

    T'[i, j] = sum_v R[j, v] T[r(i), v],

R the shares by area of `cdfast.planes.resampling_matrix`. Rows of visual tokens, and of text before
the last picture, have no counterpart and are left out: the loss of a sample is the mean over the
text rows behind its last picture. So this is not the paper's loss, and has to be asked for by name.

    aligner = VisualAttentionAligner(teacher, student, grid_resampling="area")
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**teacher_batch)
    targets = resample_targets(aligner, targets, teacher_batch, batch, grids)
    out, alignment = aligner.student_forward(targets, **batch)

Cost: a dense (B, N, N) map per aligned layer, on the teacher's device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from cdfast_kernels import VisualLayout, VisualMap
from torch import Tensor

from cdfast.aligner import AlignmentTargets, VisualAttentionAligner
from cdfast.planes import ImageGrid, resampling_matrix

# One sample's pictures: of each its grid in the teacher and in the student.
GridPairs = Sequence[tuple[ImageGrid, ImageGrid]]


@torch.no_grad()
def resample_targets(
    aligner: VisualAttentionAligner,
    targets: AlignmentTargets,
    teacher_batch: Mapping[str, Any],
    batch: Mapping[str, Any],
    grids: Sequence[GridPairs],
) -> AlignmentTargets:
    """Targets for the student's batch from those of the teacher's.

    Args:
        aligner: made with `grid_resampling="area"`.
        targets: what `aligner.teacher_forward(**teacher_batch)` returned.
        teacher_batch: input_ids (B, N_t) and attention_mask of the teacher's processor.
        batch: input_ids (B, N_s) and attention_mask of the student's processor, with the same
            samples, pictures and text.
        grids: of each sample and picture, its grid in the teacher and in the student, as
            `cdfast.geometry.image_grids` gives them; empty for a sample without a picture.

    Returns:
        Targets of the student's layout. Their sample weights turn the mean over all rows that see
        a visual token into the mean over the rows that are compared.

    Raises:
        ValueError: numbers of samples, tokens or pictures that do not fit; texts behind the last
            picture that do not end alike; an aligner without `grid_resampling`.
        GeometryError: the student's tokens are not one grid.
    """
    if aligner.grid_resampling is None:
        raise ValueError(
            "grid_resampling: expected an aligner made with grid_resampling='area'; got None."
        )
    layout = aligner.layout(batch)
    if not len(grids) == layout.num_samples == targets.layout.num_samples:
        raise ValueError(
            f"grids: expected one list of pictures for each sample; got {len(grids)} for "
            f"{targets.layout.num_samples} samples of the teacher and {layout.num_samples} of the "
            "student."
        )
    parts = [
        _Part(n, targets.layout, layout, teacher_batch["input_ids"], batch["input_ids"], pairs)
        for n, pairs in enumerate(grids)
    ]
    seen = (layout.dense_mask() & layout.visual[:, None, :]).any(-1).sum(-1)
    compared = seen.new_tensor([len(part.rows) for part in parts])
    given = {layer: one for layer, one in targets.maps.items() if isinstance(one, VisualMap)}
    assert len(given) == len(targets.maps)  # the aligner refuses "pooled_stored"
    maps = {layer: _resampled(one, layout, parts) for layer, one in given.items()}
    weight = seen / compared.clamp(min=1)
    return replace(targets, maps=maps, layout=layout, sample_weight=weight)


class _Part:
    """One sample: which rows and columns of the teacher's map go where, and by what shares."""

    def __init__(
        self,
        number: int,
        theirs: VisualLayout,
        ours: VisualLayout,
        teacher_ids: Tensor,
        ids: Tensor,
        pairs: GridPairs,
    ):
        self.number = number
        self.columns = ours.visual[number].nonzero()[:, 0]
        self.teacher_columns = theirs.visual[number].nonzero()[:, 0]
        for role, found, which in (
            ("teacher", self.teacher_columns, 0),
            ("student", self.columns, 1),
        ):
            counts = [pair[which].count for pair in pairs]
            if sum(counts) != len(found):
                raise ValueError(
                    f"grids: sample {number}: expected {counts} visual tokens in the {role}, as "
                    f"its grids say; its batch has {len(found)}."
                )
        # On the device before the first product, in float32 as the maps are there.
        blocks = [torch.from_numpy(resampling_matrix(*pair)).float() for pair in pairs]
        self.shares = torch.block_diag(*blocks).to(ids.device) if blocks else None
        tails = (
            _behind(theirs, number, self.teacher_columns),
            _behind(ours, number, self.columns),
        )
        alike = _common_end(teacher_ids[number, tails[0]], ids[number, tails[1]])
        if pairs and not alike:
            raise ValueError(
                f"sample {number}: expected texts behind the last picture that end alike in the "
                "teacher's and the student's input_ids; got none. Use one tokenizer and one chat "
                "template for both."
            )
        self.teacher_rows, self.rows = (tail[len(tail) - alike :] for tail in tails)
        if not pairs:
            self.teacher_rows, self.rows = self.teacher_rows[:0], self.rows[:0]


def _behind(layout: VisualLayout, number: int, columns: Tensor) -> Tensor:
    """Positions of live tokens behind the last visual one."""
    live = layout.live[number].nonzero()[:, 0]
    return live[live > columns[-1]] if len(columns) else live


def _common_end(a: Tensor, b: Tensor) -> int:
    n = min(len(a), len(b))
    differ = (a[len(a) - n :] != b[len(b) - n :]).nonzero()
    return n if len(differ) == 0 else n - 1 - int(differ[-1])


def _resampled(one: VisualMap, layout: VisualLayout, parts: Sequence[_Part]) -> VisualMap:
    dtype = torch.float64 if one.dtype == torch.float64 else torch.float32
    given = one.to_batch(dtype)
    made = given.new_zeros(layout.num_samples, layout.length, layout.length)
    for part in parts:
        if part.shares is not None:
            rows = given[part.number][part.teacher_rows][:, part.teacher_columns]
            values = rows @ part.shares.to(dtype).T
            made[part.number, part.rows[:, None], part.columns] = values
    return VisualMap.from_batch(made, layout, one.dtype)
