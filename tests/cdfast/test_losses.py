"""Language-model and logit losses against plain float64, and their rows by brute force."""

import pytest
import torch
import torch.nn.functional as F

from cdfast.losses import KL_ROWS as CHUNK
from cdfast.losses import answer_rows, kl_loss_sum, lm_loss_sum, next_labels, unshifted_rows

TOLERANCE = 1e-5  # relative, float32 against float64
BUDGET = 3  # times the error of eager PyTorch
WIDTH, TEACHER_WIDTH, VOCAB = 12, 20, 37


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


def student_tensors(rows, vocab=VOCAB):
    hidden, weight = normal(rows, WIDTH, seed=1), normal(vocab, WIDTH, seed=2, scale=0.5)
    return hidden.requires_grad_(), weight.requires_grad_()


def teacher_tensors(rows, vocab=VOCAB, dtype=torch.float32):
    hidden, weight = normal(rows, TEACHER_WIDTH, seed=3), normal(vocab, TEACHER_WIDTH, seed=4)
    return hidden.to(dtype), (0.5 * weight).to(dtype)


def reference(loss, *tensors):
    """Value and gradients in float64, with every logit held."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return value, torch.autograd.grad(value, leaves)


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


def plain_kl(hidden, weight, teacher_hidden, teacher_weight):
    shared = min(len(weight), len(teacher_weight))
    s = (hidden @ weight[:shared].T).log_softmax(-1)
    t = (teacher_hidden.double() @ teacher_weight[:shared].double().T).softmax(-1)
    return (t * (t.log() - s)).sum()


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, CHUNK + 77])
def test_lm_loss_and_gradients(rows):
    hidden, weight = student_tensors(rows)
    labels = torch.randint(VOCAB, (rows,), generator=torch.Generator().manual_seed(5))
    loss = lm_loss_sum(hidden, weight, labels)
    got = torch.autograd.grad(loss, [hidden, weight])

    def plain(h, w):
        return -(h @ w.T).log_softmax(-1)[torch.arange(rows), labels].sum()

    want, want_grads = reference(plain, hidden, weight)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)
    for g, w in zip(got, want_grads):
        assert relative_error(g, w) <= TOLERANCE


@pytest.mark.parametrize("rows", [1, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
@pytest.mark.parametrize(
    "vocab, teacher_vocab", [(37, 37), (37, 50), (50, 37)], ids=["equal", "teacher-more", "less"]
)
def test_kl_loss_and_gradients(rows, vocab, teacher_vocab):
    hidden, weight = student_tensors(rows, vocab)
    teacher = teacher_tensors(rows, teacher_vocab)
    loss = kl_loss_sum(hidden, weight, *teacher)
    got = torch.autograd.grad(loss, [hidden, weight])
    want, want_grads = reference(lambda h, w: plain_kl(h, w, *teacher), hidden, weight)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)
    for g, w in zip(got, want_grads):
        assert relative_error(g, w) <= TOLERANCE
    # Tokens that only the student has get no gradient.
    assert not got[1][min(vocab, teacher_vocab) :].any()


def test_kl_loss_is_of_the_teacher_given_the_student_and_not_the_reverse():
    hidden, weight = student_tensors(9)
    teacher = teacher_tensors(9)
    loss = kl_loss_sum(hidden, weight, *teacher).item()
    reverse = plain_kl(teacher[0].double(), teacher[1].double(), hidden.detach(), weight.detach())
    assert abs(loss - reverse.item()) > 0.05 * loss


def test_kl_loss_of_equal_distributions_is_zero():
    hidden, weight = student_tensors(9)
    loss = kl_loss_sum(hidden, weight, hidden.detach(), weight.detach())
    assert abs(loss.item()) < 1e-5
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(loss, [hidden, weight]))


def close_pair(rows, dtype):
    """Student and teacher whose distributions are nearly equal, as at the end of a training."""
    hidden, weight = normal(rows, 64, seed=1), normal(500, 64, seed=2, scale=0.2)
    other = hidden + 0.1 * normal(rows, 64, seed=3)
    return [x.to(dtype) for x in (hidden, weight, other, weight)]


def eager_kl(hidden, weight, teacher_hidden, teacher_weight):
    s = F.linear(hidden, weight).float().log_softmax(-1)
    t = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    return (t.exp() * (t - s)).sum()


@pytest.mark.parametrize("rows", [40, 2 * CHUNK + 77])
@pytest.mark.parametrize("form", ["bf16", "autocast"])
def test_kl_loss_in_half_precision_is_as_exact_as_eager_with_a_float32_softmax(form, rows):
    tensors = close_pair(rows, torch.float32 if form == "autocast" else torch.bfloat16)
    want, want_grads = reference(lambda h, w: plain_kl(h, w, *tensors[2:]), *tensors[:2])

    def errors(loss):
        leaves = [x.detach().requires_grad_() for x in tensors[:2]]
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            value = loss(*leaves, *tensors[2:])
        # The trainer divides by its counts afterwards.
        grads = torch.autograd.grad(value / 7, leaves)
        return [
            abs(value.item() / want.item() - 1),
            *(relative_error(7 * g, w) for g, w in zip(grads, want_grads)),
        ]

    for ours, eager in zip(errors(kl_loss_sum), errors(eager_kl)):
        assert ours <= BUDGET * eager + TOLERANCE


def test_kl_loss_makes_only_the_gradients_that_are_needed():
    hidden, weight = student_tensors(9)
    teacher = teacher_tensors(9)
    want = torch.autograd.grad(kl_loss_sum(hidden, weight, *teacher), [hidden, weight])
    for chosen, other in ((hidden, weight), (weight, hidden)):
        loss = kl_loss_sum(*(x if x is chosen else x.detach() for x in (hidden, weight)), *teacher)
        kept = [x for x in loss.grad_fn.saved_tensors if x is not None]
        assert len(kept) == 1
        [got] = torch.autograd.grad(loss, [chosen])
        assert torch.equal(got, want[0] if chosen is hidden else want[1])
        assert other.grad is None
    with torch.no_grad():
        assert not kl_loss_sum(hidden, weight, *teacher).requires_grad


def test_kl_gradient_does_not_overflow_in_float16():
    """The sum over rows is beyond float16; the mean, which is what is asked for, is not."""
    rows = 2 * CHUNK
    hidden, weight = torch.full((rows, 8), 100.0), torch.zeros(4, 8)
    other, head = torch.eye(8)[[0]].repeat(rows, 1), torch.eye(4, 8) * 9
    half = [x.half() for x in (hidden, weight, other, head)]
    half[1].requires_grad_()
    [got] = torch.autograd.grad(kl_loss_sum(*half) / rows, half[1:2])
    want = reference(lambda w: plain_kl(hidden.double(), w, other, head), weight)[1][0]
    assert want.abs().max() > torch.finfo(torch.float16).max
    assert relative_error(got, want / rows) < 1e-2


@pytest.mark.parametrize("sharpness", [0.05, 0.6], ids=["flat", "peaked"])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**17])
def test_kl_gradient_in_float16_is_as_exact_as_that_of_the_scaled_loss(sharpness, scale):
    """Entries of flat distributions over many tokens, and shares of many rows, are below it."""
    rows, vocab = 2 * CHUNK, 20_000
    hidden, weight = normal(rows, WIDTH, seed=1), normal(vocab, WIDTH, seed=2, scale=0.05)
    teacher = [normal(rows, TEACHER_WIDTH, seed=3), normal(vocab, TEACHER_WIDTH, seed=4)]
    teacher[1] *= sharpness
    want = reference(lambda h, w: plain_kl(h, w, *teacher) / rows, hidden, weight)[1]

    def errors(loss):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.float16):
            value = loss(*leaves, *teacher) / rows
        grads = torch.autograd.grad(value * scale, leaves)
        return [relative_error(g / scale, w) for g, w in zip(grads, want)]

    for ours, eager in zip(errors(kl_loss_sum), errors(eager_kl)):
        assert ours <= BUDGET * eager + TOLERANCE


def test_kl_loss_takes_a_teacher_in_bf16():
    """The teacher's numbers are what bf16 holds; nothing after them is rounded to bf16."""
    hidden, weight = student_tensors(50)
    teacher = teacher_tensors(50, dtype=torch.bfloat16)
    loss = kl_loss_sum(hidden, weight, *teacher)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss, [hidden, weight])
    want, want_grads = reference(lambda h, w: plain_kl(h, w, *teacher), hidden, weight)
    assert loss.item() == pytest.approx(want.item(), rel=TOLERANCE)
    for g, w in zip(got, want_grads):
        assert relative_error(g, w) <= TOLERANCE


def test_sums_of_two_halves_add_up():
    """What the trainer relies on when it divides by the count of the whole step."""
    rows = 2 * CHUNK
    hidden, weight = student_tensors(rows)
    teacher_hidden, teacher_weight = teacher_tensors(rows)
    whole = kl_loss_sum(hidden, weight, teacher_hidden, teacher_weight)
    halves = [
        kl_loss_sum(hidden[part], weight, teacher_hidden[part], teacher_weight)
        for part in (slice(0, 300), slice(300, rows))
    ]
    assert sum(halves).item() == pytest.approx(whole.item(), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["lm", "kl"])
def test_no_rows_give_a_zero_that_is_connected(name):
    hidden, weight = student_tensors(0)
    if name == "lm":
        loss = lm_loss_sum(hidden, weight, torch.zeros(0, dtype=torch.long))
    else:
        loss = kl_loss_sum(hidden, weight, *teacher_tensors(0))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not weight.grad.any()


# -- rows ------------------------------------------------------------------------------------------


def random_labels(seed, batch=5, length=11):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.5] = -100
    labels[0] = -100
    labels[1] = torch.arange(length)  # an answer from the first token to the last
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_answer_rows_predict_answer_tokens(seed):
    labels = random_labels(seed)
    rows = answer_rows(labels)
    want_labels = []
    for b, row in enumerate(labels.tolist()):
        for i in range(len(row)):
            predicts = i + 1 < len(row) and row[i + 1] != -100
            assert rows[b, i].item() == predicts
            if predicts:
                want_labels.append(row[i + 1])
    assert rows.dtype == torch.bool
    # Row-major order, in which hidden[rows] comes too.
    assert next_labels(labels, rows).tolist() == want_labels
    assert -100 not in want_labels


@pytest.mark.parametrize("seed", range(5))
def test_unshifted_rows_are_answer_tokens(seed):
    labels = random_labels(seed)
    rows = unshifted_rows(labels)
    assert rows.tolist() == [[value != -100 for value in row] for row in labels.tolist()]


def test_rows_of_one_answer():
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100]])
    assert answer_rows(labels).nonzero()[:, 1].tolist() == [1, 2, 3]
    assert unshifted_rows(labels).nonzero()[:, 1].tolist() == [2, 3, 4]
    assert next_labels(labels, answer_rows(labels)).tolist() == [5, 6, 7]
    # The unshifted mask takes in a row whose next token is no answer.
    assert next_labels(labels, unshifted_rows(labels)).tolist() == [6, 7, -100]


def test_rows_and_loss_equal_the_shifted_loss_of_transformers():
    """All parts together: cross-entropy of every logit with labels shifted by one."""
    labels = random_labels(9)
    hidden = normal(*labels.shape, WIDTH, seed=6)
    weight = normal(VOCAB, WIDTH, seed=7)
    rows = answer_rows(labels)
    got = lm_loss_sum(hidden[rows], weight, next_labels(labels, rows))
    logits = (hidden.double() @ weight.double().T)[:, :-1].reshape(-1, VOCAB)
    want = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    assert got.item() == pytest.approx(want.item(), rel=TOLERANCE)
