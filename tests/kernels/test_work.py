"""Formulas of benchmarks/work.py and tile_work.py: what the kernels do, counted as they run."""

import math

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

from benchmarks import tile_work, work
from benchmarks.memory import saved_bytes
from tests.kernels.conftest import INTERPRETING
from tests.kernels.on_device import DEVICE
from tests.kernels.plain import KINDS, make_case

counts = pytest.mark.skipif(
    not INTERPRETING or DEVICE != "cpu" or available_backends()["triton"] is not None,
    reason="needs the Triton interpreter on CPU tensors: TRITON_INTERPRET=1",
)


def layout_of(kind: str) -> VisualLayout:
    if kind == "holes":  # padding between live tokens: the kernels see no contiguous run
        live = torch.arange(150).expand(2, -1) % 50 > 5
        return VisualLayout.from_mask(torch.arange(150).expand(2, -1) % 90 > 30, live)
    if kind == "one image":  # a span that begins and ends inside tiles
        visual = (torch.arange(200) >= 20) & (torch.arange(200) < 140)
        return VisualLayout.from_mask(visual[None])
    return make_case(kind, seed=5, length=100).layout


LAYOUTS = (*KINDS, "holes", "one image")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_pairs_and_entries_are_those_of_the_dense_masks(kind):
    layout = layout_of(kind)
    visible = layout.visible()
    assert work.visible_pairs(layout) == int(visible.sum())
    assert work.visible_entries(layout) == int((visible & layout.visual[:, None]).sum())


@pytest.mark.parametrize("kind", ["full", "left", "packed", "turns", "one image"])
def test_row_tiles_of_the_cpu_are_those_with_a_visible_pair(kind):
    """Without padding behind the last live token no tile is visited for nothing."""
    layout, expected = layout_of(kind), 0
    for sample, visible in enumerate(layout.visible()):
        begin, end = layout.schedule.samples[sample, :2].tolist()
        lead = begin % 64  # tiles lie on the axis that packed samples share
        rows = torch.nn.functional.pad(visible[: end - begin, : end - begin], (lead, 64, lead, 64))
        for i in range(0, lead + end - begin, 64):
            n = min(i + 64, lead + end - begin) - max(i, lead)
            seen = [bool(rows[i : i + 64, j : j + 64].any()) for j in range(0, i + 64, 64)]
            expected += sum(seen) * -(-n // 4) * 4
    assert tile_work.cpu_visits(layout) == expected


def draw(shape: work.Shape, heads: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    size = (*shape.layout.shape, heads, shape.head_dim)
    return torch.randn(size, generator=g).to(shape.dtype)


def run_student(shape, q, k, v, lse, target):
    with_grad = [x.requires_grad_() for x in (q, k, v)]
    results = flash_attention_with_alignment(
        *with_grad, target, shape.layout, objective=shape.objective, backend="triton"
    )
    seeds = torch.ones_like(q), torch.ones(())
    torch.autograd.grad(results, with_grad, seeds)


def run_plain(shape, q, k, v, lse, target):
    with_grad = [x.requires_grad_() for x in (q, k, v)]
    out, _ = flash_attention(*with_grad, layout=shape.layout, backend="triton")
    torch.autograd.grad(out, with_grad, torch.ones_like(out))


def run_target(shape, q, k, v, lse, target):
    visual_attention_map(q, k, lse, shape.layout, storage="map", backend="triton")


def run_modular(shape, q, k, v, lse, target):
    with_grad = [x.requires_grad_() for x in (q, k, lse)]
    loss = visual_alignment_loss(
        *with_grad, target, shape.layout, objective=shape.objective, backend="triton"
    )
    torch.autograd.grad(loss, with_grad)


RUNS = dict(zip(work.OPERATIONS, (run_plain, run_student, run_target, run_modular)))

# (operation, layout, (heads, key heads, head size), dtype, objective, (BLOCK_M, BLOCK_N))
CASES = [
    ("plain", "one image", (2, 2, 32), torch.float32, "row", (64, 64)),
    ("plain", "packed", (2, 1, 32), torch.float16, "row", (32, 64)),
    ("student", "full", (2, 1, 32), torch.float16, "row", (64, 64)),
    ("student", "one image", (4, 2, 32), torch.float32, "kl", (128, 64)),
    ("student", "left", (2, 1, 64), torch.float32, "row", (32, 32)),
    ("student", "right", (2, 1, 32), torch.float16, "mse", (64, 32)),
    ("student", "packed", (2, 1, 32), torch.float32, "row", (64, 64)),
    ("student", "turns", (2, 1, 80), torch.float16, "kl", (64, 64)),
    ("student", "segments", (1, 1, 32), torch.float32, "map", (64, 32)),
    ("student", "holes", (1, 1, 32), torch.float16, "pooled", (64, 64)),
    ("target", "turns", (4, 2, 32), torch.float16, "row", (64, 64)),
    ("modular", "packed", (2, 1, 32), torch.float32, "row", (64, 32)),
    ("modular", "turns", (2, 2, 32), torch.float16, "row", (32, 64)),
]
# Loads are masked: dead rows and keys, padded channels and rows outside a panel are not read.
LEAST_OF_TILES = 0.35


@counts
@pytest.mark.parametrize(
    "operation, kind, heads, dtype, objective, block",
    CASES,
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x).removeprefix("torch."),
)
def test_counted_work(operation, kind, heads, dtype, objective, block, monkeypatch):
    from cdfast_kernels import launch

    from benchmarks.counting import counted

    settings = launch.Settings(*block, 4, 1)
    monkeypatch.setattr(launch, "_INTERPRETER", (settings,) * len(launch.KERNELS))
    shape = work.Shape(layout_of(kind), *heads, dtype, objective)
    n_heads, n_kv, _ = heads
    q, k, v = (draw(shape, h, i) for i, h in enumerate((n_heads, n_kv, n_kv)))
    _, lse = flash_attention(q, k, v, layout=shape.layout, backend="reference")
    target = visual_attention_map(q, k, 1.1 * lse, shape.layout, backend="reference")
    with counted() as counter:
        RUNS[operation](shape, q, k, v, lse, target)
    ideal = work.ideal(shape, operation)
    tiles = tile_work.tiles(shape, operation, lambda name: settings)
    assert set(counter.kernels) == set(ideal)
    for name, found in counter.kernels.items():
        assert found.launches == 1, name
        assert found.read >= ideal[name].read, name
        assert found.written >= ideal[name].written, name
        if name not in tiles:
            assert found.flops == ideal[name].flops == 0, name
            continue
        assert found.flops == tiles[name].flops, name
        assert found.flops >= ideal[name].flops, name
        assert LEAST_OF_TILES * tiles[name].read <= found.read <= tiles[name].read, name


@counts
@pytest.mark.parametrize(
    "kind, dtype", [("left", torch.float16), ("packed", torch.float32)], ids=str
)
def test_saved_bytes(kind, dtype):
    """q, k, v, out, lse; with the loss G and a float32 scale per row; the tables of the layout."""
    shape = work.Shape(layout_of(kind), 2, 1, 32, dtype)
    layout, tokens = shape.layout, math.prod(shape.layout.shape)
    q, k, v = (draw(shape, heads, i).requires_grad_() for i, heads in enumerate((2, 1, 1)))
    _, lse = flash_attention(q, k, v, layout=layout, backend="reference")
    target = visual_attention_map(q, k, lse.detach(), layout, backend="reference")
    tables = layout.schedule.tensors().values()
    expected = sum(x.nbytes for x in tables) + layout.slot_tiles.nbytes
    expected += tokens * 32 * (2 * 2 + 2 * 1) * dtype.itemsize + 4 * tokens * 2
    plain = saved_bytes(lambda: flash_attention(q, k, v, layout=layout, backend="triton"))
    assert plain == expected
    aligned = saved_bytes(
        lambda: flash_attention_with_alignment(q, k, v, target, layout, backend="triton")
    )
    assert aligned == expected + layout.map_rows * 64 * shape.g_size + 4 * tokens


@counts
def test_more_chunks_of_rows_are_more_launches_of_the_same_work(monkeypatch):
    """The forward of the loss is launched once per chunk of rows; the products stay."""
    from cdfast_kernels import alignment

    from benchmarks.counting import counted

    monkeypatch.setattr(alignment, "CHUNK_ROWS", 64)
    shape = work.Shape(layout_of("one image"), 1, 1, 32, torch.float32)
    q, k, v = (draw(shape, 1, i) for i in range(3))
    _, lse = flash_attention(q, k, v, layout=shape.layout, backend="reference")
    target = visual_attention_map(q, k, lse, shape.layout, backend="reference")
    found = []
    for size in (alignment.CHUNK_BYTES, 1):
        monkeypatch.setattr(alignment, "CHUNK_BYTES", size)
        with counted() as counter:
            run_student(shape, q, k, v, lse, target)
        found.append(counter.kernels)
    whole, chunked = found
    per_chunk = {name for name in whole if chunked[name].launches > 1}
    assert {chunked[name].launches for name in per_chunk} == {4}  # 200 rows, 64 at a time
    assert len(per_chunk) == 4  # map, coefficients, G, loss
    assert all(whole[name].flops == chunked[name].flops for name in whole)


def test_counting_needs_the_interpreter(monkeypatch):
    from benchmarks.counting import counted

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), counted():
        pass


def test_unknown_operation_is_named():
    shape = work.Shape(layout_of("full"), 1, 1, 32, torch.float32)
    with pytest.raises(ValueError, match=r"expected one of .*plain.*; got 'backward'"):
        work.ideal(shape, "backward")
