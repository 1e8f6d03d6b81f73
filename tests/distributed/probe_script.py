"""Train with and without evaluation; run under torchrun.

`torchrun ... -m tests.distributed.probe_script FOLDER SETUP` writes FOLDER/ends.pt: of either run
the log of every rank and the trained weights.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from cdfast import DistillationConfig, DistillationTrainer
from cdfast.adapters import assemble_student, set_trainable, share_vision_tower
from cdfast.collator import VisionTextCollator
from cdfast.data import load_dataset
from cdfast.engine import release_engine, unsharded_loading
from cdfast.miniature.suites import miniature_suite
from cdfast.probes import Probe, samples_with_image
from tests.cdfast import photo_setup
from tests.cdfast.tiny_models import sharpen
from tests.distributed.step_script import leave, trained_weights, zero_options

SETUPS = {
    "ddp": {},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    # As DeepSpeed keeps small parameters by default: gathered once, in an evaluation or not.
    "zero3, small parameters kept": {"zero_stage": 3},
    "zero3, sharded teacher": {"zero_stage": 3, "teacher_placement": "sharded"},
}
STEPS = 3


def run(folder, given, probe):
    """Trainer of one run, trained."""
    processor = photo_setup.make_processor()
    tokenizer = processor.tokenizer
    with unsharded_loading():
        teacher = sharpen(photo_setup.llava(tokenizer, seed=1, layers=5, hidden=48))
        torch.manual_seed(2)
        small = Qwen2ForCausalLM(photo_setup.text_config(tokenizer, layers=3, hidden=32))
        student = sharpen(assemble_student(teacher, small, taf=True))
    share_vision_tower(teacher, student)
    set_trainable(student, projector=True, language_model=True)
    photos = load_dataset(folder / "photos.json", photo_setup.PHOTO_FOLDER, processor)
    values = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True} if probe else {}
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=STEPS,
            learning_rate=1e-2,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            layers="all",
            **values,
            **given,
        ),
        train_dataset=photos,
        # Two samples, one of them without an image: each rank evaluates another kind.
        eval_dataset=torch.utils.data.Subset(photos, [0, 3]),
        data_collator=VisionTextCollator(tokenizer.pad_token_id),
        probe=Probe(miniature_suite("validation", 1, 1), samples_with_image(photos, 5), processor),
    )
    trainer.train()
    return trainer


def main(folder, setup):
    options = SETUPS[setup]
    if setup != "zero3, small parameters kept":
        options = zero_options(options)
    processes = int(os.environ["WORLD_SIZE"])
    ends = {}
    for probe in (False, True):
        trainer = run(folder, options, probe)
        logs = [None] * processes
        torch.distributed.all_gather_object(logs, trainer.state.log_history)
        weights = trained_weights(trainer.model)
        ends["probed" if probe else "plain"] = {"logs": logs, "weights": weights}
        for engine in (trainer.model_wrapped, trainer.teacher):
            release_engine(engine)
    if int(os.environ["RANK"]) == 0:
        torch.save(ends, folder / "ends.pt")
    leave()


if __name__ == "__main__":
    photo_folder = Path(sys.argv[1])
    main(photo_folder, sys.argv[2])
