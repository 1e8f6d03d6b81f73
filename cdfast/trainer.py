"""DistillationTrainer: transformers.Trainer whose loss is LM + KL + visual attention alignment, or
another sum of the terms in terms.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback

from cdfast.aligner import VisualAttentionAligner, build_layout, image_token_id
from cdfast.arguments import DistillationConfig
from cdfast.attention import keep_alignment_in_layers, use_cdfast_attention
from cdfast.distill import LossOptions, StudentTask, TeacherTask, add_task, loss_rows
from cdfast.engine import is_sharded, place_teacher, require_stage
from cdfast.hidden_projector import add_hidden_projector, load_hidden_projector, split_state
from cdfast.losses import answer_rows
from cdfast.metrics import Throughput, ThroughputCallback, shorten_progress
from cdfast.nonfinite import LOG_KEY, NonFiniteSteps
from cdfast.optim import muon_with_adamw
from cdfast.packing import PackedRows, check_packable, row_loader, sample_lengths, sample_name
from cdfast.preference import kto_pair_sum, larger_reward_sum, reference_kl
from cdfast.probes import undisturbed
from cdfast.resumable import ResumableTrainer
from cdfast.similarity import model_inputs
from cdfast.stored_targets.files import StoredTargets
from cdfast.terms import (
    ANSWER_ROWS,
    IMAGE_SAMPLES,
    LOSS_NAMES,
    PAIRS,
    PREFERENCE_ACCURACY,
    TEACHER_WEIGHTS,
    TERMS,
    VISUAL_ROWS,
)
from cdfast.watch import note

# What has a count of its own and is logged as a mean over it.
_MEANS = (*LOSS_NAMES, PREFERENCE_ACCURACY)


class LayoutCollator:
    """Adds the visual layout to a collated batch, on the host, where building it costs no sync."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], token_id: int):
        self.collator, self.token_id = collator, token_id

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = dict(self.collator(samples))
        batch["layout"] = build_layout(batch, self.token_id)
        return batch


class KeepAlignment(TrainerCallback):
    """Puts `keep_alignment` on aligned layers once Trainer has turned gradient checkpointing on."""

    def __init__(self, aligner: VisualAttentionAligner):
        self.aligner = aligner

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        keep_alignment_in_layers(unwrap_model(model), self.aligner.student_layers)


class RequireStage(TrainerCallback):
    """Ends a run whose student is not run by the ZeRO stage that was asked for."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_stage(self.trainer.model_wrapped, args.zero_stage)


class DistillationTrainer(ResumableTrainer):
    """Distils `teacher` into `model`; everything else as users know it from transformers.Trainer.

    Args:
        model: student, a Hugging Face vision-language model or a PEFT model around one.
        teacher: teacher model on the same tokenizer and visual tokens, or the `teacher` of an
            earlier trainer; None trains with the LM loss alone (then the weights of the other
            losses must be 0).
        aligner: an aligner of your own; by default made from the options of `args`.
        args: `DistillationConfig`.
        stored_targets: in place of a teacher: targets computed ahead of time (cdfast.targets). The
            training set is then a `WithStoredTargets`, and `aligner` is given where attention is
            aligned. Evaluation has the LM loss alone.
        probe: measures the student in each evaluation, see `cdfast.probes.Probe`: called on every
            rank with this trainer, returns numbers that become metrics of the evaluation.
        data_collator: returns input_ids, attention_mask, labels (-100 outside answers, unshifted)
            and image inputs; optionally segment_ids with position_ids.
        Others: see transformers.Trainer.

    Where both models have the same frozen vision encoder, `cdfast.adapters.share_vision_tower`
    before this makes it run once per batch.

    With hidden_weight > 0 the student gets a submodule (hidden_projector.py) that what this trainer
    saves as a model leaves out.

    Raises:
        ValueError: a weight that needs a teacher without one; a model that cannot be aligned.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: DistillationConfig,
        teacher: PreTrainedModel | nn.Module | None = None,
        aligner: VisualAttentionAligner | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        probe: Callable[[DistillationTrainer], dict[str, float]] | None = None,
        stored_targets: StoredTargets | None = None,
        **kwargs: Any,
    ):
        if data_collator is None:
            raise ValueError(
                "data_collator: expected one that returns input_ids, attention_mask, labels and "
                "image inputs; got None. Use cdfast.collator.VisionTextCollator."
            )
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics: expected None, because evaluation computes losses and no logits; "
                "got a function. Evaluate answers with probe=cdfast.probes.Probe(...)."
            )
        wanted = [n for n in TEACHER_WEIGHTS if getattr(args, n) > 0]
        if wanted and teacher is None and stored_targets is None:
            raise ValueError(
                f"teacher: expected a model, because {' and '.join(wanted)} > 0; got None. Give a "
                "teacher, or set the weights to 0."
            )
        if stored_targets is not None and args.alignment_weight > 0 and aligner is None:
            raise ValueError(
                "aligner: expected one beside stored_targets, because alignment_weight > 0; got "
                "None. Make it with cdfast.stored_targets.plan.stored_aligner."
            )
        student = unwrap_model(model)
        use_cdfast_attention(student)
        if args.packing:
            _check_packing(data_collator, student, teacher)
        if teacher is not None:
            teacher_model = unwrap_model(teacher)
            teacher_model.requires_grad_(False).eval()
            use_cdfast_attention(teacher_model)
            add_task(teacher_model)
            if args.hidden_weight > 0:
                width = teacher_model.config.get_text_config(decoder=True).hidden_size
                add_hidden_projector(student, width, args.seed)
            if args.alignment_weight > 0 and aligner is None:
                aligner = VisualAttentionAligner(
                    teacher_model,
                    student,
                    preset=args.preset,
                    matching=args.matching,
                    layers=args.layers,
                    objective=args.objective,
                    layer_reduction=args.layer_reduction,
                    backend=args.backend,
                )
        self.aligner = aligner if args.alignment_weight > 0 else None
        self.losses = LossOptions(
            frozenset(n.removesuffix("_weight") for n in wanted) - {"alignment", "preference"},
            kl_objective=args.kl_objective,
            hidden_objective=args.hidden_objective,
            unshifted_kl_mask=args.unshifted_kl_mask,
            lm=args.lm_weight > 0,
        )
        self._grams: dict[str, Tensor] = {}
        self.probe, self.stored_targets = probe, stored_targets
        add_task(student)
        collator = LayoutCollator(data_collator, image_token_id(student))
        super().__init__(model=model, args=args, data_collator=collator, **kwargs)
        if self.aligner is not None and args.keep_alignment:
            self.add_callback(KeepAlignment(self.aligner))
        self.nonfinite = NonFiniteSteps(args.process_index, args.max_skipped_steps)
        self.add_callback(self.nonfinite)
        # compute_loss returns sums over global counts, so the parent must not divide again.
        self.model_accepts_loss_kwargs = True
        self.add_callback(RequireStage(self))
        # What runs the teacher: the model, or its engine where it is sharded.
        self.teacher: nn.Module | None = None
        if teacher is not None and wanted:
            self.teacher = place_teacher(teacher, args.teacher_placement, args.device)
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.throughput = Throughput(
            student,
            teacher_model if self.teacher is not None else None,
            teacher_logits=args.kl_weight > 0 or args.preference_weight > 0,
            device=args.device,
            dtype=half or student.dtype,
            losses=self.losses.used,
        )
        self.add_callback(ThroughputCallback(self.throughput, self.accelerator))
        shorten_progress(self.callback_handler)
        self._sums_since_log: dict[str, Tensor] = {}
        self._sums_before_step: dict[str, Tensor] = {}
        self._steps_since_log = 0
        self._packed_rows: PackedRows | None = None
        self._row_tokens = torch.zeros(2, dtype=torch.int64)  # tokens and rows since the last log
        self._evaluated = torch.zeros(())

    # -- loss --------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of one global step and its counts over all ranks, see `_counts`."""
        note(step=self.state.global_step + 1, phase="data")
        self.throughput.begin_step()
        self._sums_before_step = dict(self._sums_since_log)
        self._steps_since_log += 1
        batches: list[Any] = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        self.throughput.mark("other")
        if not batches:
            self.throughput.end_step()
            return batches, None
        if self.args.packing:
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            self._row_tokens += torch.tensor([tokens, len(batches)])
        each = [self._counts(batch) for batch in batches]
        for batch, (lm, kl, *_) in zip(batches, each):
            if "pairs" in batch:  # both models make logits of both answers
                lm = kl = answer_rows(batch["labels"]).sum()
            self.throughput.count(batch, lm, kl)
        counts = torch.stack(each).sum(0).to(device)
        return batches, self.accelerator.gather(counts).view(-1, len(_MEANS)).sum(0)

    def _counts(self, batch: Mapping[str, Any]) -> Tensor:
        """(len(_MEANS),) what each sum over this batch is a sum over."""
        labels, layout, pairs = batch["labels"], batch["layout"], batch.get("pairs", 0)
        answers = answer_rows(labels[: pairs or None]).sum()  # of pairs: the chosen ones
        visual = loss_rows("visual", labels, layout).sum()
        # new_full, not new_tensor, which would wait for the device.
        images, both = (answers.new_full((), n) for n in (layout.num_image_samples, pairs))
        counts = {ANSWER_ROWS: answers, VISUAL_ROWS: visual, IMAGE_SAMPLES: images, PAIRS: both}
        found = {term.name: counts[term.counted] for term in TERMS} | {PREFERENCE_ACCURACY: both}
        found["kl"] = loss_rows(self.losses.rows("kl"), labels, layout).sum()
        return torch.stack([found[name] for name in _MEANS])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sums of this micro-batch over the counts of the whole global step.

        DDP averages gradients over ranks, so the loss is multiplied by their number: the gradient
        is then that of the global sum over the global count.
        """
        assert not isinstance(num_items_in_batch, int)  # get_batch_samples returns a tensor
        training = num_items_in_batch is not None
        counts = num_items_in_batch
        if counts is None:
            counts = self._counts(inputs).to(self.args.device)
        aligner = self._calibrated_aligner(inputs)
        pairs = self._pairs(inputs)
        given = {k: v for k, v in model_inputs(inputs).items() if k != "labels"}
        common = (inputs["labels"], inputs["layout"])
        teacher = None
        if self.teacher is not None:
            self._begin("teacher", training)
            sharded = self.args.teacher_placement != "replicated"
            asked = TeacherTask(
                *common, aligner, self.losses, sharded, pairs, backend=self.args.backend
            )
            with torch.no_grad():
                self.teacher(**given, task=asked)
            teacher = asked.output
        elif self.stored_targets is not None and (training or "stored_targets" in inputs):
            teacher = self.stored_targets.output(inputs.get("stored_targets"), inputs["layout"])
        self._begin("student", training)
        zero = self.args.zero_stage > 0
        task = StudentTask(
            *common,
            teacher,
            aligner,
            self.losses,
            zero,
            self._grams,
            pairs,
            backend=self.args.backend,
        )
        sums: dict[str, Tensor] = model(**given, task=task)
        if pairs:
            sums = self._preference(sums)
        means = {
            name: sums[name].float() / counts[i].clamp_min(1)
            for i, name in enumerate(_MEANS)
            if name in sums
        }
        if model.training:
            for name, value in means.items():
                before = self._sums_since_log.get(name, torch.zeros_like(value))
                self._sums_since_log[name] = before + value.detach()
        weighted = [getattr(self.args, t.weight) * means[t.name] for t in TERMS if t.name in means]
        total = torch.stack(weighted).sum()
        loss = total * self.accelerator.num_processes if training else total
        if training:
            loss = self.nonfinite.check(loss, means, teacher, inputs.get("sample_ids"))
        return (loss, {"loss": total, **means}) if return_outputs else loss

    def _pairs(self, inputs: Mapping[str, Any]) -> int:
        """The number of pairs of answers in a batch, 0 without a preference loss."""
        pairs = inputs.get("pairs", 0)
        if bool(pairs) != (self.args.preference_weight > 0):
            wanted, got = ("no pairs", "some") if pairs else ("pairs of answers", "none")
            raise ValueError(
                f"preference_weight: expected {wanted} in a batch, because it is "
                f"{self.args.preference_weight:g}; got {got}. Pairs are samples of "
                "cdfast.pairs.encode_pair, such as those of load_dataset(..., pairs=True)."
            )
        return pairs

    def _preference(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """`sums` with the preference loss in place of the ratios that it is made of.

        A collective: KL is a mean over the pairs of all ranks, of this forward pass and not of the
        other accumulation steps, whose ratios are gone or still to come.
        """
        ratios = sums.pop("log_ratios").float()
        chosen, rejected = ratios.detach().chunk(2)
        own = torch.stack([chosen.sum(), rejected.sum(), chosen.new_full((), len(chosen))])
        kl = reference_kl(self.accelerator.gather(own[None]).view(-1, len(own)))
        sums["preference"] = kto_pair_sum(ratios, kl, self.args.preference_beta)
        sums[PREFERENCE_ACCURACY] = larger_reward_sum(ratios)
        return sums

    def _begin(self, phase: str, training: bool) -> None:
        """For a message about a lost rank, and for the shares of the time."""
        note(phase=phase)
        if training:
            self.throughput.mark(phase)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's: forward and backward of a micro-batch, and under DeepSpeed its step."""
        loss = super().training_step(*args, **kwargs)
        steps_next = self.accelerator.sync_gradients and not self.is_deepspeed_enabled
        self.throughput.mark("optimizer" if steps_next else "other")
        return loss

    def _calibrated_aligner(self, inputs: dict[str, Any]) -> VisualAttentionAligner | None:
        """The aligner, after adaptive matching has chosen; None before any rank has had an image.

        All ranks align the layers that the first rank with an image has chosen.
        """
        aligner = self.aligner
        if aligner is None or aligner.matches is not None:
            return aligner
        images = inputs["layout"].num_image_samples
        if any(is_sharded(m) for m in (aligner.teacher, aligner.student)):
            # Sharded models run on all ranks or on none: choose when every rank has an image.
            images = min(gather_object([images]))
        if images:
            aligner.calibrate(**inputs)
        chosen = [matches for matches in gather_object([aligner.matches]) if matches]
        aligner.matches = chosen[0] if chosen else None
        return aligner if chosen else None

    # -- packing -----------------------------------------------------------------------------------

    @property
    def packed_rows(self) -> PackedRows:
        """With packing: which samples share a row. Samples are measured when it is first asked for.

        Raises:
            ValueError: no data set, or one that cannot be packed.
        """
        if self._packed_rows is None:
            assert self.args.pack_tokens is not None
            data: Any = self.train_dataset
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._packed_rows = PackedRows(
                sample_lengths(data),
                self.args.per_device_train_batch_size * self.args.pack_tokens,
                seed=seed,
                processes=self.args.world_size,
                names=functools.partial(sample_name, data),
            )
        return self._packed_rows

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, or with packing a loader of rows, which go to the ranks in turn."""
        if not self.args.packing:
            return super().get_train_dataloader()
        collator: Any = self.data_collator
        pack = LayoutCollator(collator.collator.pack, collator.token_id)
        data: Any = self.train_dataset
        return self.accelerator.prepare(row_loader(data, self.packed_rows, pack, self.args))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.packing:
            # Behind a loader that skips batches neither Trainer nor accelerate finds the sampler.
            self.packed_rows.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    # -- what users of Trainer see -----------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer, or Muon with AdamW if `muon_learning_rate` is set."""
        if self.optimizer is None and self.args.muon_learning_rate is not None:
            assert self.model is not None
            self.optimizer = muon_with_adamw(
                self.model,
                lr=self.args.learning_rate,
                muon_lr=self.args.muon_learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
        return super().create_optimizer(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Where Trainer reads the gradient's norm, before the optimizer's step: the last moment to
        skip it."""
        note(phase="optimizer")
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.nonfinite.skip(self, model, norm):
            self._sums_since_log = self._sums_before_step
            self._steps_since_log -= 1
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds loss_<name> of each term used, and preference_accuracy: unweighted means over the
        steps since the last.

        Skipped steps are in no mean, and counted in skipped_steps.
        """
        if "loss" in logs:
            means = {
                name: self.accelerator.gather(value.reshape(1)).sum().item() / self._steps_since_log
                for name, value in self._sums_since_log.items()
            }
            logs |= {_logged(name): mean for name, mean in means.items()}
            if self.nonfinite.since_log:
                # Trainer's own mean counts the skipped steps.
                logs["loss"] = sum(
                    getattr(self.args, t.weight) * means[t.name] for t in TERMS if t.name in means
                )
                if not means:
                    del logs["loss"]
            if self.nonfinite.total:
                logs[LOG_KEY] = self.nonfinite.total
            self._sums_since_log = {}
            self._steps_since_log = self.nonfinite.since_log = 0
            logs |= self.throughput.read(self.accelerator.gather)
            if self.args.packing:
                own = self._row_tokens[None].to(self.args.device)
                tokens, rows = self.accelerator.gather(own).view(-1, 2).sum(0).tolist()
                self._row_tokens = torch.zeros(2, dtype=torch.int64)
                logs["row_fill"] = tokens / max(rows * self.packed_rows.capacity, 1)
        if any(name.endswith("_probe_seconds") for name in logs):
            # Trainer's rates would count the probe's time.
            for name in [n for n in logs if n.endswith(("samples_per_second", "steps_per_second"))]:
                del logs[name]
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluation by loss only: logits of prompt rows are never computed."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, means = self.compute_loss(model, inputs, return_outputs=True)
        counts = self._counts(inputs).to(loss.device).double()
        zero = counts.new_zeros(())
        sums = torch.stack([means.get(n, zero).double() * c for n, c in zip(_MEANS, counts)])
        self._evaluated = self._evaluated + torch.stack([sums, counts])
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; training goes on as if there had been no evaluation."""
        note(phase="evaluation")
        assert self.model is not None
        with undisturbed(self.model, self.args.device):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with losses over the whole set: sums over counts, whatever the batches.

        On several ranks the last batches are filled up with samples from the front, which then
        count twice, so that all ranks take the same number of steps (accelerate's even batches).
        In an evaluation, not in a prediction, with what the probe measures.
        """
        self._evaluated = torch.zeros(2, len(_MEANS), dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        totals = self.accelerator.gather(self._evaluated[None]).sum(0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = dict(zip(_MEANS, (totals[0] / totals[1].clamp_min(1)).tolist()))
        weights = {n: getattr(self.args, f"{n}_weight") for n in LOSS_NAMES}
        distilled = [t.name for t in TERMS if t.needs_teacher and self.teacher]
        used = ["lm", *(name for name in distilled if weights[name] > 0)]
        losses = {f"{prefix}_loss": sum(weights[n] * means[n] for n in used)}
        shown = [*used, *([PREFERENCE_ACCURACY] if "preference" in used else [])]
        losses |= {f"{prefix}_{_logged(n)}": means[n] for n in shown}
        if self.probe is not None and prefix.startswith("eval"):
            losses |= {f"{prefix}_{name}": value for name, value in self.probe(self).items()}
        return output._replace(metrics={**(output.metrics or {}), **losses})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel):
            _load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_hidden_projector(unwrap_model(model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best, model = self.state.best_model_checkpoint, self.model
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if best and isinstance(model, PreTrainedModel) and not sharded:
            _load_weights(model, best)
        else:
            super()._load_best_model()
        if best and not sharded and model is not None:
            load_hidden_projector(unwrap_model(model), Path(best))


def _check_packing(collator: Any, student: PreTrainedModel, teacher: nn.Module | None) -> None:
    if not hasattr(collator, "pack"):
        raise ValueError(
            "data_collator: expected one with a method `pack`, because packing is on; got "
            f"{type(collator).__name__}. Use cdfast.collator.VisionTextCollator."
        )
    for model in (student, teacher):
        if model is not None:
            check_packable(unwrap_model(model))


def _logged(name: str) -> str:
    return name if name == PREFERENCE_ACCURACY else f"loss_{name}"


def _load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Put a checkpoint's weights into `model`.

    Trainer loads the file's names as they are and ignores those that do not fit. Several models
    (LLaVA among them) are saved under other names than they have in memory, so it would restore
    nothing and go on; from_pretrained translates the names.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    _, kept = split_state(model.state_dict())
    model.load_state_dict({**saved.state_dict(), **kept})


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an engine or a PEFT model, or the model itself."""
    inner: Any = getattr(model, "module", model)
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"model: expected a transformers.PreTrainedModel, or a PEFT model around one; got "
            f"{type(model).__name__}."
        )
    return inner
