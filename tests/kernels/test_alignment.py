"""Alignment losses against the plain loops of plain.py: values, reductions, gradients, edges."""

import pytest
import torch
import torch.nn.functional as F
from cdfast_kernels import (
    VisualLayout,
    VisualMap,
    flash_attention,
    flash_attention_with_alignment,
    visual_alignment_loss,
    visual_attention_map,
)

from tests.kernels import on_device
from tests.kernels.plain import (
    KINDS,
    OBJECTIVES,
    authors_loss,
    make_case,
    plain_attention,
    plain_loss,
    plain_maps,
    random_qkv,
)

# The smallest that every backend takes.
HEAD_DIM = 32
REDUCTIONS = ("mean", "sum", "none")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
TEACHER = {"heads": 6, "kv_heads": 3, "dim": 64}


def teacher_map(case, seed, dtype=torch.float64, backend="reference") -> VisualMap:
    q, k, v = random_qkv(case, 50 + seed, dtype=dtype, **TEACHER)
    lse = flash_attention(q, k, v, layout=case.layout, backend=backend)[1]
    return visual_attention_map(q, k, lse, case.layout, backend=backend)


def teacher_dense(case, seed, dtype=torch.float64):
    q, k, _ = random_qkv(case, 50 + seed, dtype=dtype, **TEACHER)
    return [t.detach() for t in plain_maps(case, q, k)]


def assert_close(got, want, dtype=torch.float64):
    got, want = got.detach().double(), want.detach().double()
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind, objective, reduction, backend, exact_dtype):
    case = make_case(kind, seed=11)
    q, k, v = random_qkv(case, 11)
    want = plain_loss(case, objective, plain_maps(case, q, k), teacher_dense(case, 11), reduction)
    g = torch.Generator().manual_seed(2)
    weight = torch.rand(want.shape, generator=g, dtype=torch.float64)
    want_grads = torch.autograd.grad((want * weight).sum(), (q, k))

    q2, k2, v2 = (x.detach().to(exact_dtype).requires_grad_() for x in (q, k, v))
    target = teacher_map(case, 11, exact_dtype, backend)
    options = {"objective": objective, "reduction": reduction, "backend": backend}
    _, lse = flash_attention(q2, k2, v2, layout=case.layout, backend=backend)
    modular = visual_alignment_loss(q2, k2, lse, target, case.layout, **options)
    _, fused = flash_attention_with_alignment(q2, k2, v2, target, case.layout, **options)
    for got in (modular, fused):
        assert got.shape == want.shape
        assert got.dtype == exact_dtype
        assert_close(got, want, exact_dtype)
        grads = torch.autograd.grad((got * weight).sum(), (q2, k2))
        for a, b in zip(grads, want_grads):
            assert_close(a, b, exact_dtype)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_random_layouts(objective, seed, backend, exact_dtype):
    for kind in KINDS:
        case = make_case(kind, seed=100 + seed, batch=4, length=9)
        q, k, v = random_qkv(case, seed, heads=2, kv_heads=1)
        teacher = teacher_dense(case, seed)
        want = plain_loss(case, objective, plain_maps(case, q, k), teacher, "none")
        q2, k2, v2 = (x.detach().to(exact_dtype) for x in (q, k, v))
        got = flash_attention_with_alignment(
            q2,
            k2,
            v2,
            teacher_map(case, seed, exact_dtype, backend),
            case.layout,
            objective=objective,
            reduction="none",
            backend=backend,
        )[1]
        assert_close(got, want, exact_dtype)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_out_and_loss_together(objective, backend, exact_dtype):
    case = make_case("turns", seed=12)
    q, k, v = random_qkv(case, 12)
    out, _ = plain_attention(case, q, k, v)
    loss = plain_loss(case, objective, plain_maps(case, q, k), teacher_dense(case, 12))
    g = torch.Generator().manual_seed(3)
    d_out = torch.randn(out.shape, generator=g, dtype=torch.float64)
    want = torch.autograd.grad((out * d_out).sum() + 0.7 * loss, (q, k, v))
    q2, k2, v2 = (x.detach().to(exact_dtype).requires_grad_() for x in (q, k, v))
    target = teacher_map(case, 12, exact_dtype, backend)
    out2, loss2 = flash_attention_with_alignment(
        q2, k2, v2, target, case.layout, objective=objective, backend=backend
    )
    assert_close(out2, out, exact_dtype)
    got = torch.autograd.grad((out2 * d_out).sum() + 0.7 * loss2, (q2, k2, v2))
    for a, b in zip(got, want):
        assert_close(a, b, exact_dtype)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, objective):
    case = make_case(kind, seed=21, batch=2, length=6)
    q, k, v = (x.detach() for x in random_qkv(case, 21, heads=2, kv_heads=1, dim=2))
    lse = flash_attention(q, k, v, layout=case.layout)[1]
    live = lse.isfinite()
    target = teacher_map(case, 21)

    def modular(q, k, lse):
        lse = torch.where(live, lse, -torch.inf)
        return visual_alignment_loss(q, k, lse, target, case.layout, objective=objective)

    def fused(q, k, v):
        return flash_attention_with_alignment(q, k, v, target, case.layout, objective=objective)

    lse = torch.where(live, lse, 0)
    assert torch.autograd.gradcheck(modular, [x.clone().requires_grad_() for x in (q, k, lse)])
    assert torch.autograd.gradcheck(
        fused, [x.clone().requires_grad_() for x in (q, k, v)], fast_mode=True
    )


@pytest.mark.parametrize("kind", ["full", "left", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_pooled_is_the_authors_loss(kind, seed, backend):
    """Materialised maps of the real probabilities, then the authors' tensor code per sample."""
    case = make_case(kind, seed=30 + seed, batch=4, length=24)
    q, k, v = (x.detach() for x in random_qkv(case, seed, dtype=torch.float32))
    target = teacher_map(case, seed, torch.float32)
    got = flash_attention_with_alignment(
        q, k, v, target, case.layout, objective="pooled", reduction="none", backend=backend
    )[1]
    teacher = teacher_dense(case, seed, torch.float32)
    for s, (a, b) in enumerate(zip(plain_maps(case, q.double(), k.double()), teacher)):
        index = torch.tensor(case.visual[s], dtype=torch.bool).nonzero().flatten()
        if len(index) < 2:
            assert got[s] == 0
            continue
        want = authors_loss(a[index][:, index], b.double()[index][:, index])
        assert float(got[s]) == pytest.approx(float(want), rel=1e-4, abs=1e-6)


# Edge cases. `fixed_map` gives the loss any map: with q of ones and k the logarithm, one head of
# size 1 produces the probabilities written down, and lse = 0 leaves them as they are.


def fixed_student(rows, dtype=torch.float64):
    """q, k, lse whose map is `rows` (n, n) on visible keys: q row i holds log S[i, :]."""
    s = torch.tensor(rows, dtype=dtype)
    n = s.shape[0]
    unused = (0, HEAD_DIM - n)
    # exp of it is 0 in the dtype, and it multiplies the rounding of dS in dk no more than it must.
    log_zero = -800 if dtype == torch.float64 else -150
    q = F.pad(s.log().clamp(min=log_zero), unused)[None, :, None, :].requires_grad_()
    k = F.pad(torch.eye(n, dtype=dtype), unused)[None, :, None, :].requires_grad_()
    return q, k, torch.zeros(1, 1, n, dtype=dtype, requires_grad=True)


def fixed_target(rows, layout, dtype=torch.float64):
    q, k, lse = fixed_student(rows, dtype)
    return visual_attention_map(q, k, lse, layout, softmax_scale=1.0)


def fixed_loss(student, target, visual, objective, backend="reference", segments=None, **options):
    dtype = torch.float64 if backend == "reference" else torch.float32
    visual = torch.tensor([visual])
    layout = VisualLayout.from_mask(visual)
    if segments is not None:
        layout = VisualLayout.from_segments(torch.tensor([segments]), visual)
    q, k, lse = fixed_student(student, dtype)
    loss = visual_alignment_loss(
        q,
        k,
        lse,
        fixed_target(target, layout, dtype),
        layout,
        objective=objective,
        softmax_scale=1.0,
        backend=backend,
        **options,
    )
    grads = torch.autograd.grad(loss, (q, k, lse))
    assert all(x.isfinite().all() for x in grads)
    return loss.detach(), grads


S3 = [[0.5, 0.0, 0.0], [0.1, 0.4, 0.0], [0.3, 0.2, 0.2]]
T3 = [[0.9, 0.0, 0.0], [0.3, 0.3, 0.0], [0.2, 0.5, 0.1]]


@pytest.mark.parametrize("objective", ["row", "kl"])
def test_rows_with_one_visible_visual_key_only_count(objective, backend):
    loss, (dq, _, dlse) = fixed_loss(S3, T3, [True, True, True], objective, backend)
    s, t = torch.tensor(S3).double(), torch.tensor(T3).double()
    if objective == "row":
        terms = 1 - torch.cosine_similarity(s, t, dim=1)
    else:
        sh, th = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
        terms = torch.xlogy(th, th / sh.clamp(min=1e-300)).sum(1)
    # Row 0 sees one visual key: 3 rows in the mean, 2 terms.
    assert float(loss) == pytest.approx(float(terms[1:].sum() / 3), rel=1e-5)
    assert not dq[:, 0].any()
    assert not dlse[..., 0].any()
    assert dq[:, 1].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_single_visual_token(objective, backend):
    loss, grads = fixed_loss(S3, T3, [False, True, False], objective, backend)
    if objective == "mse":
        assert float(loss) == pytest.approx(((0.4 - 0.3) ** 2 + (0.2 - 0.5) ** 2) / 2, rel=1e-5)
    elif objective == "map":
        a, b = torch.tensor([0.4, 0.2]).double(), torch.tensor([0.3, 0.5]).double()
        assert float(loss) == pytest.approx(float(1 - torch.cosine_similarity(a, b, 0)), rel=1e-5)
    else:
        assert float(loss) == 0
        assert not any(x.any() for x in grads)


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_row_with_an_all_zero_row(zero, backend):
    student, teacher = [list(r) for r in S3], [list(r) for r in T3]
    if zero != "teacher":
        student[2] = [0.0] * 3
    if zero != "student":
        teacher[2] = [0.0] * 3
    loss, (dq, _, dlse) = fixed_loss(student, teacher, [True] * 3, "row", backend)
    s, t = torch.tensor(S3[1]).double(), torch.tensor(T3[1]).double()
    assert float(loss) == pytest.approx(float(1 - torch.cosine_similarity(s, t, 0)) / 3, rel=1e-5)
    assert not dq[:, 2].any()
    assert not dlse[..., 2].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_all_zero_maps_give_a_finite_loss_and_gradient(objective, zero, backend):
    nothing = [[0.0] * 3] * 3
    student = S3 if zero == "teacher" else nothing
    teacher = T3 if zero == "student" else nothing
    loss, grads = fixed_loss(student, teacher, [True] * 3, objective, backend)
    assert loss.isfinite()
    if objective != "mse":
        assert not any(x.any() for x in grads)
    if objective in ("row", "map"):
        assert loss == 0


def test_small_probabilities_keep_their_direction(backend):
    """Entries whose squares underflow in float32 are not taken for zero rows."""
    small = [[1e-30 * x for x in r] for r in S3]
    loss, _ = fixed_loss(small, T3, [True] * 3, "row", backend)
    assert float(loss) == pytest.approx(float(fixed_loss(S3, T3, [True] * 3, "row")[0]), rel=1e-4)


def test_kl_floors_zero_entries_of_the_student(backend):
    student = [[0.5, 0.0, 0.0], [0.1, 0.0, 0.0], [0.3, 0.2, 0.2]]
    loss, (dq, _, _) = fixed_loss(student, T3, [True] * 3, "kl", backend)
    floor = torch.finfo(torch.float32).tiny
    s = torch.tensor([0.1, floor], dtype=torch.float64)
    t = torch.tensor([0.5, 0.5], dtype=torch.float64)
    row_1 = (t * (t * s.sum() / s).log()).sum()
    row_2 = fixed_loss(S3, [T3[0], [0.0] * 3, T3[2]], [True] * 3, "kl")[0] * 3
    assert float(loss) == pytest.approx(float(row_1 + row_2) / 3, rel=1e-5)
    assert dq[0, 1, 0, 1] == 0


def test_kl_rows_without_a_target_only_count(backend):
    full = fixed_loss(S3, T3, [True] * 3, "kl", backend)[0]
    rest = fixed_loss(S3, [T3[0], T3[1], [0.0] * 3], [True] * 3, "kl", backend)
    other = fixed_loss(S3, [T3[0], [0.0] * 3, T3[2]], [True] * 3, "kl", backend)
    assert float(rest[0] + other[0]) == pytest.approx(float(full), rel=1e-5)
    assert not rest[1][0][:, 2].any()


def test_kl_is_zero_at_equal_directions_and_not_negative(backend):
    scaled = [[0.25 * x for x in r] for r in T3]
    loss, _ = fixed_loss(scaled, T3, [True] * 3, "kl", backend)
    assert abs(float(loss)) < 1e-6


@pytest.mark.parametrize("objective", ["row", "map", "pooled"])
def test_cosine_losses_ignore_scale(objective, backend):
    scaled = [[0.25 * x for x in r] for r in T3]
    loss, grads = fixed_loss(scaled, T3, [True] * 3, objective, backend)
    assert 0 <= float(loss) < 1e-6
    assert all(float(x.abs().max()) < 1e-5 for x in grads)


def test_pooled_with_one_visual_token_is_zero_whatever_the_maps(backend):
    nothing = [[0.0] * 3] * 3
    for student, teacher in ((nothing, T3), (S3, nothing), (nothing, nothing)):
        loss, grads = fixed_loss(student, teacher, [False, True, False], "pooled", backend)
        assert float(loss) == 0
        assert not any(x.any() for x in grads)


def test_pooled_where_nothing_survives_the_filter(backend):
    """Every visual token in its own segment: a diagonal that lies above mean + std."""
    diagonal = [[0.4 if i == j else 0.0 for j in range(5)] for i in range(5)]
    segments = [1, 2, 3, 4, 5]
    loss, grads = fixed_loss(diagonal, diagonal, [True] * 5, "pooled", backend, segments)
    assert float(loss) == 1
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_batch_without_images(objective, reduction, packed, backend):
    layout = VisualLayout.from_mask(torch.zeros(2, 6, dtype=torch.bool))
    shape: tuple[int, ...] = (2, 6)
    if packed:
        cu, shape = torch.tensor([0, 4, 12], dtype=torch.int32), (12,)
        layout = VisualLayout.from_packed(cu, torch.zeros(12, dtype=torch.bool))
    q, k = (torch.randn(*shape, 2, HEAD_DIM, requires_grad=True) for _ in range(2))
    _, lse = flash_attention(q, k, k.detach(), layout=layout, backend=backend)
    target = visual_attention_map(q, k, lse, layout, backend=backend)
    options = {"objective": objective, "reduction": reduction, "backend": backend}
    for loss in (
        visual_alignment_loss(q, k, lse, target, layout, **options),
        flash_attention_with_alignment(q, k, k, target, layout, **options)[1],
    ):
        assert loss.shape == ((2,) if reduction == "none" else ())
        assert not loss.any()
        grads = torch.autograd.grad(loss.sum(), (q, k), retain_graph=True)
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batch(shape, objective, backend):
    layout = VisualLayout.from_mask(torch.zeros(shape, dtype=torch.bool))
    q = torch.zeros(*shape, 2, HEAD_DIM, requires_grad=True)
    lse = flash_attention(q, q, q, backend=backend)[1]
    target = visual_attention_map(q, q, lse, layout, backend=backend)
    for reduction in REDUCTIONS:
        out, loss = flash_attention_with_alignment(
            q, q, q, target, layout, objective=objective, reduction=reduction, backend=backend
        )
        assert loss.shape == ((shape[0],) if reduction == "none" else ())
        assert not loss.any()
        (out.sum() + loss.sum()).backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["left", "right", "turns"])
def test_nan_at_padding_reaches_nothing(kind, objective, backend):
    case = make_case(kind, seed=13)
    live = case.layout.live
    dead_rows, dead_lse = ~live[:, :, None, None], ~live[:, None, :]
    base = [x.detach() for x in random_qkv(case, 13, dtype=torch.float32)]
    lse = flash_attention(*base, layout=case.layout, backend=backend)[1]
    target = teacher_map(case, 13, torch.float32)
    options = {"objective": objective, "backend": backend}

    def run(poison):
        q, k, v = (x.masked_fill(dead_rows, poison).requires_grad_() for x in base)
        given = lse.masked_fill(dead_lse, poison).requires_grad_()
        modular = visual_alignment_loss(q, k, given, target, case.layout, **options)
        out, fused = flash_attention_with_alignment(q, k, v, target, case.layout, **options)
        d_out = torch.ones_like(out).masked_fill(dead_rows, poison)
        one = torch.ones(())
        return (
            modular,
            fused,
            *torch.autograd.grad(modular, (q, k, given)),
            *torch.autograd.grad((out, fused), (q, k, v), (d_out, one)),
        )

    clean = run(0.0)
    assert all(x.isfinite().all() for x in clean)
    for got, want in zip(run(float("nan")), clean):
        assert torch.equal(got, want)
    for grad in (clean[2], clean[3], *clean[5:]):
        assert not grad[~live].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("where", ["q", "k", "lse", "teacher"])
def test_nan_at_a_live_position_shows_in_the_loss(objective, where, backend):
    visual = torch.tensor([[False, True, True, True, True, False]] * 2)
    layout = VisualLayout.from_mask(visual)
    g = torch.Generator().manual_seed(0)
    q, k, tq, tk = (torch.randn(2, 6, 2, HEAD_DIM, generator=g) for _ in range(4))
    lse = flash_attention(q, k, k, backend=backend)[1]
    teacher_lse = flash_attention(tq, tk, tk, backend=backend)[1]
    nan = float("nan")
    if where == "lse":
        lse[0, 1, 3] = nan
    else:
        {"q": q, "k": k, "teacher": tq}[where][0, 3, 1, 2] = nan
    target = visual_attention_map(tq, tk, teacher_lse, layout, backend=backend)
    loss = visual_alignment_loss(
        q, k, lse, target, layout, objective=objective, reduction="none", backend=backend
    )
    assert not loss[0].isfinite()
    assert loss[1].isfinite()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_equals_padded(objective, backend, exact_dtype):
    case = make_case("packed", seed=14)
    q, k, v = random_qkv(case, 14, dtype=exact_dtype)
    target = teacher_map(case, 14, exact_dtype)
    options = {"objective": objective, "reduction": "none", "backend": backend}
    packed = flash_attention_with_alignment(q, k, v, target, case.layout, **options)[1]
    tq, tk, tv = random_qkv(case, 64, dtype=exact_dtype, **TEACHER)
    for s, tokens in enumerate(case.tokens):
        visual = torch.tensor([case.visual[s]], dtype=torch.bool).reshape(1, -1)
        layout = VisualLayout.from_mask(visual)
        t_lse = flash_attention(*(x[tokens][None] for x in (tq, tk, tv)), backend=backend)[1]
        alone_target = visual_attention_map(tq[tokens][None], tk[tokens][None], t_lse, layout)
        inputs = (x[tokens][None] for x in (q, k, v))
        alone = flash_attention_with_alignment(*inputs, alone_target, layout, **options)[1]
        assert_close(packed[s], alone[0], exact_dtype)


def test_an_equal_layout_is_the_same_layout(backend):
    case, twin = make_case("left", seed=15), make_case("left", seed=15)
    assert case.layout is not twin.layout
    q, k, v = random_qkv(case, 15, dtype=torch.float32)
    target = teacher_map(twin, 15, torch.float32)
    _, loss = flash_attention_with_alignment(q, k, v, target, case.layout, backend=backend)
    assert loss.isfinite()


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
def test_target_of_any_storage(stored, backend):
    case = make_case("full", seed=16)
    q, k, v = random_qkv(case, 16, dtype=torch.float32)
    target = teacher_map(case, 16, stored)
    _, loss = flash_attention_with_alignment(q, k, v, target, case.layout, backend=backend)
    want = plain_loss(case, "row", plain_maps(case, q, k), teacher_dense(case, 16, torch.float32))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=2e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_and_repeats_change_no_bit(objective, backend):
    case = make_case("turns", seed=17)
    q, k, v = random_qkv(case, 17, dtype=torch.float32)
    target = teacher_map(case, 17, torch.float32)

    def run():
        out, loss = flash_attention_with_alignment(
            q, k, v, target, case.layout, objective=objective, backend=backend
        )
        return out, loss

    first = run()
    grads = torch.autograd.grad(first[0].sum() + first[1], (q, k, v))
    second = run()
    again = torch.autograd.grad(second[0].sum() + second[1], (q, k, v))
    with torch.autocast(on_device.DEVICE, dtype=torch.bfloat16):
        third = run()
    for a, b in zip((*first, *first, *grads), (*second, *third, *again)):
        assert torch.equal(a, b)
