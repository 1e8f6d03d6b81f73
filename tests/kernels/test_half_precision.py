"""The error budget of tests/numerics.py in float16, bfloat16 and float32.

`pooled` is left out in half precision: entries flip at its threshold, so it is compared in float32
and float64 only.
"""

import pytest
import torch
from cdfast_kernels import (
    VisualMap,
    flash_attention,
    flash_attention_with_alignment,
    visual_attention_map,
)

from tests.kernels import on_device
from tests.kernels.plain import (
    dense_maps,
    make_case,
    plain_attention,
    plain_loss,
    plain_maps,
    random_qkv,
)
from tests.numerics import FORWARD, GRADIENT, assert_within_budget

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KINDS = ["full", "left", "packed", "turns"]
TEACHERS = [{"heads": 6, "kv_heads": 3, "dim": 64}, {"heads": 5, "kv_heads": 1, "dim": 32}]


@pytest.fixture(autouse=True)
def _the_interpreter_has_no_bfloat16(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and on_device.DEVICE == "cpu":
        pytest.skip("the Triton interpreter multiplies the bits of bfloat16 as integers")


def inputs(case, seed, dtype, **kwargs):
    """The same values in `dtype` and in float64, as leaves."""
    low = random_qkv(case, seed, dtype=dtype, **kwargs)
    return low, [x.detach().double().requires_grad_() for x in low]


def finite(lse):
    return torch.where(lse.isinf(), 0, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind, dtype, backend):
    case = make_case(kind, seed=41, length=33)
    low, exact = inputs(case, 41, dtype, heads=4, kv_heads=2)
    g = torch.Generator().manual_seed(0)
    d_out = torch.randn(low[0].shape, generator=g).to(dtype)
    results = {}
    for name, leaves, run in (
        ("exact", exact, lambda x: plain_attention(case, *x)),
        ("eager", low, lambda x: plain_attention(case, *x)),
        ("got", low, lambda x: flash_attention(*x, layout=case.layout, backend=backend)),
    ):
        out, lse = run(leaves)
        # The LSE has a weight, so that its gradient is part of what is compared.
        loss = (out * d_out.to(out.dtype)).sum() + 0.1 * finite(lse).sum()
        results[name] = (out, lse, *torch.autograd.grad(loss, leaves))
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        assert_within_budget(
            name,
            results["got"][i],
            results["eager"][i],
            results["exact"][i],
            dtype,
            FORWARD if i < 2 else GRADIENT,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_map_and_window(kind, dtype, backend):
    case = make_case(kind, seed=42, length=33)
    made, eager, exact = [], [], []
    for i, heads in enumerate(TEACHERS):
        low, double = inputs(case, 42 + i, dtype, **heads)
        lse = flash_attention(*low, layout=case.layout, backend=backend)[1]
        made.append(visual_attention_map(*low[:2], lse, case.layout, backend=backend))
        eager.append(plain_maps(case, *low[:2]))
        exact.append(plain_maps(case, *double[:2]))
    got = dense_maps(case, VisualMap.mean(made))
    for s, m in enumerate(got):
        want, low_mean = (sum(maps[s] for maps in x) / len(x) for x in (exact, eager))
        assert_within_budget(f"sample {s}", m, low_mean, want, dtype, FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", ["row", "map", "mse", "kl"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind, objective, dtype, backend):
    case = make_case(kind, seed=43, length=33)
    low, exact = inputs(case, 43, dtype, heads=4, kv_heads=2)
    t_low, t_exact = inputs(case, 93, dtype, **TEACHERS[0])
    t_lse = flash_attention(*t_low, layout=case.layout, backend=backend)[1]
    target = visual_attention_map(*t_low[:2], t_lse, case.layout, backend=backend)

    def plain(x, teacher):
        targets = [m.detach() for m in plain_maps(case, *teacher[:2])]
        return plain_loss(case, objective, plain_maps(case, *x[:2]), targets)

    results = {}
    for name, leaves, run in (
        ("exact", exact, lambda x: plain(x, t_exact)),
        ("eager", low, lambda x: plain(x, t_low)),
        (
            "got",
            low,
            lambda x: flash_attention_with_alignment(
                *x, target, case.layout, objective=objective, backend=backend
            )[1],
        ),
    ):
        loss = run(leaves)
        results[name] = (loss, *torch.autograd.grad(loss, leaves[:2]))
    for i, name in enumerate(("loss", "dq", "dk")):
        assert_within_budget(
            f"{objective} {name}",
            results["got"][i],
            results["eager"][i],
            results["exact"][i],
            dtype,
            FORWARD if i == 0 else GRADIENT,
        )
