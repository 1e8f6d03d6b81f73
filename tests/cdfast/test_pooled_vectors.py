"""Pooled attention vectors: value and gradients against plain autograd in float64."""

import pytest
import torch
from cdfast_kernels import (
    VisualLayout,
    flash_attention,
    visual_alignment_loss,
    visual_attention_map,
)

from cdfast.stored_targets.pooled_vectors import (
    PooledVectors,
    pool_map,
    pooled_vector_loss,
    pooled_vectors,
)

B, N, HEADS, KV_HEADS, WIDTH = 4, 14, 4, 2, 6
SCALE = 0.7


def layout():
    """Left padding, two images, one visual token, none; turns that see their own image alone."""
    visual = torch.zeros(B, N, dtype=torch.bool)
    visual[0, 5:11] = True
    visual[1, 1:4] = visual[1, 7:10] = True
    visual[2, 3] = True
    live = torch.ones_like(visual)
    live[0, :3] = False
    live[1, 12:] = False
    segments = torch.zeros(B, N, dtype=torch.int64)
    segments[1, 5:] = 1
    segments[1, 8:] = 2
    return VisualLayout.from_segments(segments, visual, live)


def inputs(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, N, HEADS, WIDTH), (B, N, KV_HEADS, WIDTH)]
    q, k = (torch.randn(s, generator=generator, dtype=torch.float64) * 1.5 for s in shapes)
    _, lse = flash_attention(q, k, k, softmax_scale=SCALE, layout=layout(), backend="reference")
    return [x.to(dtype).requires_grad_() for x in (q, k, lse)]


def plain_square(q, k, lse, b, seen):
    """S of one sample on its visual square, entry by entry of the definition."""
    at = layout().visual[b].nonzero().flatten()
    keys = [k[b, at, h // (HEADS // KV_HEADS)] for h in range(HEADS)]
    probs = [(SCALE * q[b, at, h] @ keys[h].T - lse[b, h, at][:, None]).exp() for h in range(HEADS)]
    return torch.where(seen[b, at][:, at], sum(probs) / HEADS, 0)


def plain_vectors(q, k, lse):
    lay = layout()
    seen, vectors = lay.visible(), []
    for b in range(B):
        s = plain_square(q, k, lse, b, seen)
        if s.numel():
            fixed = s.detach()
            std = fixed.std() if fixed.numel() > 1 else 0.0
            keep = (fixed <= fixed.mean() + std) & (fixed != 0)
            assert (
                fixed.numel() == 1 or keep.sum() < (fixed != 0).sum()
            )  # the filter does something
            vectors.append((s * keep).sum(0) / keep.sum(0).clamp(min=1))
    return torch.cat(vectors)


def plain_loss(q, k, lse, target):
    per_sample, used = [], 0
    s = plain_vectors(q, k, lse)
    for n in layout().visual.sum(1).tolist():
        a, b = s[used : used + n], target[used : used + n]
        used += n
        cosine = (a @ b) / (a.norm() * b.norm()) if n > 1 else 1.0 + 0.0 * a.sum()
        per_sample.append(1 - cosine)
    return torch.stack(per_sample)


def teacher_map(seed=5):
    q, k, lse = (x.detach() for x in inputs(seed))
    return visual_attention_map(q, k, lse, layout(), softmax_scale=SCALE, backend="reference")


def test_vectors_and_their_gradients():
    tensors = inputs()
    got, want = pooled_vectors(*tensors, layout(), SCALE), plain_vectors(*tensors)
    assert torch.allclose(got, want, rtol=1e-12)
    weights = torch.randn(len(want), generator=torch.Generator().manual_seed(1)).double()
    got, want = (torch.autograd.grad((x * weights).sum(), tensors) for x in (got, want))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=1e-10, atol=1e-13)
        assert w.abs().max() > 1e-4


def test_gradcheck():
    tensors = inputs()
    assert torch.autograd.gradcheck(
        lambda *x: pooled_vectors(*x, layout(), SCALE), tensors, fast_mode=True
    )


def test_one_head_at_a_time_is_the_same(monkeypatch):
    tensors = inputs()
    whole = torch.autograd.grad(pooled_vectors(*tensors, layout(), SCALE).square().sum(), tensors)
    monkeypatch.setattr("cdfast.stored_targets.pooled_vectors._ENTRIES", 1)
    single = torch.autograd.grad(pooled_vectors(*tensors, layout(), SCALE).square().sum(), tensors)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(whole, single))


def test_loss_and_its_gradients_through_attention():
    """q, k and the LSE that attention returns: the gradient of the whole path."""
    q, k, _ = inputs()
    target = pool_map(teacher_map())

    def loss_of(function):
        _, lse = flash_attention(q, k, k, softmax_scale=SCALE, layout=layout(), backend="reference")
        return function(q, k, lse)

    got = loss_of(lambda *x: pooled_vector_loss(*x, target, layout(), SCALE))
    want = loss_of(lambda *x: plain_loss(*x, target.data))
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    assert (got[:2] > 0.01).all()
    assert (got[2:] == 0).all()
    got, want = (torch.autograd.grad(x.sum(), (q, k)) for x in (got, want))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=1e-9, atol=1e-12)


def test_map_of_a_teacher_is_pooled_as_the_students_attention():
    vectors = pooled_vectors(*inputs(5), layout(), SCALE).detach()
    sizes = layout().visual.sum(1).tolist()
    pooled = pool_map(teacher_map()).data
    for want, got in zip(vectors.split(sizes), pooled.split(sizes)):
        assert not len(want) or torch.allclose(got, want / want.max(), rtol=1e-12)


def test_same_filter_in_both_maps_is_the_ops_pooled_objective():
    """A student close to its teacher: where the filters agree, so do the losses."""
    q, k = (x.detach() for x in inputs(5)[:2])
    near = q + 0.01 * torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).double()
    _, near_lse = flash_attention(
        near, k, k, softmax_scale=SCALE, layout=layout(), backend="reference"
    )
    options = {"softmax_scale": SCALE, "backend": "reference"}
    exact = visual_alignment_loss(
        near,
        k,
        near_lse,
        teacher_map(),
        layout(),
        objective="pooled",
        reduction="none",
        **options,
    )
    got = pooled_vector_loss(near, k, near_lse, pool_map(teacher_map()), layout(), SCALE)
    assert (exact[:2] > 1e-8).all()
    assert torch.allclose(got, exact, rtol=1e-6)


def test_other_filters_make_another_loss_than_pooled():
    """What "approximate" means: the two objectives are not the same function."""
    q, k, lse = (x.detach() for x in inputs())
    options = {"softmax_scale": SCALE, "backend": "reference", "objective": "pooled"}
    exact = visual_alignment_loss(q, k, lse, teacher_map(), layout(), reduction="none", **options)
    got = pooled_vector_loss(q, k, lse, pool_map(teacher_map()), layout(), SCALE)
    assert (exact - got).abs().max() > 1e-3


def test_nothing_left_by_the_filter_is_a_loss_of_one_without_a_gradient():
    tensors = inputs()
    target = PooledVectors(torch.zeros(13, dtype=torch.float64))
    loss = pooled_vector_loss(*tensors, target, layout(), SCALE)
    assert loss.tolist() == [1, 1, 0, 0]
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss.sum(), tensors))


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_what_is_not_a_number_reaches_the_loss(where):
    q, k, lse = (x.detach().clone() for x in inputs())
    target = pool_map(teacher_map())
    if where == "student":
        q[0, 6, 0, 0] = torch.nan
    else:
        target.data[1] = torch.nan
    loss = pooled_vector_loss(q, k, lse, target, layout(), SCALE)
    assert loss[0].isnan()
    assert loss[1:].isfinite().all()


def test_half_precision_inputs_are_widened():
    half = inputs(dtype=torch.bfloat16)
    got = pooled_vectors(*half, layout(), SCALE)
    want = pooled_vectors(*(x.detach().double() for x in half), layout(), SCALE)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=1e-5)
    grads = torch.autograd.grad(got.sum(), half)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3


def test_vectors_of_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"each of the 13 visual tokens.*got 12"):
        pooled_vector_loss(*inputs(), PooledVectors(torch.ones(12)), layout(), SCALE)
