"""Pretraining of the miniature's vision encoders on dense labels of scenes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import SiglipVisionConfig, SiglipVisionModel

from cdfast.miniature.scenes import COLOURS, TOYS, Scene, SceneObject, World, render
from cdfast.synthetic import PATCH_SIZE, VISUAL_TOKENS, SceneDataset

PATCHES_PER_SIDE = int(VISUAL_TOKENS**0.5)


def covered_patches(o: SceneObject) -> np.ndarray:
    """Bool (36,): the patches whose centre lies in the object's box."""
    centre = (np.arange(PATCHES_PER_SIDE) + 0.5) * PATCH_SIZE
    rows, columns = abs(centre - o.y) <= o.radius, abs(centre - o.x) <= o.radius
    return (rows[:, None] & columns[None]).ravel()


def patch_labels(scene: Scene) -> np.ndarray:
    """Int64 (36, 2): 1 + colour and 1 + shape of each patch's object, 0 where there is none."""
    labels = np.zeros((VISUAL_TOKENS, 2), np.int64)
    for o in scene.objects:
        labels[covered_patches(o)] = (
            1 + list(COLOURS).index(o.colour),
            1 + scene.world.shapes.index(o.shape),
        )
    return labels


def pretrain_vision(
    config: SiglipVisionConfig,
    steps: int = 900,
    world: World = TOYS,
    scenes: int = 5000,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 77,
) -> tuple[SiglipVisionModel, dict[str, float]]:
    """Train the vision encoder to tell each patch's colour, shape, row and column, in float32.

    Without the row and column it keeps almost nothing of where a patch is.

    Args:
        config: of the encoder.
        steps: of AdamW with a cosine schedule.
        world: whose scenes it sees.
        scenes: that are drawn once, and shown in batches drawn at random.
        batch: scenes in a step.
        lr: the highest learning rate.
        seed: of weights, scenes and batches.

    Returns:
        The frozen encoder, and its accuracies on covered patches of validation scenes.
    """
    torch.manual_seed(seed)
    encoder = SiglipVisionModel(config)
    _init_vision(encoder)
    classes = (1 + len(COLOURS), 1 + len(world.shapes), PATCHES_PER_SIDE, PATCHES_PER_SIDE)
    head = nn.Linear(config.hidden_size, sum(classes))
    place = torch.arange(VISUAL_TOKENS)
    place = torch.stack([place // PATCHES_PER_SIDE, place % PATCHES_PER_SIDE], -1)
    pixels, labels = _vision_data(SceneDataset("train", seed, scenes, world=world))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)

    def cosine(step: int) -> float:
        return min(1, (step + 1) / 40) * (0.5 * (1 + np.cos(np.pi * step / steps)) + 0.02)

    schedule = LambdaLR(optimizer, cosine)
    for _ in tqdm(range(steps), desc="vision encoder"):
        rows = torch.randint(len(pixels), (batch,))
        scores = head(encoder(pixels[rows]).last_hidden_state).split(classes, -1)
        targets = torch.cat([labels[rows], place.expand(batch, -1, -1)], -1)
        losses = [
            F.cross_entropy(
                score.flatten(0, 1), targets[..., k].flatten(), _class_weights(classes[k], k)
            )
            for k, score in enumerate(scores)
        ]
        loss = losses[0] + losses[1] + 0.5 * (losses[2] + losses[3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pixels, labels = _vision_data(SceneDataset("validation", seed, 500, world=world))
    with torch.no_grad():
        scores = head(encoder(pixels).last_hidden_state).split(classes, -1)
    covered = labels[..., 0] > 0
    accuracies = {
        name: (scores[k].argmax(-1) == labels[..., k])[covered].float().mean().item()
        for k, name in enumerate(("colour", "shape"))
    }
    return encoder.eval().requires_grad_(False), accuracies


def _class_weights(classes: int, head: int) -> Tensor | None:
    """Empty patches are most of the image, so they count less; places count equally."""
    if head > 1:
        return None
    weights = torch.ones(classes)
    weights[0] = 0.3
    return weights


def _vision_data(dataset: SceneDataset) -> tuple[Tensor, Tensor]:
    scenes = [dataset.draw(index)[0] for index in range(len(dataset))]
    pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    pixels = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return pixels, torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))


@torch.no_grad()
def _init_vision(encoder: nn.Module) -> None:
    """Larger than 0.02, which is small for a width of 64."""
    for name, parameter in encoder.named_parameters():
        if "patch_embedding.weight" in name:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 2:
            scale = 0.5 if "out_proj" in name or "fc2" in name else 1.0
            nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
