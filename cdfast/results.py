"""What a run measures when its stages are done: accuracy, attention similarity, environment."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cdfast.aligner import VisualAttentionAligner, build_layout
from cdfast.collator import VisionTextCollator
from cdfast.config import Recipe
from cdfast.matching import Matches
from cdfast.models import load_model, teacher_source
from cdfast.probes import PROBE_SAMPLES, SIMILARITY_BATCH, samples_with_image
from cdfast.similarity import layer_similarity, matched_similarity

_PACKAGES = ("cdfast", "torch", "transformers", "accelerate", "peft", "triton", "numpy")


def run_environment(processes: int, stages: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Versions, device, command and peak memory: of this process, or of a stage where higher."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux reports KiB, macOS bytes.
    peak_bytes = peak if platform.system() == "Darwin" else peak * 1024
    # Each stage resets the device's own number when it begins.
    peaks = [stage.get("peak_memory_bytes") or 0 for stage in stages]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "command": " ".join(["python -m cdfast.train", *sys.argv[1:]]),
        "peak_memory_bytes": max(
            torch.cuda.max_memory_allocated() if cuda else peak_bytes, *peaks, 0
        ),
    }


def probe_batches(samples: Any, pad_token_id: int) -> list[dict[str, Any]]:
    """The first samples of a data set that have an image, in small batches without labels."""
    chosen = samples_with_image(samples, PROBE_SAMPLES)
    collate = VisionTextCollator(pad_token_id)
    batches = [
        collate(chosen[i : i + SIMILARITY_BATCH]) for i in range(0, len(chosen), SIMILARITY_BATCH)
    ]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def measure_similarity(
    recipe: Recipe,
    students: dict[str, Path],
    teacher: PreTrainedModel,
    batches: list[dict[str, Any]],
    matches: Matches | None,
) -> dict[str, Any]:
    """Layer-wise similarity of student and teacher attention over visual tokens.

    Args:
        students: name -> checkpoint, such as before and after training.
        teacher: on the device that measures.
        batches: of `probe_batches`.
        matches: the run's matched layers; None: those of the recipe's options.

    Returns:
        For each name `layers`, a row per student and a column per teacher layer, and `matched`, the
        similarity of each matched student layer with its teacher window; `matches`, `samples`, and
        `rows`: those of text tokens.
    """
    result: dict[str, Any] = {"rows": "text", "samples": sum(len(b["input_ids"]) for b in batches)}
    for name, path in students.items():
        student = load_model(path, "float32", recipe.trust_remote_code).eval()
        student.to(teacher.device)  # type: ignore[arg-type]
        aligner = VisualAttentionAligner(
            teacher,
            student,
            preset=recipe.preset,
            matching=None if recipe.matching == "adaptive" else recipe.matching,
            layers=recipe.layers,
        )
        chosen = matches or aligner.matches
        assert chosen is not None
        options: dict[str, Any] = {"rows": "text", "backend": recipe.backend}
        layers: list[torch.Tensor] = []
        matched: list[dict[int, float]] = []
        for batch in batches:
            layout = build_layout(batch, aligner.image_token_id).to(teacher.device)
            moved = {k: v.to(teacher.device) if hasattr(v, "to") else v for k, v in batch.items()}
            layers.append(layer_similarity(teacher, student, moved, layout, **options))
            matched.append(matched_similarity(teacher, student, moved, layout, chosen, **options))
        mean = torch.stack(layers).mean(0)
        result[name] = {
            "layers": [[round(v, 4) for v in row] for row in mean.tolist()],
            "matched": {
                str(layer): round(sum(m[layer] for m in matched) / len(matched), 4)
                for layer in chosen
            },
        }
        result["matches"] = {str(k): list(v) for k, v in chosen.items()}
    return result


def measure_accuracy(
    recipe: Recipe,
    processor: Any,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    trained_scenes: set[Any],
) -> dict[str, Any]:
    """Accuracy of student and teacher on the recipe's suite, beside what needs no image.

    `student, shuffled images` is the student asked about another question's image; `text_only` is a
    model trained without images (recorded when the embedded teacher was made).

    Raises:
        ValueError: a question is about a scene of `trained_scenes`.
    """
    from cdfast.evaluate import evaluate
    from cdfast.miniature.suites import miniature_suite
    from cdfast.miniature.worlds import WORLDS
    from cdfast.synthetic import check_disjoint, read_card

    assert recipe.evaluate is not None
    questions = miniature_suite(
        recipe.evaluate_split,
        recipe.evaluate_per_kind,
        recipe.evaluate_vqa_per_kind,
        recipe.evaluate_seed,
        WORLDS[recipe.evaluate],
    )
    check_disjoint({question.source for question in questions}, trained_scenes)
    reports = {"student": evaluate(student, processor, questions)}
    reports["student, shuffled images"] = evaluate(
        student, processor, questions, shuffle_images=True
    )
    if teacher is not None:
        reports["teacher"] = evaluate(teacher, processor, questions)
    return {
        "suite": recipe.evaluate,
        "split": recipe.evaluate_split,
        "seed": recipe.evaluate_seed,
        "models": reports,
        "text_only": read_card(recipe.evaluate)["text_only"],
    }


def measure(
    recipe: Recipe,
    processor: Any,
    before: Path,
    after: Path,
    samples: Any,
    matches: Matches | None,
    trained_scenes: set[Any],
) -> dict[str, Any]:
    """What results.json holds beside the stages: `evaluation` and `similarity` where defined.

    Args:
        before, after: checkpoints of the student.
        samples: encoded samples, on which attention is compared.
        matches: the run's matched layers, if it aligned any.
        trained_scenes: keys of embedded scenes that evaluation must not ask about.
    """
    result: dict[str, Any] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = None
    # With stored targets the device may be too small for it.
    if recipe.teacher and not recipe.teacher_targets:
        source = teacher_source(recipe)
        teacher = load_model(source, "float32", recipe.trust_remote_code).eval()
        teacher.to(device)  # type: ignore[arg-type]
    if recipe.evaluate:
        student = load_model(after, "float32", recipe.trust_remote_code).eval()
        student.to(device)  # type: ignore[arg-type]
        result["evaluation"] = measure_accuracy(recipe, processor, student, teacher, trained_scenes)
    if teacher is not None:
        batches = probe_batches(samples, processor.tokenizer.pad_token_id)
        if batches:
            students = {"before": before, "after": after}
            result["similarity"] = measure_similarity(recipe, students, teacher, batches, matches)
    return result
