"""What DeepSpeed really allocates on each of two ranks: python -m tests.distributed.state_script F

Under torchrun, for ZeRO 1, 2 and 3: a tiny student takes a step in bfloat16 and every rank writes
the bytes of its parameters, gradients and optimizer states to FOLDER/<rank>.json.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from cdfast.adapters import vision_tower
from cdfast.metrics import Throughput, mark_engine_step
from tests.cdfast.tiny_models import tiny_batch, tiny_llava
from tests.distributed.step_script import leave

BUCKET, PERSISTENT = 10_000, 100


def student():
    model = tiny_llava().to(torch.bfloat16)
    vision_tower(model)[2].requires_grad_(False)
    return model


def bytes_of(tensors):
    """Each storage once: partitions are views of flat buffers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def gradient_bytes(optimizer, model, stage):
    if stage == 3:
        return bytes_of([optimizer.grad_partitions_flat_buffer])
    if stage == 2:
        owned = [g for group in optimizer.averaged_gradients.values() for g in group or []]
        return sum(g.numel() * g.element_size() for g in owned)
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def measure(stage):
    model = student()
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest}], 1e-3)
    zero = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENT}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    clock = Throughput(
        tiny_llava(), None, teacher_logits=False, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    mark_engine_step(engine, clock)
    batch = tiny_batch(batch=2, padding=None)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    clock.begin_step()
    clock.mark("student")
    gradients = []
    for last in (False, True):  # two micro-batches, as accelerate runs them
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        engine.backward(engine(**batch, use_cache=False).loss)
        gradients.append(gradient_bytes(engine.optimizer, model, stage))
    engine.step()
    clock.end_step()
    inner = engine.optimizer
    masters = (
        inner.fp32_partitioned_groups_flat if stage == 3 else inner.single_partition_of_fp32_groups
    )
    moments = [v for s in inner.optimizer.state.values() for v in s.values() if v.numel() > 1]
    if stage == 3:
        shards = [p.ds_tensor for p in model.parameters()]
        gathered = [p.data for p in model.parameters() if p.ds_persist]
        parameters = sum(t.numel() * t.element_size() for t in shards)
        parameters += sum(t.numel() * t.element_size() for t in gathered)
    else:
        parameters = bytes_of(model.parameters())
    return {
        "parameters": parameters,
        # Stage 1 keeps all of them until it reduces after the last micro-batch.
        "gradients": gradients[0 if stage == 1 else 1],
        "optimizer": bytes_of(masters) + bytes_of(moments),
        "marks": [phase for phase, _ in clock._marks],
    }


def main(folder):
    deepspeed.init_distributed("gloo", verbose=False)
    found = {stage: measure(stage) for stage in (1, 2, 3)}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
