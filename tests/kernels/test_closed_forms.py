"""The formulas of kernels/README.md that compiled backends implement, held against autograd.

G = dL/dS in closed form; the fused backward dS = P (dO V^T + G/H - (D + delta)); the modular form
dS = P G/H with dlse = -delta; and the zero sums of delta.
"""

import pytest
import torch
from cdfast_kernels import flash_attention, flash_attention_with_alignment, visual_alignment_loss
from cdfast_kernels.layout import VisualLayout

from tests.kernels.plain import OBJECTIVES, random_qkv
from tests.kernels.test_alignment import teacher_map

F64 = torch.float64


class Square:
    """A batch of two padded samples as materialised (B, H, N, N) tensors."""

    def __init__(self, seed: int, heads: int, kv_heads: int, objective: str):
        visual = torch.zeros(2, 13, dtype=torch.bool)
        visual[0, 2:5], visual[0, 8:11], visual[1, 5:12] = True, True, True
        self.layout = VisualLayout.from_mask(visual, torch.arange(13).expand(2, 13) > 0)
        self.shape, self.packed = (2, 13), False
        self.objective, self.heads, self.kv_heads = objective, heads, kv_heads
        self.q, self.k, self.v = random_qkv(self, seed, heads, kv_heads)
        self.target = teacher_map(self, seed)
        self.live = self.layout.live
        self.visible = self.layout.dense_mask()
        self.entries = self.visible & visual[:, None, :]
        self.T = self.target.to_dense()
        q, k, v = (x.detach().transpose(1, 2) for x in (self.q, self.k, self.v))
        self.kk = k.repeat_interleave(heads // kv_heads, 1)
        self.vv = v.repeat_interleave(heads // kv_heads, 1)
        self.scale = q.shape[-1] ** -0.5
        scores = (q @ self.kk.transpose(-1, -2) * self.scale).masked_fill(
            ~self.visible[:, None], -torch.inf
        )
        self.P = scores.softmax(-1).nan_to_num(0)
        self.O = self.P @ self.vv
        self.S = self.P.mean(1) * self.entries
        g = torch.Generator().manual_seed(seed)
        self.dO = torch.randn(self.O.shape, generator=g, dtype=F64) * self.live[:, None, :, None]

    def closed_form_g(self) -> torch.Tensor:
        """dL/dS for reduction "mean"."""
        s, t, e = self.S, self.T, self.entries
        n_visible = e.sum(-1)
        n_images = int((n_visible > 0).any(-1).sum())
        rows = (n_visible > 0).sum(-1)[:, None]
        w = (n_visible > 1)[..., None].double() / (rows * n_images)[..., None]
        if self.objective in ("row", "map"):
            dim = (-1,) if self.objective == "row" else (-2, -1)
            dot, ss, tt = (x.sum(dim, keepdim=True) for x in (s * t, s * s, t * t))
            g = -t / (ss * tt).sqrt() + dot / (ss * tt).sqrt() * s / ss
            g = g.nan_to_num(0) * (w if self.objective == "row" else 1 / n_images)
        elif self.objective == "mse":
            g = 2 * (s - t) / (e.sum((1, 2), keepdim=True) * n_images)
        elif self.objective == "kl":
            g = w * (-t / t.sum(-1, keepdim=True) / s + 1 / s.sum(-1, keepdim=True))
        else:
            g = torch.zeros_like(s)
            for b in range(len(s)):
                index = self.layout.visual[b].nonzero().flatten()
                a, c = s[b][index][:, index], t[b][index][:, index]
                keep = (a <= a.mean() + a.std()) & (c <= c.mean() + c.std()) & (c != 0)
                count = keep.sum(0).clamp(min=1)
                x, y = (a * keep).sum(0) / count, (c * keep).sum(0) / count
                cos = x @ y / (x.norm() * y.norm())
                column = (-y / (x.norm() * y.norm()) + cos * x / (x @ x)) / n_images
                g[b, index[:, None], index] = keep * (column / count)
        return torch.where(e, g, 0)

    def delta(self, g: torch.Tensor) -> torch.Tensor:
        return (self.P * g[:, None]).sum(-1) / self.heads

    def grads_from(self, ds: torch.Tensor):
        """dq, dk in the public layout."""
        dq = self.scale * ds @ self.kk
        dk = self.scale * ds.transpose(-1, -2) @ self.q.detach().transpose(1, 2)
        dk = dk.unflatten(1, (self.kv_heads, -1)).sum(2)
        return dq.transpose(1, 2), dk.transpose(1, 2)


HEADS = [(4, 2), (3, 3), (4, 1)]


@pytest.fixture(params=HEADS, ids=lambda h: f"H{h[0]}k{h[1]}")
def heads(request):
    return request.param


@pytest.mark.parametrize("with_out", [False, True], ids=["loss alone", "loss and out"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fused_backward(objective, with_out, heads):
    x = Square(5, *heads, objective)
    out, loss = flash_attention_with_alignment(
        x.q, x.k, x.v, x.target, x.layout, objective=objective
    )
    d_out = x.dO * with_out
    inputs = (x.q, x.k, x.v)
    got = torch.autograd.grad(
        (out, loss), inputs, (d_out.transpose(1, 2), torch.tensor(0.7, dtype=F64))
    )

    g = 0.7 * x.closed_form_g()
    d = (d_out * x.O).sum(-1)
    dp = d_out @ x.vv.transpose(-1, -2) + g[:, None] / x.heads
    ds = x.P * (dp - (d + x.delta(g))[..., None])
    dv = (x.P.transpose(-1, -2) @ d_out).unflatten(1, (x.kv_heads, -1)).sum(2).transpose(1, 2)
    for a, b in zip(got, (*x.grads_from(ds), dv)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_modular_backward(objective, heads):
    x = Square(6, *heads, objective)
    lse = flash_attention(x.q, x.k, x.v, layout=x.layout)[1].detach().requires_grad_()
    loss = visual_alignment_loss(x.q, x.k, lse, x.target, x.layout, objective=objective)
    dq, dk, dlse = torch.autograd.grad(loss, (x.q, x.k, lse))
    g = x.closed_form_g()
    want = (*x.grads_from(x.P * g[:, None] / x.heads), -x.delta(g))
    for a, b in zip((dq, dk, dlse), want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_delta_sums_to_zero(objective, backend, exact_dtype, heads):
    """Over heads for row and kl, over heads and rows for map and pooled; dlse = -delta."""
    x = Square(7, *heads, objective)
    q, k, v = (y.detach().to(exact_dtype) for y in (x.q, x.k, x.v))
    lse = flash_attention(q, k, v, layout=x.layout, backend=backend)[1].requires_grad_()
    target = teacher_map(x, 7, exact_dtype)
    loss = visual_alignment_loss(
        q, k, lse, target, x.layout, objective=objective, reduction="sum", backend=backend
    )
    (dlse,) = torch.autograd.grad(loss, lse)
    if objective == "mse":
        assert dlse.any()
        return
    total = dlse.sum(1) if objective in ("row", "kl") else dlse.sum((1, 2))
    tolerance = 1e-12 if exact_dtype == torch.float64 else 1e-5
    assert float(total.abs().max()) <= tolerance * float(dlse.abs().max())
