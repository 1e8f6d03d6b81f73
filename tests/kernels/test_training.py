"""A tiny LLaVA student is trained with backend="triton" and with the reference: the same losses.

Tolerance. Training amplifies rounding, so step by step the losses of two correct implementations
drift apart. The error budget of tests/numerics.py is applied to whole runs: against the same run in
float64, the losses of `triton` up to a step may be off by at most GRADIENT (3) times what those of
the reference in the same dtype are off by, plus FLOOR of the dtype; and never by more than LIMIT of
the loss, so that a reference that drifts cannot excuse anything. A gradient of the alignment loss
that is wrong by a thousandth is outside of this after 3 steps.
"""

import pytest
import torch
import torch.nn.functional as F
from cdfast_kernels import available_backends

from tests.kernels.on_device import DEVICE
from tests.numerics import FLOOR, GRADIENT

REASON = available_backends()["triton"]
runs = pytest.mark.skipif(REASON is not None, reason=f"triton backend: {REASON}")

# Largest relative difference of a loss from the float64 run: 4 times that of the reference after
# 100 steps on a CPU (5.4e-6 in float32, 1.1e-2 in bfloat16).
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
TOKENS = 72  # two key tiles, the second one mostly empty
# Loss -> how many FLOORs: KL, of about 0.03 here, is a difference of log-probabilities of about 5.
PARTS = {"lm": 1, "kl": 4, "alignment": 1}


def train(backend, steps, dtype=torch.float32, device=DEVICE):
    """LM, KL and alignment losses (steps, 3), float64, of one run; bfloat16 means autocast."""
    from cdfast import VisualAttentionAligner
    from tests.cdfast.tiny_models import tiny_batch, tiny_llava, tiny_teacher

    width = torch.float64 if dtype == torch.float64 else torch.float32
    # Head size 32; GQA in the student, another number of heads in the teacher.
    teacher = tiny_teacher(layers=2, hidden=96, heads=3, kv_heads=3).to(device, width)
    student = tiny_llava(layers=2, hidden=64, heads=2, kv_heads=1).to(device, width).train()
    aligner = VisualAttentionAligner(teacher, student, layers="all", backend=backend)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 2e-4)
    losses = []
    for step in range(steps):
        batch = tiny_batch(batch=2, length=TOKENS, seed=step % 5, starts=(4, 30))
        batch = {name: x.to(device) for name, x in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].to(width)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                teacher_out, targets = aligner.teacher_forward(**batch)
            out, alignment = aligner.student_forward(targets, **batch)
        answers = batch["labels"][:, 1:] != -100
        logits = [x.logits[:, :-1][answers].to(width).log_softmax(-1) for x in (out, teacher_out)]
        kl = F.kl_div(*logits, log_target=True, reduction="batchmean")
        parts = (out.loss, kl, alignment.loss)
        (out.loss + kl + 5 * alignment.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack([x.detach().double() for x in parts]))
    return torch.stack(losses).cpu()


def drift(losses, exact):
    """Largest relative difference of each loss up to each step: (steps, 3)."""
    return ((losses - exact).abs() / exact).cummax(0).values


def check(steps, dtype):
    exact = train("reference", steps, torch.float64)
    plain, got = (drift(train(backend, steps, dtype), exact) for backend in ("reference", "triton"))
    for name, a, b in zip(PARTS, got[-1].tolist(), plain[-1].tolist()):
        print(f"{dtype}, {steps} steps, {name}: triton {a:.2e}, reference {b:.2e} off float64")
    floor = FLOOR[dtype] * torch.tensor(list(PARTS.values()))
    assert (got <= GRADIENT * plain + floor).all()
    assert float(got.max()) <= LIMIT[dtype]
    # The student learned: a run that stands still would agree with anything.
    if steps >= 50:
        first, last = exact[:5].mean(0), exact[-5:].mean(0)
        assert last[0] < 0.96 * first[0]
        assert last[2] < 0.7 * first[2]


@runs
@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.full)])
def test_same_losses_as_the_reference(steps):
    check(steps, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_losses_over_100_steps(dtype):
    check(100, dtype)
