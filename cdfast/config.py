"""Recipes: YAML over two dataclasses, and how options override them.

A recipe says which models, which data, how attention is aligned, and in which stages. Every field
is an option of `python -m cdfast.train`: `--kl-weight 0.5` sets it for all stages, and
`--dft.kl-weight 0.5` for the stages named dft.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cdfast.terms import HIDDEN_OBJECTIVES, KL_OBJECTIVES, TEACHER_WEIGHTS, WEIGHTS
from cdfast.yaml_file import parse_yaml, read_yaml

STAGES = ("pretrain", "sft", "dpt", "dft", "preference")
ZERO_STAGES = (0, 1, 2, 3)
EVALUATION_SPLITS = ("validation", "test")
TEACHER_PLACEMENTS = ("replicated", "sharded", "offloaded")
MINIATURE = "miniature"
PHOTOS = "miniature-photos"
# What comes with the package: sets of scenes (as data, student and suite), and teacher -> its set.
EMBEDDED_SCENES = (MINIATURE, PHOTOS)
EMBEDDED_TEACHERS = {MINIATURE: MINIATURE, "miniature-unprivileged": MINIATURE, PHOTOS: PHOTOS}
# The recipe of a command line that names none: the miniature, or, with models or data, this one.
OWN_MODELS = "compodistill"
_TRAINER_TYPES = {
    name: hint
    for name, hint in typing.get_type_hints(TrainingArguments).items()
    if name in {f.name for f in fields(TrainingArguments)}
}

# What each stage trains, and which losses it has unless a recipe says otherwise.
# Source: paper, training stages; `pretrain` and `sft` are LLaVA's, `preference` is LLaVA-MoD's.
_LM_ONLY = {"lm_weight": 1.0, **dict.fromkeys(TEACHER_WEIGHTS, 0.0)}
_DPT = {"lm_weight": 1.0, "kl_weight": 1.0, "alignment_weight": 0.0, "preference_weight": 0.0}
_STAGE_WEIGHTS = {
    "pretrain": _LM_ONLY,
    "sft": _LM_ONLY,
    "dpt": _DPT,
    "dft": {**_DPT, "alignment_weight": 1.0},
    "preference": {**_LM_ONLY, "lm_weight": 0.0, "preference_weight": 1.0},
}
PROJECTOR_ONLY = ("pretrain", "dpt")
# TrainingArguments about the upload, which the command does when all stages are done (push.py).
HUB_ARGUMENTS = (
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_always_push",
)
# TrainingArguments that stages set by options of their own, whose values are checked.
_OWN_NAMES = {
    "output_dir": "output_dir",
    "seed": "seed",
    "dataloader_num_workers": "workers",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}
_ARGUMENT_LIMITS: dict[str, dict[str, float]] = {
    "adam_beta1": {"at_least": 0, "below": 1},
    "adam_beta2": {"at_least": 0, "below": 1},
    "adam_epsilon": {"above": 0},
    "label_smoothing_factor": {"at_least": 0, "below": 1},
    "eval_steps": {"above": 0},
    "logging_steps": {"above": 0},
    "save_steps": {"above": 0},
    "save_total_limit": {"at_least": 1},
}


class ConfigError(ValueError):
    """A recipe or an option that cannot be used; the message says which, and what to write."""


def _option(default: Any, help: str, **limits: float) -> Any:
    """A field with its help text and, for numbers, the limits that `_check_limits` holds it to."""
    metadata = {"help": help, "limits": limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class StageRecipe:
    """One training stage. Fields left at None take the stage's default or the recipe's value."""

    stage: str = _option(
        "dft",
        "pretrain: projector, LM loss. sft: language model and projector, LM loss. "
        "dpt: student projector, LM + KL. dft: language model and projector, LM + KL + alignment. "
        "preference: language model and projector, chosen against rejected answers.",
    )
    data: list[str] | None = _option(None, "Data files of this stage; default: the recipe's.")
    image_root: list[str] | None = _option(
        None, "Image roots of this stage; default: the recipe's."
    )
    epochs: float = _option(1.0, "Passes over the data; ignored when max_steps is given.", above=0)
    max_steps: int = _option(-1, "Optimizer steps; -1: by epochs.", at_least=-1)
    batch_size: int = _option(16, "Samples per process and forward pass.", at_least=1)
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer step.", at_least=1)
    learning_rate: float = _option(2e-4, "Peak learning rate (AdamW).", at_least=0)
    muon_learning_rate: float | None = _option(
        None,
        "Muon for decoder matrices at this rate; AdamW keeps the rest.",
        at_least=0,
    )
    lr_scheduler_type: str = _option("cosine", "Any scheduler of transformers.")
    warmup: float = _option(
        0.03, "Warm-up: a share of the steps if < 1, else a number of steps.", at_least=0
    )
    weight_decay: float = _option(0.0, "Weight decay.", at_least=0)
    max_grad_norm: float = _option(1.0, "Gradient clipping.", at_least=0)
    lora: bool = _option(False, "Train LoRA adapters of the language model, merged at the end.")
    gradient_checkpointing: bool = _option(False, "Recompute activations (non-reentrant).")
    keep_alignment: bool = _option(
        False,
        "With gradient checkpointing: keep attention and alignment of aligned layers instead of "
        "repeating them (faster on long sequences, more memory).",
    )
    lm_weight: float | None = _option(
        None,
        "Weight of the language-model loss (on pairs: of chosen answers); default: 1, 0 in "
        "preference.",
        at_least=0,
    )
    kl_weight: float | None = _option(
        None, "Weight of the logit KL; default: 1 in dpt and dft.", at_least=0
    )
    alignment_weight: float | None = _option(
        None,
        "Weight of visual attention alignment; default: 1 in dft.",
        at_least=0,
    )
    hidden_weight: float = _option(
        0.0,
        "Weight of the last hidden states' distance on answer tokens, through a student-to-teacher "
        "MLP (LLaVADI).",
        at_least=0,
    )
    visual_kl_weight: float = _option(
        0.0, "Weight of the logit KL on visual tokens (LLaVA-KD).", at_least=0
    )
    relation_weight: float = _option(
        0.0,
        "Weight of the relation loss: 1 - cos of Y Y^T over visual logits (LLaVA-KD).",
        at_least=0,
    )
    preference_weight: float | None = _option(
        None,
        "Weight of the preference loss (LLaVA-MoD); the data are then pairs of a chosen and a "
        "rejected answer. Default: 1 in preference.",
        at_least=0,
    )
    preference_beta: float = _option(0.1, "beta of the preference loss.", above=0)
    turns_mix: list[int] | None = _option(
        None,
        "Embedded data only: turns per scene (list, vqa, loc, rel, verify, ab).",
        at_least=0,
    )
    arguments: dict[str, Any] = _option({}, "Further transformers.TrainingArguments of this stage.")

    def __post_init__(self) -> None:
        _choice("stage", self.stage, STAGES)
        self.arguments = {k: _training_argument(k, v) for k, v in self.arguments.items()}
        for name, value in _STAGE_WEIGHTS[self.stage].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def needs_teacher(self) -> bool:
        return any(getattr(self, name) for name in TEACHER_WEIGHTS)

    @property
    def pairs(self) -> bool:
        """Whether its samples are pairs of a chosen and a rejected answer."""
        return bool(self.preference_weight)


@dataclass
class Recipe:
    """A whole run: models, data, alignment, stages, evaluation."""

    name: str = _option("run", "Name of the run; output goes to runs/<name> by default.")
    description: str = _option("", "One line for --list.")
    teacher: str | None = _option(
        None,
        "Teacher checkpoint (LLaVA kind; others with taf false), or 'miniature', "
        "'miniature-unprivileged' or 'miniature-photos'. None: stages without distillation.",
    )
    student: str = _option(
        "",
        "Student: a causal language model or a LLaVA checkpoint, or 'miniature' or "
        "'miniature-photos'; with taf false a vision-language model of the teacher's family.",
    )
    vision_tower: str | None = _option(
        None, "Vision encoder checkpoint, to build a LLaVA model where there is no teacher."
    )
    taf: bool = _option(True, "Teacher adapter fetch: visual tokens are P_s(P_t(z)).")
    student_projector: str = _option("mlp", "P_s: mlp (paper) or linear (authors' code).")
    share_vision_tower: bool = _option(
        True, "Run one frozen vision encoder once per batch for both models."
    )
    dtype: str = _option("float32", "Student parameters: float32 or bfloat16.")
    teacher_dtype: str = _option("float32", "Teacher parameters: float32, bfloat16 or float16.")
    teacher_targets: str | None = _option(
        None,
        "Folder of targets that cdfast.targets has stored: they stand in for the teacher, which is "
        "not loaded for training.",
    )
    trust_remote_code: bool = _option(False, "Allow checkpoints to bring their own code.")

    data: list[str] = _option(
        [], "LLaVA JSON or `messages` files, or 'miniature' or 'miniature-photos'."
    )
    image_root: list[str] = _option([], "Folders that image paths are resolved in, and stay in.")
    max_length: int = _option(
        2048, "Tokens per sample; the end is cut, never an image.", at_least=1
    )
    turns: str = _option(
        "dialogue", "dialogue, or independent: turns that share the image but not each other."
    )
    on_error: str = _option("raise", "Broken record or image: raise, or skip and count.")
    max_pixels: int = _option(64_000_000, "Largest image that is decoded, in pixels.", at_least=1)
    packing: bool = _option(
        False,
        "Several samples in one row without padding; a row is one process's forward pass and holds "
        "at most batch_size x pack_tokens tokens.",
    )
    pack_tokens: int | None = _option(
        None, "With packing: see there; default: max_length.", at_least=1
    )
    share_images: bool = _option(
        False,
        "Records that show the same image are one sample: the image is seen once, and their "
        "conversations do not see each other.",
    )
    workers: int = _option(1, "Data loader processes per rank.", at_least=0)
    streaming: bool = _option(
        False,
        "Read data from the front instead of looking through it first: .jsonl, .parquet, .tar "
        "(WebDataset), folders of them or of `datasets`. Needs max_steps.",
    )
    shuffle_window: int = _option(
        1000, "With streaming: records that are shuffled together.", at_least=1
    )

    preset: str = _option("paper", "Alignment preset: paper or official.")
    objective: str | None = _option(
        None,
        "row, map, pooled, mse, kl or pooled_stored; default: the preset's. mse, a mean over map "
        "entries, is far smaller than the others: raise alignment_weight.",
    )
    matching: str | None = _option(None, "group, simple or adaptive; default: the preset's.")
    layers: str | None = _option(None, "early, intermediate, later or all; default: the preset's.")
    layer_reduction: str | None = _option(None, "mean or sum over layers; default: the preset's.")
    backend: str = _option("auto", "cdfast_kernels backend of aligned layers.")
    unshifted_kl_mask: bool = _option(False, "Parity with the authors' code: unshifted KL mask.")
    kl_objective: str = _option(
        "kl", "kl, or soft_ce: soft cross-entropy, of the same gradient (LLaVA-MoD)."
    )
    hidden_objective: str = _option("cosine", "Distance of last hidden states: cosine or mse.")

    zero_stage: int = _option(
        0, "ZeRO: 0 nothing sharded (DDP), 1 optimizer, 2 and gradients, 3 and parameters."
    )
    teacher_placement: str = _option(
        "replicated", "Teacher: replicated on every GPU, sharded over them, or offloaded to CPU."
    )
    offload_optimizer: bool = _option(False, "With ZeRO: keep optimizer states in CPU memory.")
    rank_timeout: float = _option(
        300.0,
        "Seconds without a sign of life after which a rank is reported and the run ends.",
        above=0,
    )
    max_skipped_steps: int = _option(
        5,
        "Steps in a row with a non-finite loss or gradient after which the run stops.",
        at_least=1,
    )

    lora_r: int = _option(128, "LoRA rank.", at_least=1)
    lora_alpha: int = _option(256, "LoRA alpha.", at_least=1)
    lora_dropout: float = _option(0.05, "LoRA dropout.", at_least=0, below=1)

    evaluate: str | None = _option(
        None, "Evaluation after training: 'miniature', 'miniature-photos', or none."
    )
    evaluate_per_kind: int = _option(300, "Caption pairs per question kind.", at_least=1)
    evaluate_vqa_per_kind: int = _option(150, "Recognition questions per kind.", at_least=1)
    evaluate_split: str = _option(
        "test",
        "Scenes of the evaluation after training: test, or validation, to choose settings on. "
        "--resume takes another one, and then evaluates a finished run again: no weight depends on "
        "it, because nothing trains on either, which is checked.",
    )
    evaluate_seed: int = _option(
        0,
        "Another seed draws other scenes of evaluate_split, such as fresh ones for a final table. "
        "--resume takes another one, as for evaluate_split.",
        at_least=0,
    )
    eval_data: list[str] = _option(
        [],
        "Held-out files for evaluation during training (--eval-steps) and for attention similarity "
        "at the end; embedded data has scenes of its own for that.",
    )
    eval_image_root: list[str] = _option([], "Image roots of eval_data; default: the recipe's.")
    eval_samples: int = _option(
        32,
        "Held-out samples whose attention is compared with the teacher's in each evaluation during "
        "training; 0: none.",
        at_least=0,
    )
    eval_questions: int | None = _option(
        None,
        "Questions per kind of the suite of `evaluate` in each evaluation during training (a pair "
        "of captions counts as one); 0: none. Default: 20 where there is a suite.",
        at_least=0,
    )
    analyze_questions: int | None = _option(
        None,
        "Questions per kind (a pair of captions counts as one) or records per file of eval_data in "
        "the analysis of attention after training; 0: none. Default: 20 where there is a suite or "
        "eval_data.",
        at_least=0,
    )
    seed: int = _option(0, "Seed of weights, data and order.", at_least=0, below=2**32)
    output_dir: str | None = _option(None, "Where the run goes; default: a new folder in runs/.")
    license: str | None = _option(
        None, "License that the model card states, as the hub names it (apache-2.0); default: none."
    )
    arguments: dict[str, Any] = _option({}, "transformers.TrainingArguments for every stage.")
    stages: list[StageRecipe] = _option([], "The stages, in order.")
    compare: dict[str, dict[str, Any]] = _option(
        {}, "Variants that --compare trains besides: name -> options that differ."
    )
    architecture: dict[str, Any] = _option(
        {}, "Expected sizes of teacher, student and vision encoder, checked and used by --dry-run."
    )

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("name: expected a name of the run; got an empty one. Give --name.")
        self.arguments = {k: _training_argument(k, v) for k, v in self.arguments.items()}
        _check_limits(self)
        for number, stage in enumerate(self.stages, 1):
            _check_stage(stage, f"stage {number} ({stage.stage}): ")
        for name in self.compare:
            # It names a folder of the run.
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ConfigError(
                    f"compare: expected names of letters, digits, '.', '_' and '-'; got {name!r}. "
                    "Rename the variant."
                )
        _choice("turns", self.turns, ("dialogue", "independent"))
        _choice("on_error", self.on_error, ("raise", "skip"))
        _choice("student_projector", self.student_projector, ("mlp", "linear"))
        _choice("dtype", self.dtype, ("float32", "bfloat16"))
        _choice("teacher_dtype", self.teacher_dtype, ("float32", "bfloat16", "float16"))
        _choice("preset", self.preset, ("paper", "official"))
        _choice("evaluate_split", self.evaluate_split, EVALUATION_SPLITS)
        _choice("kl_objective", self.kl_objective, KL_OBJECTIVES)
        _choice("hidden_objective", self.hidden_objective, HIDDEN_OBJECTIVES)
        _choice("zero_stage", self.zero_stage, ZERO_STAGES)
        _choice("teacher_placement", self.teacher_placement, TEACHER_PLACEMENTS)
        if self.evaluate is not None:
            _choice("evaluate", self.evaluate, EMBEDDED_SCENES)
        elif self.eval_questions:
            raise ConfigError(
                f"eval_questions: expected none, because the recipe names no suite to take them "
                f"from; got {self.eval_questions}. Give --evaluate {MINIATURE}, or leave "
                "--eval-questions out."
            )
        if self.analyze_questions and not (self.evaluate or self.eval_data):
            raise ConfigError(
                f"analyze_questions: expected none, because the recipe names no questions to take "
                f"them from; got {self.analyze_questions}. Give --evaluate {MINIATURE} or "
                "--eval-data FILE, or leave --analyze-questions out."
            )

    def check_runnable(self) -> None:
        """Raise ConfigError if something that a run needs is missing or contradictory."""
        if not self.student:
            raise ConfigError("student: expected a checkpoint; got none. Give --student PATH.")
        if not self.stages:
            raise ConfigError("stages: expected at least one; got none. Name them in the recipe.")
        self._check_embedded()
        self._check_packing()
        self._check_shared_images()
        for number, stage in enumerate(self.stages, 1):
            if stage.needs_teacher and not self.teacher:
                used = [name for name in TEACHER_WEIGHTS if getattr(stage, name)]
                options = " ".join(f"--{name.replace('_', '-')} 0" for name in used)
                raise ConfigError(
                    f"teacher: stage {number} ({stage.stage}) distils, so a teacher is expected; "
                    f"got none. Give --teacher PATH, or {options}."
                )
            if not (stage.data or self.data):
                raise ConfigError(
                    f"data: stage {number} ({stage.stage}) has none. Give --data FILE, or "
                    f"--{stage.stage}.data FILE."
                )
        if self.taf and not self.teacher:
            raise ConfigError("taf: needs a teacher, whose adapter it fetches. Give --taf false.")

    def _check_embedded(self) -> None:
        """Refuse a mixture of embedded parts that do not know the same words."""
        named: dict[str, list[Any]] = {"student": [self.student], "evaluate": [self.evaluate]}
        named["data"] = self.data
        for number, stage in enumerate(self.stages, 1):
            named[f"data of stage {number} ({stage.stage})"] = stage.data or []
        parts = {
            role: [value for value in values if value in EMBEDDED_SCENES]
            for role, values in named.items()
        }
        if self.teacher in EMBEDDED_TEACHERS:
            parts["teacher"] = [EMBEDDED_TEACHERS[self.teacher]]
        if len({value for values in parts.values() for value in values}) > 1:
            raise ConfigError(
                "miniature: expected teacher, student, data and evaluate of one set of scenes, "
                f"because another set has other words; got {parts}. Name one set everywhere."
            )

    def _check_packing(self) -> None:
        """Refuse data and stages that cannot be packed, and rows too short for a sample."""
        if not self.packing:
            if self.pack_tokens is not None:
                raise ConfigError(
                    f"pack_tokens: expected none, because packing is off; got {self.pack_tokens}. "
                    "Give --packing true, or leave --pack-tokens out."
                )
            return
        self._refuse_streaming("packing", "the lengths of all samples")
        if self.turns != "dialogue":
            raise ConfigError(
                f"packing: expected turns 'dialogue', because a row's samples have no segments; "
                f"got {self.turns!r}. Give --turns dialogue, or --packing false."
            )
        if self.objective == "pooled_stored":
            raise ConfigError(
                "packing: expected another objective than 'pooled_stored', which takes one sample "
                "per row; got both. Give --objective pooled, or --packing false."
            )
        for number, stage in enumerate(self.stages, 1):
            where = f"stage {number} ({stage.stage})"
            embedded = [name for name in stage.data or self.data if name in EMBEDDED_SCENES]
            if stage.pairs or embedded:
                got = "pairs of answers" if stage.pairs else f"{embedded[0]!r}, split into turns"
                raise ConfigError(
                    f"packing: {where}: expected samples of one conversation; got {got}. Give "
                    "--packing false."
                )
            capacity = stage.batch_size * (self.pack_tokens or self.max_length)
            if capacity < self.max_length:
                raise ConfigError(
                    f"pack_tokens: {where}: expected rows of at least max_length = "
                    f"{self.max_length} tokens; got batch_size {stage.batch_size} x pack_tokens "
                    f"{self.pack_tokens}. Raise --pack-tokens, or lower --max-length."
                )

    def _refuse_streaming(self, option: str, what: str) -> None:
        if self.streaming:
            raise ConfigError(
                f"{option}: expected streaming false, because {what} are looked at before the "
                f"first step; got both. Leave --streaming or --{option.replace('_', '-')} out."
            )

    def _check_shared_images(self) -> None:
        if not self.share_images:
            return
        self._refuse_streaming("share_images", "the images of all records")
        if self.packing:
            raise ConfigError(
                "share_images: expected packing false, because samples of a packed row have no "
                "segments; got both. Choose the one that saves more tokens, see docs/packing.md."
            )
        for number, stage in enumerate(self.stages, 1):
            embedded = [name for name in stage.data or self.data if name in EMBEDDED_SCENES]
            if stage.pairs or embedded:
                got = "pairs of answers" if stage.pairs else f"{embedded[0]!r}, where no two do"
                raise ConfigError(
                    f"share_images: stage {number} ({stage.stage}): expected files of records, "
                    f"some of which show the same image; got {got}. Give --share-images false."
                )


def _unknown(what: str, got: str, known: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(got), [str(k) for k in known], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{what}: {got!r} is unknown.{hint} Known: {', '.join(map(str, known))}."


def _choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ConfigError(_unknown(name, value, allowed))


def _check_limits(options: StageRecipe | Recipe, where: str = "") -> None:
    """Refuse numbers outside the limits of their fields, and infinite ones."""
    for f in fields(options):
        value = getattr(options, f.name)
        for number in value if isinstance(value, list) else [value]:
            _check_number(f"{f.name}: {where}", number, f.metadata["limits"], f.name)
    for name, value in options.arguments.items():
        _check_number(f"arguments.{name}: {where}", value, _ARGUMENT_LIMITS.get(name, {}), name)


def _check_number(what: str, value: Any, limits: dict[str, float], option: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    expected = {
        "above": ("more than", lambda limit: value > limit),
        "at_least": ("at least", lambda limit: value >= limit),
        "below": ("less than", lambda limit: value < limit),
    }
    broken = [
        f"{expected[k][0]} {limit:g}" for k, limit in limits.items() if not expected[k][1](limit)
    ]
    if isinstance(value, float) and not math.isfinite(value):
        broken = ["a finite number"]
    if broken:
        flag = option.replace("_", "-")
        raise ConfigError(
            f"{what}expected {broken[0]}; got {value}. Correct the recipe, or give --{flag} NUMBER."
        )


def _check_stage(stage: StageRecipe, where: str) -> None:
    _check_limits(stage, where)
    if stage.max_steps == 0:
        raise ConfigError(
            f"max_steps: {where}expected at least 1, or -1 to train by epochs; got 0. Give "
            "--max-steps N, or leave the stage out."
        )
    if not any(getattr(stage, name) for name in WEIGHTS):
        raise ConfigError(
            f"{', '.join(WEIGHTS)}: {where}expected at least one above 0; got 0 for all, so "
            "nothing would be trained. Give one of them, or leave the stage out."
        )
    others = [n for n in TEACHER_WEIGHTS if n != "preference_weight" and getattr(stage, n)]
    if stage.pairs and others:
        options = " ".join(f"--{stage.stage}.{name.replace('_', '-')} 0" for name in others)
        raise ConfigError(
            f"preference_weight: {where}expected no other loss with a teacher beside it, because "
            f"its data are pairs of answers; got {', '.join(others)} above 0. Give {options}, or a "
            "stage of its own."
        )


def _coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the annotated type; YAML reads 2e-4 as text, and the command line everything."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if annotation is Any:
        return value
    if origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(items)]
    if origin is dict:
        if isinstance(value, dict):
            return {str(k): _coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, annotation):
            return value
        if isinstance(value, dict):
            return from_dict(annotation, value, where)
    elif annotation is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif annotation in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if annotation is float and number == number:
            return number
        if annotation is int and number.is_integer():
            return int(number)
    elif annotation is str and isinstance(value, (str, int, float)):
        return str(value)
    kind = getattr(annotation, "__name__", str(annotation))
    raise ConfigError(
        f"{where}: expected {kind}; got {_shown(value)}. Correct it in the recipe or on the "
        "command line."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _training_argument(name: str, value: Any) -> Any:
    """A TrainingArguments value: text is read as the field's type, or as YAML where it has several.

    Raises:
        ConfigError: an unknown field (the nearest is named), or a value of the wrong type.
    """
    if name not in _TRAINER_TYPES:
        raise ConfigError(_unknown("arguments", name, _near(name, list(_TRAINER_TYPES))))
    if name in _OWN_NAMES:
        raise ConfigError(
            f"arguments.{name}: expected the option {_OWN_NAMES[name]!r}, which sets it and whose "
            f"value is checked; got {_shown(value)} here. Give "
            f"--{_OWN_NAMES[name].replace('_', '-')}, or write it beside `arguments`."
        )
    if name == "hub_token":
        raise ConfigError(
            "arguments.hub_token: expected none, because options are written to recipe.yaml and "
            "results.json. Log in with `hf auth login`, or set HF_TOKEN; and take the token out of "
            "the history of your shell."
        )
    hint, where = _TRAINER_TYPES[name], f"arguments.{name}"
    kinds = [k for k in typing.get_args(hint) or (hint,) if k is not type(None)]
    if len(kinds) == 1 and kinds[0] in (bool, int, float, str):
        return _coerce(value, hint, where)
    try:
        parsed = parse_yaml(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"{where}: expected text or YAML; got {value!r}: {error}") from error
    if isinstance(parsed, bool) and bool not in kinds:  # YAML reads the words no and yes as these
        return value if isinstance(value, str) else "yes" if value else "no"
    return parsed


def from_dict(cls: type, values: dict[str, Any], where: str = "recipe") -> Any:
    """A dataclass from a mapping; unknown keys are refused with the nearest known one.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: expected a mapping of options; got {_shown(values)}. Write `option: value`."
        )
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(_unknown(where, str(key), names))
    return cls(**{k: _coerce(v, hints[k], f"{where}.{k}") for k, v in values.items()})


def recipe_files() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(importlib.resources.files("cdfast") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str) -> Recipe:
    """A shipped recipe by name, or a YAML file by path.

    Raises:
        ConfigError: no such recipe or file, no valid YAML, or an unknown field.
    """
    shipped = recipe_files()
    path = shipped.get(source, Path(source))
    if not path.is_file():
        raise ConfigError(_unknown("recipe", source, list(shipped)) + " Or give a YAML file.")
    try:
        values = read_yaml(path)
        recipe: Recipe = from_dict(Recipe, {} if values is None else values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, to be written as YAML or JSON."""
    return dataclasses.asdict(recipe)


# What the command line offers as options.
STAGE_FIELDS = [f for f in fields(StageRecipe) if f.name not in ("stage", "arguments")]
RECIPE_FIELDS = [
    f
    for f in fields(Recipe)
    if f.name not in ("description", "arguments", "stages", "compare", "architecture")
]


def override(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    """A copy of the recipe with options set: recipe fields, stage fields, or TrainingArguments.

    A stage field without a prefix goes to every stage that has the loss or setting at all: the
    weights of teacher losses stay 0 in stages that are defined without them.

    Args:
        recipe: left as it is.
        options: name -> value; "dft.max_steps" addresses the stages of that name.

    Raises:
        ConfigError: an unknown option (the nearest is named) or a value of the wrong type.
    """
    values = to_dict(recipe)
    recipe_names = {f.name for f in fields(Recipe)}
    stage_names = {f.name for f in STAGE_FIELDS}
    for key, value in options.items():
        stage_kind, _, name = key.rpartition(".")
        if stage_kind:
            _choice("stage", stage_kind, STAGES)
            chosen = [s for s in values["stages"] if s["stage"] == stage_kind]
            if not chosen:
                raise ConfigError(f"{key}: the recipe {recipe.name!r} has no stage {stage_kind!r}.")
        else:
            chosen = values["stages"]
        if not stage_kind and name in recipe_names:
            values[name] = value
        elif name in stage_names:
            for stage in chosen:
                if stage_kind or _STAGE_WEIGHTS[stage["stage"]].get(name) != 0.0:
                    stage[name] = value
        elif name in _TRAINER_TYPES:
            if not stage_kind:
                # What is asked for here wins over what the recipe says of a stage.
                for stage in chosen:
                    stage["arguments"] = {k: v for k, v in stage["arguments"].items() if k != name}
            for target in chosen if stage_kind else [values]:
                target["arguments"] = {**target["arguments"], name: value}
        else:
            known = sorted({*recipe_names, *stage_names, *_TRAINER_TYPES})
            raise ConfigError(_unknown("option", key, _near(name, known)))
    changed: Recipe = from_dict(Recipe, values, recipe.name)
    return changed


def _near(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=5, cutoff=0.3) or sorted(known)
