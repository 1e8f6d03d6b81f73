"""One stage: trained and handed over to the next.

Each stage loads the student that the one before has written, trains it with `DistillationTrainer`,
and writes the next: the same path whether the run is new or resumed.
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from cdfast.config import ConfigError, StageRecipe
from cdfast.engine import release_engine
from cdfast.hidden_projector import load_hidden_projector
from cdfast.matching import Matches
from cdfast.models import load_model, teacher_source
from cdfast.packing import describe_rows
from cdfast.probes import Probe, matched_layers, probe_questions, samples_with_image
from cdfast.stages.arguments import evaluates, stage_arguments
from cdfast.stages.data import held_out, stage_dataset
from cdfast.stages.run import STAGE_FILE, Run, user_errors
from cdfast.stages.student import export_student, load_stage_student
from cdfast.storage import write_json
from cdfast.stored_targets.files import WithStoredTargets, read_index
from cdfast.stored_targets.plan import open_targets, stored_aligner
from cdfast.terms import weighted_terms

TARGETS_FILE = "teacher_targets.json"


def run_stage(run: Run, number: int, resume: bool) -> dict[str, Any]:
    """Train one stage, or read what it has left if it is done. Returns its log and timings."""
    from cdfast.collator import VisionTextCollator
    from cdfast.trainer import DistillationTrainer

    gc.collect()  # the trainer of the stage before: its callbacks refer to it and it to them
    stage, folder = run.recipe.stages[number - 1], run.stage_folder(number)
    if (folder / STAGE_FILE).exists():
        run.say(f"stage {number} ({stage.stage}): done already")
        done = json.loads((folder / STAGE_FILE).read_text())
        run.matches = trained_matches([done]) or run.matches
        return done
    if not any(later.needs_teacher for later in run.recipe.stages[number - 1 :]):
        release_engine(run.teacher)
        run.teacher = None  # no stage needs its memory from here on
    elif stage.needs_teacher and run.teacher is None and not run.recipe.teacher_targets:
        run.teacher = load_model(
            teacher_source(run.recipe),
            run.recipe.teacher_dtype,
            run.recipe.trust_remote_code,
            sharded=run.recipe.teacher_placement != "replicated",
        )
    with user_errors():
        student = load_stage_student(run, number)
        arguments = stage_arguments(run, number)
        probe = stage_probe(run, number, student) if evaluates(arguments) else None
        data: Any = stage_dataset(run, number)
        samples, stored = stored_for(run, number, student, data)
        trainer = DistillationTrainer(
            model=student,
            teacher=run.teacher if stage.needs_teacher else None,
            args=arguments,
            train_dataset=samples,
            **stored,
            eval_dataset=held_out(run, stage.pairs) if probe else None,
            probe=probe,
            data_collator=VisionTextCollator(run.processor.tokenizer.pad_token_id),
            processing_class=run.processor,
        )
        _take_over(run, number, trainer)
    of = len(run.recipe.stages)
    matches = trainer.aligner.matches if trainer.aligner else None
    run.say(f"stage {number} of {of} ({stage.stage}): " + _describe(student, stage, matches))
    if probe:
        run.say(f"  in evaluations: {probe.describe(trainer)}")
    packing = None
    if arguments.packing:
        with user_errors():
            packing = trainer.packed_rows.summary()
        run.say(f"  {describe_rows(packing)}")
    start = time.monotonic()
    output = trainer.train(resume_from_checkpoint=resume)
    seconds = time.monotonic() - start
    throughput = trainer.throughput.summary(trainer.accelerator.gather)
    export_student(run, trainer, number)
    run.teacher = trainer.teacher or run.teacher
    release_engine(trainer.model_wrapped)
    skipped = getattr(data, "skipped", None)
    if skipped is not None and run.recipe.streaming:  # each rank has records of its own
        skipped = sum(map(Counter, gather_object([dict(skipped)])), Counter())
    run.matches = (trainer.aligner.matches if trainer.aligner else None) or run.matches
    result = {
        "stage": stage.stage,
        "steps": output.global_step,
        "seconds": round(seconds, 2),
        **throughput,
        "matches": _matches_as_json(trainer.aligner),
        "skipped": dict(skipped) if skipped else {},
        "skipped_records": data.skipped_records() if skipped else {},
        "skipped_steps": trainer.nonfinite.total,
        **({"packing": packing} if packing else {}),
        **({"shared_images": data.summary()} if run.recipe.share_images else {}),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        **(_evaluations(trainer) if probe else {}),
    }
    if run.state.is_main_process:
        write_json(folder / STAGE_FILE, result)
    run.state.wait_for_everyone()
    return result


def _take_over(run: Run, number: int, trainer: Any) -> None:
    """What earlier stages have left beside the student: its MLP, and the layers that are aligned.

    Without it a later stage would pull the student to a new random MLP, or to other layers.
    """
    from cdfast.trainer import unwrap_model

    stages = run.recipe.stages
    trained = [n for n in range(1, number) if stages[n - 1].hidden_weight]
    if stages[number - 1].hidden_weight and trained:
        load_hidden_projector(
            unwrap_model(trainer.model),
            run.stage_folder(trained[-1]),
            f"Give --overwrite, or remove {STAGE_FILE} there and in later stages to repeat them.",
        )
    if trainer.aligner and trainer.aligner.matches is None:
        trainer.aligner.matches = run.matches


def stored_for(run: Run, number: int, student: Any, data: Any) -> tuple[Any, dict[str, Any]]:
    """The samples of a stage with their stored targets, and what the trainer needs to read them.

    Just the samples where the stage has no teacher's losses or the run has the teacher.
    """
    from cdfast.trainer import unwrap_model

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    if not (stage.needs_teacher and recipe.teacher_targets):
        return data, {}
    model = unwrap_model(student)
    # Also where a later stage aligns attention: other layers must not show when that one begins.
    aligned = any(later.alignment_weight for later in recipe.stages)
    aligner = stored_aligner(recipe, model) if aligned else None
    targets = open_targets(recipe, number, data, run.processor, model, aligner)
    _keep_targets(run, number, recipe.teacher_targets)
    return WithStoredTargets(data, targets), {"aligner": aligner, "stored_targets": targets}


def _keep_targets(run: Run, number: int, targets: str) -> None:
    """Write what the stage's targets are of, or refuse others than it was begun with."""
    path, facts = run.stage_folder(number) / TARGETS_FILE, read_index(Path(targets))["facts"]
    if path.exists() and json.loads(path.read_text()) != facts:
        raise ConfigError(
            f"teacher_targets: expected those that the stage was begun with, see {path}; the "
            f"targets in {targets} have been made anew with other options. Make them as they were, "
            "or start afresh."
        )
    run.state.wait_for_everyone()
    if run.state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)


def stage_probe(run: Run, number: int, student: Any) -> Probe:
    """What is measured of the student in the evaluations of a stage, as far as it can be."""
    from cdfast.trainer import unwrap_model

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    samples = samples_with_image(held_out(run), recipe.eval_samples)
    matches = None
    if samples and run.teacher is not None and not stage.alignment_weight:
        found = matched_layers(recipe, unwrap_model(run.teacher), unwrap_model(student))
        matches = found or run.matches
    return Probe(
        questions=probe_questions(recipe),
        samples=samples,
        processor=run.processor,
        teacher=run.teacher,
        matches=matches,
        backend=recipe.backend,
    )


def _evaluations(trainer: Any) -> dict[str, Any]:
    """What results.json holds of a stage that evaluates while it trains."""
    log = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    compared = trainer.probe.compared_layers(trainer) if trainer.probe.samples else None
    return {
        "evaluations": log,
        "evaluation_seconds": round(sum(entry["eval_runtime"] for entry in log), 2),
        "evaluated": {
            "questions": len(trainer.probe.questions),
            "samples": len(trainer.probe.samples),
            "matches": compared and {str(k): list(v) for k, v in compared.items()},
        },
    }


def trained_matches(stages: Sequence[dict[str, Any]]) -> Matches | None:
    """The matched layers of the last stage that aligned attention."""
    for stage in reversed(stages):
        if stage["matches"]:
            return {int(k): tuple(v) for k, v in stage["matches"].items()}
    return None


def _matches_as_json(aligner: Any) -> dict[str, list[int]] | None:
    """Matched layers after training, when adaptive matching has chosen too."""
    return aligner.state_dict()["matches"] if aligner else None


def _describe(student: Any, stage: StageRecipe, matches: Any) -> str:
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    text = f"{trained:,} trained parameters; {weighted_terms(stage)}"
    if matches:
        pairs = "; ".join(f"{s} <- {','.join(map(str, t))}" for s, t in matches.items())
        text += f"; student layer <- teacher layers: {pairs}"
    return text
