"""The logit loss over a teacher's k most likely tokens, against plain float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cdfast.stored_targets.top_k import TopK, top_k_kl_sum, top_k_of

VOCAB, SHARED, WIDTH, ROWS = 41, 37, 8, 7


def case(rows=ROWS, seed=0):
    """Hidden states and weight of a student, then of a teacher of fewer tokens; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student = [normal(rows, WIDTH).requires_grad_(), normal(VOCAB, WIDTH).requires_grad_()]
    return student, (normal(rows, WIDTH + 2), normal(SHARED, WIDTH + 2))


def plain(hidden, weight, teacher_hidden, teacher_weight, k):
    """Sum over rows of the divergence over the k most likely tokens and all others as one."""
    total = 0.0
    for h, t in zip(hidden, teacher_hidden):
        q, p = (weight[:SHARED] @ h).softmax(0), (teacher_weight @ t).softmax(0)
        kept = p.argsort(descending=True)[:k]
        others = torch.ones(SHARED, dtype=torch.bool).index_fill(0, kept, False)
        total = total + (p[kept] * (p[kept] / q[kept]).log()).sum()
        if others.any():
            total = total + p[others].sum() * (p[others].sum() / q[others].sum()).log()
    return total


@pytest.mark.parametrize("k", [1, 5, SHARED - 1, SHARED])
def test_value_and_gradients(k):
    student, teacher = case()
    got = top_k_kl_sum(*student, top_k_of(*teacher, SHARED, k))
    want = plain(*student, *teacher, k)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    for g, w in zip(torch.autograd.grad(got, student), torch.autograd.grad(want, student)):
        assert torch.allclose(g, w, rtol=1e-10, atol=1e-12)
        assert w.abs().max() > 0.01


def test_gradcheck():
    student, teacher = case(rows=3)
    top = top_k_of(*teacher, SHARED, 4)
    assert torch.autograd.gradcheck(lambda h, w: top_k_kl_sum(h, w, top), student)


def test_whole_vocabulary_is_the_full_kl_and_fewer_tokens_are_a_lower_bound():
    student, teacher = case()
    log_q = (student[0] @ student[1][:SHARED].T).log_softmax(-1)
    log_p = (teacher[0] @ teacher[1].T).log_softmax(-1)
    full = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    values = [top_k_kl_sum(*student, top_k_of(*teacher, SHARED, k)) for k in (1, 4, 16, 30, SHARED)]
    # The k + 1 outcomes of fewer tokens are made of those of more: data processing.
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[0] < 0.9 * full
    assert values[-1].item() == pytest.approx(full.item(), rel=1e-12)
    got, want = (torch.autograd.grad(x, student, retain_graph=True) for x in (values[-1], full))
    assert all(torch.allclose(g, w, rtol=1e-10, atol=1e-12) for g, w in zip(got, want))


def test_several_chunks_of_rows_are_their_sum(monkeypatch):
    student, teacher = case(rows=20)
    top = top_k_of(*teacher, SHARED, 5)
    whole = top_k_kl_sum(*student, top)
    grads = torch.autograd.grad(whole, student)
    monkeypatch.setattr("cdfast.stored_targets.top_k._ROWS", 3)
    again = top_k_of(*teacher, SHARED, 5)
    assert torch.equal(again.indices, top.indices)
    assert torch.allclose(again.log_probs, top.log_probs)
    parts = top_k_kl_sum(*student, top)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for g, w in zip(torch.autograd.grad(parts, student), grads):
        assert torch.allclose(g, w)


def test_half_precision_chunks_are_added_in_float32(monkeypatch):
    """Many chunks are as exact as one."""
    student, teacher = case(rows=400)
    top = top_k_of(*teacher, SHARED, 5)
    want = torch.autograd.grad(top_k_kl_sum(*student, top), student)[1]
    half = [x.detach().bfloat16().requires_grad_() for x in student]
    errors = []
    for rows in (400, 4):
        monkeypatch.setattr("cdfast.stored_targets.top_k._ROWS", rows)
        got = torch.autograd.grad(top_k_kl_sum(*half, top), half)[1]
        errors.append(float((got.double() - want).norm() / want.norm()))
    assert errors[1] <= 1.5 * errors[0]


def test_soft_cross_entropy_adds_the_entropy_of_the_outcomes():
    student, teacher = case()
    top = top_k_of(*teacher, SHARED, SHARED)
    kl, soft = (top_k_kl_sum(*student, top, name) for name in ("kl", "soft_ce"))
    log_q = (student[0] @ student[1][:SHARED].T).log_softmax(-1)
    p = (teacher[0] @ teacher[1].T).softmax(-1)
    assert soft.item() == pytest.approx(-(p * log_q).sum().item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(kl, student), torch.autograd.grad(soft, student)):
        assert torch.equal(a, b)


def test_rounded_log_probabilities_are_renormalised():
    """The student that is the teacher: rounding must not make a negative divergence of 0."""
    _, teacher = case()
    top = top_k_of(*teacher, SHARED, 5)
    rounded = TopK(top.indices.int(), top.log_probs.half(), SHARED)
    student = [x.clone().requires_grad_() for x in teacher]
    loss = top_k_kl_sum(*student, rounded)
    assert 0 < loss.item() < 1e-5


def test_rows_without_an_answer_and_rows_of_other_samples():
    student, teacher = case(rows=0)
    loss = top_k_kl_sum(*student, top_k_of(*teacher, SHARED, 5))
    assert loss.item() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, student))
    with pytest.raises(ValueError, match=r"expected targets of 7 rows.*got 0 rows"):
        top_k_kl_sum(*case()[0], top_k_of(*teacher, SHARED, 5))


def test_autocast_projects_in_its_dtype():
    student, teacher = case()
    top = top_k_of(*teacher, SHARED, 5)
    single = [x.detach().float().requires_grad_() for x in student]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = top_k_kl_sum(*single, top)
    want = top_k_kl_sum(*student, top)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.02)
    assert loss.item() != pytest.approx(want.item(), rel=1e-5)
    for g, w in zip(torch.autograd.grad(loss, single), torch.autograd.grad(want, student)):
        assert (g - w).norm() < 0.03 * w.norm()
