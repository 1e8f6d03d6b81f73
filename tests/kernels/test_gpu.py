"""What a GPU adds to the suite: schedules that vary, memory that is shared, tensors that are large.

The checks are functions of a size. Those that the Triton interpreter can run do so on CPU tensors
at a small one; tests marked `gpu` need the device.
"""

import gc
import math
from contextlib import contextmanager

import pytest
import torch
from cdfast_kernels import (
    VisualLayout,
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    visual_alignment_loss,
    visual_attention_map,
)

from tests.kernels.on_device import DEVICE, on_device
from tests.kernels.plain import make_case, random_qkv
from tests.numerics import FLOOR, max_error

REASON = available_backends()["triton"]
GPU = DEVICE == "cuda"
runs = pytest.mark.skipif(REASON is not None, reason=f"triton backend: {REASON}")
GIB = 2**30
# The interpreter cannot multiply bfloat16.
HALF = torch.bfloat16 if GPU else torch.float16


def problem(kind, length, heads=4, kv_heads=2, dim=32, dtype=HALF, seed=0):
    """Layout, (q, k, v) and a target from two other layers, on the device."""
    case = make_case(kind, seed, length=length)
    layout = case.layout.to(DEVICE)
    inputs, teacher = (
        [x.detach().to(DEVICE) for x in random_qkv(case, s, heads, kv_heads, dim, dtype)]
        for s in (seed, seed + 1)
    )
    lse = flash_attention(*teacher, layout=layout, backend="triton")[1]
    return layout, inputs, visual_attention_map(*teacher[:2], lse, layout, backend="triton")


def everything(layout, inputs, target, d_out, objective="row"):
    """All outputs and gradients of the four operations."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    options = {"objective": objective, "reduction": "none", "backend": "triton"}
    out, loss = flash_attention_with_alignment(q, k, v, target, layout, **options)
    one = torch.ones_like(loss)
    fused = torch.autograd.grad((out, loss), (q, k, v), (d_out, one))
    plain, lse = flash_attention(q, k, v, layout=layout, backend="triton")
    modular = visual_alignment_loss(q, k, lse, target, layout, **options)
    apart = torch.autograd.grad((plain, modular), (q, k, v), (d_out, one))
    data = visual_attention_map(q, k, lse, layout, backend="triton").data
    return (out, loss, *fused, plain, lse, modular, *apart, data)


def random_like(x, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g).to(x)


# Shared with the interpreter

REPEATS = 1000 if GPU else 2
REPEATED = [
    ("left", 200, 4, 2, 64, "row"),
    ("packed", 150, 2, 2, 80, "kl"),
    ("turns", 130, 2, 1, 32, "map"),
    ("full", 700, 16, 4, 128, "pooled"),
]


@runs
@pytest.mark.parametrize("kind, length, heads, kv_heads, dim, objective", REPEATED)
def test_repeats_change_no_bit(kind, length, heads, kv_heads, dim, objective):
    if not GPU:
        length, heads, kv_heads, dim = 11, 2, 1, 32
    torch.use_deterministic_algorithms(False)  # as users run: no help from torch
    layout, inputs, target = problem(kind, length, heads, kv_heads, dim)
    d_out = random_like(inputs[0])
    first = everything(layout, inputs, target, d_out, objective)
    changed = [torch.zeros((), dtype=torch.bool, device=DEVICE) for _ in first]
    noise = torch.randn(1024, 1024, device=DEVICE) if GPU else None
    side = torch.cuda.Stream() if GPU else None
    for i in range(REPEATS - 1):
        if noise is not None:
            # Other work on the device, of another length each time: programs start in other orders.
            with torch.cuda.stream(side):
                for _ in range(i % 7):
                    noise @ noise
        for flag, a, b in zip(changed, everything(layout, inputs, target, d_out, objective), first):
            flag |= (a != b).any()
    assert not torch.stack(changed).any(), [i for i, x in enumerate(changed) if x]


MARGIN = 256  # numbers on each side, so that alignment stays what it was
SENTINEL = -7.0


def embedded(x, fill, buffers):
    """x with MARGIN numbers of `fill` in front of it and behind it in one allocation."""
    buffer = EMPTY(x.numel() + 2 * MARGIN, dtype=x.dtype, device=x.device).fill_(fill)
    inside = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    inside.copy_(x)
    buffers.append(buffer)
    return inside


EMPTY, EMPTY_LIKE, ZEROS = torch.empty, torch.empty_like, torch.zeros


@contextmanager
def canaries(monkeypatch):
    """Tensors made by torch.empty, empty_like and zeros have a sentinel on both sides."""
    buffers = []

    def guarded(make, value):
        def run(*args, **kwargs):
            x = make(*args, **kwargs)
            usual = x.is_contiguous() and x.is_floating_point()
            return embedded(x.fill_(value), SENTINEL, buffers) if usual else x

        return run

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded(EMPTY, math.nan))
        patch.setattr(torch, "empty_like", guarded(EMPTY_LIKE, math.nan))
        patch.setattr(torch, "zeros", guarded(ZEROS, 0))
        yield buffers
    for buffer in buffers:
        assert (buffer[:MARGIN] == SENTINEL).all(), "written in front of an output"
        assert (buffer[-MARGIN:] == SENTINEL).all(), "written behind an output"


@runs
@pytest.mark.parametrize("kind", ["left", "packed", "turns"])
@pytest.mark.parametrize("objective", ["row", pytest.param("kl", marks=pytest.mark.full)])
def test_nothing_outside_the_tensors_is_read_or_written(kind, objective, monkeypatch):
    """NaN around the inputs, sentinels around everything that the operations allocate."""
    layout, inputs, target = problem(kind, 300 if GPU else 11)
    d_out = random_like(inputs[0])
    want = everything(layout, inputs, target, d_out, objective)
    nan = float("nan")
    inputs = [embedded(x, nan, []) for x in inputs]
    target = type(target)(embedded(target.data, nan, []), layout)
    d_out = embedded(d_out, nan, [])
    with canaries(monkeypatch) as buffers:
        got = everything(layout, inputs, target, d_out, objective)
    assert len(buffers) > 10
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_the_canaries_see_a_write(monkeypatch):
    def overrun():
        with canaries(monkeypatch):
            x = torch.empty(4, 3)
            torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel()).fill_(1)

    with pytest.raises(AssertionError, match="behind"):
        overrun()


@runs
@pytest.mark.parametrize("kind", ["left", pytest.param("turns", marks=pytest.mark.full)])
def test_poisoned_padding_in_half_precision(kind):
    layout, inputs, target = problem(kind, 300 if GPU else 11)
    dead = ~layout.live[:, :, None, None]
    d_out = random_like(inputs[0])

    def run(poison):
        dirty = [x.masked_fill(dead, poison) for x in inputs]
        return everything(layout, dirty, target, d_out.masked_fill(dead, poison))

    assert dead.any()
    for a, b in zip(run(float("nan")), run(0.0)):
        assert torch.equal(a, b)


def test_arguments_land_on_the_device():
    """The plumbing that runs the shared tests on a GPU, with "meta" in its place."""
    seen = []

    def spy(*args, **kwargs):
        seen.append([*args, *kwargs.values()])

    layout = make_case("full", 0).layout
    x = torch.randn(3, 2, 5).transpose(0, 1)
    on_device(spy, "meta")(x[..., :4], x, layout=layout, scale=2.0)
    q, k, there, scale = seen.pop()
    assert {a.device.type for a in (q, k, there)} == {"meta"}
    assert (q.stride(), k.stride(), scale) == (x[..., :4].stride(), x.stride(), 2.0)
    on_device(spy, "meta")(x, backend="cpu")
    assert seen.pop()[0] is x
    other = torch.empty(1, device="meta")
    on_device(spy, "meta")(other, x)
    assert seen.pop() == [other, x]


# The GPU alone


@pytest.fixture
def gib_free():
    """A function that skips the test where fewer GiB are free; memory is given back at the end."""

    def need(gib):
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < gib:
            pytest.skip(f"needs {gib} GiB of free GPU memory: {free:.1f} are")

    torch.use_deterministic_algorithms(False)  # no time for filling
    yield need
    gc.collect()
    torch.cuda.empty_cache()


def on_gpu(shape, seed, dtype=HALF):
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=g, device=DEVICE, dtype=dtype)


def fused(layout, q, k, v, teacher_q, d_out):
    """out, loss, dq, dk, dv with a target from (teacher_q, k)."""
    lse = flash_attention(teacher_q, k, v, layout=layout, backend="triton")[1]
    target = visual_attention_map(teacher_q, k, lse, layout, backend="triton")
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, loss = flash_attention_with_alignment(
        *inputs, target, layout, reduction="none", backend="triton"
    )
    grads = torch.autograd.grad((out, loss), inputs, (d_out, torch.ones_like(loss)))
    return out.detach(), loss.detach(), *grads


def assert_samples_agree(visual, q, k, v, teacher_q, d_out, samples):
    """The batch gives each of these samples what it gets alone: programs know their sample only."""
    whole = fused(VisualLayout.from_mask(visual).to(DEVICE), q, k, v, teacher_q, d_out)
    for b in samples:
        part = slice(b, b + 1)
        layout = VisualLayout.from_mask(visual[part]).to(DEVICE)
        alone = fused(layout, *(x[part] for x in (q, k, v, teacher_q, d_out)))
        for name, a, c in zip(("out", "loss", "dq", "dk", "dv"), whole, alone):
            assert c.any(), name
            error = max_error(a[part], c)
            assert error <= FLOOR[HALF] * float(c.abs().max()), (name, b, error)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(gib_free):
    batch, tokens, heads, dim = 257, 2048, 32, 128
    gib_free(34)
    q, teacher_q, d_out = (on_gpu((batch, tokens, heads, dim), s) for s in (0, 1, 2))
    k, v = (on_gpu((batch, tokens, 1, dim), s) for s in (3, 4))
    assert q.numel() > 2**31
    visual = torch.zeros(batch, tokens, dtype=torch.bool)
    visual[:, 100:170] = True
    assert_samples_agree(visual, q, k, v, teacher_q, d_out, (0, 128, 256))


@pytest.mark.gpu
def test_maps_of_more_than_2_to_the_31_numbers(gib_free):
    batch, tokens = 18, 16384
    gib_free(66)
    assert batch * tokens * tokens // 2 > 2**31  # causal blocks alone
    q, teacher_q, d_out = (on_gpu((batch, tokens, 2, 32), s) for s in (0, 1, 2))
    k, v = (on_gpu((batch, tokens, 1, 32), s) for s in (3, 4))
    visual = torch.ones(batch, tokens, dtype=torch.bool)
    assert_samples_agree(visual, q, k, v, teacher_q, d_out, (0, 9, 17))


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["row", "kl", "pooled"])
def test_cuda_graph(objective):
    """Captured once, replayed on other values: no operation waits for the device or allocates."""
    torch.use_deterministic_algorithms(False)
    layout, inputs, target = problem("left", 200, dim=64)
    d_out = random_like(inputs[0])
    static = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            everything(layout, static, target, d_out, objective)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(layout, static, target, d_out, objective)
    for seed in (1, 2):
        fresh = [random_like(x, seed) for x in inputs]
        for x, y in zip(static, fresh):
            x.copy_(y)
        graph.replay()
        for a, b in zip(captured, everything(layout, fresh, target, d_out, objective)):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_inductor_without_graph_breaks():
    torch.use_deterministic_algorithms(False)
    layout, inputs, target = problem("turns", 200, dim=64)
    inputs = [x.requires_grad_() for x in inputs]

    def step(q, k, v):
        out, loss = flash_attention_with_alignment(2 * q, k, v, target, layout, backend="triton")
        return out.float().square().mean() + loss

    want = step(*inputs)
    got = torch.compile(step, fullgraph=True)(*inputs)
    assert max_error(got, want) <= 1e-5 * float(want)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, want))):
        assert max_error(a, b) <= FLOOR[HALF] * float(b.abs().max())


def peak_bytes(run):
    """Largest number of bytes allocated during run() beyond those before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, n_visual", [(1024, 729), (4096, 2880)])
def test_extra_memory_is_what_the_readme_counts(tokens, n_visual, gib_free):
    gib_free(8)
    heads, dim = 16, 128
    visual = torch.zeros(1, tokens, dtype=torch.bool)
    visual[:, 20 : 20 + n_visual] = True
    layout = VisualLayout.from_mask(visual).to(DEVICE)
    q, k, v, d_out = (on_gpu((1, tokens, heads, dim), s) for s in range(4))
    lse = flash_attention(q, k, v, layout=layout, backend="triton")[1]
    target = visual_attention_map(q, k, 0.9 * lse, layout, backend="triton")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    one = torch.ones((), device=DEVICE)

    def plain():
        out, _ = flash_attention(*leaves, layout=layout, backend="triton")
        torch.autograd.grad(out, leaves, d_out)

    def aligned(backward=True):
        out, loss = flash_attention_with_alignment(*leaves, target, layout, backend="triton")
        kept.append(torch.cuda.memory_allocated())
        if backward:
            torch.autograd.grad((out, loss), leaves, (d_out, one))

    kept = []
    plain(), aligned()  # compiled now
    # kernels/README.md: G, as large as T, stays until backward; S in float32 and the partial sums
    # of every slot and row are gone with the forward.
    counted_g = 2 * target.data.numel()
    counted_peak = (2 + 4) * target.data.numel() + 130 * layout.num_slots * tokens
    rounding = 4 * 2**20  # the allocator's, and numbers per row
    qkv = q.numel() * 2
    forward = peak_bytes(lambda: aligned(backward=False))
    assert forward - qkv <= counted_peak + rounding  # its output is no extra
    before = torch.cuda.memory_allocated()
    out, loss = flash_attention_with_alignment(*leaves, target, layout, backend="triton")
    saved = torch.cuda.memory_allocated() - before - qkv
    assert saved <= counted_g + rounding, (saved, counted_g)
    del out, loss
    extra = peak_bytes(aligned) - peak_bytes(plain)
    assert extra <= counted_peak + rounding, (extra, counted_peak)
