"""The op alone, in a plain PyTorch loop: a small attention layer learns where a larger one looks.

    python examples/op_alone.py

Needs torch and cdfast_kernels only. For a real model, x is what enters a decoder layer and
q, k, v are the layer's own, after rotary embedding, in flash-attn's layout (batch, tokens, heads,
head size); visual is input_ids == model.config.image_token_id. On a GPU use bfloat16.
"""

import torch
from cdfast_kernels import (
    VisualLayout,
    flash_attention,
    flash_attention_with_alignment,
    visual_attention_map,
)
from torch import nn

device = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TOKENS, WIDTH, HEAD_SIZE = 4, 96, 64, 32


class QueriesKeysValues(nn.Module):
    """x (batch, tokens, width) -> q, k, v (batch, tokens, heads, head size)."""

    def __init__(self, heads, scale):
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(WIDTH, 3 * heads * HEAD_SIZE, bias=False)
        nn.init.normal_(self.linear.weight, std=scale / WIDTH**0.5)

    def forward(self, x):
        return self.linear(x).unflatten(-1, (3, self.heads, HEAD_SIZE)).unbind(2)


torch.manual_seed(0)
teacher = QueriesKeysValues(heads=8, scale=1.5).to(device)
student = QueriesKeysValues(heads=2, scale=1.0).to(device)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

visual = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
visual[:, 8:72] = True  # 64 image tokens behind 8 of text, and text behind them
mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
mask[-1, 80:] = False  # the last sample is shorter
layout = VisualLayout.from_mask(visual, mask).to(device)  # once per batch, for all layers

for step in range(101):
    x = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    with torch.no_grad():
        q, k, v = teacher(x)
        wanted, lse = flash_attention(q, k, v, layout=layout)
        target = visual_attention_map(q, k, lse, layout)  # head-mean attention on image tokens
    out, alignment = flash_attention_with_alignment(*student(x), target, layout)
    task = (out.mean(2) - wanted.mean(2)).square().mean()  # stands for the loss of your model
    optimizer.zero_grad()
    (task + alignment).backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step}: task {task.item():.3f}, alignment {alignment.item():.3f}")
