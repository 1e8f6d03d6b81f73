"""Make a shipped teacher again: `python -m cdfast.build_miniature [--which NAME] [--output DIR]`.

It trains a small vision encoder, then a teacher on top of it, evaluates the teacher on scenes that
it never saw, trains a baseline that sees no images, and writes the checkpoint and `card.json`.

Two of the teachers get privileged supervision that no student gets: one head of layer 2 is trained
to look from a shape word to the patches of the object that it names (ground-truth boxes), and one
head of layer 3 from the second object of a statement to the first (ground-truth hops).
`miniature-unprivileged` learns by language modelling alone, which takes several times as many
steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainingArguments,
)

from cdfast.build_teacher import (
    BLANK_IMAGE,
    HOP_HEAD,
    HOP_LAYER,
    LOOKUP_HEAD,
    LOOKUP_LAYER,
    TeacherCollator,
    TeacherScenes,
    TeacherTrainer,
)
from cdfast.build_vision import pretrain_vision
from cdfast.evaluate import evaluate
from cdfast.optim import muon_with_adamw
from cdfast.questions import DEFAULT_CR_WEIGHTS, TURN_KINDS
from cdfast.scenes import TOYS, World
from cdfast.suites import Question, miniature_suite
from cdfast.synthetic import (
    SceneDataset,
    assets_path,
    build_miniature_model,
    check_disjoint,
    llava_config,
    make_processor,
    miniature_configs,
    read_card,
    teacher_path,
    vocabulary,
)
from cdfast.worlds import PHOTOS

BATCH = 16
WARMUP_STEPS = 30
SUPERVISION_WEIGHT = 0.3
TEACHER_SEED = 0
TEXT_ONLY_SEED = 1
EVALUATION_SEED = 0


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
TEACHER_STAGES = (
    Stage((0, 3, 5, 0, 0, 0), 200, 11),
    Stage((0, 1, 1, 6, 0, 0), 400, 12),
    Stage((0, 2, 1, 1, 3, 2), 700, 13, decay=True),
    Stage((0, 3, 0, 1, 3, 2), 300, 14, 1e-3, 0.01, decay=True, cr_weights=RELATIONS_FIRST),
)
UNPRIVILEGED_STAGES = (Stage((0, 3, 5, 0, 0, 0), 300, 31),)
PHOTO_STAGES = (
    Stage((0, 3, 5, 0, 0, 0), 150, 41),
    Stage((0, 3, 1, 1, 3, 2), 400, 42, decay=True),
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


def train_stages(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    stages: Sequence[Stage],
    world: World = TOYS,
    supervision: float = 0.0,
    blank: bool = False,
) -> None:
    """Train the language model and the adapter in place, stage after stage; nothing is saved."""
    # Only eager attention hands out the maps that privileged supervision needs.
    model.set_attn_implementation("eager" if supervision else "sdpa")
    model.model.vision_tower.requires_grad_(False)
    for number, stage in enumerate(stages, 1):
        mix = ", ".join(f"{n} {kind}" for kind, n in zip(TURN_KINDS, stage.mix) if n)
        print(f"stage {number} of {len(stages)}: {stage.steps} steps with {mix}", flush=True)
        optimizer = muon_with_adamw(model, stage.lr, stage.muon_lr)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = TeacherTrainer(
                model=model,
                args=TrainingArguments(
                    output_dir=scratch,
                    max_steps=stage.steps,
                    per_device_train_batch_size=BATCH,
                    max_grad_norm=1.0,
                    seed=stage.seed,
                    use_cpu=True,
                    save_strategy="no",
                    report_to="none",
                    logging_steps=100,
                    remove_unused_columns=False,
                    dataloader_pin_memory=False,
                ),
                data_collator=TeacherCollator(processor.tokenizer.pad_token_id),
                train_dataset=TeacherScenes(
                    stage.scenes(world), processor, privileged=supervision > 0, blank=blank
                ),
                optimizers=(optimizer, LambdaLR(optimizer, stage.learning_rate_scale)),
                supervision=supervision,
            )
            trainer.train()
    model.eval()


def save_teacher(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Write half-precision weights that load as float32, which is faster and exact on a CPU."""
    saved = copy.deepcopy(model).half()
    # The trainer switches the cache off.
    saved.config.use_cache = True
    saved.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"float16"', '"float32"'))


def accuracies(report: dict[str, Any]) -> dict[str, float]:
    """The accuracy of each kind and group, rounded."""
    kinds = {name: kind["accuracy"] for name, kind in report["kinds"].items()}
    return {name: round(value, 4) for name, value in {**kinds, **report["averages"]}.items()}


def with_blank_images(questions: Sequence[Question]) -> list[Question]:
    return [replace(question, image=BLANK_IMAGE) for question in questions]


def vision_encoder(variant: Variant) -> tuple[SiglipVisionModel, dict[str, float]]:
    """The variant's frozen vision encoder and its accuracies on patches of validation scenes."""
    config = miniature_configs(variant.world)[0].vision_config
    assert isinstance(config, SiglipVisionConfig)
    if variant.vision_of is None:
        return pretrain_vision(
            config, variant.vision_steps, variant.world, scenes=variant.vision_scenes
        )
    owner: Any = AutoModelForImageTextToText.from_pretrained(teacher_path(variant.vision_of))
    return owner.model.vision_tower, read_card(variant.vision_of)["vision_patch_accuracy"]


def new_teacher(variant: Variant, encoder: SiglipVisionModel) -> LlavaForConditionalGeneration:
    """The teacher before training; known words keep the vectors of the model it starts from."""
    teacher = build_miniature_model(miniature_configs(variant.world)[0], TEACHER_SEED)
    teacher.model.vision_tower.load_state_dict(encoder.state_dict())
    if variant.starts_from is None:
        return teacher
    folder = teacher_path(variant.starts_from)
    source: Any = AutoModelForImageTextToText.from_pretrained(folder)
    teacher.model.language_model.layers.load_state_dict(
        source.model.language_model.layers.state_dict()
    )
    teacher.model.language_model.norm.load_state_dict(source.model.language_model.norm.state_dict())
    known = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    shared = [
        (row, known[word]) for row, word in enumerate(vocabulary(variant.world)) if word in known
    ]
    rows, source_rows = (torch.tensor(column) for column in zip(*shared))
    with torch.no_grad():
        for new, old in (
            (teacher.get_input_embeddings(), source.get_input_embeddings()),
            (teacher.get_output_embeddings(), source.get_output_embeddings()),
        ):
            new.weight[rows] = old.weight[source_rows]
    return teacher


def train_text_only(
    variant: Variant, encoder: SiglipVisionModel, stages: Sequence[Stage]
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model of the student's size that sees grey instead of every image."""
    processor = make_processor(variant.world)
    config = llava_config(encoder.config, miniature_configs(variant.world)[1])
    blind = build_miniature_model(config, TEXT_ONLY_SEED)
    blind.model.vision_tower.load_state_dict(encoder.state_dict())
    train_stages(blind, processor, stages, variant.world, blank=True)
    return blind, processor


def build(output: Path, name: str = "miniature", fraction: float = 1.0) -> dict[str, Any]:
    """Make one teacher's assets in `output` and return the card.

    Args:
        output: gets `teacher/` and `card.json`.
        name: one of `VARIANTS`.
        fraction: of the steps of every stage; below 1 for a quick try of the whole path.
    """
    started = time.process_time()
    variant = VARIANTS[name].shortened(fraction)
    encoder, patch_accuracy = vision_encoder(variant)
    seconds = {"vision": time.process_time() - started}

    processor = make_processor(variant.world)
    teacher = new_teacher(variant, encoder)
    train_stages(teacher, processor, variant.stages, variant.world, variant.supervision)
    save_teacher(teacher, processor, output / "teacher")
    seconds["teacher"] = time.process_time() - started - sum(seconds.values())

    command = f"python -m cdfast.build_miniature --which {name}"
    card = {
        "name": name,
        "world": variant.world.name,
        "command": command + ("" if fraction == 1 else f" --fraction {fraction}"),
        "supervision": supervision_note(variant),
        **measure(output / "teacher", variant),
        **measure_text_only(variant, encoder, fraction),
        "vision_patch_accuracy": {kind: round(v, 4) for kind, v in patch_accuracy.items()},
        **settings(variant),
    }
    seconds["evaluation and text-only baseline"] = (
        time.process_time() - started - sum(seconds.values())
    )
    card["cpu_seconds"] = {part: round(value) for part, value in seconds.items()}
    write_card(output, card)
    return card


def supervision_note(variant: Variant) -> str:
    """What the teacher was told beside the answers."""
    if not variant.supervision:
        return "none: language modelling alone, no boxes and no hops"
    origin = f" (and, before, the teacher {variant.starts_from!r} that it starts from)"
    return (
        "privileged: ground-truth boxes supervise attention head "
        f"{LOOKUP_HEAD} of layer {LOOKUP_LAYER} and ground-truth hops head {HOP_HEAD} of layer "
        f"{HOP_LAYER} of the teacher{origin if variant.starts_from else ''}, weight "
        f"{variant.supervision}; no student gets them"
    )


def measure(folder: Path, variant: Variant) -> dict[str, Any]:
    """The saved teacher's accuracies on test scenes, and on the validation scenes beside them.

    Raises:
        ValueError: a test or validation scene is one that the teacher was trained on.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    processor = make_processor(variant.world)
    trained = set().union(*(s.scenes(variant.world).scene_keys() for s in variant.stages))
    chosen_on, questions = (
        miniature_suite(split, seed=EVALUATION_SEED, world=variant.world)
        for split in ("validation", "test")
    )
    for suite in (chosen_on, questions):
        check_disjoint({question.source for question in suite}, trained)
    asked = {question.source for question in questions}
    report = evaluate(model, processor, questions)
    kinds = report["kinds"]
    return {
        "evaluation": {
            "split": "test",
            "seed": EVALUATION_SEED,
            "scenes": len(asked),
            "training_scenes": len(trained),
            "scenes_shared_with_training": len(asked & trained),
            "questions": {kind: result["n"] for kind, result in kinds.items()},
        },
        "chance": {kind: round(result["chance"], 4) for kind, result in kinds.items()},
        "teacher": accuracies(report),
        "teacher_both_orders": {
            kind: round(result["both_orders"], 4) for kind, result in kinds.items()
        },
        "teacher_shuffled_images": accuracies(
            evaluate(model, processor, questions, shuffle_images=True)
        ),
        "teacher_validation": accuracies(evaluate(model, processor, chosen_on)),
        "teacher_parameters": sum(p.numel() for p in model.parameters()),
    }


def measure_text_only(
    variant: Variant, encoder: SiglipVisionModel, fraction: float
) -> dict[str, Any]:
    """Accuracies of a model trained without images; teachers of one world share them."""
    if variant.vision_of is not None:
        return {"text_only": read_card(variant.vision_of)["text_only"]}
    stages = [stage.shortened(fraction) for stage in TEXT_ONLY_STAGES]
    blind, processor = train_text_only(variant, encoder, stages)
    questions = miniature_suite("test", seed=EVALUATION_SEED, world=variant.world)
    return {
        "text_only": accuracies(evaluate(blind, processor, with_blank_images(questions))),
        "text_only_stages": [asdict(stage) for stage in stages],
    }


def settings(variant: Variant) -> dict[str, Any]:
    """What the card says of training and versions."""
    return {
        "batch": BATCH,
        "vision_of": variant.vision_of,
        "language_model_starts_from": variant.starts_from,
        "vision_steps": variant.vision_steps if variant.vision_of is None else 0,
        "teacher_stages": [asdict(stage) for stage in variant.stages],
        "seeds": {"teacher": TEACHER_SEED, "text_only": TEXT_ONLY_SEED},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "cdfast.build_miniature", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--which", choices=list(VARIANTS), default="miniature")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: in the package")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps (a quick try)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    output = options.output or assets_path(options.which)
    output.mkdir(parents=True, exist_ok=True)
    card = build(output, options.which, options.fraction)
    print(json.dumps({name: card[name] for name in ("teacher", "text_only", "cpu_seconds")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
