"""Visual attention maps: values, storage, the window mean."""

import pytest
import torch
from cdfast_kernels import VisualLayout, VisualMap, flash_attention, visual_attention_map
from cdfast_kernels.layout import MAP_TILE

from tests.kernels.plain import KINDS, dense_maps, make_case, plain_maps, random_qkv


def make_map(case, seed, backend="reference", **kwargs) -> VisualMap:
    q, k, v = random_qkv(case, seed, **kwargs)
    lse = flash_attention(q, k, v, layout=case.layout, backend=backend)[1]
    return visual_attention_map(q, k, lse, case.layout, backend=backend)


@pytest.mark.parametrize("length", [11, 2 * MAP_TILE + 9])
@pytest.mark.parametrize("kind", KINDS)
def test_map_is_the_head_mean(kind, length, backend, exact_dtype):
    case = make_case(kind, seed=2, length=length)
    q, k, _ = random_qkv(case, 2, dtype=exact_dtype)
    got = dense_maps(case, make_map(case, 2, backend, dtype=exact_dtype))
    tolerance = 1e-13 if exact_dtype == torch.float64 else 1e-6
    for a, b in zip(got, plain_maps(case, q, k)):
        assert a.dtype == exact_dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_map_is_zero_elsewhere(kind, backend):
    case = make_case(kind, seed=9)
    m = make_map(case, 9, backend, dtype=torch.float32)
    dense = m.to_dense()
    if case.packed:
        assert [d.shape for d in dense] == [(len(t), len(t)) for t in case.tokens]
        inside = dense
    else:
        assert dense.shape == (*case.shape, case.shape[1])
        inside = dense_maps(case, m)
        assert float(dense.sum()) == pytest.approx(sum(float(x.sum()) for x in inside))
    for s, entries in enumerate(map(case.entries, range(case.n_samples))):
        assert not inside[s][~entries].any()


@pytest.mark.parametrize(
    "dtype, stored, dense",
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_storage(dtype, stored, dense):
    case = make_case("full", seed=1)
    m = make_map(case, 1, dtype=dtype)
    assert (m.dtype, m.data.dtype, m.to_dense().dtype) == (stored, stored, dense)
    assert not m.data.requires_grad
    assert not m.to_dense().requires_grad
    q, k, _ = random_qkv(case, 1, dtype=dtype)
    for a, b in zip(dense_maps(case, m), plain_maps(case, q.double(), k.double())):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-6)


def test_scaled_storage_holds_one_and_small_values():
    # One token that sees only itself has probability 1; far logits give probabilities near 1e-9.
    q = torch.tensor([[[[0.0]], [[1.0]]]], dtype=torch.float16)
    k = torch.tensor([[[[-10.0]], [[10.5]]]], dtype=torch.float16)
    layout = VisualLayout.from_mask(torch.ones(1, 2, dtype=torch.bool))
    lse = flash_attention(q, k, k, layout=layout, softmax_scale=1.0)[1]
    dense = visual_attention_map(q, k, lse, layout, softmax_scale=1.0).to_dense()[0]
    assert dense[0, 0] == 1.0
    assert float(dense[1, 0]) == pytest.approx(1.25e-9, rel=0.02)


def test_it_uses_the_lse_it_is_given(backend):
    case = make_case("left", seed=3)
    q, k, v = random_qkv(case, 3, dtype=torch.float32)
    lse = flash_attention(q, k, v, layout=case.layout, backend=backend)[1]
    a = visual_attention_map(q, k, lse, case.layout, backend=backend).to_dense()
    b = visual_attention_map(q, k, lse + 1, case.layout, backend=backend).to_dense()
    torch.testing.assert_close(b, a / torch.e)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_padding_stays_out(poison, backend):
    case = make_case("left", seed=5)
    dead = ~case.layout.live
    q, k, v = (x.detach() for x in random_qkv(case, 5, dtype=torch.float32))
    lse = flash_attention(q, k, v, layout=case.layout, backend=backend)[1]
    clean = visual_attention_map(q, k, lse, case.layout, backend=backend)
    q, k = (x.masked_fill(dead[:, :, None, None], poison) for x in (q, k))
    lse = lse.masked_fill(dead[:, None, :], poison)
    dirty = visual_attention_map(q, k, lse, case.layout, backend=backend)
    assert torch.equal(clean.data, dirty.data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_mean_of_a_window(kind, dtype):
    case = make_case(kind, seed=4)
    maps = [
        make_map(case, s, heads=h, kv_heads=h, dtype=dtype) for s, h in ((1, 2), (2, 3), (3, 1))
    ]
    mean = VisualMap.mean(maps)
    assert mean.dtype == maps[0].dtype
    assert mean.layout == case.layout
    dense = [dense_maps(case, m) for m in maps]
    for s, got in enumerate(dense_maps(case, mean)):
        want = sum(d[s].double() for d in dense) / 3
        rtol = {torch.bfloat16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-10)


def test_mean_of_many_half_maps_accumulates_in_float32():
    case = make_case("full", seed=4)
    one = make_map(case, 1, dtype=torch.float16)
    assert torch.equal(VisualMap.mean([one] * 37).data, one.data)
    assert torch.equal(VisualMap.mean(m for m in (one,)).data, one.data)


def test_mean_leaves_its_arguments_alone():
    case = make_case("full", seed=4)
    maps = [make_map(case, s) for s in (1, 2)]
    before = [m.data.clone() for m in maps]
    VisualMap.mean(maps)
    assert all(torch.equal(m.data, b) for m, b in zip(maps, before))


def test_mean_errors():
    case, other = make_case("full", 1), make_case("full", 2)
    m = make_map(case, 1)
    for maps, what in (
        ([], "empty list"),
        ([m, make_map(other, 1)], "another layout"),
        ([m, make_map(case, 1, dtype=torch.float32)], "float32"),
        ([m, m.to_dense()], "tensor"),
        (m, "VisualMap"),
    ):
        with pytest.raises(ValueError, match=rf"^maps.*expected .*got .*{what}"):
            VisualMap.mean(maps)


def test_maps_store_only_tiles_with_visual_keys():
    n = 6 * MAP_TILE
    visual = torch.zeros(2, n, dtype=torch.bool)
    visual[0, 5 : MAP_TILE + 1] = True
    layout = VisualLayout.from_mask(visual)
    q = torch.randn(2, n, 1, 4)
    m = visual_attention_map(q, q, flash_attention(q, q, q)[1], layout)
    # Of each tile the rows from its first key on; the other sample has no image.
    assert m.data.shape == (layout.map_rows, MAP_TILE) == ((6 + 5) * MAP_TILE, MAP_TILE)
    assert m.to_dense()[0, -1, 5 : MAP_TILE + 1].all()
    assert m.to("cpu") is m
    assert "VisualMap" in repr(m)
