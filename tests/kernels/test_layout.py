"""VisualLayout against brute force, its immutability and its checks of values."""

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from cdfast_kernels import VisualLayout
from cdfast_kernels.layout import MAP_TILE

from tests.kernels.plain import KINDS, make_case

CASES = [(kind, seed) for kind in KINDS for seed in range(4)]


@pytest.mark.parametrize("kind, seed", CASES)
def test_dense_mask_is_the_visibility_rule(kind, seed):
    case = make_case(kind, seed)
    n = case.shape[-1]
    expected = torch.zeros(1 if case.packed else case.shape[0], n, n, dtype=torch.bool)
    for s, tokens in enumerate(case.tokens):
        expected[0 if case.packed else s, tokens[:, None], tokens] = case.visible(s)
    assert torch.equal(case.layout.dense_mask(), expected)


@pytest.mark.parametrize("kind, seed", CASES)
def test_visual_mask_and_image_samples(kind, seed):
    case = make_case(kind, seed)
    expected = torch.zeros(case.shape, dtype=torch.bool)
    for s, tokens in enumerate(case.tokens):
        row = expected if case.packed else expected[s]
        row[tokens] = torch.tensor(case.visual[s], dtype=torch.bool)
    images = [any(v) for v in case.visual]
    assert torch.equal(case.layout.visual_mask, expected)
    assert case.layout.image_samples.tolist() == images
    assert case.layout.num_image_samples == sum(images)
    assert isinstance(case.layout.num_image_samples, int)


def test_batch_view_round_trip():
    case = make_case("packed", 1)
    x = torch.randn(*case.shape, 3)
    view = case.layout.to_batch(x)
    for s, tokens in enumerate(case.tokens):
        assert torch.equal(view[s, : len(tokens)], x[tokens])
    assert torch.equal(case.layout.from_batch(view), x)


def test_visual_tokens_at_padding_do_not_count():
    visual = torch.ones(2, 4, dtype=torch.bool)
    attention = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    layout = VisualLayout.from_mask(visual, attention)
    assert torch.equal(layout.visual_mask, attention)
    assert layout.num_image_samples == 1


@pytest.mark.parametrize(
    "build, causal",
    [
        (lambda v: VisualLayout.from_mask(v), True),
        (lambda v: VisualLayout.from_mask(v, torch.ones_like(v)), True),
        (lambda v: VisualLayout.from_mask(v, torch.arange(6).expand(2, 6) > 0), False),
        (lambda v: VisualLayout.from_segments(torch.full((2, 6), 3), v), True),
        (lambda v: VisualLayout.from_segments(torch.arange(6).expand(2, 6) // 3, v), True),
        (lambda v: VisualLayout.from_segments(torch.arange(6).expand(2, 6) // 2, v), False),
    ],
    ids=["no mask", "full mask", "padded", "one segment", "prefix and one", "prefix and two"],
)
def test_is_causal(build, causal):
    layout = build(torch.zeros(2, 6, dtype=torch.bool))
    assert layout.is_causal is causal
    plain = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)
    assert torch.equal(layout.dense_mask(), plain) is causal


def test_stored_tiles_are_those_with_a_visual_key():
    n = 5 * MAP_TILE + 7
    visual = torch.zeros(3, n, dtype=torch.bool)
    visual[0, [0, MAP_TILE - 1, 3 * MAP_TILE, n - 1]] = True
    visual[1, 2 * MAP_TILE + 5] = True
    layout = VisualLayout.from_mask(visual)
    assert layout.slot_tiles.dtype == torch.int32
    assert layout.slot_tiles.tolist() == [[0, 3, 5], [2, -1, -1], [-1, -1, -1]]
    # Packed tiles are counted on the packed axis, per sample: a shared tile appears twice.
    packed = VisualLayout.from_packed(
        torch.tensor([0, 70, 70, 150], dtype=torch.int32),
        torch.arange(150).ge(60) & torch.arange(150).lt(80),
    )
    assert packed.slot_tiles.tolist() == [[0, 1], [-1, -1], [1, -1]]


@pytest.mark.parametrize("kind, seed", CASES)
def test_panels_hold_the_rows_that_can_see_a_tile(kind, seed):
    """By brute force over the visibility of every slot."""
    layout = make_case(kind, seed, length=3 * MAP_TILE + 9).layout
    entries = layout.visible() & layout.visual[:, None, :]
    base = 0
    for s in range(layout.num_samples):
        shift = int(layout.start[s])
        for tile, panel in zip(layout.slot_tiles[s].tolist(), layout.panels[s].tolist()):
            if tile < 0:
                assert panel == [0, 0, 0]
                continue
            keys = slice(max(tile * MAP_TILE - shift, 0), (tile + 1) * MAP_TILE - shift)
            rows = entries[s, :, keys].any(1).nonzero() + shift
            live = int(layout.live[s].nonzero().amin()) + shift
            first, end = max(tile * MAP_TILE, live), int(rows.amax()) + 1
            assert panel == [base - first, first, end]
            assert int(rows.amin()) >= first
            base += end - first
    assert layout.map_rows == base
    data = torch.randn(layout.map_rows, MAP_TILE)
    columns = layout.unpack_map(data)
    assert torch.equal(layout.pack_map(columns), data)
    assert columns.count_nonzero() == data.count_nonzero()


def test_immutable_and_independent_of_its_inputs():
    visual = torch.tensor([[True, True, False]])
    attention = torch.ones(1, 3, dtype=torch.bool)
    segment = torch.zeros(1, 3, dtype=torch.int64)
    layout = VisualLayout.from_segments(segment, visual, attention)
    before = layout.dense_mask()
    visual.fill_(False), attention.fill_(False), segment.fill_(1)
    assert torch.equal(layout.dense_mask(), before)
    assert layout.visual_mask.tolist() == [[True, True, False]]
    with pytest.raises(FrozenInstanceError):
        layout.live = attention


def test_equality_is_by_content():
    visual = torch.tensor([[True, True, False]])
    a, b = VisualLayout.from_mask(visual), VisualLayout.from_mask(visual.clone())
    assert a == b
    assert hash(a) == hash(b)
    assert a != VisualLayout.from_mask(~visual)
    assert a != VisualLayout.from_mask(visual, torch.tensor([[False, True, True]]))
    assert a != VisualLayout.from_packed(torch.tensor([0, 3], dtype=torch.int32), visual[0])
    assert a.to("cpu") is a


def test_repr_names_what_it_is():
    text = repr(make_case("packed", 0).layout)
    assert "packed" in text
    assert "image_samples" in text


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape):
    layout = VisualLayout.from_mask(torch.zeros(shape, dtype=torch.bool))
    assert layout.num_image_samples == 0
    assert layout.dense_mask().shape == (*shape, shape[1])
    empty = VisualLayout.from_segments(torch.zeros(shape).long(), torch.zeros(shape).bool())
    assert empty == layout
    packed = VisualLayout.from_packed(torch.zeros(shape[0] + 1).int(), torch.zeros(0).bool())
    assert packed.num_samples == shape[0]


def test_segment_ids_at_padding_are_ignored():
    visual = torch.tensor([[False, False, True, False, False]])
    live = torch.tensor([[False, True, True, True, False]])
    a = VisualLayout.from_segments(torch.tensor([[9, 0, 0, 1, 0]]), visual, live)
    b = VisualLayout.from_segments(torch.tensor([[0, 0, 0, 1, -5]]), visual, live)
    assert a == b


@pytest.mark.parametrize(
    "ids",
    [[1, 0, 0], [0, 2, 1], [0, 1, 0], [-1, 0, 1], [0, -1, 1]],
    ids=str,
)
def test_segment_ids_in_a_wrong_order_are_refused(ids):
    visual = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"segment_ids: expected .*got id -?\d.* Put the shared"):
        VisualLayout.from_segments(torch.tensor([[0, 0, 1], ids]), visual)


def test_decrease_across_padding_is_refused():
    visual = torch.zeros(1, 4, dtype=torch.bool)
    live = torch.tensor([[True, False, True, True]])
    with pytest.raises(ValueError, match="segment_ids"):
        VisualLayout.from_segments(torch.tensor([[2, 0, 1, 1]]), visual, live)


@pytest.mark.parametrize("ids", [[1, 1, 4], [0, 0, 0], [0, 3, 3], [2, 2, 2]], ids=str)
def test_segment_ids_without_prefix_or_with_gaps_are_fine(ids):
    visual = torch.ones(1, 3, dtype=torch.bool)
    mask = VisualLayout.from_segments(torch.tensor([ids]), visual).dense_mask()[0]
    expected = [[j <= i and ids[j] in (0, ids[i]) for j in range(3)] for i in range(3)]
    assert mask.tolist() == expected


@pytest.mark.parametrize(
    "cu", [[1, 5], [0, 4], [0, 3, 2, 5], [0, 6], [], [0]], ids=lambda c: str(c) or "empty"
)
def test_cu_seqlens_that_do_not_cover_the_tokens_are_refused(cu):
    with pytest.raises(ValueError, match=r"cu_seqlens: expected .*got .*Pass the cumulative"):
        VisualLayout.from_packed(torch.tensor(cu, dtype=torch.int32), torch.zeros(5).bool())


@pytest.mark.parametrize("kind", ["turns", "packed"])
def test_pickles_and_copies(kind):
    """Collators build layouts in worker processes."""
    layout = make_case(kind, 0).layout
    for twin in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert twin == layout
        assert torch.equal(twin.dense_mask(), layout.dense_mask())
