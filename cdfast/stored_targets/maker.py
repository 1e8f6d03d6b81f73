"""From a batch of samples to the tensors that are stored of it: one forward of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from cdfast.aligner import VisualAttentionAligner
from cdfast.distill import LossOptions, TeacherTask, loss_rows, teacher_step
from cdfast.images import DataError
from cdfast.similarity import model_inputs
from cdfast.stored_targets.files import ALIGNMENT, KL, content_hash, source_hash
from cdfast.stored_targets.pooled_vectors import PooledVectors
from cdfast.stored_targets.top_k import top_k_of


@dataclass
class TargetMaker:
    """The teacher, and what is asked of it.

    Attributes:
        teacher: on `device`, with cdfast attention; `aligner` is made with it.
        losses: of all stages, "kl" among those used where one has the logit loss.
        vocabulary: tokens that teacher and student share.
        top_k: tokens kept of each row.
        dtype: of log-probabilities and vectors: float16 or float32.
        autocast: dtype of the forward under autocast; None without.
    """

    teacher: PreTrainedModel
    aligner: VisualAttentionAligner | None
    losses: LossOptions
    vocabulary: int
    top_k: int
    dtype: str
    device: torch.device
    autocast: torch.dtype | None

    def batch(self, batch: dict[str, Any], parts: set[str]) -> dict[str, Tensor]:
        """The tensors of a shard, of the samples of one batch; see files.py."""
        labels, mask, sources = batch["labels"], batch["attention_mask"].bool(), batch["sample_ids"]
        contents = [
            content_hash(ids[live], label[live])
            for ids, live, label in zip(batch["input_ids"], mask, labels, strict=True)
        ]
        rows = loss_rows(self.losses.rows("kl"), labels, batch["layout"]).sum(1)
        tensors = {
            "source": torch.tensor([source_hash(source) for source in sources]),
            "content": torch.tensor(contents),
            "answer_rows": rows.to(torch.int32),
            "visual_tokens": batch["layout"].visual.sum(1).to(torch.int32),
        }
        wanted = self.aligner if ALIGNMENT in parts else None
        losses = self.losses if KL in parts else LossOptions()
        moved = send_to_device(batch, self.device)
        inputs = {k: v for k, v in model_inputs(moved).items() if k != "labels"}
        task = TeacherTask(moved["labels"], moved["layout"], wanted, losses)
        dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = teacher_step(self.teacher, inputs, task)
        stored = getattr(torch, self.dtype)
        if output.weight is not None:
            hidden = output.hidden[losses.rows("kl")]
            top_k = top_k_of(hidden, output.weight, self.vocabulary, self.top_k)
            tensors["indices"] = top_k.indices.to("cpu", torch.int32)
            tensors["log_probs"] = top_k.log_probs.to("cpu", stored)
        if output.targets is not None:
            maps = output.targets.maps
            vectors = [maps[n] for n in sorted(maps)]
            data = [v.data for v in vectors if isinstance(v, PooledVectors)]
            tensors["vectors"] = torch.stack(data, 1).to("cpu", stored)
        _check_numbers(tensors, sources)
        return tensors


def _check_numbers(tensors: dict[str, Tensor], sources: Sequence[str]) -> None:
    """Refuse targets that are no numbers; what is less likely than float16 has is -inf."""
    for name, counts in (("log_probs", "answer_rows"), ("vectors", "visual_tokens")):
        if name in tensors:
            bad = tensors[name].isnan().any(1)
            for source, part in zip(sources, bad.split(tensors[counts].tolist()), strict=True):
                if part.any():
                    raise DataError(
                        source=source,
                        field=name,
                        expected="numbers from the teacher",
                        got="NaN",
                        remedy="give the teacher more range (--teacher-dtype float32 or bfloat16)",
                    )
