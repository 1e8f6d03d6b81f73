"""ResumableTrainer: transformers.Trainer whose checkpoints are whole, verified and plain data."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from cdfast.arguments import DistillationConfig
from cdfast.checkpoint import (
    commit,
    deferred_errors,
    newest_checkpoint,
    require_same_layout,
    rotate,
    safe_pickles,
    verify,
)
from cdfast.engine import full_state_dict
from cdfast.hidden_projector import has_hidden_projector, save_hidden_projector, split_state
from cdfast.manifest import PREFIX
from cdfast.storage import (
    STAGING,
    CheckpointError,
    discard,
    prepare_run_folder,
    rank_and_world,
    together,
)
from cdfast.streaming import StreamedDataset

logger = logging.getLogger(__name__)

ALIGNMENT_FILE = "alignment.json"
STREAM_FILE = "data_stream.json"


class ResumableTrainer(Trainer):
    """Saves by staging, manifest and one rename; resumes from what is verified.

    What a checkpoint holds is Trainer's and DeepSpeed's own; here is when it counts as one.
    """

    args: DistillationConfig
    aligner: Any = None
    _staging: Path | None = None

    # -- saving ------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, which writes into a staging folder; see `cdfast.checkpoint.commit`."""
        step, is_first = self.state.global_step, rank_and_world()[0] == 0
        folder = Path(self._get_output_dir(trial))
        target, staging = folder / f"{PREFIX}{step}", folder / f"{STAGING}{PREFIX}{step}"
        write = super()._save_checkpoint
        # An upload must take the finished folder.
        push, self.args.push_to_hub = self.args.push_to_hub, False
        self._staging = staging
        try:
            together(lambda: staging.mkdir(parents=True) if is_first else None, staging)
            together(lambda: write(model, trial), staging)
            together(lambda: self._name_best_checkpoint(target, staging), staging)
            commit(staging / target.name, target, step=step, zero_stage=self.args.zero_stage)
        finally:
            self._staging, self.args.push_to_hub = None, push
            if is_first:
                discard(staging)
        if push:
            self._push_from_checkpoint(str(target))
        if is_first:
            try:
                rotate(target, self.args.save_total_limit, self.state.best_model_checkpoint)
            except OSError as error:  # the new checkpoint is whole: no reason to stop the run
                logger.warning(f"{folder}: an old checkpoint cannot be deleted: {error}")

    def _name_best_checkpoint(self, target: Path, staging: Path) -> None:
        """Trainer looks for the best checkpoint beside the one it writes: alone in its folder."""
        if self.state.best_global_step:
            best = target.with_name(f"{PREFIX}{self.state.best_global_step}")
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staging / target.name / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; the weights are gathered where they are sharded."""
        if not _internal_call:
            return super().save_model(output_dir)
        assert output_dir is not None
        state = full_state_dict(cast(nn.Module, self.model))
        together(lambda: self._save(output_dir, state_dict=state), Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        projector: dict[str, Any] = {}
        model = cast(nn.Module, self.model)
        if self.args.should_save and has_hidden_projector(model):
            state = full_state_dict(model) if state_dict is None else state_dict
            state_dict, projector = split_state(state or {})
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        save_hidden_projector(projector, folder)
        # A pickle that nothing reads.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.aligner is not None:
            path = folder / ALIGNMENT_FILE
            path.write_text(json.dumps(self.aligner.state_dict(), indent=2) + "\n")
        if self._stream is not None:
            order = json.dumps(self._order(self._stream), indent=2)
            (folder / STREAM_FILE).write_text(order + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        write = super()._save_optimizer_and_scheduler
        if not self.is_deepspeed_enabled:
            return together(lambda: write(output_dir), Path(output_dir))
        engine: Any = self.model_wrapped

        def write_shards() -> None:
            with deferred_errors(engine):
                write(output_dir)
            if self.args.should_save:
                (Path(output_dir) / "latest").write_text(f"global_step{engine.global_steps}")

        together(write_shards, Path(output_dir))

    # -- resuming ----------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's; what it resumes from is verified first.

        Args:
            resume_from_checkpoint: True: the newest whole checkpoint in output_dir, or afresh if
                there is none; or the path of one.
            Others: see transformers.Trainer.train.

        Raises:
            CheckpointError: the run folder cannot be used, the named checkpoint is not whole, or it
                is of another number of processes or ZeRO stage.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.save_strategy != "no":
            if self.args.save_on_each_node:
                raise CheckpointError(
                    "save_on_each_node: expected false, because a checkpoint is one folder on "
                    "storage that all machines share; got true."
                )
            prepare_run_folder(folder)
        checkpoint: Path | None = None
        if resume_from_checkpoint is True:
            checkpoint = newest_checkpoint(folder, self.args.zero_stage)
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            problem = verify(checkpoint, self.args.zero_stage)
            if problem:
                raise CheckpointError(
                    f"{checkpoint}: cannot be resumed from: {problem}. Give another checkpoint, or "
                    "True for the newest whole one."
                )
            require_same_layout(checkpoint, self.args.zero_stage)
        if checkpoint and self.aligner is not None and (checkpoint / ALIGNMENT_FILE).exists():
            self.aligner.load_state_dict(json.loads((checkpoint / ALIGNMENT_FILE).read_text()))
        if self._stream is not None:
            # It begins at its place by itself; Trainer would decode all that comes before.
            self.args.ignore_data_skip = True
            if checkpoint:
                _require_same_order(checkpoint, self._order(self._stream))
        if checkpoint:
            self.args.eval_on_start = False  # the start is in the log of the run that is resumed
        return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with safe_pickles(self.args.zero_stage):
            return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # A run that was stopped after its last step has none left; Trainer would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        if self._stream is not None:
            done = self.state.global_step * self.args.gradient_accumulation_steps
            self._stream.begin_at(done)
        return super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer counts from where it was resumed, unless it reads all data again up to there.
        if self._stream is not None:
            self.state.epoch = self.state.global_step / self.state.max_steps
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    @property
    def _stream(self) -> StreamedDataset | None:
        data = self.train_dataset
        return data if isinstance(data, StreamedDataset) else None

    def _order(self, stream: StreamedDataset) -> dict[str, Any]:
        steps = self.args.gradient_accumulation_steps
        return {**stream.order(), "gradient_accumulation_steps": steps}

    def get_train_dataloader(self) -> Any:
        """As Trainer's; a stream is split over ranks already, and keeps off the global generator.

        Trainer would give all ranks the first rank's batches, or every rank a part of its part.
        """
        if self._stream is None:
            return super().get_train_dataloader()
        args = self.args
        made_for = self._stream.made_for()
        own = {
            "batch_size": args.per_device_train_batch_size,
            "workers": args.dataloader_num_workers,
            "rank": args.process_index,
            "world_size": args.world_size,
        }
        if made_for != own:
            raise ValueError(
                f"train_dataset: expected a StreamedDataset made for {own}, which are the "
                f"trainer's; got one for {made_for}. Make it with these."
            )
        return DataLoaderShard(
            self._stream,
            device=args.device,
            batch_size=args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
            generator=torch.Generator(),
        )

    def _load_best_model(self) -> None:
        with safe_pickles(self.args.zero_stage):
            super()._load_best_model()


def _require_same_order(checkpoint: Path, now: dict[str, Any]) -> None:
    """Refuse to resume a stream whose samples would come in another order."""
    path = checkpoint / STREAM_FILE
    then = json.loads(path.read_text()) if path.exists() else {}
    for name in now:
        if then.get(name) != now[name]:
            raise CheckpointError(
                f"{checkpoint}: {name} of the streamed data was {then.get(name)}; got {now[name]}. "
                "The order of samples depends on it: give the same, or start afresh."
            )
