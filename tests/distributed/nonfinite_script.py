"""Two ranks whose second has a sample that makes its teacher's output infinite.

`torchrun ... -m tests.distributed.nonfinite_script FOLDER ddp|zero1|zero2|zero3` writes
FOLDER/<case>.pt: each rank's losses, weights after every step, and messages.
"""

import logging
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config

import cdfast.distill
from cdfast import DistillationConfig, DistillationTrainer
from cdfast.adapters import vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.nonfinite import NonFiniteError
from tests.cdfast.samples import TinySamples
from tests.cdfast.tiny_models import tiny_llava, tiny_teacher
from tests.distributed.step_script import InOrder, leave

BAD = 6
GOOD, BAD_STEP = [[0, 1, 2, 4], [5, 8, 9, 10], [12, 13, 14, 0]], [1, 2, 4, BAD]
# Two ranks and two micro-batches of one sample: rank 0 has samples 0 and 2 of a step, rank 1 the
# others; the bad one is in the last micro-batch of rank 1, or, in "first", in its first.
STEPS = {
    "skipped": [GOOD[0], BAD_STEP, GOOD[1], GOOD[2]],
    "first": [GOOD[0], [1, BAD, 2, 4], GOOD[1], GOOD[2]],
    "not taken": [*GOOD, GOOD[0]],
    "too many": [GOOD[0], BAD_STEP, BAD_STEP, GOOD[1]],
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 1000,
        "reduce_bucket_size": 10000,
    },
}


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


class Weights(TrainerCallback):
    """A number for each parameter after every step, gathered from its shards."""

    def __init__(self, zero3):
        self.zero3, self.after = zero3, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        sums = []
        for parameter in model.parameters():
            if self.zero3:
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    sums.append(parameter.detach().double().square().sum().item())
            else:
                sums.append(parameter.detach().double().square().sum().item())
        self.after.append(sums)


def poison():
    step, compute_loss = cdfast.distill.teacher_step, DistillationTrainer.compute_loss
    now = {"bad": False}

    def watched(self, model, inputs, *args, **kwargs):
        now["bad"] = f"tiny, sample {BAD}" in inputs["sample_ids"]
        return compute_loss(self, model, inputs, *args, **kwargs)

    def poisoned(*args):
        output = step(*args)
        if now["bad"]:
            output.hidden["answer"][0, 0] = torch.inf
        return output

    DistillationTrainer.compute_loss = watched
    cdfast.distill.teacher_step = poisoned


def zero(stage):
    return {**DEEPSPEED, "zero_optimization": {**DEEPSPEED["zero_optimization"], "stage": stage}}


def run_case(case, folder, stage):
    unset_hf_deepspeed_config()  # the last case's would shard this student while it is made
    student = tiny_llava()
    vision_tower(student)[2].requires_grad_(False)
    trainer = InOrder(
        model=student,
        teacher=tiny_teacher(),
        args=DistillationConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=len(STEPS[case]),
            learning_rate=0.01,
            lr_scheduler_type="linear",
            warmup_steps=2,
            weight_decay=0.1,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            layers="all",
            max_skipped_steps=2,
            deepspeed=zero(stage) if stage else None,
        ),
        train_dataset=torch.utils.data.Subset(TinySamples(16), [i for s in STEPS[case] for i in s]),
        data_collator=VisionTextCollator(0),
    )
    assert trainer.is_deepspeed_enabled == bool(stage)
    weights, messages = Weights(stage == 3), Messages()
    trainer.add_callback(weights)
    logging.getLogger("cdfast").addHandler(messages)
    error = None
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = str(raised)
    logging.getLogger("cdfast").removeHandler(messages)
    log = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    result = {"log": log, "weights": weights.after, "said": messages.texts, "error": error}
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, result)
    if trainer.is_world_process_zero():
        torch.save(gathered, folder / f"{case}.pt")


def main(folder, how):
    torch.set_num_threads(1)
    stage = 0 if how == "ddp" else int(how.removeprefix("zero"))
    if stage:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    poison()
    for case in STEPS:
        run_case(case, folder, stage)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
