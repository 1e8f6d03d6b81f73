"""Make a shipped teacher again: `python -m cdfast.miniature.build [--which NAME] [--output DIR]`.

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
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
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

from cdfast.evaluate import evaluate
from cdfast.miniature.build_teacher import (
    BLANK_IMAGE,
    HOP_HEAD,
    HOP_LAYER,
    LOOKUP_HEAD,
    LOOKUP_LAYER,
    TeacherCollator,
    TeacherScenes,
    TeacherTrainer,
)
from cdfast.miniature.build_variants import BATCH, TEXT_ONLY_STAGES, VARIANTS, Stage, Variant
from cdfast.miniature.build_vision import pretrain_vision
from cdfast.miniature.questions import TURN_KINDS
from cdfast.miniature.scenes import TOYS, World
from cdfast.miniature.suites import Question, miniature_suite
from cdfast.optim import muon_with_adamw
from cdfast.synthetic import (
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

TEACHER_SEED = 0
# Weights after a stage, until the card is written.
STAGE_FILE = "stage-{}.pt"
TEXT_ONLY_SEED = 1
EVALUATION_SEED = 0


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
    teacher: Any = build_miniature_model(miniature_configs(variant.world)[0], TEACHER_SEED)
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


def train_teacher(
    variant: Variant, encoder: SiglipVisionModel, folder: Path
) -> tuple[LlavaForConditionalGeneration, float]:
    """The trained teacher and its CPU seconds.

    The weights after every stage are kept in `folder`; the same call goes on from them.
    """
    teacher = new_teacher(variant, encoder)
    processor = make_processor(variant.world)
    seconds = 0.0
    for number, stage in enumerate(variant.stages, 1):
        # Another curriculum or another way of training has other files.
        so_far = replace(variant, stages=variant.stages[:number])
        made_by = repr((asdict(so_far) | {"world": variant.world.name}, BATCH, TEACHER_SEED))
        digest = hashlib.blake2b(made_by.encode(), digest_size=6).hexdigest()
        path = folder / STAGE_FILE.format(digest)
        if path.is_file():
            stored = torch.load(path, weights_only=True)
            teacher.load_state_dict(stored["model"])
            seconds = stored["cpu_seconds"]
            print(f"stage {number} of {len(variant.stages)}: done before", flush=True)
            continue
        started = time.process_time()
        train_stages(teacher, processor, [stage], variant.world, variant.supervision)
        seconds += time.process_time() - started
        unfinished = path.with_suffix(".tmp")
        torch.save({"model": teacher.state_dict(), "cpu_seconds": seconds}, unfinished)
        unfinished.replace(path)
    return teacher, seconds


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

    teacher, seconds["teacher"] = train_teacher(variant, encoder, output)
    save_teacher(teacher, make_processor(variant.world), output / "teacher")
    started = time.process_time()

    command = f"python -m cdfast.miniature.build --which {name}"
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
    seconds["evaluation and text-only baseline"] = time.process_time() - started
    card["cpu_seconds"] = {part: round(value) for part, value in seconds.items()}
    (output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    for path in output.glob(STAGE_FILE.format("*")):
        path.unlink()
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "cdfast.miniature.build", description=(__doc__ or "").split("\n")[0]
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
