"""The aligner in transformers.Trainer: a subclass of ten lines adds the alignment loss.

    python examples/hf_trainer.py

It distils cdfast's miniature; hf_loop.py says what to change for models and data of your own.
On several GPUs start it by torchrun or accelerate: each process trains on its share of a batch.
"""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from cdfast import VisualAttentionAligner
from cdfast.data import VisionTextCollator, encode
from cdfast.synthetic import SceneDataset, build_student, teacher_path


class AlignedTrainer(Trainer):  # set its aligner before train()
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            _, targets = self.aligner.teacher_forward(**inputs)
        context = self.aligner.student_context(targets)  # the student's layers put their loss here
        inputs = {**inputs, "alignment": context, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        alignment = self.aligner.alignment(context).loss
        if model.training and num_items_in_batch is not None:  # then Trainer does not divide
            alignment = alignment / self.current_gradient_accumulation_steps
        loss = loss + alignment
        return (loss, outputs) if return_outputs else loss


args = TrainingArguments(
    output_dir="runs/hf_trainer",
    max_steps=20,
    per_device_train_batch_size=8,
    learning_rate=2e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,  # Trainer would drop the images
)
processor = AutoProcessor.from_pretrained(teacher_path())
teacher = AutoModelForImageTextToText.from_pretrained(teacher_path(), dtype=torch.float32)
teacher, student = teacher.to(args.device).eval(), build_student().to(args.device)
scenes = SceneDataset(size=176, turns_mix={"vqa": 1})
samples = [encode(processor, scene) for scene in scenes]
collate = VisionTextCollator(processor.tokenizer.pad_token_id)
trainer = AlignedTrainer(student, args, collate, samples[16:], samples[:16])
trainer.aligner = VisualAttentionAligner(teacher, student, preset="paper")
held_out = next(iter(trainer.get_eval_dataloader()))
print("similarity before, by layer:", trainer.aligner.similarity(**held_out))
trainer.train()
print("similarity after, by layer:", trainer.aligner.similarity(**held_out))
print("held-out loss:", trainer.evaluate()["eval_loss"])
