"""keep_alignment: activation recomputation repeats everything but the operators of the package.

The cases of `triton` run in the interpreter (TRITON_INTERPRET=1) or on a GPU.
"""

import pytest
import torch
from cdfast_kernels import (
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    keep_alignment,
    library_calls,
    visual_alignment_loss,
    visual_attention_map,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tests.kernels.plain import make_case, random_qkv

REASON = available_backends()["triton"]
runs = pytest.mark.skipif(REASON is not None, reason=f"triton backend: {REASON}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The forward passes of triton_ops.
FORWARDS = ("attn_fwd", "alignment_fwd")


class Forwards:
    """Counts calls of a forward pass, and tells which tensors of the first are still in memory."""

    def __init__(self, function):
        self.function, self.calls, self.storages = function, 0, []

    def __call__(self, *args):
        self.calls += 1
        outputs = self.function(*args)
        self.storages.append([StorageWeakRef(x.untyped_storage()) for x in outputs])
        return outputs

    def alive(self):
        return [not storage.expired() for storage in self.storages[0]]


def make_layer(backend, form):
    """(loss of two layers, leaves): projections, attention with its loss, output projection."""
    case = make_case("left", seed=2, length=20)
    q, k, v = (x.to(DEVICE) for x in random_qkv(case, 2, dtype=torch.float32))
    layout = case.layout.to(DEVICE)
    lse = flash_attention(q, k, v, layout=layout, backend="reference")[1]
    target = visual_attention_map(q, k, 0.9 * lse, layout, backend="reference")
    g = torch.Generator().manual_seed(0)
    weight = (0.3 * torch.randn(32, 32, generator=g)).to(DEVICE).requires_grad_()

    def layer(x):
        q, k, v = x @ weight, (x @ weight)[..., ::2, :], x[..., 1::2, :] @ weight
        if form == "fused":
            out, loss = flash_attention_with_alignment(q, k, v, target, layout, backend=backend)
        else:
            out, lse = flash_attention(q, k, v, layout=layout, backend=backend)
            aligned = "reference" if backend == "sdpa" else backend
            loss = visual_alignment_loss(q, k, lse, target, layout, backend=aligned)
        return out @ weight, loss

    return layer, (q.detach().requires_grad_(), weight)


def train(layer, leaves, context_fn, counted=()):
    """Loss and gradients of two layers, each recomputed in the backward pass; and which tensors of
    the counted forwards are alive before that."""
    options = {} if context_fn is None else {"context_fn": context_fn}
    hidden, total = leaves[0], 0.0
    for _ in range(2):
        hidden, loss = checkpoint(layer, hidden, use_reentrant=False, **options)
        total = total + loss
    total = total + hidden.square().mean()
    alive = [forwards.alive() for forwards in counted]
    return (total.detach(), *torch.autograd.grad(total, leaves)), alive


@runs
@pytest.mark.parametrize("form", ["fused", "modular"])
def test_the_kernels_run_once(form, monkeypatch):
    """With the policy two forward launches for two layers, and out, LSE, G and row scale stay in
    memory after the forward pass; without it four, and nothing stays. The gradients are equal."""
    from cdfast_kernels import triton_ops

    layer, leaves = make_layer("triton", form)
    results = []
    for context_fn, calls, stays in ((keep_alignment, 2, True), (None, 4, False)):
        with monkeypatch.context() as patch:
            counted = [Forwards(getattr(triton_ops, name)) for name in FORWARDS]
            for name, forwards in zip(FORWARDS, counted):
                patch.setattr(triton_ops, name, forwards)
            result, (attention, (_, *alignment)) = train(layer, leaves, context_fn, counted)
            results.append(result)
        assert [forwards.calls for forwards in counted] == [calls, calls]
        assert [*attention, *alignment] == [stays] * 4
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_attention_of_a_library_runs_once(monkeypatch):
    layer, leaves = make_layer("sdpa", "modular")
    expected, _ = train(layer, leaves, None)
    forward, backward = library_calls.LIBRARIES["sdpa"]
    for context_fn, calls in ((keep_alignment, 2), (None, 4)):
        counted = Forwards(forward)
        monkeypatch.setitem(library_calls.LIBRARIES, "sdpa", (counted, backward))
        got, _ = train(layer, leaves, context_fn)
        assert counted.calls == calls
        for a, b in zip(got, expected):
            assert torch.equal(a, b)


def test_the_reference_is_repeated_with_equal_results(monkeypatch):
    from cdfast_kernels import ops

    layer, leaves = make_layer("reference", "fused")
    expected, _ = train(layer, leaves, None)
    counted = Forwards(ops.flash_attention_with_alignment_ref)
    monkeypatch.setattr(ops, "flash_attention_with_alignment_ref", counted)
    got, _ = train(layer, leaves, keep_alignment)
    assert counted.calls == 4
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=runs)])
def test_compiled(backend):
    layer, leaves = make_layer(backend, "modular" if backend == "sdpa" else "fused")
    expected, _ = train(layer, leaves, None)

    def loss(x, weight):
        out, loss = checkpoint(layer, x, use_reentrant=False, context_fn=keep_alignment)
        out, more = checkpoint(layer, out, use_reentrant=False, context_fn=keep_alignment)
        return loss + more + out.square().mean()

    total = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    got = total.detach(), *torch.autograd.grad(total, leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
