"""The only seam to Hugging Face attention: what a decoder layer calls while a batch is aligned.

`use_cdfast_attention(model)` selects the function below for the text model alone. Everything a
layer needs to know about the batch travels as the model keyword argument
`alignment=AlignmentContext(...)`: global or context-manager state breaks under activation
checkpointing, where layers run again during the backward pass. Without that argument the model
computes stock attention, so it generates and evaluates as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from cdfast_kernels import (
    VisualLayout,
    VisualMap,
    flash_attention,
    flash_attention_with_alignment,
    keep_alignment,
    visual_alignment_loss,
    visual_attention_map,
)
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from cdfast.stored_targets.pooled_vectors import PooledVectors, pooled_vector_loss

ATTENTION_NAME = "cdfast"

# Models that let the tokens of an image (PaliGemma: and of the prompt) see keys behind their own
# row, which no row of a `VisualLayout` does; docs/families.md says what else stands against them.
_BIDIRECTIONAL_IMAGES = ("gemma3", "paligemma")

# Backends of `cdfast_kernels` that compute attention alone: the loss is computed beside them.
_ATTENTION_BACKENDS = ("sdpa", "flash_attn", "xformers")

# What a layer may ask of attention that the fused op does not compute: refused by name where a
# layer is aligned, never ignored.
_UNSUPPORTED_ARGUMENTS = ("softcap", "sliding_window", "position_bias", "s_aux")


class AttentionCall(NamedTuple):
    """One layer's attention, handed to a probe: q (B, N, H, d), k, v (B, N, Hk, d), out as q, and
    lse (B, H, N), the natural log over all visible keys. In a packed batch (total, H, d) and
    (H, total)."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float


# Looks at a layer's attention, and returns the output that the model goes on with.
Probe = Callable[[AttentionCall], Tensor]


class AlignmentContext:
    """One batch's passage through one model: what its layers need, and what they hand back.

    Args:
        layout: padding, visual columns and segments of the batch, on the model's device.
        objective: alignment objective of `cdfast_kernels` (student).
        backend: backend of `cdfast_kernels` for aligned layers; with sdpa, flash_attn or xformers
            the map or the loss is computed beside that attention, by the backend "auto".
        map_layers: layers whose visual attention map is collected into `maps` (teacher).
        targets: student layer -> teacher target, a map or, with objective "pooled_stored", vectors;
            such a layer returns its loss into `losses`.
        sample_weight: (B,) for the aligner, which multiplies the losses by it.
        probes: layer -> what is called with its fused attention (analysis; no other use of it).
    """

    # No dataclass: FSDP rebuilds those that it finds among a module's arguments, and the layers
    # would hand their losses to copies.
    def __init__(
        self,
        layout: VisualLayout,
        *,
        objective: str = "row",
        backend: str = "auto",
        map_layers: frozenset[int] = frozenset(),
        targets: Mapping[int, VisualMap | PooledVectors] | None = None,
        sample_weight: Tensor | None = None,
        probes: Mapping[int, Probe] | None = None,
    ):
        self.layout = layout
        self.objective, self.backend = objective, backend
        self.map_layers = map_layers
        self.sample_weight = sample_weight
        self.targets, self.probes = dict(targets or {}), dict(probes or {})
        self.maps: dict[int, VisualMap] = {}
        self.losses: dict[int, Tensor] = {}
        self.with_grad = torch.is_grad_enabled()
        self._mask: Tensor | None = None

    def dense_mask(self) -> Tensor:
        """(B, 1, N, N) bool for layers that run stock attention under a layout with segments."""
        if self._mask is None:
            mask = self.layout.dense_mask()
            # A padding row sees nothing, and softmax over nothing is undefined: let it see itself.
            eye = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
            self._mask = (mask | (eye & ~mask.any(-1, keepdim=True)))[:, None]
        return self._mask


def _stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # flash-attn takes no dense mask; SDPA does, and uses its own flash kernel where there is none.
    name = "sdpa"
    if mask is None and query.is_cuda and query.dtype != torch.float32:
        name = "flash_attention_2" if is_flash_attn_2_available() else name
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **kwargs)


def cdfast_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    alignment: AlignmentContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a decoder layer: q (B, H, N, d), k, v (B, Hk, N, d) -> ((B, N, H, d), None)."""
    # Under autocast, rotary embeddings leave q and k in float32 while v is in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if alignment is None:
        return _stock_attention(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    target = alignment.targets.get(layer)
    layout = alignment.layout
    probe = alignment.probes.get(layer)
    aligned = target is not None or probe is not None or layer in alignment.map_layers
    # A dense mask of a packed batch would be (total, total); the fused op skips its empty tiles.
    if not aligned and not layout.is_packed:
        # Right padding needs no mask: a live row sees only keys at or before itself, all live.
        mask = None if layout.is_prefix_causal else alignment.dense_mask()
        return _stock_attention(module, query, key, value, mask, scaling=scaling, **kwargs)

    _refuse_unsupported(module, layer, kwargs)
    q, k, v = (_tokens(x, layout) for x in (query, key, value))
    beside = alignment.backend in _ATTENTION_BACKENDS
    backend = "auto" if beside else alignment.backend
    options: dict[str, Any] = {"softmax_scale": scaling, "backend": backend}
    attention = {**options, "layout": layout, "backend": alignment.backend}
    if target is None:
        out, lse = flash_attention(q, k, v, **attention)
        if layer in alignment.map_layers:
            alignment.maps[layer] = visual_attention_map(q, k, lse, layout, **options)
        if probe is not None:
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            out = probe(AttentionCall(layer, q, k, v, out, lse, scale))
        return _batched(out, layout), None

    if alignment.with_grad and not torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(module).__name__} {layer}: the alignment loss would lose its gradient, because "
            "this layer runs without autograd inside a forward pass that has it. That is reentrant "
            "activation checkpointing; expected gradient_checkpointing_kwargs="
            "{'use_reentrant': False}."
        )
    options |= {"objective": alignment.objective, "reduction": "none"}
    if isinstance(target, PooledVectors):
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out, lse = flash_attention(q, k, v, **attention)
        loss = pooled_vector_loss(q, k, lse, target, layout, scale)
    elif beside:
        out, lse = flash_attention(q, k, v, **attention)
        loss = visual_alignment_loss(q, k, lse, target, layout, **options)
    else:
        out, loss = flash_attention_with_alignment(q, k, v, target, layout, **options)
    # Activation recomputation calls this again: the first loss is the one in the caller's graph.
    alignment.losses.setdefault(layer, loss)
    return _batched(out, layout), None


def _tokens(x: Tensor, layout: VisualLayout) -> Tensor:
    """(B, N, H, d) of a layer's (B, H, N, d); of a packed batch, whose B is 1, (total, H, d)."""
    x = x.transpose(1, 2)
    return x.squeeze(0) if layout.is_packed else x


def _batched(out: Tensor, layout: VisualLayout) -> Tensor:
    """Inverse of `_tokens`, as a layer wants its output: (B, N, H, d)."""
    return out.unsqueeze(0) if layout.is_packed else out


def _refuse_unsupported(module: nn.Module, layer: int, kwargs: dict[str, Any]) -> None:
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} {layer} uses {name}={kwargs[name]!r}, which visual "
                "alignment does not support (expected plain causal softmax attention). Align other "
                "layers, or use another model."
            )
    if module.training and kwargs.get("dropout", 0.0) > 0:
        raise ValueError(
            f"{type(module).__name__} {layer} uses attention dropout {kwargs['dropout']}, which "
            "visual alignment does not support. Set attention_dropout=0 in the text configuration."
        )


def cdfast_attention_mask(
    *args: Any,
    mask_function: Any = causal_mask_function,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """SDPA's mask for a causal text model; any other kind is refused by the model's name."""
    if mask_function is not causal_mask_function:
        name = getattr(config, "model_type", "this model")
        raise ValueError(
            f"{name} asks for an attention mask that is not plain causal "
            f"({getattr(mask_function, '__qualname__', mask_function)}), such as a bidirectional "
            "image block, a sliding window, or packed position_ids without an attention_mask. "
            "Visual alignment is defined for causal attention: expected a causal text model and an "
            "attention_mask in the batch."
        )
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        *args, mask_function=mask_function, config=config, **kwargs
    )


def keep_alignment_in_layers(model: PreTrainedModel, layers: Collection[int]) -> None:
    """Let activation recomputation of these decoder layers keep what `keep_alignment` keeps.

    Call it after gradient checkpointing has been turned on, which resets it. Layers that are not
    checkpointed stay as they are.
    """
    for module in model.get_decoder().modules():
        attends = {getattr(child, "layer_idx", None) for child in module.children()}
        if getattr(module, "gradient_checkpointing", False) and attends & {*layers}:
            recompute = module._gradient_checkpointing_func
            keeping = functools.partial(recompute, context_fn=keep_alignment)
            module._gradient_checkpointing_func = keeping


AttentionInterface.register(ATTENTION_NAME, cdfast_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, cdfast_attention_mask)


def text_config_name(model: PreTrainedModel) -> str | None:
    """Name of the text model's configuration inside `model.config`; None if it is the model."""
    text_config = model.config.get_text_config(decoder=True)
    if text_config is model.config:
        return None
    for name in model.config.sub_configs:
        if getattr(model.config, name, None) is text_config:
            return name
    return None


def refusal(config: PreTrainedConfig) -> str | None:
    """Why attention of models with this configuration cannot be aligned; None if it can."""
    text_config = config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    reasons = []
    if config.model_type in _BIDIRECTIONAL_IMAGES:
        reasons.append(
            "tokens of an image see each other in both directions (bidirectional image mask)"
        )
    if kinds != {"full_attention"}:
        reasons.append(f"its layers are of the kinds {sorted(kinds)}")
    if getattr(text_config, "attn_logit_softcapping", None):
        reasons.append("it caps attention logits (attn_logit_softcapping)")
    if not getattr(text_config, "is_causal", True):
        reasons.append("its text attention is not causal")
    return _refused(config, " and ".join(reasons)) if reasons else None


def _refused(config: PreTrainedConfig, reason: str) -> str:
    return (
        f"{config.model_type}: visual alignment cannot be used, because {reason}. Expected full "
        "causal attention through AttentionInterface in every decoder layer; docs/families.md "
        "lists the families that have it."
    )


def use_cdfast_attention(model: PreTrainedModel) -> None:
    """Select cdfast attention for the text model of `model`, and leave its vision model alone.

    Raises:
        ValueError: the text model has layers that are not full causal attention, or does not choose
            its attention through AttentionInterface; the message names the model and the reason.
    """
    reason = refusal(model.config)
    if reason is None and not getattr(model, "_supports_attention_backend", False):
        reason = _refused(
            model.config, "its attention does not go through transformers' AttentionInterface"
        )
    if reason:
        raise ValueError(reason)
    model_type = model.config.model_type
    name = text_config_name(model)
    model.set_attn_implementation(ATTENTION_NAME if name is None else {name: ATTENTION_NAME})
    chosen = model.config.get_text_config(decoder=True)._attn_implementation
    if chosen != ATTENTION_NAME:
        raise ValueError(
            f"{model_type}: set_attn_implementation left the text model on {chosen!r}; expected "
            f"{ATTENTION_NAME!r}."
        )
