"""The preference loss: values and gradients in float64, and Liger's KTO where it is the same."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

from cdfast import preference
from cdfast.preference import answer_log_probs, kto_pair_sum, larger_reward_sum, reference_kl

PAIRS, LENGTH, WIDTH, VOCAB, BETA = 3, 9, 6, 23, 0.1
EXACT = {"rel": 1e-10, "abs": 1e-12}


def normal(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def answers(seed=0):
    """Labels of chosen answers, then of rejected ones: 1 to 4 tokens from position 3 on."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((2 * PAIRS, LENGTH), -100)
    for row in range(2 * PAIRS):
        size = 1 + row % 4
        labels[row, 3 : 3 + size] = torch.randint(VOCAB, (size,), generator=generator)
    return labels


def student():
    hidden = normal(2 * PAIRS, LENGTH, WIDTH, seed=1).requires_grad_()
    return hidden, normal(VOCAB, WIDTH, seed=2).requires_grad_()


def plain_log_probs(hidden, weight, labels):
    """One token after another, with all logits."""
    log_probs = (hidden @ weight.T).log_softmax(-1)
    return torch.stack(
        [
            sum(log_probs[b, n - 1, labels[b, n]] for n in range(LENGTH) if labels[b, n] != -100)
            for b in range(len(labels))
        ]
    )


def plain_loss(ratios):
    """The text of the module, pair by pair."""
    chosen, rejected = ratios[:PAIRS], ratios[PAIRS:]
    kl_chosen = max(0.0, chosen.mean().item())
    kl_rejected = max(0.0, rejected.mean().item())
    total = 0.0
    for c, r in zip(chosen, rejected):
        total = total + (1 - 1 / (1 + torch.exp(-BETA * (c - kl_rejected)))) / 2
        total = total + (1 - 1 / (1 + torch.exp(-BETA * (kl_chosen - r)))) / 2
    return total


def sums(ratios):
    chosen, rejected = ratios.chunk(2)
    return torch.stack([chosen.sum(), rejected.sum(), torch.tensor(1.0 * len(chosen))])


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_log_probs_and_gradients_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(preference, "CHUNK", chunk)
    leaves, labels = student(), answers()
    coefficients = normal(2 * PAIRS, seed=3)
    got = answer_log_probs(*leaves, labels)
    want = plain_log_probs(*leaves, labels)
    assert got.tolist() == pytest.approx(want.tolist(), **EXACT)
    ours = torch.autograd.grad(got @ coefficients, leaves)
    theirs = torch.autograd.grad(want @ coefficients, leaves)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_log_prob_of_a_row_without_an_answer_is_zero():
    hidden, weight = student()
    labels = answers()
    labels[1] = -100
    got = answer_log_probs(hidden, weight, labels)
    assert got[1] == 0
    assert (got[[0, 2, 3, 4, 5]] < 0).all()
    nothing = answer_log_probs(hidden, weight, torch.full_like(labels, -100))
    assert nothing.tolist() == [0.0] * len(labels)
    nothing.sum().backward()
    assert not weight.grad.any()


def test_log_probs_are_summed_in_float32_for_half_precision():
    hidden, weight = (leaf.detach().bfloat16() for leaf in student())
    assert answer_log_probs(hidden, weight, answers()).dtype == torch.float32


@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0], ids=["KL clamped", "mixed", "KL above 0"])
def test_loss_and_gradient(shift):
    ratios = (normal(2 * PAIRS, seed=4, scale=8.0) + shift).requires_grad_()
    got = kto_pair_sum(ratios, reference_kl(sums(ratios)[None]), BETA)
    want = plain_loss(ratios)
    assert got.item() == pytest.approx(want.item(), **EXACT)
    ours, theirs = (torch.autograd.grad(loss, ratios)[0] for loss in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert (ours[:PAIRS] < 0).all()
    assert (ours[PAIRS:] > 0).all()


def test_a_student_that_is_its_teacher_has_half_the_largest_loss():
    ratios = torch.zeros(2 * PAIRS)
    assert kto_pair_sum(ratios, reference_kl(sums(ratios)[None]), BETA) == PAIRS / 2


def test_extreme_ratios_stay_finite():
    ratios = torch.tensor([1e6, -1e6, -1e6, 1e6]).requires_grad_()
    loss = kto_pair_sum(ratios, torch.zeros(2), BETA)
    loss.backward()
    assert loss.item() == 1.0
    assert ratios.grad.isfinite().all()


def test_kl_is_a_mean_over_the_pairs_of_all_ranks():
    ranks = torch.tensor([[6.0, -1.0, 1.0], [3.0, -8.0, 2.0], [0.0, 0.0, 0.0]])
    assert reference_kl(ranks).tolist() == [3.0, 0.0]
    assert reference_kl(torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_a_rank_that_is_not_finite_does_not_spoil_the_others():
    ranks = torch.tensor([[float("nan"), 1.0, 2.0], [3.0, 5.0, 1.0]])
    assert reference_kl(ranks).tolist() == [3.0, 5.0]


def test_larger_reward_counts_pairs():
    ratios = torch.tensor([1.0, 2.0, 3.0, 0.5, 2.0, 4.0])
    assert larger_reward_sum(ratios) == 1


def test_liger_kto_is_the_same_given_kl():
    """Each half of the pairs in a call of its own: Liger takes one KL for all answers."""
    hidden, weight = (leaf.detach().float().requires_grad_() for leaf in student())
    teacher_hidden = normal(2 * PAIRS, LENGTH, WIDTH + 2, seed=5).float()
    teacher_weight = normal(VOCAB, WIDTH + 2, seed=6).float()
    labels = answers()
    ratios = answer_log_probs(hidden, weight, labels)
    ratios = ratios - answer_log_probs(teacher_hidden, teacher_weight, labels)
    kl = reference_kl(sums(ratios)[None])
    assert (kl > 0).any()
    ours = kto_pair_sum(ratios, kl, BETA)

    liger = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True, compiled=False)
    theirs = torch.zeros(())
    targets = labels.roll(-1, dims=1)
    for half, chosen in ((slice(0, PAIRS), True), (slice(PAIRS, None), False)):
        loss, _ = liger(
            hidden[half],
            weight,
            targets[half],
            preference_labels=torch.full((PAIRS,), chosen),
            ref_input=teacher_hidden[half],
            ref_weight=teacher_weight,
            kl=kl[1] if chosen else kl[0],
        )
        theirs = theirs + PAIRS * loss / 2
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(loss, [hidden, weight]) for loss in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
