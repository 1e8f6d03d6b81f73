"""What teacher and student share: one frozen vision tower, and the teacher's adapter (TAF).

Source: CompoDistill, "teacher adapter fetch".
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from cdfast.engine import make_whole
from cdfast.modeling_cdfast_llava import CdfastLlavaConfig, CdfastLlavaForConditionalGeneration

LLAVA = ("llava", "cdfast_llava")
_TOWER_NAMES = ("vision_tower", "visual", "vision_model")
# What lies between vision encoder and decoder, by family: LLaVA and InternVL; the newline token of
# LLaVA-NeXT and LLaVA-OneVision; Idefics3 and SmolVLM; Qwen, whose encoder contains it.
_ADAPTER_NAMES = {
    "multi_modal_projector",
    "image_newline",
    "connector",
    "merger",
    "deepstack_merger_list",
}


def register_taf_classes() -> None:
    """Let AutoModel load TAF students here, and let their file travel with saved checkpoints."""
    AutoConfig.register("cdfast_llava", CdfastLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        CdfastLlavaConfig, CdfastLlavaForConditionalGeneration, exist_ok=True
    )
    CdfastLlavaConfig.register_for_auto_class()
    CdfastLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


class _Run:
    """A frozen vision tower and what it returned last."""

    def __init__(self, tower: nn.Module):
        self.tower = tower.requires_grad_(False).eval()
        self.runs = 0
        self.forget()

    def forget(self) -> None:
        self._input: Tensor | None = None
        self._options: dict[str, Any] = {}
        self._output: Any = None

    def __call__(self, pixel_values: Tensor, options: dict[str, Any]) -> Any:
        # From transformers 5.24 on LLaVA hands decoder options on to the tower: each model has
        # an alignment context of its own, which says nothing of images.
        options = {name: value for name, value in options.items() if name != "alignment"}
        if pixel_values is not self._input or options != self._options:
            with torch.no_grad():
                self._output = self.tower(pixel_values, **options)
            self._input, self._options = pixel_values, options
            self.runs += 1
        # A copy of the container: LLaVA writes its projected features into what the tower returns.
        return copy.copy(self._output)


class SharedVisionTower(nn.Module):
    """Stands for the vision tower of one of several models that run one frozen tower together.

    The tower itself is no registered child: optimizers, DDP and sharding see no parameters here,
    yet `state_dict` contains them under the names that a checkpoint of either model expects. Each
    model has a stand-in of its own, because hooks that an engine puts on one model's modules must
    not fire in the forward of another.
    """

    def __init__(self, tower: nn.Module | SharedVisionTower):
        super().__init__()
        self._run: Any = tower._run if isinstance(tower, SharedVisionTower) else _Run(tower)
        self.config = self.tower.config

    @property
    def tower(self) -> nn.Module:
        return self._run.tower

    @property
    def runs(self) -> int:
        """Forwards of the tower, for whichever model."""
        return self._run.runs

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Features of the batch; the same tensor again returns what was computed the first time."""
        # transformers adds use_cache here or not, depending on the caller; an encoder has no cache.
        options.pop("use_cache", None)
        return self._run(pixel_values, options)

    def train(self, mode: bool = True) -> SharedVisionTower:
        super().train(mode)
        self.tower.eval()  # frozen: dropout never runs
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> SharedVisionTower:
        self.tower._apply(fn, recurse)
        self._run.forget()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.tower.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        result = self.tower.load_state_dict(mine, strict=False)
        missing_keys.extend(prefix + k for k in result.missing_keys)
        if strict:
            unexpected_keys.extend(prefix + k for k in result.unexpected_keys)


def vision_tower(model: PreTrainedModel) -> tuple[nn.Module, str, nn.Module]:
    """(parent, attribute name, tower) of a vision-language model's vision encoder.

    Raises:
        ValueError: none found; the message names the model.
    """
    for parent in (model.base_model, model):
        for name in _TOWER_NAMES:
            tower = getattr(parent, name, None)
            if isinstance(tower, nn.Module):
                return parent, name, tower
    raise ValueError(
        f"{model.config.model_type}: expected a vision encoder named one of "
        f"{', '.join(_TOWER_NAMES)}; found none."
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter or module of this name belongs to an adapter of vision to text."""
    return not _ADAPTER_NAMES.isdisjoint(name.split("."))


def share_vision_tower(teacher: PreTrainedModel, student: PreTrainedModel) -> SharedVisionTower:
    """Replace both models' vision encoders by stand-ins of one that runs once per batch.

    Where teacher and student have unequal dtypes, the wider one is kept, so that the student is
    saved with exact weights, and each adapter reads its features in its own dtype.

    Raises:
        ValueError: the encoders differ, in configuration or in a weight that is named; or contain
            the adapters.
    """
    teacher_parent, teacher_name, theirs = vision_tower(teacher)
    student_parent, student_name, ours = vision_tower(student)
    for model, tower in ((teacher, theirs), (student, ours)):
        if any(is_adapter(name) for name, _ in tower.named_parameters()):
            raise ValueError(
                f"{model.config.model_type}: expected a vision encoder apart from the adapter; in "
                "this family the adapter is a part of it, and each model has its own. Distil "
                "without sharing (share_vision_tower=False, on the command line "
                "--share-vision-tower false)."
            )
    for tower in (theirs, ours):
        make_whole(tower)  # it runs outside of any engine
    _require_equal_towers(theirs, ours)
    kept = ours if _dtype(ours).itemsize > _dtype(theirs).itemsize else theirs
    shared = kept if isinstance(kept, SharedVisionTower) else SharedVisionTower(kept)
    for parent, name, tower in (
        (teacher_parent, teacher_name, theirs),
        (student_parent, student_name, ours),
    ):
        setattr(parent, name, SharedVisionTower(shared))
        adapter = getattr(parent, "multi_modal_projector", None)
        if adapter is not None and not isinstance(tower, SharedVisionTower):
            adapter.register_forward_pre_hook(_in_own_dtype)
    return shared


def _dtype(module: nn.Module) -> torch.dtype:
    return next(v.dtype for v in module.state_dict().values() if v.is_floating_point())


def _in_own_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # Asked anew each time: an engine may have changed the dtype of either side since.
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])


def _require_equal_towers(theirs: nn.Module, ours: nn.Module) -> None:
    teacher_state, student_state = theirs.state_dict(), ours.state_dict()
    differing = sorted(set(teacher_state) ^ set(student_state)) or [
        name
        for name, value in teacher_state.items()
        if value.shape != student_state[name].shape
        or not _equal_when_rounded(value.cpu(), student_state[name].cpu())
    ]
    if differing:
        raise ValueError(
            f"vision encoder: expected teacher and student to have the same frozen one; "
            f"{differing[0]} differs ({len(differing)} in all). Build the student from the "
            "teacher's encoder, or distil without sharing and without TAF "
            "(share_vision_tower=False, taf=False; on the command line --share-vision-tower false "
            "--taf false)."
        )


def _equal_when_rounded(a: Tensor, b: Tensor) -> bool:
    """Equal in the narrower of the two dtypes: a half-precision copy of a model is that model."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(narrow), b.to(narrow))


def check_assembly(teacher: PreTrainedConfig, student: PreTrainedConfig, taf: bool) -> None:
    """Refuse models of which no student can be assembled; nothing where the student stays as it is.

    Args:
        teacher, student: configurations.
        taf: fetch the teacher's adapter.

    Raises:
        ValueError: the teacher is no LLaVA model, or has a fetched adapter itself; or the student
            is a model of another family with a vision encoder of its own.
    """
    has_encoder = "vision_config" in student.sub_configs
    if has_encoder and not taf:
        return
    if teacher.model_type not in LLAVA:
        raise ValueError(
            f"teacher: expected a LLaVA model (model_type 'llava'), whose vision encoder and "
            f"adapter the student takes over; got {teacher.model_type!r}. For other families give "
            "a ready student that reads the same images as the same tokens, and taf=False (on the "
            "command line --taf false)."
        )
    if taf and teacher.model_type == "cdfast_llava":
        raise ValueError(
            "teacher: expected a LLaVA model with a plain adapter to fetch (taf=True); got a "
            "student that has a fetched adapter itself. Distil from it with taf=False."
        )
    if has_encoder and student.model_type not in LLAVA:
        raise ValueError(
            f"student: expected a causal language model or a LLaVA model, whose language model is "
            f"put behind the teacher's vision encoder and adapter (taf=True); got "
            f"{student.model_type!r}, which has its own. Distil it as it is with taf=False (on the "
            "command line --taf false)."
        )


def assemble_student(
    teacher: PreTrainedModel,
    language_model: PreTrainedModel,
    *,
    taf: bool,
    student_projector: str = "mlp",
) -> PreTrainedModel:
    """A LLaVA student: the teacher's vision encoder and adapter, and its own language model.

    With `taf`, visual tokens are P_s(P_t(z)) with P_t the teacher's adapter (copied, to be kept
    frozen) and P_s new. Without, the student's projector is new, or its own if it is a LLaVA model.

    Args:
        teacher: LLaVA model.
        language_model: a causal language model, or a LLaVA model whose language model is taken.
        taf: fetch the teacher's adapter.
        student_projector: P_s: "mlp" or "linear".

    Returns:
        The student, float dtype of `language_model`.

    Raises:
        ValueError: see `check_assembly`.

    Source: paper, "teacher adapter fetch".
    """
    check_assembly(teacher.config, language_model.config, taf)
    is_llava = isinstance(language_model, LlavaForConditionalGeneration)
    text_config = language_model.config.get_text_config(decoder=True)
    token = teacher.config.image_token_id
    if token >= text_config.vocab_size:
        language_model.resize_token_embeddings(token + 1)
        text_config = language_model.config.get_text_config(decoder=True)

    if is_llava and not taf:
        student: Any = language_model
    else:
        shared: dict[str, Any] = {
            name: getattr(teacher.config, name)
            for name in (
                "image_token_id",
                "image_seq_length",
                "projector_hidden_act",
                "vision_feature_select_strategy",
                "vision_feature_layer",
                "multimodal_projector_bias",
            )
        }
        shared["vision_config"] = copy.deepcopy(teacher.config.vision_config)
        shared["text_config"] = copy.deepcopy(text_config)
        shared["tie_word_embeddings"] = language_model.config.tie_word_embeddings
        if taf:
            config = CdfastLlavaConfig(
                **shared,
                teacher_hidden_size=teacher.config.text_config.hidden_size,
                student_projector=student_projector,
            )
            student = CdfastLlavaForConditionalGeneration(config)
        else:
            student = LlavaForConditionalGeneration(LlavaConfig(**shared))
        student = student.to(language_model.dtype)
        source = language_model.model.language_model if is_llava else language_model.base_model
        student.model.language_model.load_state_dict(source.state_dict())
        student.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
        student.tie_weights()
        student.generation_config = copy.deepcopy(language_model.generation_config)
    vision_tower(student)[2].load_state_dict(vision_tower(teacher)[2].state_dict())
    if taf:
        fetched = teacher.model.multi_modal_projector.state_dict()
        student.model.multi_modal_projector.teacher.load_state_dict(fetched)
    return student


def set_trainable(student: PreTrainedModel, *, projector: bool, language_model: bool) -> None:
    """Freeze everything but the named parts; P_t and the vision encoder always stay frozen.

    Args:
        student: a vision-language model.
        projector: train the adapter between vision encoder and decoder.
        language_model: train the decoder and the output embedding.
    """
    parts = (student.get_decoder(), student.get_output_embeddings())
    text = {id(p) for part in parts for p in part.parameters()}
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(projector and ".multi_modal_projector.teacher." not in name)
        else:
            parameter.requires_grad_(language_model and id(parameter) in text)
