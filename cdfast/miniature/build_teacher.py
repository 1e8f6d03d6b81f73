"""The trainer of the miniature's teachers: language modelling, with or without two heads that are
shown where to look.

Their targets come from the scene itself (boxes and which words name what), so they are privileged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlavaProcessor, Trainer

from cdfast.collator import VisionTextCollator
from cdfast.encoding import encode
from cdfast.losses import IGNORE_INDEX
from cdfast.miniature.build_vision import covered_patches
from cdfast.miniature.scenes import COLOURS, IMAGE_SIZE, TOYS, Scene, World
from cdfast.synthetic import VISUAL_TOKENS, SceneDataset, vocabulary

LOOKUP_LAYER, LOOKUP_HEAD = 2, 0
HOP_LAYER, HOP_HEAD = 3, 1
SUPERVISION_FLOOR = 1e-4
NO_HOP = 0
BLANK_IMAGE = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 127, np.uint8)
# Words after which a statement begins anew, so that a hop never crosses them.
STATEMENT_STARTS = ("Q", "A", "B", "ans")


def lookup_targets(input_ids: Sequence[int], scene: Scene) -> np.ndarray:
    """Bool (N, 36): for a shape word that names exactly one object, that object's patches."""
    known = vocabulary(scene.world)
    words = [known[index] for index in input_ids]
    targets = np.zeros((len(words), VISUAL_TOKENS), bool)
    for position, word in enumerate(words):
        if word in scene.world.shapes:
            before = words[position - 1]
            colour = before if before in COLOURS else None
            named = [o for o in scene.objects if o.shape == word and colour in (None, o.colour)]
            if len(named) == 1:
                targets[position] = covered_patches(named[0])
    return targets


def hop_targets(input_ids: Sequence[int], world: World = TOYS) -> np.ndarray:
    """Int64 (N,): for a statement's second shape word the position of its first, else `NO_HOP`."""
    targets = np.full(len(input_ids), NO_HOP, np.int64)
    words = vocabulary(world)
    first: int | None = None
    closed = False
    for position, word in enumerate(words[index] for index in input_ids):
        if word in STATEMENT_STARTS:
            first, closed = None, False
        elif word == "and":
            closed = True
        elif word in world.shapes and not closed:
            if first is not None:
                targets[position] = first
            first = position
    return targets


class TeacherScenes(Dataset[dict[str, Any]]):
    """Encoded scenes for a teacher.

    Args:
        privileged: add the supervised heads' targets; otherwise boxes and hops are not even made.
        blank: replace every image by grey.
    """

    def __init__(
        self,
        scenes: SceneDataset,
        processor: LlavaProcessor,
        privileged: bool = False,
        blank: bool = False,
    ):
        self.scenes = scenes
        self.processor = processor
        self.privileged = privileged
        self.blank = blank

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.scenes[index]
        if self.blank:
            sample = replace(sample, images=(BLANK_IMAGE,))
        item = encode(self.processor, sample, turns="independent")
        if not self.privileged:
            return item
        ids = item["input_ids"].tolist()
        scene, _ = self.scenes.draw(index)
        item["lookup"] = torch.from_numpy(lookup_targets(ids, scene))
        item["hop"] = torch.from_numpy(hop_targets(ids, scene.world))
        return item


class TeacherCollator(VisionTextCollator):
    """Adds the supervised heads' targets to the batch, where samples have them."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(samples)
        for name in {"lookup", "hop"} & samples[0].keys():
            rows = [sample[name] for sample in samples]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        del batch["sample_ids"]
        return batch


def turn_mask(segment_ids: Tensor) -> Tensor:
    """Additive (B, 1, N, N): a token sees the image prefix and its own turn, causally."""
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = (same | (segment_ids[:, None, :] == 0)).tril()
    mask = torch.zeros(len(segment_ids), 1, length, length)
    return mask.masked_fill_(~visible[:, None], torch.finfo(torch.float32).min)


class TeacherTrainer(Trainer):
    """Language modelling on the answers, plus `supervision` times the two heads' losses."""

    def __init__(self, *args: Any, supervision: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.supervision = supervision
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            attention_mask=turn_mask(inputs["segment_ids"]),
            position_ids=inputs["position_ids"],
            output_attentions=self.supervision > 0,
            use_cache=False,
        )
        answers = inputs["labels"][:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(logits, answers, ignore_index=IGNORE_INDEX)
        if self.supervision:
            lookup = lookup_loss(outputs.attentions[LOOKUP_LAYER][:, LOOKUP_HEAD], inputs["lookup"])
            hop = hop_loss(outputs.attentions[HOP_LAYER][:, HOP_HEAD], inputs["hop"])
            loss = loss + self.supervision * (lookup + hop)
        return (loss, outputs) if return_outputs else loss


def lookup_loss(attention: Tensor, targets: Tensor) -> Tensor:
    """-log of the attention (B, N, N) on the target patches (B, N, 36), mean over rows with any."""
    rows = targets.any(-1)
    # The image's tokens stand behind the begin-of-text token.
    visual = attention[:, :, 1 : 1 + VISUAL_TOKENS][rows].float()
    return -((visual * targets[rows]).sum(-1) + SUPERVISION_FLOOR).log().mean()


def hop_loss(attention: Tensor, targets: Tensor) -> Tensor:
    """-log of the attention (B, N, N) on the target position (B, N), mean over rows with one."""
    rows = targets != NO_HOP
    reached = attention[rows].float().gather(1, targets[rows][:, None])
    return -(reached + SUPERVISION_FLOOR).log().mean()
