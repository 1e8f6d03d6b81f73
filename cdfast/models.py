"""Loading teachers, students and processors, and making the student a run starts from."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

# From its module: transformers 5.17 hides the name at the top level where torchvision is missing,
# although the class works without it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from cdfast.adapters import assemble_student, check_assembly, vision_tower
from cdfast.attention import refusal
from cdfast.config import EMBEDDED_SCENES, EMBEDDED_TEACHERS, ConfigError, Recipe
from cdfast.engine import sharded_loading, unsharded_loading
from cdfast.logits import logit_transforms

IMAGE_TOKEN = "<image>"


def load_config(source: str | Path, trust_remote_code: bool = False) -> Any:
    """A checkpoint's configuration.

    Raises:
        ConfigError: there is none, it is broken, or it asks for code; the message has the reason.
    """
    config = _loaded(
        AutoConfig,
        source,
        "cannot be loaded",
        "Expected a Hugging Face checkpoint folder (config.json and safetensors) or a hub name.",
        trust_remote_code,
    )
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        kernel = getattr(part, "_attn_implementation", None)
        # transformers fetches and runs what has the name of a hub repository.
        if isinstance(kernel, str) and "/" in kernel and not trust_remote_code:
            raise ConfigError(
                f"model {str(source)!r}: attn_implementation: expected none in config.json; got "
                f"{kernel!r}, code from the hub. Remove it, or, if you trust that code, give "
                "--trust-remote-code true."
            )
    return config


def _loaded(
    loader: Any, source: str | Path, what: str, expected: str, trust: bool, **options: Any
) -> Any:
    """`loader.from_pretrained`, whose errors on a stranger's files become one ConfigError."""
    try:
        return loader.from_pretrained(source, trust_remote_code=trust, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Configurations, tokenizers and unpicklers raise a dozen different errors on damaged files.
    except Exception as error:
        if "trust_remote_code" in str(error):
            expected = (
                "It brings code of its own, which is not run. Read it, and if you trust it, give "
                "--trust-remote-code true."
            )
        raise ConfigError(
            f"model {str(source)!r} {what}: {type(error).__name__}: {error} {expected}"
        ) from error


def is_vision_language(config: Any) -> bool:
    """Whether a configuration is that of a model of images and text."""
    return (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        or "vision_config" in config.sub_configs
    )


def load_model(
    source: str | Path, dtype: str, trust_remote_code: bool = False, sharded: bool = False
) -> PreTrainedModel:
    """A vision-language or causal language model from a checkpoint folder or the hub.

    Args:
        source: folder or hub name.
        dtype: of its parameters.
        trust_remote_code: let the checkpoint bring its own code.
        sharded: partition it over all ranks as it is loaded; all must call this. Otherwise it is
            loaded whole, on whichever ranks call.

    Raises:
        ConfigError: no configuration or no weights; the message has the loader's reason.
    """
    config = load_config(source, trust_remote_code)
    chosen = getattr(torch, dtype)
    with sharded_loading(chosen) if sharded else unsharded_loading():
        return _loaded(
            AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM,
            source,
            "has weights that cannot be loaded",
            "Expected model.safetensors, whole, of the sizes in config.json. Copy it again.",
            trust_remote_code,
            dtype=chosen,
        )


def check_models(recipe: Recipe) -> None:
    """Refuse by their configurations what cannot be a teacher or a student, loading no weights.

    Raises:
        ConfigError: a checkpoint without a readable configuration, of the wrong kind, or of a
            family whose attention cannot be aligned.
    """
    configs = {}
    for role in ("teacher", "student", "vision_tower"):
        source = getattr(recipe, role)
        if role == "teacher" and source in EMBEDDED_TEACHERS:
            teacher_source(recipe)
            continue
        if not source or source in EMBEDDED_SCENES:
            continue
        config = configs[role] = load_config(source, recipe.trust_remote_code)
        if role == "teacher" and not is_vision_language(config):
            raise ConfigError(
                f"teacher: expected a vision-language model such as LLaVA; got {source!r} of "
                f"model_type {config.model_type!r}. Give --teacher PATH of one."
            )
        if role == "student" and getattr(config.get_text_config(), "vocab_size", None) is None:
            raise ConfigError(
                f"student: expected a causal language model or a LLaVA checkpoint; got {source!r} "
                f"of model_type {config.model_type!r}. Give --student PATH of one."
            )
        reason = refusal(config) if role != "vision_tower" else None
        if reason:
            raise ConfigError(f"{role}: {source!r}: {reason}")
        if role != "vision_tower" and (changed := logit_transforms(config)):
            raise ConfigError(
                f"{role}: {source!r}: expected logits that are hidden states times the output "
                f"embedding, as the chunked losses have them; got model_type {config.model_type!r} "
                f"with {changed}. Give --{role} PATH of another model."
            )
    if "teacher" in configs and "student" in configs:
        try:
            check_assembly(configs["teacher"], configs["student"], recipe.taf)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def teacher_source(recipe: Recipe) -> str | Path:
    assert recipe.teacher is not None
    if recipe.teacher in EMBEDDED_TEACHERS:
        from cdfast.synthetic import teacher_path

        try:
            return teacher_path(recipe.teacher)
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from error
    return recipe.teacher


def _load_part(loader: Any, source: str | Path, recipe: Recipe) -> Any:
    load_config(source, recipe.trust_remote_code)  # its error is about the checkpoint as a whole
    return _loaded(
        loader,
        source,
        "has a processor that cannot be loaded",
        "Expected the files that processor.save_pretrained writes beside the weights.",
        recipe.trust_remote_code,
    )


def load_processor(recipe: Recipe) -> Any:
    """The processor of both models: the teacher's; without one, the student's or a new one.

    Raises:
        ConfigError: there is no such checkpoint or no processor in it.
    """
    if recipe.teacher:
        return _load_part(AutoProcessor, teacher_source(recipe), recipe)
    if recipe.vision_tower is None:
        return _load_part(AutoProcessor, recipe.student, recipe)
    tokenizer = _load_part(AutoTokenizer, recipe.student, recipe)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_processor = _load_part(AutoImageProcessor, recipe.vision_tower, recipe)
    vision = load_config(recipe.vision_tower, recipe.trust_remote_code)
    vision = getattr(vision, "vision_config", vision)
    # SigLIP has no class token; CLIP has one, which LLaVA leaves out ("default").
    has_class_token = vision.model_type.startswith("clip")
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if has_class_token else "full",
        num_additional_image_tokens=int(has_class_token),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def new_llava(
    language_model: PreTrainedModel, vision: str, processor: Any, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A LLaVA model from a language model and a vision encoder, with a new projector.

    Features are those of the encoder's last layer but one, as in LLaVA.
    """
    tower = _loaded(
        AutoModel,
        vision,
        "has weights that cannot be loaded",
        "Expected a vision encoder with model.safetensors.",
        trust_remote_code,
    )
    tower = getattr(tower, "vision_model", tower)
    config = tower.config
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token >= language_model.config.vocab_size:
        language_model.resize_token_embeddings(token + 1)
    llava: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config,
            text_config=language_model.config,
            image_token_index=token,
            image_seq_length=(config.image_size // config.patch_size) ** 2,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            vision_feature_layer=-2,
            tie_word_embeddings=language_model.config.tie_word_embeddings,
        )
    )
    llava = llava.to(language_model.dtype)
    llava.model.language_model.load_state_dict(language_model.base_model.state_dict())
    llava.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    inner = vision_tower(llava)[2]
    inner.load_state_dict(tower.state_dict(), strict=False)
    llava.tie_weights()
    init_projector(llava)
    return llava


@torch.no_grad()
def init_projector(model: PreTrainedModel) -> None:
    """Weights of a new projector: std 1/sqrt(fan_in), no bias; a fetched P_t is left as it is."""
    projector = model.model.multi_modal_projector
    for name, layer in projector.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith("teacher."):
            layer.weight.normal_(std=1 / math.sqrt(layer.in_features))
            if layer.bias is not None:
                layer.bias.zero_()


def make_initial_student(recipe: Recipe, processor: Any, folder: Path) -> None:
    """Write the student the first stage starts from: assembled, with a new projector if due."""
    if recipe.student in EMBEDDED_SCENES:
        from cdfast.miniature.worlds import WORLDS
        from cdfast.synthetic import make_student

        with tempfile.TemporaryDirectory() as scratch:
            source = make_student(Path(scratch) / "student", recipe.seed, WORLDS[recipe.student])
            student = load_model(source, recipe.dtype)
    else:
        student = load_model(recipe.student, recipe.dtype, recipe.trust_remote_code)
    # P_s is drawn below: the same for a seed, whatever was loaded.
    torch.manual_seed(recipe.seed)
    is_vlm = hasattr(student.config, "vision_config")
    if recipe.teacher:
        if recipe.taf or not is_vlm:
            teacher = load_model(teacher_source(recipe), recipe.dtype, recipe.trust_remote_code)
            student = assemble_student(
                teacher, student, taf=recipe.taf, student_projector=recipe.student_projector
            )
            init_projector(student)
    elif not is_vlm:
        if recipe.vision_tower is None:
            raise ConfigError(
                f"student: {recipe.student!r} is a language model without a vision encoder, and "
                "there is no teacher to take one from. Give --vision-tower PATH."
            )
        student = new_llava(student, recipe.vision_tower, processor, recipe.trust_remote_code)
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
