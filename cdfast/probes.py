"""What is measured of a student while it trains, beside held-out losses.

Answers to held-out questions, and the similarity of its visual attention with the teacher's. Both
run where `Trainer.evaluate` runs (`eval_strategy`, `eval_steps`), and their numbers are part of its
metrics: logged to the trackers of `report_to`, kept in `log_history`, and known to
`metric_for_best_model`.

    <prefix>_<group>               mean accuracy over the kinds of a suite's group, as eval_CR
    <prefix>_similarity/mean       mean over the matched student layers
    <prefix>_similarity/layer_<j>  of student layer j with the mean map of its teacher window
    <prefix>_probe_seconds         their time; <prefix>_runtime includes it

Trackers that split Trainer's names show eval/CR and eval/similarity/mean.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from cdfast_kernels import VisualLayout, VisualMap
from torch import nn
from transformers import PreTrainedModel

from cdfast.aligner import VisualAttentionAligner
from cdfast.attention import AlignmentContext
from cdfast.matching import Matches
from cdfast.similarity import map_similarity, model_inputs, similarity_rows

if TYPE_CHECKING:
    from cdfast.config import Recipe
    from cdfast.miniature.suites import Question

# Samples per forward of the similarity: its maps are (batch, text, visual) per matched layer.
SIMILARITY_BATCH = 4
# Samples whose attention is compared when a run has ended.
PROBE_SAMPLES = 32
QUESTION_BATCH = 64
QUESTIONS_PER_KIND = 20


@dataclass
class MapsTask:
    """Asks a model's forward for the visual attention maps of some layers, and for nothing else."""

    layout: VisualLayout
    layers: frozenset[int]
    backend: str
    maps: dict[int, VisualMap] = field(default_factory=dict)

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        context = AlignmentContext(self.layout, backend=self.backend, map_layers=self.layers)
        model.base_model(**inputs, alignment=context, use_cache=False)
        self.maps = context.maps


@dataclass
class QuestionsTask:
    """Asks a model's forward to answer questions: as many inner forwards as that takes.

    One forward to those who wrap it: ZeRO-3 expects each to begin at the outermost module.
    """

    questions: Sequence[Question]
    processor: Any
    progress: bool
    report: dict[str, Any] = field(default_factory=dict)

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        from cdfast.evaluate import evaluate

        self.report = evaluate(
            model,
            self.processor,
            self.questions,
            batch_size=QUESTION_BATCH,
            progress=self.progress,
        )


@dataclass
class Probe:
    """Measures the student of a `DistillationTrainer`, whenever that evaluates.

    Every rank computes the same on the same inputs, because sharded models run on all ranks or on
    none; the numbers are those of rank 0.

    Args:
        questions: of a suite, none to leave accuracy out; `processor` encodes them.
        samples: encoded samples with an image, none to leave similarity out.
        processor: of the student; needed for questions.
        teacher: what attention is compared with where the trainer has no teacher: a model, or its
            engine, that an earlier trainer has prepared.
        matches: layers that are compared where the trainer aligns none.
        backend: backend of `cdfast_kernels` for the maps.
    """

    questions: Sequence[Question] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    processor: Any = None
    teacher: nn.Module | None = None
    matches: Matches | None = None
    backend: str = "auto"

    @torch.no_grad()
    def __call__(self, trainer: Any) -> dict[str, float]:
        """Names without prefix -> numbers, the same on every rank; a collective."""
        start = time.perf_counter()
        found: dict[str, float] = {}
        with trainer.compute_loss_context_manager():
            found |= self._similarity(trainer)
        if self.questions:
            show = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
            asked = QuestionsTask(self.questions, self.processor, show)
            trainer.model(task=asked)
            found |= asked.report["averages"]
        found["probe_seconds"] = round(time.perf_counter() - start, 3)
        return broadcast_object_list([found])[0]

    def _similarity(self, trainer: Any) -> dict[str, float]:
        """Empty where it is not available, and until adaptive matching has chosen layers."""
        teacher = trainer.teacher if trainer.teacher is not None else self.teacher
        matches = self.compared_layers(trainer)
        if teacher is None or not matches or not self.samples:
            return {}
        wanted = frozenset(layer for window in matches.values() for layer in window)
        sums = dict.fromkeys(matches, 0.0)
        batches = range(0, len(self.samples), SIMILARITY_BATCH)
        for begin in batches:
            batch = trainer.data_collator(list(self.samples[begin : begin + SIMILARITY_BATCH]))
            batch = trainer._prepare_inputs(send_to_device(batch, trainer.args.device))
            inputs = {k: v for k, v in model_inputs(batch).items() if k != "labels"}
            layout = batch["layout"]
            theirs = MapsTask(layout, wanted, self.backend)
            teacher(**inputs, task=theirs)
            ours = MapsTask(layout, frozenset(matches), self.backend)
            trainer.model(**inputs, task=ours)
            rows = similarity_rows(layout, "text")
            for layer, window in matches.items():
                target = VisualMap.mean([theirs.maps[t] for t in window])
                sums[layer] += map_similarity(ours.maps[layer], target, rows).item()
        layers = {f"similarity/layer_{j}": sums[j] / len(batches) for j in matches}
        return {"similarity/mean": sum(layers.values()) / len(layers), **layers}

    def unavailable(self, trainer: Any) -> str | None:
        """Why attention is not compared; None where it is."""
        if not self.samples:
            return "no held-out sample has an image, or none is asked for"
        if trainer.teacher is None and self.teacher is None:
            return "no teacher is loaded in this stage"
        if trainer.aligner is None and not self.matches:
            return "matching='adaptive' chooses layers in the first stage that aligns attention"
        return None

    def describe(self, trainer: Any) -> str:
        """What is measured, in one line."""
        parts = ["held-out losses"]
        if self.questions:
            parts.append(f"{len(self.questions)} questions")
        reason = self.unavailable(trainer)
        if reason:
            parts.append(f"attention similarity is not available: {reason}")
        else:
            parts.append(f"attention similarity on {len(self.samples)} samples")
            matches = self.compared_layers(trainer) or {}
            pairs = "; ".join(f"{s} <- {','.join(map(str, t))}" for s, t in matches.items())
            parts[-1] += f", student layer <- teacher layers: {pairs or 'to be chosen'}"
        return "; ".join(parts)

    def compared_layers(self, trainer: Any) -> Matches | None:
        """Student layer -> teacher layers: those that are aligned, or else `matches`."""
        return trainer.aligner.matches if trainer.aligner else self.matches


def probe_questions(recipe: Recipe) -> Sequence[Question]:
    """Of the recipe's suite: its validation split, as the test split judges the trained student."""
    from cdfast.miniature.suites import miniature_suite
    from cdfast.miniature.worlds import WORLDS

    per_kind = recipe.eval_questions
    if per_kind is None:
        per_kind = QUESTIONS_PER_KIND
    if recipe.evaluate is None or not per_kind:
        return ()
    return miniature_suite("validation", per_kind, per_kind, world=WORLDS[recipe.evaluate])


def matched_layers(
    recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel
) -> Matches | None:
    """The layers that the recipe would align; None before adaptive matching has chosen them."""
    return VisualAttentionAligner(
        teacher, student, preset=recipe.preset, matching=recipe.matching, layers=recipe.layers
    ).matches


def samples_with_image(samples: Any, number: int) -> list[Any]:
    """The first `number` samples of a data set that have an image; fewer where it has fewer."""
    chosen: list[Any] = []
    for i in range(len(samples)):
        if len(chosen) == number:
            break
        sample = samples[i]
        if sample["images"]:
            chosen.append(sample)
    return chosen


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training goes on after this as if it had not been: random generators, modes of modules.

    Args:
        model: in training; evaluation puts it into another mode.
        device: whose generator is kept, beside those of the CPU, numpy and Python.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    modes = [(module, module.training) for module in model.modules()]
    try:
        # A data loader draws the seed of its workers from torch's generator, even without any.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        for module, training in modes:
            module.training = training
