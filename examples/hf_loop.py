"""The aligner in a plain Hugging Face loop: loss = LM + KL + alignment.

    python examples/hf_loop.py

It distils cdfast's miniature: a trained teacher, an untrained student, scenes with one question.
For models of your own change what "real" stands beside; both must share tokens and processor.
"""

import torch
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdfast import VisualAttentionAligner
from cdfast.data import VisionTextCollator, encode
from cdfast.synthetic import SceneDataset, build_student, teacher_path

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
name = teacher_path()  # real: "llava-hf/llava-onevision-qwen2-7b-ov-hf"
processor = AutoProcessor.from_pretrained(name)
# real: dtype=torch.bfloat16
teacher = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).to(device).eval()
# real: AutoModelForImageTextToText.from_pretrained("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
student = build_student().to(device).train()
# real: samples = cdfast.data.load_dataset("train.json", "folder/of/images", processor)
scenes = SceneDataset(size=176, turns_mix={"vqa": 1})
samples = [encode(processor, scene) for scene in scenes]


def collate(samples):  # input_ids, attention_mask, labels, pixel_values
    batch = VisionTextCollator(processor.tokenizer.pad_token_id)(samples)
    return {name: v.to(device) for name, v in batch.items() if isinstance(v, torch.Tensor)}


held_out = collate(samples[:16])
batches = DataLoader(samples[16:], batch_size=8, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
aligner = VisualAttentionAligner(teacher, student, preset="paper")
print("similarity before, by layer:", aligner.similarity(**held_out))
for step, batch in enumerate(batches):
    with torch.no_grad():
        teacher_out, targets = aligner.teacher_forward(**batch)
    student_out, alignment = aligner.student_forward(targets, **batch)
    predicts = batch["labels"][:, 1:] != -100  # the positions before answer tokens
    p, q = (log_softmax(o.logits[:, :-1][predicts], -1) for o in (teacher_out, student_out))
    kl = kl_div(q, p, log_target=True, reduction="batchmean")
    loss = student_out.loss + kl + alignment.loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        lm, kl, align = student_out.loss.item(), kl.item(), alignment.loss.item()
        print(f"step {step}: LM {lm:.3f}, KL {kl:.3f}, alignment {align:.3f}")
print("similarity after, by layer:", aligner.similarity(**held_out))
