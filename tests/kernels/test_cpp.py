"""What only the extension has: its scheduler, instruction sets, threads, operators and absence."""

import os
import subprocess
import sys
import time

import pytest
import torch
from cdfast_kernels import (
    VisualLayout,
    VisualMap,
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    native,
    visual_alignment_loss,
    visual_attention_map,
)
from cdfast_kernels.layout import MAP_TILE, _native_tables, _python_tables

from tests.kernels.plain import KINDS, OBJECTIVES, make_case, random_qkv
from tests.numerics import FLOOR, FORWARD, GRADIENT, assert_within_budget, max_error

# CI builds the extension; a source tree without a compiler still runs the rest of the suite.
pytestmark = pytest.mark.skipif(native.REASON is not None, reason=f"{native.REASON}")
# The shared tests go to a GPU where there is one; these stay.
DEVICE = "cpu"
ISAS = native.EXTENSION.supported_isas() if native.EXTENSION else []


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter; the variables that would steer it are given or absent."""
    inherited = {k: v for k, v in os.environ.items() if k != native.ISA_VARIABLE}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=inherited | environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


# The scheduler


def layout_inputs(seed: int):
    """(visual, live, segment, cu_seqlens): any padding, holes, segments, spans."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def chance(p: float, *shape: int):
        return torch.rand(*shape, generator=g) < p

    length = (number(0, 12), number(60, 70), number(1, 300))[number(0, 2)]
    if number(0, 3) == 0:
        lengths = torch.randint(0, length + 1, (number(0, 6),), generator=g)
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        visual = chance((0.02, 0.5, 1.0)[number(0, 2)], int(cu[-1]))
        return visual, None, None, cu
    shape = number(0, 4), length
    visual = chance((0.0, 0.02, 0.9)[number(0, 2)], *shape)
    for row in visual:
        a, b = sorted((number(0, length), number(0, length)))
        row[a:b] |= bool(number(0, 1))
    live = None
    if number(0, 2):
        place = torch.arange(length)
        a = torch.randint(0, length + 1, (shape[0], 1), generator=g)
        b = torch.randint(0, length + 1, (shape[0], 1), generator=g)
        live = [place >= a, place < b, (place >= a) & (place < b), chance(0.7, *shape)][
            number(0, 3)
        ].expand(shape)
    segment = None
    if number(0, 1):
        steps = torch.randint(0, 4, shape, generator=g) * chance((0.02, 0.3)[number(0, 1)], *shape)
        segment = steps.cumsum(1)
        segment[:, : number(0, length)] = 0
        segment = segment.cummax(1).values if segment.numel() else segment
        if live is not None:
            segment = torch.where(live, segment, number(-5, 9))
    return visual, live, segment, None


def contiguous(inputs):
    return [None if x is None else x.contiguous() for x in inputs]


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_scheduler_equals_the_python_builder(first):
    for seed in range(first, first + 50):
        inputs = contiguous(layout_inputs(seed))
        got, want = _native_tables(*inputs), _python_tables(*inputs)
        assert got is not None
        assert set(got) == set(want)
        for name, value in want.items():
            if isinstance(value, torch.Tensor):
                assert got[name].dtype == value.dtype, (seed, name)
                assert got[name].shape == value.shape, (seed, name, got[name].shape, value.shape)
                assert torch.equal(got[name], value), (seed, name)
                assert got[name].is_contiguous(), (seed, name)
            else:
                assert type(got[name]) is type(value), (seed, name)
                assert got[name] == value, (seed, name)


def test_layouts_are_equal_whoever_built_them(monkeypatch):
    built = [make_case(kind, 3).layout for kind in KINDS]
    monkeypatch.setattr(native, "EXTENSION", None)
    for kind, layout in zip(KINDS, built):
        twin = make_case(kind, 3).layout
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert twin != make_case(kind, 4).layout


@pytest.mark.parametrize(
    "build",
    [
        lambda: VisualLayout.from_segments(
            torch.tensor([[0, 0, 1], [0, 2, 1]]), torch.zeros(2, 3).bool()
        ),
        lambda: VisualLayout.from_segments(torch.tensor([[0, -1, 1]]), torch.zeros(1, 3).bool()),
        lambda: VisualLayout.from_segments(
            torch.tensor([[2, 0, 1, 1]]),
            torch.zeros(1, 4).bool(),
            torch.tensor([[True, False, True, True]]),
        ),
        lambda: VisualLayout.from_packed(torch.tensor([0, 3, 2, 5]).int(), torch.zeros(5).bool()),
    ],
    ids=["decrease", "negative", "decrease across padding", "cu_seqlens"],
)
def test_refusals_have_the_same_words(build, monkeypatch):
    with pytest.raises(ValueError) as native_error:
        build()
    monkeypatch.setattr(native, "EXTENSION", None)
    with pytest.raises(ValueError) as python_error:
        build()
    assert str(native_error.value) == str(python_error.value)


def test_non_contiguous_masks():
    visual = torch.arange(60).view(20, 3).T % 4 == 0
    live = (torch.arange(120).view(3, 40) % 7 > 0)[:, ::2]
    segment = (torch.arange(20) // 9)[:, None].expand(20, 3).T
    got = VisualLayout.from_segments(segment, visual, live)
    assert got == VisualLayout.from_segments(
        segment.contiguous().int(), visual.contiguous(), live.contiguous()
    )


def test_the_extension_builds_layouts_faster_than_python(monkeypatch):
    """A guard against a slow path, not a benchmark: the measured factor is about 20."""
    visual = torch.zeros(16, 1024, dtype=torch.bool)
    visual[:, 20:749] = True

    def best() -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            VisualLayout.from_mask(visual)
            times.append(time.perf_counter() - start)
        return min(times)

    with_extension = best()
    monkeypatch.setattr(native, "EXTENSION", None)
    assert with_extension < best() / 2


# The operations


@pytest.fixture
def isa(request):
    before = native.EXTENSION.isa()
    native.EXTENSION.use_isa(request.param)
    yield request.param
    native.EXTENSION.use_isa(before)


def everything(inputs, target, layout, objective, d_out, d_loss, d_lse, backend):
    """out, fused loss, lse, modular loss, and the gradients of a weighted sum of them."""
    options = {"objective": objective, "backend": backend}
    out, fused = flash_attention_with_alignment(*inputs, target, layout, **options)
    _, lse = flash_attention(*inputs, layout=layout, backend=backend)
    modular = visual_alignment_loss(*inputs[:2], lse, target, layout, **options)
    total = (out * d_out.to(out.dtype)).sum() + d_loss * (fused + 0.5 * modular)
    total = total + (torch.where(lse.isinf(), 0, lse) * d_lse.to(lse.dtype)).sum()
    return out, fused, lse, modular, *torch.autograd.grad(total, inputs)


def check(layout, inputs, objective="row", d_loss=3.0, with_out=1.0, without=0.0):
    """All of it on `cpu` within the error budget of the reference in the same dtype."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    g = torch.Generator().manual_seed(8)
    tq, tk = (2 * torch.randn(*layout.shape, 6, 32, generator=g) for _ in range(2))
    t_lse = flash_attention(tq, tk, tk, layout=layout, backend="reference")[1]
    target = visual_attention_map(tq, tk, t_lse, layout, backend="reference")
    d_out = with_out * torch.randn(inputs[0].shape, generator=g)
    d_out[torch.rand(layout.shape, generator=g) < without] = 0
    d_out = d_out.to(dtype)
    d_lse = 0.3 * with_out * torch.randn(1, generator=g)
    got, eager, want = (
        everything(x, target, layout, objective, d_out, d_loss, d_lse, backend)
        for x, backend in ((inputs, "cpu"), (inputs, "reference"), (exact, "reference"))
    )
    for i, name in enumerate(("out", "fused", "lse", "modular", "dq", "dk", "dv")):
        factor = FORWARD if i < 4 else GRADIENT
        if not want[i].any():
            # An exact 0 (one key: dP - D cancels) has no largest value: one rounding of dP.
            largest = d_out.double().abs().amax() * exact[2].detach().abs().amax()
            assert max_error(got[i], want[i]) <= FLOOR[dtype] * float(largest)
            continue
        assert_within_budget(f"{objective} {name}", got[i], eager[i], want[i], dtype, factor)


def random_case(seed):
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=g))]

    length = int(torch.randint(6, 200, (1,), generator=g))
    case = make_case(pick(*KINDS), seed, batch=pick(2, 3, 4), length=length)
    kv_heads = pick(1, 2, 3)
    dtype = pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    objective = pick("row", "map", "mse", "kl", *(["pooled"] * (dtype == torch.float32)))
    dim = pick(1, 3, 8, 16, 24, 32, 40, 64, 80, 96, 128, 160, 256)
    inputs = random_qkv(case, seed, kv_heads * pick(1, 2, 3), kv_heads, dim, dtype)
    return case.layout, inputs, objective, pick(0.0, 0.5), pick(0.0, 1.0)


SEEDS = [*range(60), *(pytest.param(s, marks=pytest.mark.full) for s in range(60, 2000))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random(seed):
    layout, inputs, objective, without, with_out = random_case(seed)
    # float16 training scales its losses: the gradient of the loss alone is subnormal otherwise.
    d_loss = 4096.0 if inputs[0].dtype == torch.float16 and not with_out else 3.0
    check(layout, inputs, objective, d_loss, with_out, without)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_instruction_sets(objective, isa):
    assert native.EXTENSION.isa() == isa
    for kind, dim in (("left", 24), ("packed", 80), ("turns", 64)):
        case = make_case(kind, seed=dim, length=75)
        check(case.layout, random_qkv(case, dim, 4, 2, dim, torch.float32), objective)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_gradients_of_keys_that_many_query_heads_read(kv_heads, isa):
    """Sums over all rows of all these heads: one term after another would round too often."""
    n, heads, dim = 512, 16, 64
    g = torch.Generator().manual_seed(0)
    q, d_out = (torch.randn(1, n, heads, dim, generator=g) for _ in range(2))
    k, v = (torch.randn(1, n, kv_heads, dim, generator=g) for _ in range(2))

    def eager(*inputs):
        q, k, v = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in inputs)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) * dim**-0.5).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def gradients(run, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(run(*leaves), leaves, d_out.to(dtype))

    got = gradients(lambda *x: flash_attention(*x, backend="cpu")[0], torch.float32)
    low, exact = gradients(eager, torch.float32), gradients(eager, torch.float64)
    for name, *values in zip(("dq", "dk", "dv"), got, low, exact):
        assert_within_budget(name, *values, torch.float32, GRADIENT)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_sixteen_bit_conversions(isa):
    """Every finite bfloat16 and float16 value survives a softmax over one key: out is v."""
    segments = torch.arange(1, 513)[None]
    layout = VisualLayout.from_segments(segments, torch.zeros(1, 512).bool())
    for dtype in (torch.bfloat16, torch.float16):
        v = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 512, 1, 128)
        v = torch.where(v.isfinite(), v, 1)
        q = torch.zeros_like(v)
        assert torch.equal(flash_attention(q, q, v, layout=layout, backend="cpu")[0], v)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_rounding_to_sixteen_bits(isa):
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        # The mean of two neighbours is a tie or a value between; both must round as torch rounds.
        v = (torch.randn(1, 256, 1, 64, generator=g) * 10.0 ** torch.arange(-7, 1).repeat(8)).to(
            dtype
        )
        layout = VisualLayout.from_segments(
            torch.arange(1, 257)[None] // 2 + 1, torch.zeros(1, 256).bool()
        )
        q = torch.zeros_like(v)
        out, _ = flash_attention(q, q, v, layout=layout, backend="cpu")
        pairs = v.float()
        for i in range(1, 255, 2):
            mean = (pairs[0, i] + pairs[0, i + 1]) * 0.5
            assert torch.equal(out[0, i + 1], mean.to(dtype))


def operations(inputs, target, layout, objective):
    """All results and gradients of the cpu backend, for comparisons by torch.equal."""
    g = torch.Generator().manual_seed(1)
    d_out = torch.randn(inputs[0].shape, generator=g).to(inputs[0].dtype)
    results = everything(inputs, target, layout, objective, d_out, 3.0, torch.ones(1), "cpu")
    lse = results[2].detach().requires_grad_()
    loss = visual_alignment_loss(
        *inputs[:2], lse, target, layout, objective=objective, backend="cpu"
    )
    map_data = visual_attention_map(*inputs[:2], lse, layout, backend="cpu").data
    return *results, map_data, *torch.autograd.grad(loss, (*inputs[:2], lse))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["left", "packed", "turns"])
def test_results_do_not_depend_on_threads_or_repeats(kind, objective):
    case = make_case(kind, seed=5, batch=4, length=200)
    inputs = random_qkv(case, 5, 4, 2, 24, torch.float32)
    lse = flash_attention(*inputs, layout=case.layout)[1].detach()
    target = visual_attention_map(*inputs[:2], 0.9 * lse, case.layout)
    results = []
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)
        results.append(operations(inputs, target, case.layout, objective))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


THREADS = """
import sys, time, torch
from cdfast_kernels import flash_attention
torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else {threads})
x = torch.randn(2, 600, 8, 64, requires_grad=True)
flash_attention(x, x, x, backend="cpu")[0].sum().backward()
process, own = time.process_time(), time.thread_time()
for _ in range(6):
    flash_attention(x, x, x, backend="cpu")
process, own = time.process_time() - process, time.thread_time() - own
print((process - own) / process)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_it_runs_on_as_many_threads_as_torch(threads):
    """By processor time: the share that other threads than the caller's used."""
    others = float(run_python(THREADS.format(threads=threads)))
    assert others < 0.05 if threads == 1 else 0.2 < others < 0.8


MEMORY = """
import resource, torch
from cdfast_kernels import VisualLayout, flash_attention_with_alignment, visual_attention_map
from cdfast_kernels import flash_attention
torch.set_num_threads(1)
def run(n):
    layout = VisualLayout.from_mask((torch.arange(n) > 9)[None])
    q, k, v = (torch.randn(1, n, 16, 16, requires_grad=True) for _ in range(3))
    lse = flash_attention(q, k, v, layout=layout, backend="cpu")[1].detach()
    target = visual_attention_map(q, k, lse, layout, backend="cpu")
    out, loss = flash_attention_with_alignment(q, k, v, target, layout, backend="cpu")
    (out.sum() + loss).backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(2048)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_no_map_over_heads_is_stored():
    """One map over heads would take 16 * 2048^2 * 4 bytes = 268 MB."""
    assert int(run_python(MEMORY)) < 100e6


# Maps, G and the other backends


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_shared_with_the_reference(kind):
    case = make_case(kind, seed=6, length=75)
    q, k, v = random_qkv(case, 6, dtype=torch.float32)
    exact = [x.detach().double() for x in (q, k, v)]
    lse = flash_attention(q, k, v, layout=case.layout, backend="reference")[1]
    maps = [visual_attention_map(q, k, lse, case.layout, backend=b) for b in ("cpu", "reference")]
    torch.testing.assert_close(maps[0].data, maps[1].data, rtol=1e-5, atol=1e-7)
    assert torch.equal(maps[0].data == 0, maps[1].data == 0)
    exact[0] *= 0.5
    wide_lse = flash_attention(*exact, layout=case.layout)[1]
    wide = visual_attention_map(*exact[:2], wide_lse, case.layout)
    low = [x.half() for x in exact]
    half_lse = flash_attention(*low, layout=case.layout, backend="cpu")[1]
    half = visual_attention_map(*low[:2], half_lse, case.layout, backend="cpu")
    assert (wide.dtype, half.dtype) == (torch.float64, torch.float16)
    for objective in OBJECTIVES[:2]:
        want = visual_alignment_loss(q, k, lse, wide, case.layout, objective=objective)
        for target in (wide, half, VisualMap(wide.data.float(), case.layout)):
            for backend in ("cpu", "reference"):
                got = visual_alignment_loss(
                    q, k, lse, target, case.layout, objective=objective, backend=backend
                )
                torch.testing.assert_close(got, want, rtol=5e-3, atol=1e-6)


def test_saved_for_backward():
    """q, k, v, lse and G; of the tables only what the layout holds anyway."""
    case = make_case("full", seed=1, length=20)
    inputs = random_qkv(case, 1, dtype=torch.bfloat16)
    lse = flash_attention(*inputs, layout=case.layout)[1]
    target = visual_attention_map(*inputs[:2], lse, case.layout)
    out, _ = flash_attention_with_alignment(*inputs, target, case.layout, backend="cpu")
    own = [x for x in out.grad_fn.saved_tensors if x.is_floating_point()]
    want = sorted(x.numel() for x in (*inputs, lse, target.data))
    assert sorted(x.numel() for x in own) == want


def test_float64_is_left_to_the_reference_and_refused_by_name():
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    assert flash_attention(x, x, x)[1].dtype == torch.float64
    with pytest.raises(ValueError, match=r"q: expected float16, bfloat16 or float32 .*float64"):
        flash_attention(x, x, x, backend="cpu")


def test_auto_is_cpu_here(monkeypatch):
    from cdfast_kernels import cpu_ops

    calls = []
    forward = cpu_ops.flash_attention_cpu
    monkeypatch.setattr(
        cpu_ops, "flash_attention_cpu", lambda *a: calls.append(a[0].dtype) or forward(*a)
    )
    assert available_backends()["cpu"] is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(1, 3, 1, 8).to(dtype)
        flash_attention(x, x, x)
    assert calls == [torch.float32, torch.bfloat16, torch.float16]


# Operators


def operator_arguments():
    from cdfast_kernels import cpu_ops

    case = make_case("turns", seed=2)
    q, k, v = random_qkv(case, 2, 2, 1, 24, torch.float32)
    lse = flash_attention(q, k, v, layout=case.layout)[1].detach()
    lse = torch.where(lse.isinf(), 0, lse).requires_grad_()
    data = visual_attention_map(q, k, lse, case.layout).data
    axis = cpu_ops._axis_arguments(case.layout)
    return cpu_ops, {
        "attention": (q, k, v, 0.2, *axis),
        "visual_map": (q.detach(), k.detach(), lse.detach(), 0.2, *axis),
        "alignment": (q, k, lse, data, "row", 0.2, *axis),
        "attention_with_alignment": (q, k, v, data, "kl", 0.2, *axis),
    }


@pytest.mark.parametrize(
    "name", ["attention", "visual_map", "alignment", "attention_with_alignment"]
)
def test_opcheck(name):
    module, arguments = operator_arguments()
    torch.library.opcheck(getattr(module, name), arguments[name])


def test_torch_compile_without_graph_breaks():
    case = make_case("left", seed=6)
    inputs = random_qkv(case, 6, dtype=torch.float32)
    lse = flash_attention(*inputs, layout=case.layout)[1]
    target = visual_attention_map(*inputs[:2], lse + 0.1, case.layout)

    def step(q, k, v):
        out, loss = flash_attention_with_alignment(2 * q, k, v, target, case.layout)
        out2, lse2 = flash_attention(q, k, out[..., :2, :], layout=case.layout, backend="cpu")
        extra = visual_alignment_loss(q, k, lse2, target, case.layout, objective="kl")
        return out2.square().sum() + loss + extra

    want = step(*inputs)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, want))):
        assert torch.equal(a, b)


FAR = """
import torch
from cdfast_kernels import VisualLayout, flash_attention_with_alignment, flash_attention
from cdfast_kernels import visual_attention_map, visual_alignment_loss
torch.set_num_threads(1)
far = 2**31 + 64
g = torch.Generator().manual_seed(0)
layout = VisualLayout.from_mask(torch.arange(5).expand(2, 5) < 4)
near = [torch.randn(2, 5, 2, 32, generator=g).half() for _ in range(3)]
d_out = torch.randn(2, 5, 2, 32, generator=g).half()

def spread(x, strides):
    # Sparse: only the pages that are written take memory.
    size = sum((n - 1) * s for n, s in zip(x.shape, strides)) + 1
    y = torch.empty(size, dtype=x.dtype).as_strided(x.shape, strides)
    return y.copy_(x)

def run(q, k, v, d_out):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    _, lse = flash_attention(q, k, v, layout=layout, backend="cpu")
    target = visual_attention_map(q, k, 0.9 * lse, layout, backend="cpu")
    out, loss = flash_attention_with_alignment(q, k, v, target, layout, backend="cpu")
    modular = visual_alignment_loss(q, k, lse, target, layout, backend="cpu")
    total = (out, loss, modular)
    one = torch.ones(())
    return *total, *torch.autograd.grad(total, (q, k, v), (d_out, one, one))

want = run(*near, d_out)
for strides in ((far, 64, 32, 1), (160, 32, far, 1), (64, far // 4, 32, 1)):
    got = run(*(spread(x, strides) for x in near), spread(d_out, strides))
    for a, b in zip(got, want):
        assert torch.equal(a, b), strides
print("equal")
"""


def test_offsets_past_2_to_the_31():
    assert run_python(FAR) == "equal"


# Absence


ABSENT = """
import sys, warnings
sys.modules["cdfast_kernels._C"] = None
import torch
import cdfast_kernels as c
x = torch.randn(1, 5, 1, 8)
layout = c.VisualLayout.from_mask(torch.ones(1, 5, dtype=torch.bool))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    reason = c.available_backends()["cpu"]
    c.flash_attention(x.double(), x.double(), x.double())
    c.flash_attention(x, x, x, backend="reference")
    try:
        c.flash_attention(x, x, x, backend="cpu")
    except ValueError as error:
        print(reason in str(error))
    print(len(caught))
    for _ in range(2):
        lse = c.flash_attention(x, x, x, layout=layout)[1]
        c.visual_attention_map(x, x, lse, layout)
print([w.category.__name__ for w in caught], reason in str(caught[0].message))
print("was not built" in reason)
"""


def test_without_the_extension():
    """The package works on the reference, says why, and warns once, when auto would take cpu."""
    lines = run_python(ABSENT).splitlines()
    assert lines == ["True", "0", "['RuntimeWarning'] True", "True"]


ISA = """
import cdfast_kernels as c
from cdfast_kernels import native
print(native.EXTENSION.isa() if native.EXTENSION else c.available_backends()["cpu"])
"""


def test_an_instruction_set_can_be_forced():
    assert run_python(ISA) == ISAS[0]
    assert run_python(ISA, CDFAST_CPU_ISA="portable") == "portable"
    reason = run_python(ISA, CDFAST_CPU_ISA="mmx")
    assert reason == f"CDFAST_CPU_ISA: expected one of {', '.join(ISAS)}, got mmx"


def test_map_tile_is_the_one_of_the_sources():
    """csrc/problem.h repeats MAP_TILE."""
    layout = VisualLayout.from_mask(torch.ones(1, MAP_TILE + 1, dtype=torch.bool))
    assert layout.slot_tiles.tolist() == [[0, 1]]
