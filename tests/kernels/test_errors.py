"""Every refused argument: ValueError that names it, what was expected, what came, what to do."""

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

VISUAL = torch.tensor([[False, True, True, False, True, False]] * 2)
LAYOUT = VisualLayout.from_mask(VISUAL)
PACKED = VisualLayout.from_packed(torch.tensor([0, 6, 12], dtype=torch.int32), VISUAL.flatten())
OTHER = VisualLayout.from_mask(~VISUAL)


def tensors():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, h, 4, generator=g) for h in (4, 2, 2))
    return q, k, v, flash_attention(q, k, v)[1]


def make_target(layout=LAYOUT) -> VisualMap:
    q, k, _, lse = tensors()
    return visual_attention_map(q, k, lse, layout)


def call_flash(**changes):
    q, k, v, _ = tensors()
    arguments = {"q": q, "k": k, "v": v, "layout": LAYOUT} | changes
    return flash_attention(**arguments)


def call_map(**changes):
    q, k, _, lse = tensors()
    return visual_attention_map(**({"q": q, "k": k, "lse": lse, "layout": LAYOUT} | changes))


def call_loss(**changes):
    q, k, _, lse = tensors()
    arguments = {"q": q, "k": k, "lse": lse, "target": make_target(), "layout": LAYOUT} | changes
    return visual_alignment_loss(**arguments)


def call_fused(**changes):
    q, k, v, _ = tensors()
    arguments = {"q": q, "k": k, "v": v, "target": make_target(), "layout": LAYOUT} | changes
    return flash_attention_with_alignment(**arguments)


CALLS = {"flash": call_flash, "map": call_map, "loss": call_loss, "fused": call_fused}


def assert_refused(call, name, **changes):
    call()
    with pytest.raises(ValueError) as error:
        call(**changes)
    message = str(error.value)
    assert message.startswith(f"{name}: expected "), message
    expected, _, rest = message.partition(", got ")
    got, _, remedy = rest.partition(". ")
    assert len(expected) > len(f"{name}: expected ")
    assert got
    assert remedy.endswith("."), message


@pytest.mark.parametrize(
    "name, bad",
    [
        ("q", [[1.0]]),
        ("q", torch.randn(6, 4)),
        ("q", torch.ones(2, 6, 4, 4, dtype=torch.int64)),
        ("q", torch.randn(2, 6, 0, 4)),
        ("q", torch.randn(2, 6, 4, 4).transpose(-1, -2)),
        ("q", torch.randn(2, 6, 4, 8)[..., ::2]),
        ("k", None),
        ("k", torch.randn(12, 2, 4)),
        ("k", torch.randn(2, 5, 2, 4)),
        ("k", torch.randn(2, 6, 3, 4)),
        ("k", torch.randn(2, 6, 0, 4)),
        ("k", torch.randn(2, 6, 8, 4)),
        ("k", torch.randn(2, 6, 2, 5)),
        ("k", torch.randn(2, 6, 2, 4).half()),
        ("k", torch.randn(2, 6, 2, 4).double()),
        ("k", torch.randn(2, 6, 2, 4, device="meta")),
        ("k", torch.randn(2, 6, 4, 2).transpose(-1, -2)),
        ("layout", VISUAL),
        ("layout", PACKED),
        ("layout", VisualLayout.from_mask(VISUAL[:, :5])),
        ("layout", LAYOUT.to("meta")),
        ("softmax_scale", 0.0),
        ("softmax_scale", -1.0),
        ("softmax_scale", float("nan")),
        ("softmax_scale", float("inf")),
        ("softmax_scale", "0.5"),
        ("softmax_scale", True),
        ("backend", "cuda"),
        ("backend", None),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_common_arguments(call, name, bad):
    assert_refused(call, name, **{name: bad})


@pytest.mark.parametrize(
    "bad",
    [
        None,
        torch.randn(2, 6, 4, 4),
        torch.randn(2, 6, 2, 5),
        torch.randn(12, 2, 4),
        torch.randn(2, 6, 2, 4).half(),
        torch.randn(2, 6, 4, 2).transpose(-1, -2),
    ],
)
@pytest.mark.parametrize("call", [call_flash, call_fused])
def test_v(call, bad):
    assert_refused(call, "v", v=bad)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        torch.randn(2, 6, 4),
        torch.randn(4, 12),
        torch.randn(2, 4, 6).double(),
        torch.randn(2, 4, 6).half(),
        torch.randn(2, 4, 6, device="meta"),
    ],
)
@pytest.mark.parametrize("call", [call_map, call_loss])
def test_lse(call, bad):
    assert_refused(call, "lse", lse=bad)


@pytest.mark.parametrize("call", [call_loss, call_fused])
@pytest.mark.parametrize(
    "name, bad",
    [
        ("objective", "cosine"),
        ("objective", None),
        ("reduction", "batchmean"),
        ("reduction", None),
        ("target", torch.randn(2, 6, 6)),
        ("target", make_target(OTHER)),
        ("target", make_target().to("meta")),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_alignment_arguments(call, name, bad):
    assert_refused(call, name, **{name: bad})


def test_packed_tensors_need_a_layout():
    x = torch.randn(12, 2, 4)
    with pytest.raises(ValueError, match=r"q: expected .*no layout.*from_packed"):
        flash_attention(x, x, x)


def test_padded_tensors_refuse_a_packed_layout_and_the_other_way_round():
    x = torch.randn(12, 2, 4)
    flash_attention(x, x, x, layout=PACKED)
    with pytest.raises(ValueError, match="layout: expected"):
        flash_attention(x, x, x, layout=LAYOUT)


@pytest.mark.parametrize(
    "name, build",
    [
        ("visual_mask", lambda: VisualLayout.from_mask(VISUAL.long())),
        ("visual_mask", lambda: VisualLayout.from_mask(VISUAL[0])),
        ("visual_mask", lambda: VisualLayout.from_mask([[True]])),
        ("attention_mask", lambda: VisualLayout.from_mask(VISUAL, VISUAL[:, 1:])),
        ("attention_mask", lambda: VisualLayout.from_mask(VISUAL, VISUAL.long())),
        ("attention_mask", lambda: VisualLayout.from_mask(VISUAL, VISUAL[:, None, :])),
        ("segment_ids", lambda: VisualLayout.from_segments(VISUAL, VISUAL)),
        ("segment_ids", lambda: VisualLayout.from_segments(VISUAL.float(), VISUAL)),
        ("segment_ids", lambda: VisualLayout.from_segments(VISUAL[0].long(), VISUAL)),
        ("segment_ids", lambda: VisualLayout.from_segments(None, VISUAL)),
        ("visual_mask", lambda: VisualLayout.from_segments(VISUAL.long(), VISUAL.long())),
        ("cu_seqlens", lambda: VisualLayout.from_packed(torch.tensor([0, 6]), VISUAL[0])),
        ("cu_seqlens", lambda: VisualLayout.from_packed(torch.zeros(1, 2).int(), VISUAL[0])),
        ("cu_seqlens", lambda: VisualLayout.from_packed([0, 6], VISUAL[0])),
        ("visual_mask", lambda: VisualLayout.from_packed(torch.tensor([0, 6]).int(), VISUAL)),
    ],
)
def test_layout_arguments(name, build):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*\. \S"):
        build()


ATTENTION_ONLY = ("sdpa", "flash_attn", "xformers")


def test_available_backends():
    backends = available_backends()
    assert set(backends) == {"triton", "cpu", "reference", *ATTENTION_ONLY}
    assert backends["reference"] is None
    assert all(
        reason is None or (isinstance(reason, str) and reason) for reason in backends.values()
    )


@pytest.mark.parametrize("name", [n for n, why in available_backends().items() if why])
def test_an_explicit_backend_that_cannot_run_raises_with_the_reason(name):
    reason = available_backends()[name]
    with pytest.raises(ValueError, match="backend: expected") as error:
        call_flash(backend=name)
    assert reason in str(error.value)
    if name not in ATTENTION_ONLY:
        for call in (call_map, call_loss, call_fused):
            with pytest.raises(ValueError, match="backend: expected") as error:
                call(backend=name)
            assert reason in str(error.value)


@pytest.mark.parametrize("name", ATTENTION_ONLY)
@pytest.mark.parametrize("call", [call_map, call_loss, call_fused])
def test_attention_backends_do_not_align(call, name):
    assert_refused(call, "backend", backend=name)
