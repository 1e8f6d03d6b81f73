"""The curricula of the miniature's teachers: what `python -m cdfast.miniature.build` can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cdfast.miniature.questions import DEFAULT_CR_WEIGHTS
from cdfast.miniature.scenes import TOYS, World
from cdfast.miniature.worlds import PHOTOS
from cdfast.synthetic import SceneDataset

BATCH = 16
WARMUP_STEPS = 30
SUPERVISION_WEIGHT = 0.3


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum: turns per image (in `TURN_KINDS` order) and how long."""

    mix: tuple[int, int, int, int, int, int]
    steps: int
    seed: int
    lr: float = 2e-3
    muon_lr: float = 0.02
    decay: bool = False
    cr_weights: Mapping[str, float] | None = None

    def scenes(self, world: World) -> SceneDataset:
        size = self.steps * BATCH
        return SceneDataset("train", self.seed, size, self.mix, self.cr_weights, world)

    def learning_rate_scale(self, step: int) -> float:
        """Warm-up, then constant; with `decay` linear to 0.02 in the second half."""
        decayed = self.decay and step >= self.steps / 2
        scale = max(0.02, 2 * (1 - step / self.steps)) if decayed else 1.0
        return min(1.0, (step + 1) / WARMUP_STEPS) * scale

    def shortened(self, fraction: float) -> Stage:
        return replace(self, steps=max(1, round(self.steps * fraction)))


RELATIONS_FIRST = DEFAULT_CR_WEIGHTS | dict.fromkeys(DEFAULT_CR_WEIGHTS, 1)
RELATIONS_FIRST |= {"swap_obj": 4, "replace_rel": 4}
EVENLY = dict.fromkeys(DEFAULT_CR_WEIGHTS, 1)
REPLACED_ONLY = {"replace_att": 1, "replace_obj": 1, "replace_rel": 2}
# Whether a third object is there is what photographs make hardest.
PRESENCE_FIRST = dict.fromkeys(DEFAULT_CR_WEIGHTS, 1.0) | {"add_obj": 3.0}
TEACHER_STAGES = (
    Stage((0, 3, 5, 0, 0, 0), 200, 11),
    Stage((0, 1, 1, 6, 0, 0), 400, 12),
    Stage((0, 2, 1, 1, 3, 2), 700, 13, decay=True),
    Stage((0, 3, 0, 1, 3, 2), 300, 14, 1e-3, 0.01, decay=True, cr_weights=RELATIONS_FIRST),
)
# Without supervision captions stay at chance until relations alone are verified for a while.
UNPRIVILEGED_STAGES = (
    Stage((0, 3, 5, 0, 0, 0), 300, 31),
    Stage((0, 1, 1, 6, 0, 0), 1200, 32),
    Stage((0, 3, 1, 2, 3, 2), 500, 33),
    Stage((0, 2, 0, 2, 6, 0), 200, 35, 1e-3, 0.01, cr_weights=REPLACED_ONLY),
    Stage((0, 1, 0, 3, 6, 0), 250, 36, cr_weights={"replace_rel": 1}),
    Stage((0, 2, 0, 1, 4, 2), 300, 37, cr_weights=EVENLY),
    Stage((0, 1, 0, 1, 3, 5), 150, 38, cr_weights=EVENLY),
    Stage((0, 2, 0, 1, 3, 4), 1100, 39, decay=True, cr_weights=EVENLY),
)
PHOTO_STAGES = (
    Stage((0, 3, 5, 0, 0, 0), 150, 41),
    Stage((0, 2, 1, 1, 3, 2), 160, 42, decay=True),
    Stage((0, 4, 0, 0, 2, 3), 80, 43, 1e-3, 0.01, decay=True, cr_weights=PRESENCE_FIRST),
)
TEXT_ONLY_STAGES = (Stage((0, 2, 1, 1, 3, 2), 300, 21, decay=True),)


@dataclass(frozen=True)
class Variant:
    """A shipped teacher and how it is made.

    Args:
        world: of its scenes.
        stages: of its curriculum.
        supervision: weight of the privileged supervision of two heads; 0: none.
        vision_steps, vision_scenes: of the vision encoder's pretraining.
        vision_of: the shipped teacher whose vision encoder it takes instead.
        starts_from: the shipped teacher whose language model it starts from; None: from scratch.
    """

    world: World
    stages: tuple[Stage, ...]
    supervision: float = 0.0
    vision_steps: int = 900
    vision_scenes: int = 5000
    vision_of: str | None = None
    starts_from: str | None = None

    def shortened(self, fraction: float) -> Variant:
        """With `fraction` of the steps of every stage, for a quick try of the whole path."""
        stages = tuple(stage.shortened(fraction) for stage in self.stages)
        steps = max(1, round(self.vision_steps * fraction))
        return replace(self, stages=stages, vision_steps=steps)


VARIANTS = {
    "miniature": Variant(TOYS, TEACHER_STAGES, SUPERVISION_WEIGHT),
    "miniature-unprivileged": Variant(TOYS, UNPRIVILEGED_STAGES, vision_of="miniature"),
    "miniature-photos": Variant(
        PHOTOS,
        PHOTO_STAGES,
        SUPERVISION_WEIGHT,
        vision_steps=1500,
        vision_scenes=10_000,
        starts_from="miniature",
    ),
}
