"""What a run measures when its stages are done: accuracy, attention similarity, environment."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cdfast.aligner import VisualAttentionAligner, build_layout
from cdfast.config import Recipe
from cdfast.encoding import VisionTextCollator
from cdfast.models import load_model, teacher_source
from cdfast.similarity import layer_similarity, matched_similarity

_PACKAGES = ("cdfast", "torch", "transformers", "accelerate", "peft", "triton", "numpy")
PROBE_SAMPLES = 32


def run_environment(processes: int) -> dict[str, Any]:
    """Versions, device, command and peak memory of this process."""
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
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "command": " ".join(["python -m cdfast.train", *sys.argv[1:]]),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes,
    }


def probe_batch(samples: Any, pad_token_id: int, number: int = PROBE_SAMPLES) -> dict[str, Any]:
    """The first samples of a data set as one batch, for attention similarity."""
    chosen = [samples[i] for i in range(min(number, len(samples)))]
    batch = VisionTextCollator(pad_token_id)(chosen)
    batch.pop("labels")
    return batch


def measure_similarity(
    recipe: Recipe, before: Path, after: Path, teacher: PreTrainedModel, batch: dict[str, Any]
) -> dict[str, Any]:
    """Layer-wise similarity of student and teacher attention over visual tokens.

    Rows are those of text tokens; `layers` has a row per student and a column per teacher layer,
    `matched` the similarity with the teacher window that group matching (or the recipe's) assigns.
    """
    result: dict[str, Any] = {"rows": "text", "samples": len(batch["input_ids"])}
    for name, path in (("before", before), ("after", after)):
        student = load_model(path, "float32", recipe.trust_remote_code).eval()
        matching = None if recipe.matching == "adaptive" else recipe.matching
        aligner = VisualAttentionAligner(
            teacher, student, preset=recipe.preset, matching=matching, layers=recipe.layers
        )
        assert aligner.matches is not None
        layout = build_layout(batch, aligner.image_token_id)
        options: dict[str, Any] = {"rows": "text", "backend": recipe.backend}
        layers = layer_similarity(teacher, student, batch, layout, **options)
        matched = matched_similarity(teacher, student, batch, layout, aligner.matches, **options)
        result[name] = {
            "layers": [[round(v, 4) for v in row] for row in layers.tolist()],
            "matched": {str(k): round(v, 4) for k, v in matched.items()},
        }
        result["matches"] = {str(k): list(v) for k, v in aligner.matches.items()}
    return result


def measure_accuracy(
    recipe: Recipe, processor: Any, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> dict[str, Any]:
    """Accuracy of student and teacher on the recipe's suite, beside what needs no image.

    `student, shuffled images` is the student asked about another question's image; `text_only` is a
    model trained without images (recorded when the embedded teacher was made).
    """
    from cdfast.evaluate import evaluate, miniature_suite
    from cdfast.synthetic import read_card

    questions = miniature_suite(
        "test", recipe.evaluate_per_kind, recipe.evaluate_vqa_per_kind, seed=0
    )
    reports = {"student": evaluate(student, processor, questions)}
    reports["student, shuffled images"] = evaluate(
        student, processor, questions, shuffle_images=True
    )
    if teacher is not None:
        reports["teacher"] = evaluate(teacher, processor, questions)
    return {"suite": recipe.evaluate, "models": reports, "text_only": read_card()["text_only"]}


def measure(
    recipe: Recipe,
    processor: Any,
    before: Path,
    after: Path,
    teacher: PreTrainedModel | None,
    probe: dict[str, Any],
) -> dict[str, Any]:
    """What results.json holds beside the stages: `evaluation` and `similarity` where defined."""
    result: dict[str, Any] = {}
    if teacher is None and recipe.teacher:
        teacher = load_model(teacher_source(recipe), "float32", recipe.trust_remote_code).eval()
    if recipe.evaluate:
        student = load_model(after, "float32", recipe.trust_remote_code).eval()
        result["evaluation"] = measure_accuracy(recipe, processor, student, teacher)
    if teacher is not None:
        teacher.cpu().float()
        result["similarity"] = measure_similarity(recipe, before, after, teacher, probe)
    return result
