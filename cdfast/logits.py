"""What models do to logits after the output embedding: scale them, cap them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_CAP, _SCALING = "final_logit_softcapping", "logits_scaling"
# Of the models that have logits_scaling these multiply by it; Granite and its kin divide.
_MULTIPLY = ("hyperclovax", "hyperclovax_vision_v2")


def logit_transforms(config: PreTrainedConfig) -> dict[str, float]:
    """The options of a configuration that change logits, as far as they do: name -> value."""
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in (_CAP, _SCALING)}
    return {n: float(v) for n, v in found.items() if v and not (n == _SCALING and v == 1)}


def model_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of hidden states (..., d), as the model's forward has them.

    Float32 at least: z = W h, times or over `logits_scaling`, then cap tanh(z / cap).
    """
    z: Tensor = model.get_output_embeddings()(hidden)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    found = logit_transforms(model.config)
    if scaling := found.get(_SCALING):
        z = z * scaling if model.config.model_type in _MULTIPLY else z / scaling
    if cap := found.get(_CAP):
        z = cap * torch.tanh(z / cap)
    return z
