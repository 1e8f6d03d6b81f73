"""flash_attention against eager softmax: out, LSE, every gradient, padding, strides."""

import pytest
import torch
from cdfast_kernels import VisualLayout, flash_attention

from tests.kernels import on_device
from tests.kernels.conftest import USABLE_BACKENDS
from tests.kernels.plain import KINDS, make_case, plain_attention, random_qkv

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
HEADS = {"mha": (3, 3), "gqa": (4, 2), "mqa": (4, 1)}


@pytest.fixture(params=[*USABLE_BACKENDS, "sdpa"])
def backend(request) -> str:
    return request.param


@pytest.fixture
def exact_dtype(backend) -> torch.dtype:
    return torch.float64 if backend in ("reference", "sdpa") else torch.float32


def assert_close(got, expected, dtype=torch.float64):
    got, expected = got.detach().double(), expected.detach().double()
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def finite(lse):
    return torch.where(lse.isinf(), 0, lse)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_out_lse_and_gradients(kind, heads, backend, exact_dtype):
    case = make_case(kind, seed=3)
    q, k, v = random_qkv(case, 3, *heads)
    out, lse = plain_attention(case, q, k, v)
    g = torch.Generator().manual_seed(5)
    d_out = torch.randn(out.shape, generator=g, dtype=torch.float64)
    d_lse = torch.randn(lse.shape, generator=g, dtype=torch.float64)
    expected = torch.autograd.grad((out * d_out).sum() + (finite(lse) * d_lse).sum(), (q, k, v))

    q2, k2, v2 = (x.detach().to(exact_dtype).requires_grad_() for x in (q, k, v))
    out2, lse2 = flash_attention(q2, k2, v2, layout=case.layout, backend=backend)
    assert out2.dtype == exact_dtype
    assert out2.shape == q.shape
    assert lse2.shape == lse.shape
    assert_close(out2, out, exact_dtype)
    assert_close(lse2, lse, exact_dtype)
    loss = (out2 * d_out).sum() + (finite(lse2) * d_lse).sum()
    for got, want in zip(torch.autograd.grad(loss, (q2, k2, v2)), expected):
        assert_close(got, want, exact_dtype)


def test_lse_alone_is_differentiable(backend, exact_dtype):
    case = make_case("left", seed=1)
    q, k, v = random_qkv(case, 1, dtype=exact_dtype)
    _, lse = flash_attention(q, k, v, layout=case.layout, backend=backend)
    got = torch.autograd.grad(finite(lse).sum(), (q, k), retain_graph=True)
    want = torch.autograd.grad(finite(plain_attention(case, q, k, v)[1]).sum(), (q, k))
    for a, b in zip(got, want):
        assert_close(a, b, exact_dtype)


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_without_a_layout_it_is_plain_causal(n, backend, exact_dtype):
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, n, 2, 32, generator=g, dtype=exact_dtype) for _ in range(3))
    out, _ = flash_attention(q, k, v, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    assert_close(out, expected.transpose(1, 2), exact_dtype)


def test_softmax_scale(backend, exact_dtype):
    case = make_case("full", seed=2)
    q, k, v = random_qkv(case, 2, dtype=exact_dtype)
    out, lse = flash_attention(q, k, v, softmax_scale=0.3, layout=case.layout, backend=backend)
    expected = plain_attention(case, q, k, v, scale=0.3)
    assert_close(out, expected[0], exact_dtype)
    assert_close(lse, expected[1], exact_dtype)


@pytest.mark.parametrize(
    "dtype, lse_dtype",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype, lse_dtype):
    x = torch.randn(1, 4, 2, 8).to(dtype)
    out, lse = flash_attention(x, x, x)
    assert (out.dtype, lse.dtype) == (dtype, lse_dtype)


@pytest.mark.parametrize("kind", ["left", "right", "turns"])
def test_nan_at_padding_reaches_nothing(kind, backend):
    case = make_case(kind, seed=7)
    live = case.layout.live
    assert not live.all()
    clean = random_qkv(case, 7, dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    d_out, d_lse = torch.randn(*case.shape, 4, 32, generator=g), torch.randn(3, 4, 11, generator=g)
    poison_row = ~live[:, :, None, None]

    def run(poison):
        inputs = [x.detach().masked_fill(poison_row, poison).requires_grad_() for x in clean]
        out, lse = flash_attention(*inputs, layout=case.layout, backend=backend)
        outer = d_out.masked_fill(poison_row, poison), d_lse.masked_fill(~live[:, None], poison)
        return out, lse, *torch.autograd.grad((out, lse), inputs, outer)

    expected = run(0.0)
    for poison in (float("nan"), float("inf")):
        for got, want in zip(run(poison), expected):
            assert torch.equal(got, want)
    out, lse, *grads = expected
    for x in (out, *grads):
        assert not x[~live].any()
    assert (lse.transpose(1, 2)[~live] == -torch.inf).all()
    assert lse.transpose(1, 2)[live].isfinite().all()


def test_strided_inputs_and_gradients(backend, exact_dtype):
    case = make_case("packed", seed=4)
    g = torch.Generator().manual_seed(4)
    total = case.shape[0]
    packed = torch.randn(total, 3, 2, 32, generator=g, dtype=exact_dtype)
    q, k, v = packed.unbind(1)
    d_out = torch.randn(2, total, 32, generator=g, dtype=exact_dtype).transpose(0, 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    contiguous = flash_attention(*leaves, layout=case.layout, backend=backend)[0]
    want = torch.autograd.grad(contiguous, leaves, d_out.contiguous())
    strided = packed.requires_grad_()
    out = flash_attention(*strided.unbind(1), layout=case.layout, backend=backend)[0]
    (got,) = torch.autograd.grad(out, strided, d_out)
    assert torch.equal(out, contiguous)
    for a, b in zip(got.unbind(1), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batch(shape, backend):
    q = torch.zeros(*shape, 4, 32, requires_grad=True)
    k = torch.zeros(*shape, 2, 32, requires_grad=True)
    out, lse = flash_attention(q, k, k, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (shape[0], 4, shape[1])
    (out.sum() + lse.sum()).backward()
    assert q.grad.shape == q.shape
    packed = VisualLayout.from_packed(torch.zeros(1).int(), torch.zeros(0).bool())
    x = torch.zeros(0, 2, 32)
    assert flash_attention(x, x, x, layout=packed, backend=backend)[1].shape == (2, 0)


def test_packed_equals_its_sequences(backend, exact_dtype):
    case = make_case("packed", seed=6)
    q, k, v = random_qkv(case, 6, dtype=exact_dtype)
    out, lse = flash_attention(q, k, v, layout=case.layout, backend=backend)
    for tokens in case.tokens:
        alone = flash_attention(*(x[tokens][None] for x in (q, k, v)), backend=backend)
        assert_close(out[tokens], alone[0][0], exact_dtype)
        assert_close(lse[:, tokens], alone[1][0], exact_dtype)


def test_autocast_does_not_lower_the_precision(backend):
    q, k, v = (torch.randn(1, 9, 2, 32) for _ in range(3))
    expected = flash_attention(q, k, v, backend=backend)[0]
    with torch.autocast(on_device.DEVICE, dtype=torch.bfloat16):
        assert torch.equal(flash_attention(q, k, v, backend=backend)[0], expected)


def test_repeats_are_bitwise_equal(backend):
    case = make_case("turns", seed=8)
    inputs = random_qkv(case, 8, dtype=torch.float32)

    def run():
        out, lse = flash_attention(*inputs, layout=case.layout, backend=backend)
        return out, lse, *torch.autograd.grad(out.square().sum() + finite(lse).sum(), inputs)

    for a, b in zip(run(), run()):
        assert torch.equal(a, b)
