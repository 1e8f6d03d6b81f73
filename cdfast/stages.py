"""The stages of a run: what each trains and on what, hand-over from one to the next.

Each stage loads the student that the one before has written, trains it with `DistillationTrainer`,
and writes the next: the same path whether the run is new or resumed.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from cdfast_kernels import available_backends
from torch import nn

from cdfast.adapters import is_adapter, set_trainable, share_vision_tower
from cdfast.config import (
    EMBEDDED_SCENES,
    EMBEDDED_TEACHERS,
    HUB_ARGUMENTS,
    PROJECTOR_ONLY,
    ConfigError,
    Recipe,
    StageRecipe,
)
from cdfast.data import DataError, load_dataset
from cdfast.engine import full_state_dict, release_engine
from cdfast.export import write_student
from cdfast.hidden_projector import load_hidden_projector, save_hidden_projector, split_state
from cdfast.matching import MATCHINGS, Matches, layers_in_range
from cdfast.models import check_models, load_config, load_model, teacher_source
from cdfast.packing import describe_rows
from cdfast.probes import (
    PROBE_SAMPLES,
    Probe,
    matched_layers,
    probe_questions,
    samples_with_image,
)
from cdfast.storage import staged_folder, together, write_text
from cdfast.stored_targets.files import WithStoredTargets, read_index
from cdfast.stored_targets.plan import check_storable, open_targets, stored_aligner
from cdfast.terms import WEIGHTS, weighted_terms

STAGE_FILE = "stage.json"
TARGETS_FILE = "teacher_targets.json"
# Trainer settings that a recipe's `arguments` may change.
_DEFAULT_ARGUMENTS: dict[str, Any] = {
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class Run:
    """One recipe on its way through the stages."""

    recipe: Recipe
    folder: Path
    processor: Any
    state: PartialState
    # A model; its engine, once a stage has sharded it.
    teacher: nn.Module | None = None
    # Opened files by (data, roots): checking the records of a large set takes minutes.
    datasets: dict[Any, Any] = field(default_factory=dict)
    # Layers that the last stage with alignment had: adaptive matching chooses them once in a run.
    matches: Matches | None = None

    @property
    def initial_student(self) -> Path:
        return self.folder / "student-init"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def stage_folder(self, number: int) -> Path:
        return self.folder / "stages" / f"{number}-{self.recipe.stages[number - 1].stage}"

    def student_after(self, number: int) -> Path:
        """Where stage `number` (1-based) leaves the student; 0 is before the first."""
        if number == 0:
            return self.initial_student
        last = number == len(self.recipe.stages)
        return self.model if last else self.stage_folder(number) / "model"

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Around what is built from a recipe: a ValueError there is about an option, not a bug."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_stages(run: Run) -> None:
    """Refuse before the first stage what would otherwise show when a later one begins.

    Files of preference stages are opened here: most data have no rejected answers.

    Raises:
        ConfigError: a stage's data file or image root does not exist, its options are no
            `DistillationConfig`, or attention cannot be aligned as asked.
        DataError: a record of a preference stage's files is no pair of answers.
    """
    for number, stage in enumerate(run.recipe.stages, 1):
        where = f"stage {number} ({stage.stage})"
        for path in stage.data or run.recipe.data:
            if path not in EMBEDDED_SCENES and not Path(path).exists():
                raise ConfigError(
                    f"data: {where}: expected an existing file; got {path!r}. Give --data FILE."
                )
        for path in stage.image_root or run.recipe.image_root:
            if not Path(path).is_dir():
                raise ConfigError(
                    f"image_root: {where}: expected a folder; got {path!r}. Give --image-root."
                )
    for path in run.recipe.eval_data:
        if not Path(path).exists():
            raise ConfigError(
                f"eval_data: expected an existing file; got {path!r}. Give --eval-data FILE."
            )
    check_options(run)
    reason = available_backends().get(run.recipe.backend)
    used = run.recipe.packing or any(stage.alignment_weight for stage in run.recipe.stages)
    if reason and used:
        raise ConfigError(f"backend: {run.recipe.backend!r} cannot run here: {reason}")
    for number, stage in enumerate(run.recipe.stages, 1):
        if stage.pairs and not (run.stage_folder(number) / STAGE_FILE).exists():
            stage_dataset(run, number)
            if evaluates(stage_arguments(run, number)):
                held_out(run, pairs=True)
        elif stage.needs_teacher and run.recipe.teacher_targets:
            open_targets(run.recipe, number, stage_dataset(run, number), run.processor)


def check_options(run: Run) -> None:
    """Refuse what is wrong on any machine: models of the wrong kind, options that do not exist.

    Raises:
        ConfigError: see `check_stages`.
    """
    check_models(run.recipe)
    _check_streaming(run.recipe)
    if run.recipe.teacher_targets is not None:
        check_storable(run.recipe)
    with user_errors():
        for number in range(1, len(run.recipe.stages) + 1):
            _check_evaluation(run, number, stage_arguments(run, number))
        if any(stage.alignment_weight for stage in run.recipe.stages):
            _check_alignment(run.recipe)


def _check_streaming(recipe: Recipe) -> None:
    if recipe.streaming and all(uses_scenes(recipe, n + 1) for n in range(len(recipe.stages))):
        raise ConfigError(
            "streaming: expected data files, because embedded scenes are generated; got "
            f"{recipe.data}. Give --data FILE, or leave --streaming out."
        )
    for number, stage in enumerate(recipe.stages, 1):
        if recipe.streaming and stage.max_steps < 1 and not uses_scenes(recipe, number):
            raise ConfigError(
                f"max_steps: stage {number} ({stage.stage}): expected at least 1, because streamed "
                f"data have no known length; got {stage.max_steps}. Give --max-steps N or "
                f"--{stage.stage}.max-steps N, or leave --streaming out."
            )


def _check_evaluation(run: Run, number: int, arguments: Any) -> None:
    recipe = run.recipe
    if evaluates(arguments) and not (recipe.eval_data or uses_scenes(recipe, len(recipe.stages))):
        raise ConfigError(
            f"eval_data: stage {number} ({recipe.stages[number - 1].stage}) evaluates during "
            "training, so files that it does not train on are expected; got none. Give "
            "--eval-data FILE, or leave --eval-steps, --eval-strategy and --eval-on-start out."
        )


def evaluates(arguments: Any) -> bool:
    """Whether a trainer with these arguments evaluates while it trains."""
    return arguments.eval_strategy != "no" or arguments.eval_on_start


def _check_alignment(recipe: Recipe) -> None:
    from cdfast.aligner import OBJECTIVES

    for name, allowed in (
        ("objective", OBJECTIVES),
        ("matching", MATCHINGS),
        ("layer_reduction", ("mean", "sum")),
        ("backend", ("auto", *available_backends())),
    ):
        value = getattr(recipe, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}.")
    for source in (recipe.teacher, recipe.student):
        if source and source not in EMBEDDED_TEACHERS:
            config = load_config(source, recipe.trust_remote_code).get_text_config(decoder=True)
            layers_in_range(config.num_hidden_layers, recipe.layers or "intermediate")


def stage_dataset(run: Run, number: int) -> Any:
    """The encoded training samples of a stage: of a preference stage, pairs of answers."""
    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    data = stage.data or recipe.data
    if uses_scenes(recipe, number):
        from cdfast.miniature.worlds import WORLDS
        from cdfast.synthetic import SceneDataset

        steps = stage.max_steps
        if steps < 1:
            raise ConfigError(
                f"max_steps: expected at least 1, because embedded scenes are generated step by "
                f"step; got {steps} in stage {number} ({stage.stage}). Give --max-steps N."
            )
        per_step = stage.batch_size * stage.gradient_accumulation_steps * run.state.num_processes
        mix: dict[str, Any] = {"turns_mix": stage.turns_mix} if stage.turns_mix else {}
        scenes = SceneDataset(
            "train",
            seed=recipe.seed * 100 + number,
            size=steps * per_step,
            world=WORLDS[data[0]],
            **mix,
        )
        return _encoded_scenes(scenes, run.processor, stage.pairs)
    roots = stage.image_root or recipe.image_root
    if recipe.streaming:
        return _stream(run, number, data, roots)
    opened = _opened(run, data, roots, stage.pairs)
    return _with_shared_images(run, opened) if recipe.share_images else opened


def _stream(run: Run, number: int, data: list[str], roots: list[str]) -> Any:
    """The samples of a stage's files, read as they are needed."""
    from cdfast.streaming import StreamedDataset

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    return StreamedDataset(
        data,
        roots,
        run.processor,
        batch_size=stage.batch_size,
        workers=recipe.workers,
        rank=run.state.process_index,
        world_size=run.state.num_processes,
        seed=recipe.seed * 100 + number,
        window=recipe.shuffle_window,
        max_length=recipe.max_length,
        turns=recipe.turns,
        on_error=recipe.on_error,
        max_pixels=recipe.max_pixels,
        pairs=stage.pairs,
    )


def _with_shared_images(run: Run, opened: Any) -> Any:
    """The samples of files, in which records that show the same image are one; made once."""
    from cdfast.shared_images import SharedImages

    key = id(opened)
    if key not in run.datasets:
        run.datasets[key] = SharedImages(opened)
        run.say(run.datasets[key].describe())
    return run.datasets[key]


def _encoded_scenes(scenes: Any, processor: Any, pairs: bool) -> Any:
    from cdfast.miniature.preference_scenes import PreferenceScenes
    from cdfast.synthetic import EncodedScenes

    return (PreferenceScenes if pairs else EncodedScenes)(scenes, processor)


def _opened(run: Run, data: list[str], roots: list[str], pairs: bool = False) -> Any:
    """The samples of files, opened once in a run."""
    recipe, key = run.recipe, (*data, pairs, *roots)
    if key not in run.datasets:
        run.datasets[key] = load_dataset(
            data,
            roots,
            run.processor,
            max_length=recipe.max_length,
            turns=recipe.turns,
            on_error=recipe.on_error,
            max_pixels=recipe.max_pixels,
            pairs=pairs,
        )
    return run.datasets[key]


def held_out(run: Run, pairs: bool = False) -> Any:
    """Samples that no stage trains on: of eval_data, or fresh scenes; None where there are none."""
    recipe, number = run.recipe, len(run.recipe.stages)
    if recipe.eval_data:
        return _opened(run, recipe.eval_data, recipe.eval_image_root or recipe.image_root, pairs)
    if uses_scenes(recipe, number):
        from cdfast.synthetic import SceneDataset

        trained = stage_dataset(run, number).scenes
        size = max(64, recipe.eval_samples)
        fresh = SceneDataset(
            "validation", size=size, turns_mix=trained.turns_mix, world=trained.world
        )
        return _encoded_scenes(fresh, run.processor, pairs)
    return None


def probe_samples(run: Run) -> Any:
    """Samples to compare attention on at the end: held out where there are any, else trained on."""
    samples = held_out(run)
    if samples is None:
        numbers = range(1, len(run.recipe.stages) + 1)
        single = [n for n in numbers if not run.recipe.stages[n - 1].pairs]
        samples = stage_dataset(run, (single or numbers)[-1])
        if hasattr(samples, "first"):  # a stream, which has no end
            shown = (sample for sample in samples.first() if sample["images"])
            samples = list(itertools.islice(shown, PROBE_SAMPLES))
    return samples


def trained_scenes(run: Run) -> set[Any]:
    """Keys of the embedded scenes that the stages train on; empty for other data."""
    numbers = range(1, len(run.recipe.stages) + 1)
    scenes = [stage_dataset(run, n).scenes for n in numbers if uses_scenes(run.recipe, n)]
    return {key for dataset in scenes for key in dataset.scene_keys()}


def uses_scenes(recipe: Recipe, number: int) -> bool:
    """Whether a stage trains on the embedded scenes."""
    data = recipe.stages[number - 1].data or recipe.data
    return len(data) == 1 and data[0] in EMBEDDED_SCENES


def trained_matches(stages: Sequence[dict[str, Any]]) -> Matches | None:
    """The matched layers of the last stage that aligned attention."""
    for stage in reversed(stages):
        if stage["matches"]:
            return {int(k): tuple(v) for k, v in stage["matches"].items()}
    return None


def stage_arguments(run: Run, number: int) -> Any:
    """`DistillationConfig` of a stage."""
    from cdfast.trainer import DistillationConfig

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    cuda = torch.cuda.is_available()
    given = {**recipe.arguments, **stage.arguments}
    # Trainer would upload its checkpoints: the command uploads the student, when it is finished.
    given = {name: value for name, value in given.items() if name not in HUB_ARGUMENTS}
    if given.get("eval_steps"):  # which Trainer would ignore
        given.setdefault("eval_strategy", "steps")
    # transformers 5.23 renames gradient_ to activation_checkpointing; 5.17 has the old name.
    names = {f.name for f in fields(DistillationConfig)}
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    values: dict[str, Any] = {
        **_DEFAULT_ARGUMENTS,
        "output_dir": str(run.stage_folder(number)),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not cuda,
        # A stage shorter than this would end without a logged loss.
        "logging_steps": min(10, stage.max_steps) if stage.max_steps > 0 else 10,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "dataloader_num_workers": recipe.workers,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "learning_rate": stage.learning_rate,
        "muon_learning_rate": stage.muon_learning_rate,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "warmup_steps": stage.warmup,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        **{name: getattr(stage, name) for name in WEIGHTS},
        "preference_beta": stage.preference_beta,
        **{
            name: getattr(recipe, name)
            for name in (
                "preset",
                "objective",
                "matching",
                "layers",
                "layer_reduction",
                "backend",
                "unshifted_kl_mask",
                "kl_objective",
                "hidden_objective",
                "zero_stage",
                "teacher_placement",
                "offload_optimizer",
                "max_skipped_steps",
                "packing",
            )
        },
        "pack_tokens": recipe.pack_tokens or recipe.max_length,
        "keep_alignment": stage.keep_alignment,
        f"{prefix}_checkpointing": stage.gradient_checkpointing,
        **given,
    }
    return DistillationConfig(**values)


def load_stage_student(run: Run, number: int) -> Any:
    """The student of the stage before, with what this stage trains set, LoRA around it if asked."""
    from cdfast.trainer import unwrap_model

    recipe, stage = run.recipe, run.recipe.stages[number - 1]
    student = load_model(run.student_after(number - 1), recipe.dtype, recipe.trust_remote_code)
    if run.teacher is not None and recipe.share_vision_tower:
        share_vision_tower(unwrap_model(run.teacher), student)
    full = stage.stage not in PROJECTOR_ONLY
    set_trainable(student, projector=True, language_model=full and not stage.lora)
    if not (full and stage.lora):
        return student
    # New adapters are random: the same in a run that is resumed as in one that is not.
    torch.manual_seed(recipe.seed + number)
    return with_lora(student, recipe)


def with_lora(student: Any, recipe: Recipe) -> Any:
    """The student with LoRA adapters in its decoder, and its own projector trained in full."""
    from peft import LoraConfig, get_peft_model

    decoder = student.get_decoder()
    within = next(name for name, module in student.named_modules() if module is decoder)
    # P_s trains in full beside the adapters and belongs to their checkpoints; P_t stays frozen.
    trained = [
        name
        for name, module in student.named_modules()
        if is_adapter(name) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=rf"{re.escape(within)}\..*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=trained,
    )
    return get_peft_model(student, config)


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
    _export(run, trainer, number)
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


def _export(run: Run, trainer: Any, number: int) -> None:
    """Write the student after a stage: plain weights, LoRA merged; complete or not there at all.

    The MLP of the hidden-state loss, no part of the student, goes into the stage's folder.
    """
    target, recipe = run.student_after(number), run.recipe
    state = full_state_dict(trainer.model)

    def write() -> None:
        if state is None or not run.state.is_main_process:
            return
        save_hidden_projector(split_state(state)[1], run.stage_folder(number))
        with staged_folder(target) as folder:
            write_student(
                trainer.model,
                state,
                folder,
                base=run.student_after(number - 1),
                dtype=getattr(torch, recipe.dtype),
                trust_remote_code=recipe.trust_remote_code,
            )
            run.processor.save_pretrained(folder)

    together(write, target)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, complete or not at all; what is not finite as null, as JSON asks."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
