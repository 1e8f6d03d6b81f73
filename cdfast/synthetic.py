"""The embedded miniature: training sets of scenes, processors, teachers and students.

`SceneDataset` feeds the same path as real data; `teacher_path(name)` is a checkpoint that comes
with the package (made by `python -m cdfast.miniature.build`), and `make_student` writes an
untrained student beside it. What scenes are made of is a `World` (`cdfast.miniature.worlds`).

Source of the question kinds: SugarCrepe (arXiv 2306.14610).
"""

from __future__ import annotations

import importlib.resources
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from cdfast.encoding import Sample, encode
from cdfast.miniature.questions import TURN_KINDS, Turn, draw_turns, normalise_mix
from cdfast.miniature.scenes import (
    COLOURS,
    COLUMNS,
    IMAGE_SIZE,
    RELATIONS,
    ROWS,
    SPLITS,
    TOYS,
    Scene,
    SceneKey,
    World,
    draw_scene,
    render,
    scene_key,
    split_of,
)
from cdfast.miniature.worlds import PHOTOS

__all__ = [
    "TURN_KINDS",
    "EncodedScenes",
    "SceneDataset",
    "build_student",
    "check_disjoint",
    "init_miniature_weights",
    "make_processor",
    "make_student",
    "miniature_configs",
    "read_card",
    "scene_key",
    "split_of",
    "teacher_path",
    "vocabulary",
]

PATCH_SIZE = 8
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_POSITIONS = 512
WIDTH = 96
HEADS = 6
TEACHER_LAYERS = 6
STUDENT_LAYERS = 4
# World -> width and layers of its vision encoder: handwriting is harder to read than shapes.
VISION_SIZES = {TOYS.name: (64, 2), PHOTOS.name: (96, 3)}
EMBEDDING_STD = 0.6
LM_HEAD_STD = 0.02

SPECIAL_TOKENS = ("<pad>", "<bos>", "<image>", "<eos>", "<unk>")
FUNCTION_WORDS = (
    *("A", "B", "yes", "no", "0", "1", "2", "3", "4", "Q", "ans", "?", ":", ",", "and", "to"),
    *("which", "fits", "true", "is", "there", "what", "colour", "shape", "how", "many"),
    *("objects", "list", "where"),
)

# One turn renders as `<bos> <image> Q question ans answer <eos>`.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- set parts = [{'type': 'text', 'text': message['content']}]
        if message['content'] is string else message['content'] -%}
  {%- if message['role'] == 'user' -%}
    {%- for part in parts if part['type'] == 'image' -%}{{- ' <image>' -}}{%- endfor -%}
    {{- ' Q' -}}
    {%- for part in parts if part['type'] == 'text' -%}{{- ' ' + part['text'] -}}{%- endfor -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ans' -}}
    {%- for part in parts if part['type'] == 'text' -%}{{- ' ' + part['text'] -}}{%- endfor -%}
    {{- ' ' + eos_token -}}
  {%- else -%}
    {{- raise_exception('role: expected user or assistant, got ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ans' -}}{%- endif -%}
"""


def vocabulary(world: World = TOYS) -> tuple[str, ...]:
    """The words of a world's tokenizer; a word's place is its token id."""
    names = (*COLOURS, *world.shapes, *RELATIONS, *ROWS, *COLUMNS)
    return (*SPECIAL_TOKENS, *names, *FUNCTION_WORDS)


class SceneDataset(Dataset[Sample]):
    """Scenes with several questions each; item i depends on (split, seed, i) alone.

    Args:
        split: "train", "validation" or "test"; no scene is in two of them.
        seed: another seed draws other scenes of the same split.
        size: number of scenes.
        turns_mix: turns per scene by kind, a mapping or six numbers in `TURN_KINDS` order
            (list, vqa, loc, rel, verify, ab).
        cr_weights: relative frequency of the caption kinds in verify and ab turns.
        world: what the scenes are made of.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 4480,
        turns_mix: Mapping[str, int] | Sequence[int] = (0, 2, 1, 1, 3, 2),
        cr_weights: Mapping[str, float] | None = None,
        world: World = TOYS,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.split = split
        self.seed = seed
        self.size = size
        self.turns_mix = normalise_mix(turns_mix)
        self.cr_weights = cr_weights
        self.world = world

    def __len__(self) -> int:
        return self.size

    def _generator(self, index: int) -> random.Random:
        if not -self.size <= index < self.size:
            raise IndexError(f"index: expected one of {self.size} items, got {index}")
        return random.Random(f"{self.split}/{self.seed}/{index % self.size}")

    def draw(self, index: int) -> tuple[Scene, list[Turn]]:
        """The scene and the (question, answer) turns of item `index`."""
        rng = self._generator(index)
        scene = draw_scene(rng, self.split, self.world)
        return scene, draw_turns(scene, self.turns_mix, rng, self.cr_weights)

    def __getitem__(self, index: int) -> Sample:
        scene, turns = self.draw(index)
        source = f"{self.world.name} {self.split}, seed {self.seed}, scene {index}"
        return Sample(turns_as_messages(turns), (render(scene),), source)

    def scene_keys(self) -> set[SceneKey]:
        """The keys of all scenes, without rendering them or asking about them."""
        generators = (self._generator(index) for index in range(self.size))
        return {scene_key(draw_scene(rng, self.split, self.world)) for rng in generators}


class EncodedScenes(Dataset[dict[str, Any]]):
    """Scenes encoded for training; each turn sees the image and itself (`turns="independent"`)."""

    def __init__(self, scenes: SceneDataset, processor: Any) -> None:
        self.scenes = scenes
        self.processor = processor

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return encode(self.processor, self.scenes[index], turns="independent")


def turns_as_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Chat messages of the turns; the image is in the first one."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def check_disjoint(evaluation: Iterable[SceneKey], training: Iterable[SceneKey]) -> None:
    """Raise ValueError if an evaluation scene is also a training scene."""
    shared = set(evaluation) & set(training)
    if shared:
        raise ValueError(
            f"{len(shared)} evaluation scenes are training scenes, for example {min(shared)}: "
            "draw the training set from split='train'"
        )


def make_processor(world: World = TOYS) -> LlavaProcessor:
    """A word-level tokenizer, a 48x48 image processor and the chat template, as one processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = {word: index for index, word in enumerate(vocabulary(world))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=MAX_POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    image_processor = SiglipImageProcessorPil(
        do_resize=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def miniature_configs(world: World = TOYS) -> tuple[LlavaConfig, Qwen2Config]:
    """The teacher's configuration (96 wide, 6 layers) and the student's text configuration (4)."""
    width, layers = VISION_SIZES[world.name]
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    return (
        llava_config(vision, _text_config(TEACHER_LAYERS, world)),
        _text_config(STUDENT_LAYERS, world),
    )


def _text_config(layers: int, world: World) -> Qwen2Config:
    words = vocabulary(world)
    return Qwen2Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=words.index("<pad>"),
        bos_token_id=words.index("<bos>"),
        eos_token_id=words.index("<eos>"),
    )


def llava_config(vision: SiglipVisionConfig, text: Qwen2Config) -> LlavaConfig:
    """The miniature's LLaVA around a text configuration."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        # `image_token_id` is this field's other name.
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def init_miniature_weights(model: nn.Module, seed: int) -> None:
    """Initialise the language model and the adapter in place; the vision tower is left as it is.

    Matrices get std 1/sqrt(fan_in), half of it where they write to the residual stream, embeddings
    0.6 and the output head 0.02: the usual 0.02 is too small for 96 wide layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            continue
        if parameter.dim() < 2:
            parameter.fill_(1.0 if "norm" in name else 0.0)
            continue
        std = 1 / math.sqrt(parameter.shape[1])
        if "embed_tokens" in name:
            std = EMBEDDING_STD
        elif "lm_head" in name:
            std = LM_HEAD_STD
        elif "o_proj" in name or "down_proj" in name:
            std /= 2
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def build_miniature_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A float32 model with `init_miniature_weights`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    init_miniature_weights(model, seed)
    return model


def assets_path(name: str = TOYS.name) -> Path:
    """The folder of a shipped teacher and its card."""
    return Path(str(importlib.resources.files("cdfast") / "assets" / name))


def teacher_path(name: str = TOYS.name) -> Path:
    """An embedded teacher: model and processor, for `from_pretrained`.

    Args:
        name: "miniature", "miniature-unprivileged" or "miniature-photos".

    Raises:
        FileNotFoundError: it has not been made in this installation.
    """
    folder = assets_path(name) / "teacher"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"teacher {name!r}: expected its checkpoint in {folder}; found none. Make it with "
            f"python -m cdfast.miniature.build --which {name}"
        )
    return folder


def read_card(name: str = TOYS.name) -> dict[str, Any]:
    """How a shipped teacher was made and how well it does: `card.json`."""
    return json.loads((assets_path(name) / "card.json").read_text())


def build_student(seed: int = 0, world: World = TOYS) -> LlavaForConditionalGeneration:
    """An untrained float32 student that has its teacher's vision tower.

    Args:
        seed: of the student's language model and adapter.
        world: whose scenes it will see; the teachers of one world share their vision tower.
    """
    source = teacher_path(world.name)
    teacher = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    _, text = miniature_configs(world)
    student = build_miniature_model(llava_config(teacher.config.vision_config, text), seed)
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    return student


def make_student(directory: str | Path, seed: int = 0, world: World = TOYS) -> Path:
    """Write `build_student(seed, world)` and the teacher's processor; return their path.

    Args:
        directory: created if needed; a plain LLaVA checkpoint for `from_pretrained`.
        seed, world: as in `build_student`.
    """
    directory = Path(directory)
    build_student(seed, world).save_pretrained(directory)
    AutoProcessor.from_pretrained(teacher_path(world.name)).save_pretrained(directory)
    return directory
