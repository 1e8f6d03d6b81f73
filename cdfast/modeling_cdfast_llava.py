"""LLaVA student with a fetched teacher adapter (TAF): x_v = P_s(P_t(z)).

Self-contained: the file travels with a saved checkpoint, so that `trust_remote_code=True` loads it
in a process that has never heard of cdfast. It must import nothing but torch and transformers.

Source: CompoDistill, "teacher adapter fetch"; the authors' code uses one linear layer for P_s
(`student_projector="linear"`), the paper says a light MLP (`"mlp"`, the default).
"""

from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.activations import ACT2FN


class CdfastLlavaConfig(LlavaConfig):
    """`LlavaConfig` with the width of the fetched adapter and the kind of the student's own.

    Args:
        teacher_hidden_size: width of the teacher's language model, which P_t projects to.
        student_projector: "mlp" (linear, activation, linear) or "linear".
    """

    model_type = "cdfast_llava"
    teacher_hidden_size: int | None = None
    student_projector: str = "mlp"


class FetchedAdapterProjector(nn.Module):
    """P_s(P_t(z)): the teacher's adapter, then the student's.

    P_t has the parameter names of `LlavaMultiModalProjector`, so that its state dict loads as is.
    """

    def __init__(self, config: CdfastLlavaConfig):
        super().__init__()
        if config.teacher_hidden_size is None:
            raise ValueError(
                "teacher_hidden_size: expected the width of the teacher's language model; got "
                "None. Set it in CdfastLlavaConfig."
            )
        if config.student_projector not in ("mlp", "linear"):
            raise ValueError(
                f"student_projector: expected 'mlp' or 'linear'; got {config.student_projector!r}."
            )
        layer = config.vision_feature_layer
        num_layers = 1 if isinstance(layer, int) else len(layer)
        vision: Any = config.vision_config
        text: Any = config.text_config
        vision_width = vision.hidden_size * num_layers
        teacher_width = config.teacher_hidden_size
        width = text.hidden_size
        bias = config.multimodal_projector_bias
        self.teacher = nn.ModuleDict(
            {
                "linear_1": nn.Linear(vision_width, teacher_width, bias=bias),
                "linear_2": nn.Linear(teacher_width, teacher_width, bias=bias),
            }
        )
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_1 = nn.Linear(teacher_width, width, bias=bias)
        self.linear_2 = (
            nn.Linear(width, width, bias=bias) if config.student_projector == "mlp" else None
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden = self.teacher["linear_2"](self.act(self.teacher["linear_1"](image_features)))
        hidden = self.linear_1(hidden)
        return hidden if self.linear_2 is None else self.linear_2(self.act(hidden))


class CdfastLlavaModel(LlavaModel):
    config: CdfastLlavaConfig

    def __init__(self, config: CdfastLlavaConfig):
        super().__init__(config)
        self.multi_modal_projector = FetchedAdapterProjector(config)  # type: ignore[assignment]
        self.post_init()


class CdfastLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config: CdfastLlavaConfig

    def __init__(self, config: CdfastLlavaConfig):
        super().__init__(config)
        self.model = CdfastLlavaModel(config)
        self.post_init()


__all__ = ["CdfastLlavaConfig", "CdfastLlavaForConditionalGeneration", "CdfastLlavaModel"]
