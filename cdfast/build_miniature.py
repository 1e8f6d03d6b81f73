"""Make the shipped miniature again: `python -m cdfast.build_miniature [--output DIR]`.

It trains a small vision encoder, then a teacher on top of it, evaluates the teacher on scenes that
it never saw, trains a baseline that sees no images, and writes the checkpoint and `card.json`.
On one CPU core it takes about a quarter of an hour.

The teacher gets privileged supervision that no student gets: one head of layer 2 is trained to look
from a shape word to the patches of the object that it names (ground-truth boxes), and one head of
layer 3 from the second object of a statement to the first (ground-truth hops). Without it the
relation kinds take several times as many steps to learn.
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
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    TrainingArguments,
)

from cdfast.build_teacher import (
    BLANK_IMAGE,
    HOP_HEAD,
    HOP_LAYER,
    LOOKUP_HEAD,
    LOOKUP_LAYER,
    SupervisedCollator,
    SupervisedScenes,
    TeacherTrainer,
)
from cdfast.build_vision import pretrain_vision
from cdfast.evaluate import evaluate
from cdfast.optim import muon_with_adamw
from cdfast.questions import DEFAULT_CR_WEIGHTS, TURN_KINDS
from cdfast.suites import Question, miniature_suite
from cdfast.synthetic import (
    SceneDataset,
    assets_path,
    build_miniature_model,
    check_disjoint,
    llava_config,
    make_processor,
    miniature_configs,
)

BATCH = 16
WARMUP_STEPS = 30
SUPERVISION_WEIGHT = 0.3
VISION_STEPS = 900
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

    def scenes(self) -> SceneDataset:
        return SceneDataset("train", self.seed, self.steps * BATCH, self.mix, self.cr_weights)

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
TEXT_ONLY_STAGES = (Stage((0, 2, 1, 1, 3, 2), 300, 21, decay=True),)


def train_stages(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    stages: Sequence[Stage],
    supervision: float = 0.0,
    blank: bool = False,
) -> None:
    """Train the language model and the adapter in place, stage after stage; nothing is saved."""
    model.set_attn_implementation("eager")
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
                data_collator=SupervisedCollator(processor.tokenizer.pad_token_id),
                train_dataset=SupervisedScenes(stage.scenes(), processor, blank),
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


def build(output: Path, fraction: float = 1.0) -> dict[str, Any]:
    """Make the assets in `output` and return the card.

    Args:
        output: gets `teacher/` and `card.json`.
        fraction: of the steps of every stage; below 1 for a quick try of the whole path.
    """
    started = time.process_time()
    processor = make_processor()
    teacher_config, student_text = miniature_configs()
    vision = teacher_config.vision_config
    assert isinstance(vision, SiglipVisionConfig)
    vision_steps = max(1, round(VISION_STEPS * fraction))
    encoder, patch_accuracy = pretrain_vision(vision, vision_steps)
    seconds = {"vision": time.process_time() - started}

    stages = [stage.shortened(fraction) for stage in TEACHER_STAGES]
    teacher = build_miniature_model(teacher_config, TEACHER_SEED)
    teacher.model.vision_tower.load_state_dict(encoder.state_dict())
    train_stages(teacher, processor, stages, SUPERVISION_WEIGHT)
    save_teacher(teacher, processor, output / "teacher")
    seconds["teacher"] = time.process_time() - started - sum(seconds.values())

    questions = miniature_suite(split="test", seed=EVALUATION_SEED)
    asked = {question.source for question in questions}
    trained = set().union(*(stage.scenes().scene_keys() for stage in stages))
    check_disjoint(asked, trained)
    saved = AutoModelForImageTextToText.from_pretrained(output / "teacher")
    report = evaluate(saved, processor, questions)
    shuffled = evaluate(saved, processor, questions, shuffle_images=True)

    blind_stages = [stage.shortened(fraction) for stage in TEXT_ONLY_STAGES]
    blind = build_miniature_model(llava_config(vision, student_text), TEXT_ONLY_SEED)
    blind.model.vision_tower.load_state_dict(encoder.state_dict())
    train_stages(blind, processor, blind_stages, blank=True)
    blind_report = evaluate(blind, processor, with_blank_images(questions))
    seconds["evaluation and text-only baseline"] = (
        time.process_time() - started - sum(seconds.values())
    )

    card = {
        "command": "python -m cdfast.build_miniature"
        + ("" if fraction == 1 else f" --fraction {fraction}"),
        "supervision": "privileged: ground-truth boxes supervise attention head "
        f"{LOOKUP_HEAD} of layer {LOOKUP_LAYER} and ground-truth hops head {HOP_HEAD} of layer "
        f"{HOP_LAYER} of the teacher, weight {SUPERVISION_WEIGHT}; no student gets them",
        "evaluation": {
            "split": "test",
            "seed": EVALUATION_SEED,
            "scenes": len(asked),
            "training_scenes": len(trained),
            "scenes_shared_with_training": len(asked & trained),
            "questions": {name: kind["n"] for name, kind in report["kinds"].items()},
        },
        "chance": {name: round(kind["chance"], 4) for name, kind in report["kinds"].items()},
        "teacher": accuracies(report),
        "teacher_both_orders": {
            name: round(kind["both_orders"], 4) for name, kind in report["kinds"].items()
        },
        "teacher_shuffled_images": accuracies(shuffled),
        "text_only": accuracies(blind_report),
        "vision_patch_accuracy": {name: round(v, 4) for name, v in patch_accuracy.items()},
        "batch": BATCH,
        "vision_steps": vision_steps,
        "teacher_stages": [asdict(stage) for stage in stages],
        "text_only_stages": [asdict(stage) for stage in blind_stages],
        "seeds": {"teacher": TEACHER_SEED, "text_only": TEXT_ONLY_SEED},
        "teacher_parameters": sum(p.numel() for p in saved.parameters()),
        "cpu_seconds": {name: round(value) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "cdfast.build_miniature", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=assets_path(), metavar="DIR")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps (a quick try)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    card = build(options.output, options.fraction)
    print(json.dumps({name: card[name] for name in ("teacher", "text_only", "cpu_seconds")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
