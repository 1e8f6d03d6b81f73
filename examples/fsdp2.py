"""The aligner beside torch FSDP2: the student is sharded, the teacher is whole on every rank.

    torchrun --nproc-per-node 2 examples/fsdp2.py

It distils cdfast's miniature; hf_loop.py says what to change for models of your own. Losses are
those of one process on the whole batch, for any number of ranks. In bfloat16 give fully_shard
mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16).
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast import VisualAttentionAligner
from cdfast.data import VisionTextCollator, encode
from cdfast.synthetic import SceneDataset, build_student, teacher_path

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()  # nccl for GPUs, gloo for CPUs
rank, ranks = dist.get_rank(), dist.get_world_size()
STEPS, BATCH = 8, 4 * ranks  # samples of all ranks together

processor = AutoProcessor.from_pretrained(teacher_path())
teacher = AutoModelForImageTextToText.from_pretrained(teacher_path(), dtype=torch.float32)
teacher, student = teacher.to(device).eval(), build_student().to(device).train()
aligner = VisualAttentionAligner(teacher, student, preset="paper")
for layer in student.get_decoder().layers:
    fully_shard(layer)
fully_shard(student)
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
scenes = SceneDataset(size=STEPS * BATCH, turns_mix={"vqa": 1})
collate = VisionTextCollator(processor.tokenizer.pad_token_id)
for step in range(STEPS):
    mine = range(step * BATCH + rank, (step + 1) * BATCH, ranks)
    batch = collate([encode(processor, scenes[i]) for i in mine])
    batch = {name: v.to(device) for name, v in batch.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        _, targets = aligner.teacher_forward(**batch)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    dist.all_reduce(tokens)  # answer tokens on all ranks: LM is the sum over its own, divided by it
    output, alignment = aligner.student_forward(targets, **batch, num_items_in_batch=tokens)
    samples = torch.tensor(alignment.count, device=device)
    dist.all_reduce(samples)  # samples with an image on all ranks
    shares = torch.stack([output.loss, alignment.sum / samples.clamp(min=1)])
    optimizer.zero_grad()
    (shares.sum() * ranks).backward()  # FSDP takes the mean of the gradients over ranks
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).full_tensor()
    optimizer.step()
    dist.all_reduce(losses := shares.detach())
    if rank == 0:
        lm, align = losses.tolist()
        print(f"step {step}: LM {lm:.6f}, alignment {align:.6f}, gradient norm {norm:.6f}")
dist.destroy_process_group()
