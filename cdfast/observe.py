"""Attention of chosen rows, read while a model runs on fused attention.

A row of attention needs its query, the keys it looks at, and its log-sum-exp, which the fused
kernel returns: P_h[i, j] = exp(scale q_h[i] . k[j] - lse_h[i]). So a probe keeps q of the wanted
rows, k of the wanted keys and lse, and any head, row or mean is computed from them when asked for.
No (N, N) map exists at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from cdfast_kernels import VisualLayout
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.attention import AlignmentContext, AttentionCall, Probe, use_cdfast_attention
from cdfast.similarity import model_inputs, num_layers

# Probabilities per head that are formed at a time when rows are averaged over heads.
_CHUNK = 2**22


@contextmanager
def observed(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model is in evaluation mode and its text model runs cdfast attention.

    At the end, also after an exception, every module has its training flag and every configuration
    its attention implementation back. No hook is set.

    Raises:
        ValueError: the model's text attention is not causal, or does not go through
            AttentionInterface; the message names the model.
    """
    training = [(module, module.training) for module in model.modules()]
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs.append(model.config.get_text_config(decoder=True))
    chosen = [(config, config._attn_implementation) for config in configs]
    try:
        use_cdfast_attention(model)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for config, implementation in chosen:
            # The public setter would hand a parent's value down to its parts.
            config._attn_implementation_internal = implementation
        for module, flag in training:
            module.training = flag


@dataclass(frozen=True)
class AttentionRows:
    """What the attention of R rows of one sample on C keys is computed from, in one layer.

    Attributes:
        q: (R, H, d).
        k: (C, Hk, d); query head h reads key head h // (H / Hk).
        lse: (H, R), natural log over all keys that the row sees, wanted or not.
        visible: bool (R, C).
        scale: softmax scale.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    visible: Tensor
    scale: float

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    def probabilities(self) -> Tensor:
        """P of every head, (H, R, C): float32 (float64 for float64 q), 0 at keys not visible."""
        dtype = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        heads, groups = self.num_heads, self.k.shape[1]
        rows, keys = self.visible.shape
        # The heads of a group are stacked as rows: one product per key head.
        q = self.q.to(dtype).transpose(0, 1).reshape(groups, heads // groups * rows, -1)
        scores = q @ self.k.to(dtype).permute(1, 2, 0) * self.scale
        scores = scores.reshape(heads, rows, keys) - self.lse.to(dtype)[..., None]
        return scores.masked_fill(~self.visible, -torch.inf).exp()

    def select(self, rows: Sequence[int] | slice) -> AttentionRows:
        """The same of some of the rows."""
        q, lse, visible = self.q[rows], self.lse[:, rows], self.visible[rows]
        return replace(self, q=q, lse=lse, visible=visible)

    def reduced(self, heads: str | int = "mean") -> Tensor:
        """(R, C): the mean or the maximum over heads, or one head; some rows at a time."""
        if isinstance(heads, int):
            return self._head(heads).probabilities()[0]
        if heads not in ("mean", "max"):
            raise ValueError(f"heads: expected 'mean', 'max' or a head's number; got {heads!r}.")
        size = max(1, _CHUNK // max(1, self.num_heads * self.visible.shape[1]))
        parts = []
        for start in range(0, max(1, len(self.visible)), size):
            probabilities = self.select(slice(start, start + size)).probabilities()
            parts.append(probabilities.mean(0) if heads == "mean" else probabilities.amax(0))
        return torch.cat(parts)

    def _head(self, head: int) -> AttentionRows:
        if not 0 <= head < self.num_heads:
            raise ValueError(
                f"head: expected a number from 0 to {self.num_heads - 1}, the last head of this "
                f"layer; got {head}."
            )
        group = head // (self.num_heads // self.k.shape[1])
        q, k = self.q[:, head : head + 1], self.k[:, group : group + 1]
        return replace(self, q=q, k=k, lse=self.lse[head : head + 1])


@dataclass(frozen=True)
class RowsAndKeys:
    """Of each sample of a batch, the wanted rows and keys: int64 positions on its token axis."""

    rows: Sequence[Tensor]
    keys: Sequence[Tensor]


def take_rows(
    call: AttentionCall, wanted: RowsAndKeys, layout: VisualLayout
) -> list[AttentionRows]:
    """`AttentionRows` of every sample of a batch, copied from one layer's attention."""
    device = call.q.device
    return [
        take_sample(call, sample, rows.to(device), keys.to(device), layout)
        for sample, (rows, keys) in enumerate(zip(wanted.rows, wanted.keys))
    ]


def take_sample(
    call: AttentionCall, sample: int, rows: Tensor, keys: Tensor, layout: VisualLayout
) -> AttentionRows:
    """`AttentionRows` of one sample; rows and keys are on the attention's device."""
    return AttentionRows(
        # Indexing copies: nothing of the batch's own q and k is kept alive.
        q=call.q[sample, rows],
        k=call.k[sample, keys],
        lse=call.lse[sample][:, rows],
        visible=visible(layout, sample, rows, keys),
        scale=call.scale,
    )


def visible(layout: VisualLayout, sample: int, rows: Tensor, keys: Tensor) -> Tensor:
    """bool (R, C): row sees key, in a padded batch (the rule of VisualLayout)."""
    live, segment = layout.live[sample], layout.segment[sample]
    seen = (keys[None, :] <= rows[:, None]) & live[rows][:, None] & live[keys][None, :]
    key_segment = segment[keys][None, :]
    return seen & ((segment[rows][:, None] == key_segment) | (key_segment == 0))


def run(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    layout: VisualLayout,
    probes: Mapping[int, Probe],
    backend: str = "auto",
) -> Tensor:
    """One forward of an `observed` model: (B, N, width), what its language-model head reads.

    The head itself is left out: logits of all positions would be the largest tensor by far.
    """
    context = AlignmentContext(layout, backend=backend, probes=dict(probes))
    inputs = {k: v for k, v in model_inputs(batch).items() if k != "labels"}
    hidden = model.base_model(**inputs, alignment=context, use_cache=False)
    return hidden.last_hidden_state


def collect_rows(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    layout: VisualLayout,
    wanted: RowsAndKeys,
    *,
    layers: Collection[int] | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> tuple[dict[int, list[AttentionRows]], Tensor]:
    """Attention of the wanted rows in one forward of an `observed` model.

    Args:
        model, batch, layout: as to `run`.
        wanted: rows and keys of every sample.
        layers: default all.
        device: where the result is kept; None leaves it where the model is.
        backend: backend of `cdfast_kernels`.

    Returns:
        layer -> `AttentionRows` per sample; and the hidden states of `run`.
    """
    found: dict[int, list[AttentionRows]] = {}

    def keep(call: AttentionCall) -> Tensor:
        taken = take_rows(call, wanted, layout)
        found[call.layer] = taken if device is None else [_moved(t, device) for t in taken]
        return call.out

    chosen = check_layers(model, layers)
    hidden = run(model, batch, layout, dict.fromkeys(chosen, keep), backend)
    missing = sorted(set(chosen) - set(found))
    if missing:
        raise ValueError(
            f"{model.config.model_type}: layers {missing} were not observed: expected the model to "
            "hand unknown keyword arguments on to its attention layers. Is it wrapped in something "
            "that drops them?"
        )
    return found, hidden


def check_layers(model: PreTrainedModel, layers: Collection[int] | None) -> list[int]:
    """The layers in ascending order, all by default; ValueError for one that does not exist."""
    depth = num_layers(model)
    chosen = sorted(set(range(depth) if layers is None else layers))
    outside = [layer for layer in chosen if not 0 <= layer < depth]
    if outside:
        raise ValueError(
            f"layers: expected numbers from 0 to {depth - 1} ({model.config.model_type} has "
            f"{depth} decoder layers); got {outside}."
        )
    return chosen


def _moved(rows: AttentionRows, device: torch.device | str) -> AttentionRows:
    tensors = {name: getattr(rows, name).to(device) for name in ("q", "k", "lse", "visible")}
    return replace(rows, **tensors)
