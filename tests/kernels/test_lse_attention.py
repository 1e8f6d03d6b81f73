"""The backends sdpa, flash_attn and xformers: a gradient of the LSE that their backward lacks.

test_flash_attention.py runs on sdpa as a whole. flash_attn and xformers run on a GPU only: without
one, functions with their documented signatures stand in for them here.
"""

import sys
import types

import pytest
import torch
from cdfast_kernels import (
    VisualLayout,
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    library_calls,
    lse_attention,
    visual_alignment_loss,
    visual_attention_map,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.plain import KINDS, OBJECTIVES, make_case, plain_attention, random_qkv
from tests.numerics import FORWARD, GRADIENT, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22, torch.float64: 2**-48}


def needs(library):
    reason = available_backends()[library]
    return pytest.param(library, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


def finite(lse):
    return torch.where(lse.isinf(), 0, lse)


def make_d_out(pattern, shape, dtype):
    """None, or a gradient of `out` that is zero or tiny in a part of the rows, as a model's is."""
    g = torch.Generator().manual_seed(3)
    d_out = torch.randn(shape, generator=g)
    rows = torch.rand(shape[:-2], generator=g) < 0.5
    if pattern == "none":
        return None
    if pattern == "half zero":
        d_out[rows] = 0
    if pattern == "half tiny":
        d_out[rows] *= 1e-6
    if pattern == "all tiny":
        d_out *= 1e-6
    if pattern == "one channel":
        d_out[..., 1:] = 0
    return d_out.to(dtype)


PATTERNS = ["all", "half zero", "half tiny", "all tiny", "one channel", "none"]


@pytest.mark.parametrize("library", ["sdpa", needs("flash_attn"), needs("xformers")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["full", "left", "packed", "turns"])
def test_error_budget(kind, pattern, dtype, library):
    """out, LSE and gradients, for every ratio of dlse to dO that a row can have."""
    if library == "flash_attn" and dtype == torch.float32:
        pytest.skip("flash_attn computes in float16 and bfloat16")
    if library != "sdpa" and kind == "turns":
        pytest.skip(f"{library} has no segments")
    case = make_case(kind, seed=51, length=33)
    low = random_qkv(case, 51, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    device = [x.detach().to(DEVICE).requires_grad_() for x in low]
    layout = case.layout.to(DEVICE)
    d_out = make_d_out(pattern, low[0].shape, dtype)
    g = torch.Generator().manual_seed(4)
    results = {}
    for size in (1e-3, 1.0, 30.0):
        d_lse = size * torch.randn(case.layout.live.shape[0], 4, case.shape[-1], generator=g)
        d_lse = d_lse[0] if case.packed else d_lse
        for name, leaves, run in (
            ("exact", exact, lambda x: plain_attention(case, *x)),
            ("eager", low, lambda x: plain_attention(case, *x)),
            ("got", device, lambda x: flash_attention(*x, layout=layout, backend=library)),
        ):
            out, lse = run(leaves)
            loss = (finite(lse) * d_lse.to(lse)).sum()
            if d_out is not None:
                loss = loss + (out * d_out.to(out)).sum()
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            results[name] = [x.cpu() for x in (out, lse, *grads)]
        for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
            if pattern == "none" and name == "dv":
                assert not results["got"][i].any()
                continue
            assert_within_budget(
                f"{name} at dlse {size}",
                *(results[x][i] for x in ("got", "eager", "exact")),
                dtype,
                FORWARD if i < 2 else GRADIENT,
            )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS[:-1])
def test_out_carries_dlse(pattern, dtype):
    """rowsum(dO' out') is rowsum(dO out) - dlse up to the rounding of one channel."""
    shape = (2, 40, 3, 32)
    g = torch.Generator().manual_seed(0)
    d_out = make_d_out(pattern, shape, dtype)
    out = torch.randn(shape, generator=g).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for size in (1e-8, 1e-5, 1e-2, 1.0, 1e3):
        d_lse = size * torch.randn(2, 3, 40, generator=g, dtype=wide)
        d_lse[..., ::5] = 0
        carrier, carried, stuck = lse_attention.carry_dlse(d_out, out, d_lse)
        assert carrier.dtype == carried.dtype == dtype
        d = d_lse.transpose(1, 2)[..., None].double()
        products = d_out.double() * out.double()
        got = (carrier.double() * carried.double()).sum(-1, keepdim=True)
        error = (got - (products.sum(-1, keepdim=True) - d)).abs()
        needed = (products - d).abs()
        reach = 2.0 ** lse_attention._REACH[dtype]
        in_range = needed <= d_out.double().abs() * reach
        bound = EPS[dtype] * torch.where(in_range, needed, torch.inf).amin(-1, keepdim=True)
        bound = torch.where(stuck, 1.1 * EPS[dtype] * d.abs(), bound)
        # float16 cannot be below its smallest number, in out' or in d_out'.
        step = 2.0**-24 if dtype == torch.float16 else 0.0
        bound += step * carrier.double().abs().amax(-1, keepdim=True)
        assert (error <= bound + EPS[wide] * products.abs().sum(-1, keepdim=True)).all()
        changed = (carried != out).sum(-1, keepdim=True)
        assert changed.max() <= 1
        assert changed.any() or size < 1
        assert not changed[d == 0].any()
        assert torch.equal(carrier.where(~stuck, 0), d_out.where(~stuck, 0))
        assert not stuck[d == 0].any()
        # What a changed d_out adds to dP and dv.
        limit = 2.0**-15 if dtype == torch.float16 else 2.0**-58
        added = (carrier.double() - d_out.double()).abs().amax(-1, keepdim=True)
        assert (added <= 4 * limit * d.abs() + step).all()
        if pattern == "half zero":
            assert stuck.any()
            assert not stuck.all()
        if pattern == "one channel" and dtype != torch.float16 and size < 1e-2:
            assert stuck[d != 0].all()  # a channel without d_out keeps more digits


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_tokens(packed, monkeypatch):
    g = torch.Generator().manual_seed(0)
    shape, lse_shape = ((30, 3, 16), (3, 30)) if packed else ((2, 15, 3, 16), (2, 3, 15))
    d_out, out = (torch.randn(shape, generator=g).bfloat16() for _ in range(2))
    d_lse = torch.randn(lse_shape, generator=g)
    want = lse_attention.carry_dlse(d_out, out, d_lse)
    monkeypatch.setattr(lse_attention, "_CHUNK", 7 * 3 * 16)
    for a, b in zip(lse_attention.carry_dlse(d_out, out, d_lse), want):
        assert torch.equal(a, b)


def test_a_small_dlse_is_not_lost_in_bfloat16():
    """Adding dlse dO / |dO|^2 to every channel of out returns out, where it is below its rounding:
    the gradient of a loss with a small weight would lose its part through the LSE altogether."""
    g = torch.Generator().manual_seed(0)
    d_out, out = (torch.randn(4, 500, 2, 64, generator=g).bfloat16() for _ in range(2))
    d_lse = 1e-3 * torch.randn(4, 2, 500, generator=g)
    direction = d_out.float() / d_out.float().square().sum(-1, keepdim=True)
    added = (out.float() - d_lse.transpose(1, 2)[..., None] * direction).bfloat16()
    got = lse_attention.carry_dlse(d_out, out, d_lse)[1]

    def carried(x):
        """The share of dlse that rowsum(dO x) has, over all rows."""
        part = (d_out.double() * (out.double() - x.double())).sum(-1).transpose(1, 2)
        return float((part * d_lse).sum() / d_lse.square().sum())

    assert carried(added) < 0.5
    assert abs(carried(got) - 1) < 0.01


@pytest.mark.parametrize("with_out", [True, False], ids=["with out", "loss alone"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_modular_loss_beside_sdpa(kind, objective, with_out):
    """The modular form with sdpa's LSE equals the fused form, gradients too."""
    case = make_case(kind, seed=6, length=20)
    inputs = random_qkv(case, 6)
    teacher = random_qkv(case, 7, heads=6, kv_heads=3)
    t_lse = flash_attention(*teacher, layout=case.layout)[1]
    target = visual_attention_map(*teacher[:2], t_lse, case.layout)
    g = torch.Generator().manual_seed(5)
    d_out = with_out * torch.randn(inputs[0].shape, generator=g, dtype=torch.float64)
    d_out[torch.rand(case.shape, generator=g) < 0.5] = 0
    options = {"objective": objective}

    fused_out, fused_loss = flash_attention_with_alignment(*inputs, target, case.layout, **options)
    out, lse = flash_attention(*inputs, layout=case.layout, backend="sdpa")
    loss = visual_alignment_loss(*inputs[:2], lse, target, case.layout, **options)
    assert torch.allclose(loss, fused_loss, rtol=1e-10)
    want = torch.autograd.grad((fused_out * d_out).sum() + fused_loss, inputs)
    total = (out * d_out).sum() + loss if with_out else loss
    got = torch.autograd.grad(total, inputs, materialize_grads=True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(b.abs().max()))
    assert bool(got[0].any()) == bool(want[0].any())


@pytest.mark.parametrize("kind", ["full", "left", "packed"])
def test_gradcheck(kind):
    case = make_case(kind, seed=1, length=6)
    inputs = random_qkv(case, 1, heads=2, kv_heads=1, dim=5)

    def run(q, k, v):
        out, lse = flash_attention(q, k, v, layout=case.layout, backend="sdpa")
        return out, finite(lse)

    assert torch.autograd.gradcheck(run, inputs)


def test_padding_with_holes_takes_the_mask():
    live = torch.tensor([[True, False, True, True, False, True, True, False]])
    layout = VisualLayout.from_mask(torch.zeros(1, 8, dtype=torch.bool), live)
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, 8, 2, 16, generator=g, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    results = []
    for backend in ("sdpa", "reference"):
        out, lse = flash_attention(*inputs, layout=layout, backend=backend)
        loss = out.square().sum() + finite(lse).sum()
        results.append((out, lse, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_live_nan_reaches_the_gradient():
    q, k, v = (torch.randn(1, 6, 2, 8).requires_grad_() for _ in range(3))
    out, lse = flash_attention(q, k, v, backend="sdpa")
    d_lse = torch.zeros_like(lse)
    d_lse[0, 0, 3] = float("nan")
    dq = torch.autograd.grad((out, lse), q, (torch.ones_like(out), d_lse))[0]
    assert dq[0, 3, 0].isnan().all()
    assert dq[0, :, 1].isfinite().all()


# The operator


def operator_arguments(library="sdpa", dtype=torch.float32, mask=None):
    g = torch.Generator().manual_seed(1)
    tensors = (torch.randn(2, 7, h, 16, generator=g).to(dtype).requires_grad_() for h in (4, 2, 2))
    return *tensors, 0.2, library, mask, None, 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(lse_attention.library_attention, operator_arguments(dtype=dtype))


@pytest.mark.parametrize("kind", ["full", "left", "packed", "turns"])
def test_torch_compile_without_graph_breaks(kind):
    case = make_case(kind, seed=6)
    inputs = random_qkv(case, 6, dtype=torch.float32)

    def step(q, k, v):
        out, lse = flash_attention(2 * q, k, v, layout=case.layout, backend="sdpa")
        return out.square().sum() + finite(lse).square().sum()

    want = step(*inputs)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, want))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_calls_have_the_arguments_of_their_operators(dtype, capability, masked, monkeypatch):
    """Without a device: tensors without data check signatures and shapes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    forward, backward = library_calls.LIBRARIES["sdpa"]
    q = torch.empty(2, 20, 4, 36, dtype=dtype, device="meta")
    k, v = (torch.empty(2, 20, 2, 36, dtype=dtype, device="meta") for _ in range(2))
    mask = torch.empty(2, 1, 20, 32, dtype=dtype, device="meta")[..., :20] if masked else None
    arguments = (0.2, mask, None, 20)
    out, lse = forward(q, k, v, *arguments)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 20)
    assert lse.dtype == torch.float32
    grads = backward(out.contiguous(), q, k, v, out.contiguous(), lse, *arguments)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


# flash_attn and xformers, by stand-ins with their signatures


def causal(q, k, v, scale):
    """Softmax attention of one sequence, q (n, H, d), k, v (n, Hk, d) -> out, lse (H, n)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def causal_backward(d_out, q, k, v, out, lse, scale):
    """What every flash backward computes: D from the `out` it is given, P from the LSE."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    probs = (scores - lse[..., None]).exp().tril()
    d = (d_out * out).sum(-1).transpose(0, 1)
    ds = probs * (torch.einsum("ihd,jhd->hij", d_out, v) - d[..., None]) * scale
    dk, dv = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", probs, d_out)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return torch.einsum("hij,jhd->ihd", ds, k), dk, dv


class StandInFlashAttn:
    """flash_attn.flash_attn_interface of 2.8: the two functions that are called."""

    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
                seqused_k=None, zero_tensors=False):  # fmt: skip
        self.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, dropout_p, causal)
        spans = cu_seqlens_q.unfold(0, 2, 1).tolist()
        parts = [globals()["causal"](q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in spans]
        out, lse = torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts], 1)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def backward(self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                 max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                 window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                 zero_tensors=False):  # fmt: skip
        self.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, dropout_p, causal)
        assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
        assert softmax_lse.shape == (q.shape[1], len(q))
        assert softmax_lse.is_contiguous()
        assert dout.shape == out.shape == q.shape
        assert deterministic  # as torch.use_deterministic_algorithms says
        for a, b in cu_seqlens_q.unfold(0, 2, 1).tolist():
            parts = (x[a:b] for x in (dout, q, k, v, out))
            grads = causal_backward(*parts, softmax_lse[:, a:b], softmax_scale)
            for to, grad in zip((dq, dk, dv), grads):
                to[a:b] = grad
        return torch.empty(0)

    @staticmethod
    def check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, dropout_p, causal):
        assert q.ndim == k.ndim == v.ndim == 3
        assert q.shape[-1] % 8 == 0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert int(cu_seqlens_q[0]) == 0
        assert int(cu_seqlens_q[-1]) == len(q)
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen
        assert causal
        assert dropout_p == 0

    def modules(self):
        interface = types.ModuleType("flash_attn.flash_attn_interface")
        interface._wrapped_flash_attn_varlen_forward = self.forward
        interface._wrapped_flash_attn_varlen_backward = self.backward
        package = types.ModuleType("flash_attn")
        package.flash_attn_interface = interface
        return {"flash_attn": package, interface.__name__: interface}


class StandInXformers:
    """xformers.ops: the names that are used. Its LSE is padded to a multiple of 32, as cutlass'."""

    class LowerTriangularMask:
        pass

    def forward(self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        self.check(query, key, value, attn_bias, p)
        parts = [causal(*x, scale) for x in zip(query, key, value)]
        lse = torch.stack([x for _, x in parts])
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
        return torch.stack([x for x, _ in parts]), lse

    def backward(self, grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None,
                 *, op=None):  # fmt: skip
        self.check(query, key, value, attn_bias, p)
        assert grad.shape == output.shape == query.shape
        assert lse.shape[:2] == (query.shape[0], query.shape[2])
        assert lse.shape[2] >= query.shape[1]
        lse = lse[..., : query.shape[1]]
        samples = zip(grad, query, key, value, output, lse)
        parts = [causal_backward(*x, scale) for x in samples]
        return tuple(torch.stack(x) for x in zip(*parts))

    def check(self, query, key, value, attn_bias, p):
        assert query.ndim == 4
        assert query.shape == key.shape == value.shape  # no heads are shared
        assert query.shape[-1] % 8 == 0
        assert isinstance(attn_bias, self.LowerTriangularMask)
        assert p == 0

    def modules(self):
        ops = types.ModuleType("xformers.ops")
        ops.memory_efficient_attention_forward_requires_grad = self.forward
        ops.memory_efficient_attention_backward = self.backward
        ops.LowerTriangularMask = self.LowerTriangularMask
        package = types.ModuleType("xformers")
        package.ops = ops
        return {"xformers": package, "xformers.ops": ops}


STAND_INS = {"flash_attn": StandInFlashAttn, "xformers": StandInXformers}


@pytest.mark.parametrize("dim", [16, 20])
@pytest.mark.parametrize("kind", ["full", "left", "right", "packed"])
@pytest.mark.parametrize("library", STAND_INS)
def test_calls_of_the_library(library, kind, dim, monkeypatch):
    for name, module in STAND_INS[library]().modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    case = make_case(kind, seed=9, length=14)
    inputs = random_qkv(case, 9, dim=dim)
    g = torch.Generator().manual_seed(2)
    d_out = torch.randn(inputs[0].shape, generator=g, dtype=torch.float64)
    d_out[torch.rand(case.shape, generator=g) < 0.5] = 0
    results = []
    for name in (library, "reference"):
        if name == library:
            run = lse_attention.flash_attention_library
            out, lse = run(*inputs, case.layout, dim**-0.5, library)
        else:
            out, lse = flash_attention(*inputs, layout=case.layout, backend=name)
        d_lse = torch.randn(lse.shape, generator=g.manual_seed(2), dtype=lse.dtype)
        total = (out * d_out).sum() + (finite(lse) * d_lse).sum()
        results.append((out, lse, *torch.autograd.grad(total, inputs)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# Refusals


CASES = {
    "segments": ("layout", make_case("turns", 0).layout, torch.float16, 32, ["sdpa"]),
    "dtype": ("q", make_case("full", 0).layout, torch.float64, 32, []),
    "float32": ("q", make_case("full", 0).layout, torch.float32, 32, ["sdpa", "xformers"]),
    "head size": ("q", make_case("full", 0).layout, torch.float16, 264, ["sdpa", "xformers"]),
}


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("library", ["sdpa", "flash_attn", "xformers"])
def test_refused_by_name(library, what):
    name, layout, dtype, dim, takers = CASES[what]
    with FakeTensorMode():
        q = torch.empty(3, 11, 4, dim, dtype=dtype, device="cuda")
    if library in takers:
        lse_attention.check_library(q, layout, library)
        return
    message = rf"^{name}: expected .*for the {library} backend.*, got .*\. Use backend="
    with pytest.raises(ValueError, match=message):
        lse_attention.check_library(q, layout, library)


@pytest.mark.parametrize("library", ["flash_attn", "xformers"])
def test_other_devices_are_refused(library):
    layout = make_case("full", 0).layout
    q = torch.empty(3, 11, 4, 32)
    with pytest.raises(ValueError, match=rf"^q: expected a tensor on cuda for the {library}"):
        lse_attention.check_library(q, layout, library)
    with pytest.raises(ValueError, match=r"^q: expected a tensor on cpu or cuda for the sdpa"):
        lse_attention.check_library(q.to("meta"), layout, "sdpa")


@pytest.mark.parametrize(
    "library, file",
    [("flash_attn", "flash_attn_interface.py"), ("xformers", "ops/__init__.py")],
)
def test_reasons(library, file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / library
    (folder / file).parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported to look for it')")
    # FlashAttention-4 alone: the package is there, the interface of version 2 is not.
    assert not lse_attention._is_installed(library, file)
    (folder / file).touch()
    assert lse_attention._is_installed(library, file)
    for installed, reason in (
        (False, f"{library} is not installed"),
        (True, f"no CUDA device, and {library} runs on CUDA only"),
    ):
        monkeypatch.setitem(lse_attention._INSTALLED, library, installed)
        assert available_backends()[library] == reason
    assert available_backends()["sdpa"] is None
