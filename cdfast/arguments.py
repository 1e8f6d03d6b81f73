"""DistillationConfig: transformers.TrainingArguments with the options of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from cdfast.config import TEACHER_PLACEMENTS, ZERO_STAGES
from cdfast.engine import stage_of, start_zero, zero_config
from cdfast.terms import HIDDEN_OBJECTIVES, KL_OBJECTIVES, TEACHER_WEIGHTS, WEIGHTS


@dataclass
class DistillationConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the weights and options of distillation.

    L = lm_weight L_LM + kl_weight L_KL + alignment_weight L_alignment + hidden_weight L_hidden +
    visual_kl_weight L_visual_KL + relation_weight L_relation + preference_weight L_preference, each
    a sum over the global step (all ranks, all accumulation steps) divided by its own global count:
    answer tokens for LM, KL and hidden states, visual tokens for the visual KL, pairs of answers
    for the preference, samples with an image for the others.
    """

    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the language-model loss."})
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of KL(teacher || student) on answer tokens."}
    )
    alignment_weight: float = field(
        default=1.0, metadata={"help": "Weight of the visual attention alignment loss."}
    )
    hidden_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the last hidden states' distance on answer tokens (LLaVADI)."},
    )
    visual_kl_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of KL(teacher || student) on visual tokens (LLaVA-KD)."},
    )
    relation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the visual relation loss (LLaVA-KD)."}
    )
    preference_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the preference loss on pairs of answers (LLaVA-MoD); beside it only "
            "lm_weight may be above 0."
        },
    )
    preference_beta: float = field(
        default=0.1, metadata={"help": "beta of the preference loss, above 0."}
    )
    kl_objective: str = field(
        default="kl",
        metadata={"help": "kl, or soft_ce: soft cross-entropy, of the same gradient (LLaVA-MoD)."},
    )
    hidden_objective: str = field(
        default="cosine", metadata={"help": "Distance of last hidden states: cosine or mse."}
    )
    preset: str = field(
        default="paper", metadata={"help": "Alignment preset: 'paper' or 'official'."}
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "row, map, pooled, mse, kl or pooled_stored; default: the preset's. mse, a "
            "mean over map entries, is far smaller than the others: raise alignment_weight."
        },
    )
    matching: str | None = field(
        default=None, metadata={"help": "group, simple or adaptive; default: the preset's."}
    )
    layers: str | None = field(
        default=None,
        metadata={"help": "early, intermediate, later or all; default: the preset's."},
    )
    layer_reduction: str | None = field(
        default=None, metadata={"help": "mean or sum over layers; default: the preset's."}
    )
    backend: str = field(
        default="auto", metadata={"help": "Backend of cdfast_kernels for aligned layers."}
    )
    keep_alignment: bool = field(
        default=False,
        metadata={
            "help": "With gradient checkpointing: keep attention and alignment of aligned layers "
            "instead of repeating them (faster on long sequences, more memory)."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Several samples in one row without padding, on one token axis of at most "
            "per_device_train_batch_size x pack_tokens tokens; see cdfast/packing.py."
        },
    )
    pack_tokens: int | None = field(
        default=None, metadata={"help": "With packing: see there; at least 1."}
    )
    zero_stage: int = field(
        default=0,
        metadata={
            "help": "ZeRO: 0 nothing sharded (DDP), 1 optimizer, 2 and gradients, 3 and parameters."
        },
    )
    teacher_placement: str = field(
        default="replicated",
        metadata={"help": "Teacher: replicated on every GPU, sharded over them, or offloaded."},
    )
    offload_optimizer: bool = field(
        default=False, metadata={"help": "With ZeRO: keep optimizer states in CPU memory."}
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={"help": "Non-finite steps in a row after which the run stops."},
    )
    unshifted_kl_mask: bool = field(
        default=False,
        metadata={"help": "Parity with the authors' code: mask KL rows with unshifted labels."},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Use Muon at this rate for decoder matrices, AdamW for the rest."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: batches carry what the aligner needs."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Kept off: steps that are not finite are skipped before they are logged."
        },
    )

    def __post_init__(self) -> None:
        self._set_up_zero()
        # transformers 5.23 renames gradient_ to activation_checkpointing; 5.17 has the old name.
        new_name = hasattr(self, "activation_checkpointing")
        options = "activation_checkpointing" if new_name else "gradient_checkpointing"
        on = self.gradient_checkpointing or getattr(self, options)
        if on and not (self.gradient_checkpointing_kwargs or getattr(self, f"{options}_kwargs")):
            setattr(self, f"{options}_kwargs", {"use_reentrant": False})
        super().__post_init__()
        kwargs = self.gradient_checkpointing_kwargs
        if on and isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant=False; got True. Reentrant "
                "checkpointing loses the gradient of the alignment loss."
            )
        for name in WEIGHTS:
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number >= 0; got {value}.")
        others = [n for n in TEACHER_WEIGHTS if n != "preference_weight" and getattr(self, n) > 0]
        if self.preference_weight > 0 and others:
            raise ValueError(
                f"preference_weight: expected no other loss with a teacher beside it; got "
                f"{', '.join(others)} > 0. Set them to 0."
            )
        self._check_packing()
        if not 0 < self.preference_beta < float("inf"):
            raise ValueError(
                f"preference_beta: expected a finite number > 0; got {self.preference_beta}."
            )
        for name, allowed in (
            ("kl_objective", KL_OBJECTIVES),
            ("hidden_objective", HIDDEN_OBJECTIVES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}; got {value!r}.")
        if self.max_skipped_steps < 1:
            raise ValueError(
                f"max_skipped_steps: expected at least 1; got {self.max_skipped_steps}."
            )

    def _check_packing(self) -> None:
        if not self.packing:
            return
        if self.pack_tokens is None or self.pack_tokens < 1:
            raise ValueError(
                f"pack_tokens: expected at least 1, because packing is on; got {self.pack_tokens}. "
                "Give the tokens that a row may have per sample of the batch size."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                "packing: expected train_sampling_strategy 'random', because rows are made by "
                f"length; got {self.train_sampling_strategy!r}. Leave one of them out."
            )
        if self.preference_weight > 0:
            raise ValueError(
                "packing: expected no preference loss, whose two answers are rows of their own; "
                f"got preference_weight {self.preference_weight:g}. Set one of them to 0 or False."
            )

    def _set_up_zero(self) -> None:
        """Join the process group and choose DeepSpeed's configuration, where options ask for it."""
        if self.deepspeed:
            self.zero_stage = stage_of(self.deepspeed, self.zero_stage)
        check_zero_options(
            self.zero_stage,
            self.teacher_placement,
            self.offload_optimizer,
            self.muon_learning_rate,
        )
        if self.deepspeed or self.zero_stage or self.teacher_placement != "replicated":
            start_zero(self.ddp_timeout)
        if self.zero_stage and not self.deepspeed:
            self.deepspeed = zero_config(self.zero_stage, self.offload_optimizer)


def check_zero_options(
    zero_stage: int,
    teacher_placement: str,
    offload_optimizer: bool,
    muon_learning_rate: float | None,
) -> None:
    """Refuse what is unknown or contradicts itself; needs neither DeepSpeed nor a launcher.

    Raises:
        ValueError: the option, what was expected, what came.
    """
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage: expected 0, 1, 2 or 3; got {zero_stage!r}.")
    if teacher_placement not in TEACHER_PLACEMENTS:
        raise ValueError(
            f"teacher_placement: expected one of {', '.join(TEACHER_PLACEMENTS)}; got "
            f"{teacher_placement!r}."
        )
    if offload_optimizer and not zero_stage:
        raise ValueError(
            "offload_optimizer: expected zero_stage 1, 2 or 3, which keeps optimizer states; got "
            "0. Give a stage, or leave the option out."
        )
    if muon_learning_rate is not None and zero_stage:
        raise ValueError(
            "muon_learning_rate: expected zero_stage 0, because Muon needs whole matrices and ZeRO "
            f"shards them; got {zero_stage}. Use AdamW, or zero_stage 0."
        )
