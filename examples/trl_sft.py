"""The aligner in TRL's SFTTrainer, with TRL's own data format and collator for images.

    python examples/trl_sft.py

It distils cdfast's miniature; hf_loop.py says what to change for models of your own. The data set
is any of TRL's with images: prompt and completion, as here, or messages.
"""

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports the use of its trainers otherwise

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from cdfast import VisualAttentionAligner
from cdfast.synthetic import SceneDataset, build_student, teacher_path


class AlignedSFTTrainer(SFTTrainer):  # set its aligner before train()
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            _, targets = self.aligner.teacher_forward(**inputs)
        inputs["alignment"] = context = self.aligner.student_context(targets)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        alignment = self.aligner.alignment(context).loss
        if model.training and num_items_in_batch is not None:  # then Trainer does not divide
            alignment = alignment / self.current_gradient_accumulation_steps
        return (result[0] + alignment, result[1]) if return_outputs else result + alignment


args = SFTConfig(
    output_dir="runs/trl_sft",
    max_steps=20,
    per_device_train_batch_size=8,
    learning_rate=2e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    max_length=None,  # images are never cut
    bf16=torch.cuda.is_available(),
)
teacher = AutoModelForImageTextToText.from_pretrained(teacher_path(), dtype=torch.float32)
teacher, student = teacher.to(args.device).eval(), build_student().to(args.device)
processor = AutoProcessor.from_pretrained(teacher_path())
rows = [
    {"image": Image.fromarray(s.images[0]), "prompt": s.messages[:1], "completion": s.messages[1:]}
    for s in SceneDataset(size=176, turns_mix={"vqa": 1})
]
train, held_out = Dataset.from_list(rows[16:]), Dataset.from_list(rows[:16])
trainer = AlignedSFTTrainer(student, args, None, train, held_out, processor)
trainer.aligner = VisualAttentionAligner(teacher, student, preset="paper")
batch = next(iter(trainer.get_eval_dataloader()))
print("similarity before, by layer:", trainer.aligner.similarity(**batch))
trainer.train()
print("similarity after, by layer:", trainer.aligner.similarity(**batch))
