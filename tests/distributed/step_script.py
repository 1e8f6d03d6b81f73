"""Distil tiny models for a few SGD steps; run under torchrun, or called for one process.

`torchrun ... -m tests.distributed.step_script FOLDER SETUP` trains every case of a setup on the
ranks and writes FOLDER/<case>.pt: the trained weights of every rank, the log, the matched layers.
"""

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from cdfast import DistillationConfig, DistillationTrainer
from cdfast.adapters import assemble_student, set_trainable, share_vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.engine import full_state_dict, release_engine, unsharded_loading, zero_config
from tests.cdfast.samples import TinyPairs, TinySamples
from tests.cdfast.tiny_models import sharpen, tiny_language_model, tiny_teacher

GLOBAL_BATCH, STEPS = 4, 3
# Every fourth sample has no image. Here the second rank's first batch has none.
TEXT_ONLY_SECOND = [0, 1, 3, 7, 2, 4, 5, 11, 6, 8, 9, 15]
TEXT_ONLY_FIRST = [3, 7, 0, 1, 4, 5, 11, 15, 2, 6, 8, 3]
# The second batches of both ranks have none either.
TEXT_ONLY_BOTH = [0, 1, 3, 7, 3, 7, 11, 15, 4, 5, 6, 8]
PREFERENCE = {
    "preference_weight": 1.0,
    "preference_beta": 1.0,
    **dict.fromkeys(("lm_weight", "kl_weight", "alignment_weight"), 0.0),
}
# The losses of the systems that the paper compares.
SYSTEMS = {
    "hidden_weight": 1.0,
    "visual_kl_weight": 1.0,
    "relation_weight": 0.5,
    "kl_objective": "soft_ce",
}
# What a case changes. Batches are those of two ranks: one process takes the global batch at once.
CASES = {
    "plain": {"batch": 2},
    "accumulation": {"batch": 1, "accumulation": 2},
    "text only on the second rank": {"batch": 2, "order": TEXT_ONLY_SECOND},
    "text only on the first rank": {"batch": 2, "order": TEXT_ONLY_FIRST},
    "text only on both": {"batch": 2, "order": TEXT_ONLY_BOTH},
    "projector": {"batch": 2, "train": "projector", "order": TEXT_ONLY_SECOND},
    "lora": {"batch": 2, "train": "lora", "order": TEXT_ONLY_SECOND},
    "recomputation": {
        "batch": 1,
        "accumulation": 2,
        "order": [0, 3, 1, 7, 2, 4, 5, 11, 6, 8, 9, 15],
        "options": {"gradient_checkpointing": True},
    },
    "keep alignment": {
        "batch": 2,
        "order": TEXT_ONLY_SECOND,
        "options": {"gradient_checkpointing": True, "keep_alignment": True},
    },
    "adaptive": {
        "batch": 2,
        "order": TEXT_ONLY_FIRST,
        "options": {"matching": "adaptive"},
    },
    "systems": {"batch": 2, "order": TEXT_ONLY_BOTH, "options": SYSTEMS},
    "systems, lora": {
        "batch": 1,
        "accumulation": 2,
        "train": "lora",
        "order": TEXT_ONLY_SECOND,
        "options": {**SYSTEMS, "hidden_objective": "mse", "gradient_checkpointing": True},
    },
    # Six rows of about two samples: the second step has half as many as the first and the third.
    "packing": {
        "batch": 1,
        "accumulation": 2,
        "order": TEXT_ONLY_SECOND,
        "options": {"packing": True, "pack_tokens": 50},
    },
    # On pairs of answers; KL is a mean over the pairs of all ranks.
    "preference": {"batch": 2, "order": TEXT_ONLY_SECOND, "pairs": True, "options": PREFERENCE},
}


TEXT_CASES = [case for case in CASES if case.startswith("text only")]
# How the ranks share the work: options of the trainer, and the cases that are run this way.
SETUPS = {
    "ddp": ({}, list(CASES)),
    "zero1": ({"zero_stage": 1}, ["plain", "accumulation", "lora"]),
    "zero2": (
        {"zero_stage": 2, "teacher_placement": "offloaded"},
        ["plain", "accumulation", "lora", "systems", "preference", *TEXT_CASES],
    ),
    "zero3": ({"zero_stage": 3}, ["plain", "accumulation", "recomputation", "lora"]),
    "zero3, sharded teacher": (
        {"zero_stage": 3, "teacher_placement": "sharded"},
        [case for case in CASES if case != "adaptive"],
    ),
    "zero3, bfloat16": (
        {"zero_stage": 3, "teacher_placement": "sharded", "bf16": True},
        ["plain", "text only on both"],
    ),
    "zero3, adaptive": ({"zero_stage": 3, "teacher_placement": "sharded"}, ["adaptive"]),
}


class InOrder(DistillationTrainer):
    """Takes the samples as they come, so that the test knows which rank gets which."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_student(train):
    """Teacher and student that share one vision encoder, with what the case trains set."""
    with unsharded_loading():
        teacher = tiny_teacher()
        student = sharpen(assemble_student(teacher, tiny_language_model(), taf=True))
    share_vision_tower(teacher, student)
    set_trainable(student, projector=True, language_model=train == "everything")
    if train == "lora":
        torch.manual_seed(0)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            init_lora_weights=False,  # so that both factors have a gradient
            target_modules=r".*language_model.*\.(q|v|down)_proj",
            modules_to_save=[f"multi_modal_projector.linear_{n}" for n in (1, 2)],
        )
        student = get_peft_model(student, config)
    return teacher, student


def zero_options(options):
    """Options of a setup; under ZeRO-3 with every parameter sharded, however small it is."""
    if options.get("zero_stage") != 3:
        return options
    config = zero_config(3)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return {**options, "deepspeed": config}


def run_case(case, folder, processes, setup="ddp"):
    """Train one case on this process's share. Returns (weights before, weights after, trainer)."""
    chosen = CASES[case]
    batch, accumulation = chosen["batch"], chosen.get("accumulation", 1)
    if processes == 1:
        one = chosen.get("options", {}).get("packing")  # as many rows, one after another
        batch, accumulation = (1, GLOBAL_BATCH) if one else (GLOBAL_BATCH, 1)
    assert processes * batch * accumulation == GLOBAL_BATCH
    samples = (TinyPairs if chosen.get("pairs") else TinySamples)(16)
    order = chosen.get("order", range(GLOBAL_BATCH * STEPS))
    teacher, student = make_student(chosen.get("train", "everything"))
    trainer = InOrder(
        model=student,
        teacher=teacher,
        args=DistillationConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            **{
                "layers": "all",
                "alignment_weight": 2.0,
                **chosen.get("options", {}),
                **zero_options(SETUPS[setup][0]),
            },
        ),
        train_dataset=torch.utils.data.Subset(samples, list(order)),
        data_collator=VisionTextCollator(0),
    )
    assert trainer.args.world_size == processes
    before = trained_weights(student)
    trainer.train()
    return before, trained_weights(student), trainer


def trained_weights(model):
    """Whole trained weights; under ZeRO-3 on the first rank only."""
    whole = full_state_dict(model)
    if whole is None:
        return None
    return {n: whole[n].detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def main(folder, setup):
    for case in SETUPS[setup][1]:
        processes = int(os.environ["WORLD_SIZE"])
        _, after, trainer = run_case(case, folder, processes, setup)
        gathered = [None] * processes
        matches = trainer.aligner.matches if trainer.aligner else None
        torch.distributed.all_gather_object(gathered, (after, matches))
        if trainer.is_world_process_zero():
            log = [entry for entry in trainer.state.log_history if "loss" in entry]
            torch.save({"ranks": gathered, "log": log}, folder / f"{case}.pt")
        for engine in (trainer.model_wrapped, trainer.teacher):
            release_engine(engine)
    leave()


def leave():
    """End this rank when all have come here, without taking the interpreter down.

    On a busy machine a thread of gloo or DeepSpeed that asks for the interpreter in its last
    moments aborts the process ("terminate called without an active exception"; torch 2.13).
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
