"""What only the Triton backend has: its tiles, head sizes, operators, launch table and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cdfast_kernels import (
    VisualLayout,
    VisualMap,
    available_backends,
    flash_attention,
    flash_attention_with_alignment,
    visual_alignment_loss,
    visual_attention_map,
)
from cdfast_kernels.layout import MAP_TILE
from cdfast_kernels.visual_map import FP16_SCALE

from tests.kernels.on_device import DEVICE
from tests.kernels.plain import KINDS, make_case, random_qkv
from tests.numerics import FLOOR, FORWARD, GRADIENT, assert_within_budget, max_error

ROOT = Path(__file__).parents[2]
REASON = available_backends()["triton"]
runs = pytest.mark.skipif(REASON is not None, reason=f"triton backend: {REASON}")
# The interpreter cannot multiply bfloat16.
BFLOAT16 = [torch.bfloat16] if DEVICE == "cuda" else []


def fused(inputs, target, layout, objective, d_out, d_loss, backend):
    """out, loss, dq, dk, dv."""
    out, loss = flash_attention_with_alignment(
        *inputs, target, layout, objective=objective, backend=backend
    )
    total = (out * d_out.to(out.dtype)).sum() + d_loss * loss
    return out, loss, *torch.autograd.grad(total, inputs)


def check(case_layout, inputs, objective="row", rows_without_d_out=0.0, d_loss=3.0, with_out=1.0):
    """The fused operation within the error budget of the reference in the same dtype."""
    layout = case_layout.to(DEVICE)
    low = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in low]
    g = torch.Generator().manual_seed(8)
    shape = (*layout.shape, 6, 32)
    tq, tk = (2 * torch.randn(shape, generator=g).to(DEVICE) for _ in range(2))
    lse = flash_attention(tq, tk, tk, layout=layout, backend="reference")[1]
    target = visual_attention_map(tq, tk, lse, layout, backend="reference")
    d_out = with_out * torch.randn(low[0].shape, generator=g)
    d_out[torch.rand(layout.shape, generator=g) < rows_without_d_out] = 0
    d_out = d_out.to(low[0])
    got, eager, want = (
        fused(x, target, layout, objective, d_out, d_loss, backend)
        for x, backend in ((low, "triton"), (low, "reference"), (exact, "reference"))
    )
    for i, name in enumerate(("out", "loss", "dq", "dk", "dv")):
        factor = FORWARD if i < 2 else GRADIENT
        if not want[i].any():
            # An exact 0 (one key: dP - D cancels) has no largest value: one rounding of dP.
            largest = d_out.double().abs().amax() * exact[2].detach().abs().amax()
            assert max_error(got[i], want[i]) <= FLOOR[low[0].dtype] * float(largest)
            continue
        assert_within_budget(name, got[i], eager[i], want[i], low[0].dtype, factor)


@runs
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *BFLOAT16], ids=str)
def test_head_sizes(dim, dtype):
    case = make_case("left", seed=dim, length=17)
    check(case.layout, random_qkv(case, dim, 2, 1, dim, dtype), "map")


SPANS = {
    "none": [],
    "one": [(3, 4)],
    "all": [(0, 10**6)],
    "first": [(0, 1)],
    "last": [(-1, None)],
    "several": [(0, 5), (7, 30), (64, 66)],
}


@runs
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    "length", [1, 2, 5, 17, 127, 128, 129, pytest.param(1025, marks=pytest.mark.full)]
)
def test_lengths_and_spans(length, span):
    if length > 17 and span not in ("several", "last"):
        length = length % 64 + 60  # the other spans at one length that crosses a tile
    visual = torch.zeros(1, length, dtype=torch.bool)
    for a, b in SPANS[span]:
        visual[:, a:b] = True
    case = make_case("full", 0)
    case.shape = (1, length)
    check(VisualLayout.from_mask(visual), random_qkv(case, length, 1, 1, dtype=torch.float32))


@runs
@pytest.mark.parametrize("objective", ["row", "map", "pooled", "mse", "kl"])
def test_rows_without_a_gradient_of_out(objective):
    """The loss alone, and dO = 0 on some rows: where an LSE gradient through `out` would fail."""
    case = make_case("turns", seed=4, length=40)
    inputs = random_qkv(case, 4, dtype=torch.float32)
    check(case.layout, inputs, objective, rows_without_d_out=0.5)
    check(case.layout, inputs, objective, with_out=0.0)


TILES = [(16, 64, True), (32, 32, False), (64, 32, True), (128, 64, False)]


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's launch table has these shapes")
@pytest.mark.parametrize("kind", ["left", "packed", "turns"])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_tile_shapes(tiles, kind, monkeypatch):
    """Every relation of row, key and map tiles that the launch table has."""
    from cdfast_kernels import launch

    block_m, block_n, acc_init = tiles
    settings = launch.Settings(block_m, block_n, 4, 1, acc_init)
    monkeypatch.setattr(launch, "_INTERPRETER", (settings,) * len(launch.KERNELS))
    case = make_case(kind, seed=3, length=75)
    inputs = random_qkv(case, 3, 2, 1, dtype=torch.float32)
    check(case.layout, inputs)
    lse = flash_attention(*inputs, layout=case.layout)[1].detach().requires_grad_()
    target = visual_attention_map(*inputs[:2], 1.3 * lse.detach(), case.layout)
    grads = []
    for backend in ("triton", "reference"):
        loss = visual_alignment_loss(*inputs[:2], lse, target, case.layout, backend=backend)
        grads.append(torch.autograd.grad(loss, (*inputs[:2], lse)))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


@runs
@pytest.mark.parametrize(
    "objective, kind, dtype",
    [
        ("row", "packed", torch.float16),
        ("row", "turns", torch.float32),
        ("map", "packed", torch.float32),
        ("pooled", "turns", torch.float32),
        ("mse", "turns", torch.float16),
        ("kl", "packed", torch.float32),
    ],
    ids=str,
)
def test_inputs_in_place_of_maps(objective, kind, dtype):
    """A window that keeps q, k and lse gives the loss of the window of maps, on every backend."""
    case = make_case(kind, seed=11, length=40)
    layout, window = case.layout.to(DEVICE), {"map": [], "inputs": []}
    for seed in (1, 2):
        q, k, _ = (x.detach().to(DEVICE) for x in random_qkv(case, seed, 2, 1, dtype=dtype))
        lse = flash_attention(q, k, k, layout=layout)[1]
        for storage, maps in window.items():
            maps.append(visual_attention_map(q, k, lse, layout, storage=storage, backend="triton"))
    kept, lazy = (VisualMap.mean(maps) for maps in window.values())
    assert len(lazy.inputs) == 2
    assert not kept.inputs
    assert torch.equal(lazy.data, kept.data)
    assert lazy.dtype == kept.dtype
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in random_qkv(case, 3, dtype=dtype)]
    d_out = torch.zeros_like(inputs[0])
    want = fused(inputs, kept, layout, objective, d_out, 3.0, "triton")
    # A stored float16 window has one rounding more than one that is formed in float32.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for backend in ("triton", "reference"):
        for a, b in zip(fused(inputs, lazy, layout, objective, d_out, 3.0, backend), want):
            assert (
                max_error(a, b) <= tolerance * float(b.detach().abs().max()) + FLOOR[dtype] * 1e-3
            )


@runs
@pytest.mark.parametrize(
    "kind, objective, storage",
    [("left", "row", "inputs"), ("packed", "mse", "map"), ("turns", "kl", "inputs")],
)
def test_chunks_of_rows(kind, objective, storage, monkeypatch):
    """Losses formed row by row do not depend on how many rows of S exist at a time."""
    from cdfast_kernels import alignment

    case = make_case(kind, seed=12, length=150)
    layout = case.layout.to(DEVICE)
    q, k, v = (x.detach().to(DEVICE) for x in random_qkv(case, 1, 2, 1, dtype=torch.float32))
    lse = flash_attention(q, k, k, layout=layout)[1]
    target = visual_attention_map(q, k, 0.9 * lse, layout, storage=storage, backend="triton")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for size in (alignment.CHUNK_BYTES, 1):
        monkeypatch.setattr(alignment, "CHUNK_BYTES", size)
        monkeypatch.setattr(alignment, "CHUNK_ROWS", 64)
        d_out = torch.ones_like(q)
        results.append(fused(inputs, target, layout, objective, d_out, 3.0, "triton"))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@runs
def test_a_map_larger_than_its_inputs_is_not_kept():
    layout = VisualLayout.from_mask(torch.ones(1, 300, dtype=torch.bool)).to(DEVICE)
    q = torch.randn(1, 300, 1, 32, device=DEVICE)
    lse = flash_attention(q, q, q, layout=layout)[1]
    assert visual_attention_map(q, q, lse, layout, backend="triton").inputs
    assert not visual_attention_map(q, q, lse, layout, backend="reference").inputs
    q = q.expand(1, 300, 4, 32)
    lse = lse.expand(1, 4, 300)
    assert not visual_attention_map(q, q, lse, layout, backend="triton").inputs


def random_case(seed):
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=g))]

    case = make_case(
        pick(*KINDS),
        seed,
        batch=pick(2, 3, 4),
        length=int(torch.randint(6, 100, (1,), generator=g)),
    )
    kv_heads = pick(1, 2)
    dtype = pick(torch.float32, torch.float16, *BFLOAT16)
    objective = pick("row", "map", "mse", "kl", *(["pooled"] * (dtype == torch.float32)))
    inputs = random_qkv(case, seed, kv_heads * pick(1, 2, 3), kv_heads, pick(32, 64, 80), dtype)
    return case.layout, inputs, objective, pick(0.0, 0.5), pick(0.0, 1.0)


@runs
@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(s, marks=pytest.mark.full) for s in range(6, 2000))]
)
def test_random(seed):
    layout, inputs, objective, without, with_out = random_case(seed)
    check(layout, inputs, objective, without, with_out=with_out)


def operator_arguments(objective="row"):
    from cdfast_kernels import triton_ops

    case = make_case("turns", seed=2)
    q, k, v = random_qkv(case, 2, 2, 1, dtype=torch.float32)
    lse = flash_attention(q, k, v, layout=case.layout)[1].detach()
    lse = torch.where(lse.isinf(), 0, lse).requires_grad_()
    data = visual_attention_map(q, k, lse, case.layout).data
    axis = triton_ops.Axis.of(case.layout).split()
    return triton_ops, {
        "attention": (q, k, v, 0.2, *axis),
        "visual_map": (q.detach(), k.detach(), lse.detach(), 0.2, *axis),
        "alignment": (q, k, lse, [data], [1.0], objective, 0.2, *axis),
        "attention_with_alignment": (q, k, v, [data], [1.0], objective, 0.2, *axis),
    }


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="device-independent")
@pytest.mark.parametrize(
    "name", ["attention", "visual_map", "alignment", "attention_with_alignment"]
)
def test_opcheck(name):
    module, arguments = operator_arguments()
    torch.library.opcheck(getattr(module, name), arguments[name])


@runs
def test_torch_compile_without_graph_breaks():
    case = make_case("left", seed=6)
    layout = case.layout.to(DEVICE)
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in random_qkv(case, 6)]
    inputs = [x.float().detach().requires_grad_() for x in inputs]
    lse = flash_attention(*inputs, layout=layout)[1]
    target = visual_attention_map(*inputs[:2], lse + 0.1, layout)

    def step(q, k, v):
        out, loss = flash_attention_with_alignment(2 * q, k, v, target, layout, backend="triton")
        out2, lse2 = flash_attention(q, k, out[..., :2, :], layout=layout, backend="triton")
        extra = visual_alignment_loss(q, k, lse2, target, layout, objective="kl", backend="triton")
        return out2.square().sum() + loss + extra

    want = step(*inputs)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, want))):
        assert torch.equal(a, b)


@runs
def test_saved_for_backward():
    """q, k, v, out, lse, G and the row scale; of the tables only what the layout holds anyway."""
    case = make_case("full", seed=1, length=20)
    inputs = [x.to(DEVICE) for x in random_qkv(case, 1, dtype=torch.float16)]
    layout = case.layout.to(DEVICE)
    lse = flash_attention(*inputs, layout=layout)[1]
    target = visual_attention_map(*inputs[:2], lse, layout)
    out, _ = flash_attention_with_alignment(*inputs, target, layout, backend="triton")
    saved = {x.data_ptr(): x for x in out.grad_fn.saved_tensors}
    own = [x for x in saved.values() if x.is_floating_point()]
    assert len(own) == 7
    assert sorted(x.numel() for x in own) == sorted(
        x.numel() for x in (*inputs, out, lse, target.data, layout.live)
    )
    g = next(x for x in own if x.shape == target.data.shape)
    assert g.dtype == torch.float16
    assert target.data.data_ptr() not in saved


@runs
@pytest.mark.parametrize(
    "change",
    [{"dim": 48}, {"dim": 33}, {"dim": 512}, {"dtype": torch.float64}],
    ids=str,
)
def test_refused_by_name(change):
    case = make_case("full", seed=0)
    q, k, v = random_qkv(case, 0, **({"dim": 32, "dtype": torch.float32} | change))
    lse = flash_attention(q, k, v, layout=case.layout)[1]
    target = visual_attention_map(q, k, lse, case.layout)
    for call in (
        lambda: flash_attention(q, k, v, layout=case.layout, backend="triton"),
        lambda: visual_attention_map(q, k, lse, case.layout, backend="triton"),
        lambda: visual_alignment_loss(q, k, lse, target, case.layout, backend="triton"),
        lambda: flash_attention_with_alignment(q, k, v, target, case.layout, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"^q: expected .*for the triton backend, got "):
            call()


def test_constants_of_the_kernels_are_those_of_the_package():
    from cdfast_kernels import schedule, tl_common

    assert tl_common.MAP_TILE.value == MAP_TILE
    assert tl_common.MAP_SCALE.value == FP16_SCALE
    assert tl_common.TINY.value == torch.finfo(torch.float32).tiny
    assert schedule.DEAD == -1
    samples = VisualLayout.from_mask(torch.zeros(1, 3, dtype=torch.bool)).schedule.samples
    assert samples.shape[1] == tl_common.SAMPLE_FIELDS.value


def test_every_architecture_and_head_size_has_settings():
    from cdfast_kernels import launch

    for arch in (80, 86, 89, 90, 100, 120):
        for dim in (32, 64, 80, 96, 128, 256):
            for size in (2, 4):
                for kernel in launch.KERNELS:
                    settings = launch.settings_for(kernel, arch, dim, size)
                    assert MAP_TILE % settings.BLOCK_N == 0


def test_settings_that_were_measured_come_first(tmp_path, monkeypatch):
    from cdfast_kernels import launch

    row = {"arch": 90, "head_dim_pad": 128, "element_size": 2, "kernel": "dq"}
    file = tmp_path / "table.json"
    file.write_text(json.dumps([row | {"settings": [64, 32, 4, 3, False]}]))
    before = launch.settings_for("dq", 90, 64, 2), launch.settings_for("fwd", 90, 128, 2)
    monkeypatch.setenv(launch.TABLE_VARIABLE, str(file))
    assert launch.settings_for("dq", 90, 96, 2) == (64, 32, 4, 3, False)
    assert before == (launch.settings_for("dq", 90, 64, 2), launch.settings_for("fwd", 90, 128, 2))
    for number, text in enumerate(("[", "{}[", json.dumps([row]), "[3]")):
        bad = tmp_path / f"bad{number}.json"
        bad.write_text(text)
        for path in (bad, tmp_path / "absent.json"):
            monkeypatch.setenv(launch.TABLE_VARIABLE, str(path))
            with pytest.raises(ValueError, match=r"^CDFAST_LAUNCH_TABLE: expected .*json"):
                launch.settings_for("dq", 90, 128, 2)


def test_importing_the_package_does_not_import_triton():
    code = "import sys, cdfast_kernels as c; c.available_backends(); print('triton' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "False"


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch, cdfast_kernels as c\n"
        "x = torch.zeros(1, 2, 1, 32)\n"
        "try: c.flash_attention(x, x, x, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    assert "expected" in result.stdout
    assert "TRITON_INTERPRET" in result.stdout or "CUDA tensor" in result.stdout


FAR = """
import sys
import torch
from cdfast_kernels import VisualLayout, flash_attention_with_alignment, flash_attention
from cdfast_kernels import visual_attention_map, visual_alignment_loss
torch.set_num_threads(1)
device = sys.argv[1]
far = 2**31 + 64
g = torch.Generator().manual_seed(0)
layout = VisualLayout.from_mask(torch.arange(5).expand(2, 5) < 4).to(device)
near = [torch.randn(2, 5, 2, 32, generator=g).half().to(device) for _ in range(3)]
d_out = torch.randn(2, 5, 2, 32, generator=g).half().to(device)

def spread(x, strides):
    # On a CPU sparse: only the pages that are written take memory. A GPU takes 4 GiB each.
    size = sum((n - 1) * s for n, s in zip(x.shape, strides)) + 1
    y = torch.empty(size, dtype=x.dtype, device=device).as_strided(x.shape, strides)
    return y.copy_(x)

def run(q, k, v, d_out):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    _, lse = flash_attention(q, k, v, layout=layout, backend="triton")
    target = visual_attention_map(q, k, 0.9 * lse, layout, backend="triton")
    out, loss = flash_attention_with_alignment(q, k, v, target, layout, backend="triton")
    modular = visual_alignment_loss(q, k, lse, target, layout, backend="triton")
    total = (out, loss, modular)
    one = torch.ones((), device=device)
    return *total, *torch.autograd.grad(total, (q, k, v), (d_out, one, one))

want = run(*near, d_out)
for strides in ((far, 64, 32, 1), (160, 32, far, 1), (64, far // 4, 32, 1)):
    got = run(*(spread(x, strides) for x in near), spread(d_out, strides))
    for a, b in zip(got, want):
        assert torch.equal(a, b), strides
print("equal")
"""


@runs
def test_offsets_past_2_to_the_31():
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    result = subprocess.run(
        [sys.executable, "-c", FAR, DEVICE], capture_output=True, text=True, timeout=800
    )
    assert result.stdout.strip().endswith("equal"), result.stderr[-2000:]


@runs
def test_the_fused_and_the_modular_form_agree():
    case = make_case("packed", seed=9, length=30)
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in random_qkv(case, 9, dim=64)]
    inputs = [x.float().detach().requires_grad_() for x in inputs]
    layout = case.layout.to(DEVICE)
    out, lse = flash_attention(*inputs, layout=layout, backend="triton")
    target = visual_attention_map(*inputs[:2], 0.9 * lse, layout, backend="triton")
    modular = visual_alignment_loss(*inputs[:2], lse, target, layout, backend="triton")
    fused_out, loss = flash_attention_with_alignment(*inputs, target, layout, backend="triton")
    assert torch.equal(out, fused_out)
    assert torch.equal(loss, modular)
    got = torch.autograd.grad(out.sum() + modular, inputs)
    want = torch.autograd.grad(fused_out.sum() + loss, inputs)
    for a, b in zip(got, want):
        assert max_error(a, b) <= 1e-5 * float(b.abs().max())
