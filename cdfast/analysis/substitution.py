"""Another model's visual attention put in place of a model's own, while it runs.

For the chosen rows i, with P_h the student's probabilities, V the visual keys that i sees and T the
head-mean map of the teacher (mean over the matched layers),

    P'_h[i, v] = (1 - weight) P_h[i, v] + weight T[i, v],  v in V;  other keys as they are,

then renormalised or not, and out'_h = P'_h v. The fused output is corrected: out' = out +
(P' - P) v over the visual keys, so per-head probabilities exist for some rows and visual keys at a
time, in the chosen layers only, and never for text keys.

Source: CompoDistill, substitution of the student's visual attention at inference (weight 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from cdfast_kernels import VisualLayout
from torch import Tensor

from cdfast.attention import AttentionCall
from cdfast.observe import RowsAndKeys, take_sample

RENORMALISE = ("row", "visual", "none")
# Probabilities of all heads that are formed at a time.
_CHUNK = 2**24


@dataclass(frozen=True)
class Substitution:
    """A probe that blends a teacher's map into a layer's attention and corrects its output.

    Attributes:
        targets: layer -> of each sample T (R, V), on the model's device.
        wanted: of each sample the rows and the visual keys of the targets.
        layout: of the batch, on the model's device.
        weight: of the teacher, from 0 (nothing changes) to 1 (replaced wholly).
        renormalise: "row": P' is divided by its sum over all keys, which is 1 again. "visual": the
            blend is scaled so that visual keys together get what they had. "none": as it is.
    """

    targets: Mapping[int, Sequence[Tensor]]
    wanted: RowsAndKeys
    layout: VisualLayout
    weight: float
    renormalise: str = "row"

    def __post_init__(self) -> None:
        if self.renormalise not in RENORMALISE:
            raise ValueError(
                f"renormalise: expected one of {', '.join(RENORMALISE)}; got {self.renormalise!r}."
            )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight: expected a number from 0 to 1; got {self.weight}.")

    def __call__(self, call: AttentionCall) -> Tensor:
        out = call.out.clone()
        heads, groups = call.q.shape[2], call.v.shape[2]
        for sample, target in enumerate(self.targets[call.layer]):
            rows = self.wanted.rows[sample].to(out.device)
            keys = self.wanted.keys[sample].to(out.device)
            values = call.v[sample, keys].to(target.dtype).repeat_interleave(heads // groups, 1)
            size = max(1, _CHUNK // max(1, heads * len(keys)))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                own = take_sample(call, sample, rows[part], keys, self.layout).probabilities()
                change, scale = self._change(own.to(target.dtype), target[part])
                # (H, R, V) x (V, H, d)
                correction = torch.einsum("hrv,vhd->rhd", change, values)
                blended = out[sample, rows[part]].to(target.dtype) + correction
                out[sample, rows[part]] = (blended * scale.T[..., None]).to(out.dtype)
        return out

    def _change(self, own: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """P' - P before rows are rescaled (H, R, V), and what they are rescaled by (H, R)."""
        blended = (1 - self.weight) * own + self.weight * target
        if self.renormalise == "visual":
            tiny = torch.finfo(own.dtype).tiny
            blended = blended * (own.sum(-1) / blended.sum(-1).clamp(min=tiny))[..., None]
        change = blended - own
        total = 1 + change.sum(-1)
        scale = 1 / total if self.renormalise == "row" else torch.ones_like(total)
        return change, scale
