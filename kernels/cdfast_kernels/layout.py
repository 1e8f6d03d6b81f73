"""VisualLayout: who sees whom, and which keys are visual, for one batch.

One visibility rule serves plain causal batches, padded batches, packed sequences and several turns
that share one image:

    visible(i, j)  <=>  j <= i, both live, same sample,
                        and (segment_i == segment_j or segment_j == 0)

Every layout holds a *batch view*: tensors of shape (samples, length) with one sample per row. A
packed layout adds the two index tensors that convert between its token axis and that view.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from cdfast_kernels import native
from cdfast_kernels.errors import bad_argument
from cdfast_kernels.schedule import Schedule, build_schedule

# Maps are stored in key tiles of this width; a tile without a visual key takes no space.
MAP_TILE = 64


class _Content:
    """What makes two layouts equal, on the host; the digest is taken when it is first asked for."""

    def __init__(self, shape: tuple[int, ...], schedule: Schedule) -> None:
        self._shape, self._tables = shape, (schedule.samples, schedule.codes)
        self._digest: bytes | None = None

    def digest(self) -> bytes:
        if self._digest is None:
            digest = hashlib.blake2b(repr(self._shape).encode(), digest_size=16)
            for table in self._tables:
                digest.update(table.numpy().tobytes())
            self._digest = digest.digest()
        return self._digest


@dataclass(frozen=True, eq=False, repr=False)
class VisualLayout:
    """Visibility and visual columns of one batch, built once on the host and immutable.

    Build it with `from_mask`, `from_packed` or `from_segments`; move it with `to`. Two layouts are
    equal when they describe the same batch, whatever device they are on.

    Attributes:
        shape: (B, N), or (total,) for a packed batch.
        live: bool (samples, length), False at padding.
        visual: bool (samples, length), live visual tokens.
        segment: int64 (samples, length), 0 for the shared prefix and at padding.
        start: int64 (samples,), position of each sample's first token on its key axis.
        slot_tiles: int32 (samples, slots), index of each key tile with a visual key, ascending; -1
            where unused.
        image_samples: bool (samples,), True for samples with at least one live visual token.
        gather: int64 (samples, length), packed only: token of each place of the batch view.
        scatter: int64 (total,), packed only: flat place in the batch view of each token.
        schedule: the tables that compiled kernels read.
        map_rows: rows of all panels together.
        num_image_samples: B_img, the number of True entries of `image_samples`.
        is_causal: True if plain causal attention over (B, N) is equivalent.
        is_prefix_causal: True if it is equivalent on live rows: one segment, padding at the end.
    """

    shape: tuple[int, ...]
    live: Tensor
    visual: Tensor
    segment: Tensor
    start: Tensor
    slot_tiles: Tensor
    image_samples: Tensor
    gather: Tensor | None
    scatter: Tensor | None
    schedule: Schedule
    map_rows: int
    num_image_samples: int
    is_causal: bool
    is_prefix_causal: bool
    _content: _Content

    @classmethod
    def from_mask(cls, visual_mask: Tensor, attention_mask: Tensor | None = None) -> VisualLayout:
        """Layout of a padded batch: row i sees the live keys j <= i of its sample.

        Args:
            visual_mask: bool (B, N), True at visual tokens; ignored at padding.
            attention_mask: bool (B, N), False at padding (left or right); None means no padding.

        Returns:
            The layout, on the device of `visual_mask`.

        Raises:
            ValueError: a shape or dtype is not as above.
        """
        _check_mask("visual_mask", visual_mask, ndim=2)
        _check_attention_mask(visual_mask, attention_mask)
        return _build(visual_mask, attention_mask).to(visual_mask.device)

    @classmethod
    def from_segments(
        cls, segment_ids: Tensor, visual_mask: Tensor, attention_mask: Tensor | None = None
    ) -> VisualLayout:
        """Layout of samples with a shared prefix: row i sees segment 0 and its own segment.

        Args:
            segment_ids: integer (B, N). In each sample, over the live tokens: 0 first (the prefix,
                possibly empty), then non-decreasing. Ids at padding are ignored.
            visual_mask: bool (B, N), True at visual tokens; ignored at padding.
            attention_mask: bool (B, N), False at padding; None means no padding.

        Returns:
            The layout, on the device of `visual_mask`.

        Raises:
            ValueError: a shape or dtype is not as above, or the ids are negative or decrease.
        """
        _check_mask("visual_mask", visual_mask, ndim=2)
        expected = f"an integer tensor of shape {tuple(visual_mask.shape)}, as visual_mask"
        remedy = "Give one segment id per token."
        if not isinstance(segment_ids, Tensor) or segment_ids.shape != visual_mask.shape:
            raise bad_argument("segment_ids", expected, segment_ids, remedy)
        if segment_ids.dtype == torch.bool or segment_ids.is_floating_point():
            raise bad_argument("segment_ids", expected, segment_ids, "Cast it to torch.int64.")
        _check_attention_mask(visual_mask, attention_mask)
        return _build(visual_mask, attention_mask, segment_ids).to(visual_mask.device)

    @classmethod
    def from_packed(cls, cu_seqlens: Tensor, visual_mask: Tensor) -> VisualLayout:
        """Layout of S sequences packed on one token axis; a row sees only its own sequence.

        Args:
            cu_seqlens: int32 (S + 1,), 0 first, non-decreasing, `total` last.
            visual_mask: bool (total,), True at visual tokens.

        Returns:
            The layout, on the device of `visual_mask`.

        Raises:
            ValueError: a shape or dtype is not as above, or cu_seqlens does not cover the tokens.
        """
        _check_mask("visual_mask", visual_mask, ndim=1)
        cu = _host_cu_seqlens(cu_seqlens, visual_mask.shape[0])
        return _build(visual_mask, cu_seqlens=cu).to(visual_mask.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VisualLayout:
        """This layout on `device` (itself if it is there already)."""
        if self.live.to(device, non_blocking=non_blocking).device == self.device:
            return self

        def moved(tensors: dict[str, Tensor]) -> dict[str, Any]:
            return {n: x.to(device, non_blocking=non_blocking) for n, x in tensors.items()}

        own = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        schedule = replace(self.schedule, **moved(self.schedule.tensors()))
        return replace(self, schedule=schedule, **moved(tensors))

    @property
    def device(self) -> torch.device:
        return self.live.device

    @property
    def is_packed(self) -> bool:
        return self.gather is not None

    @property
    def num_samples(self) -> int:
        """B, or S for a packed batch."""
        return self.live.shape[0]

    @property
    def length(self) -> int:
        """N, or the length of the longest packed sequence."""
        return self.live.shape[1]

    @property
    def num_slots(self) -> int:
        """Stored key tiles per sample (the largest number over the samples)."""
        return self.slot_tiles.shape[1]

    @property
    def panels(self) -> Tensor:
        """int64 (samples, slots, 3): the panel of each slot, (base, first, end).

        A stored map keeps of each slot only the rows that can see its key tile: the positions
        first <= p < end of the sample's axis, position p in row base + p of the map's data.
        """
        return self.schedule.panels

    @property
    def visual_mask(self) -> Tensor:
        """bool, of `shape`: the live visual tokens."""
        return self.from_batch(self.visual)

    def to_batch(self, x: Tensor) -> Tensor:
        """Batch view (samples, length, ...) of a tensor whose leading dimensions are `shape`.

        Places that are padding hold arbitrary values: mask the result with `live`.
        """
        if self.gather is None:
            return x
        return x.index_select(0, self.gather.flatten()).reshape(*self.gather.shape, *x.shape[1:])

    def from_batch(self, x: Tensor) -> Tensor:
        """Inverse of `to_batch`: (samples, length, ...) to leading dimensions `shape`."""
        if self.scatter is None:
            return x
        return x.flatten(0, 1).index_select(0, self.scatter)

    def visible(self) -> Tensor:
        """bool (samples, length, length): visible(i, j) in the batch view."""
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()
        key_segment = self.segment[:, None, :]
        same = (self.segment[:, :, None] == key_segment) | (key_segment == 0)
        return causal & same & self.live[:, :, None] & self.live[:, None, :]

    def dense_mask(self) -> Tensor:
        """bool (B, N, N), packed (1, total, total): visible(i, j) on the token axes of `shape`."""
        if self.scatter is None:
            return self.visible()
        # Packed sequences have no padding and one segment each: same sequence and causal.
        sample = torch.div(self.scatter, max(self.length, 1), rounding_mode="floor")
        return (sample[:, None] == sample[None, :]).tril()[None]

    def map_columns(self) -> Tensor:
        """int64 (samples, slots * MAP_TILE): place in the batch view of each stored map column.

        -1 for columns that are not a token of the sample.
        """
        offset = torch.arange(MAP_TILE, device=self.device)
        column = self.slot_tiles.long()[:, :, None] * MAP_TILE + offset - self.start[:, None, None]
        used = (self.slot_tiles >= 0)[:, :, None] & (column >= 0) & (column < self.length)
        return column.masked_fill(~used, -1).flatten(1)

    def unpack_map(self, data: Tensor) -> Tensor:
        """(samples, length, slots * MAP_TILE) of a stored map, 0 where it stores nothing."""
        return unpack_map(data, self.start, self.length, self.panels, self.map_rows)

    def pack_map(self, columns: Tensor) -> Tensor:
        """Inverse of `unpack_map`: (map_rows, MAP_TILE)."""
        return pack_map(columns, self.start, self.panels, self.map_rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VisualLayout):
            return False
        same = self._content is other._content
        return same or self._content.digest() == other._content.digest()

    def __hash__(self) -> int:
        return hash(self._content.digest())

    def __repr__(self) -> str:
        kind = "packed" if self.is_packed else "padded"
        return (
            f"VisualLayout({kind}, shape={self.shape}, samples={self.num_samples}, "
            f"image_samples={self.num_image_samples}, map_columns={self.num_slots * MAP_TILE}, "
            f"device={self.device})"
        )


def unpack_map(data: Tensor, start: Tensor, length: int, panels: Tensor, map_rows: int) -> Tensor:
    """See VisualLayout.unpack_map; kernels have the tables of a layout only."""
    row = _stored_rows(start, length, panels, map_rows)
    if not map_rows:
        return data.new_zeros(*row.shape[:2], row.shape[2] * MAP_TILE)
    columns = data[row.clamp(max=map_rows - 1)]
    return columns.masked_fill((row == map_rows)[..., None], 0).flatten(2)


def pack_map(columns: Tensor, start: Tensor, panels: Tensor, map_rows: int) -> Tensor:
    """See VisualLayout.pack_map."""
    row = _stored_rows(start, columns.shape[1], panels, map_rows).flatten()
    # The last row takes all that no panel stores.
    data = columns.new_empty(map_rows + 1, MAP_TILE)
    data[row] = columns.reshape(-1, MAP_TILE)
    return data[:map_rows]


def _stored_rows(start: Tensor, length: int, panels: Tensor, map_rows: int) -> Tensor:
    """int64 (samples, length, slots): row of a stored map, map_rows where there is none."""
    position = (start[:, None] + torch.arange(length, device=start.device))[:, :, None]
    base, first, end = panels[:, None].unbind(-1)
    return torch.where((position >= first) & (position < end), base + position, map_rows)


def _build(
    visual_mask: Tensor,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> VisualLayout:
    """The layout of checked masks, on the host; cu_seqlens is an int64 host tensor."""
    visual = visual_mask.detach().cpu().contiguous()
    live = None if attention_mask is None else attention_mask.detach().cpu().contiguous()
    if segment_ids is not None:
        segment_ids = segment_ids.detach().cpu().to(torch.int64).contiguous()
    tables: dict[str, Any] | None = None
    if native.EXTENSION is not None:
        tables = _native_tables(visual, live, segment_ids, cu_seqlens)
    if tables is None:
        # Without the extension; and with it, for the words of a refusal.
        tables = _python_tables(visual, live, segment_ids, cu_seqlens)
    schedule = Schedule(**{f.name: tables.pop(f.name) for f in fields(Schedule)})
    shape = tuple(visual.shape)
    return VisualLayout(
        shape=shape, schedule=schedule, _content=_Content(shape, schedule), **tables
    )


def _native_tables(
    visual: Tensor, live: Tensor | None, segment: Tensor | None, cu: Tensor | None
) -> dict[str, Any] | None:
    """`_python_tables` by the extension (csrc/layout.cpp); None if the segment ids are refused."""
    if cu is None:
        n_samples, length = visual.shape
    else:
        lengths = cu.diff()
        n_samples, length = len(lengths), int(lengths.max()) if len(lengths) else 0
    addresses = (0 if x is None else x.data_ptr() for x in (visual, live, segment, cu))
    tables = native.EXTENSION.layout_tables(n_samples, length, visual.numel(), *addresses)
    if tables is None:
        return None
    for name, value in tables.items():
        if isinstance(value, numpy.ndarray):
            tables[name] = torch.from_numpy(value)
    return tables


def _python_tables(
    visual: Tensor, live: Tensor | None, segment: Tensor | None, cu: Tensor | None
) -> dict[str, Any]:
    """Fields of VisualLayout and Schedule of host tensors: the oracle of csrc/layout.cpp."""
    # The layout must not change when the caller reuses the buffer.
    live = torch.ones_like(visual) if live is None else live.clone()
    gather = scatter = None
    if segment is not None:
        segment = segment.masked_fill(~live, 0)
        _check_segment_order(segment, live)
    if cu is None:
        visual = visual & live
        start = torch.zeros(live.shape[0], dtype=torch.int64)
    else:
        lengths, start, tokens = cu.diff(), cu[:-1].clone(), visual
        place = torch.arange(int(lengths.max()) if len(lengths) else 0)
        live = place < lengths[:, None]
        # Padding places of the view read token 0; `live` masks them.
        gather = (start[:, None] + place).masked_fill(~live, 0)
        scatter = live.flatten().nonzero().flatten()
        visual = torch.zeros_like(live)
        visual[live] = tokens
    if segment is None:
        segment = torch.zeros(live.shape, dtype=torch.int64)
    slot_tiles = _slot_tiles(visual, start)
    schedule = build_schedule(live, visual, segment, start, slot_tiles, scatter, MAP_TILE)
    heights = schedule.panels[..., 2] - schedule.panels[..., 1]
    image_samples = visual.any(1)
    highest = segment.amax(1, keepdim=True) if segment.numel() else segment
    one_segment = bool(((segment == 0) | (segment == highest)).all())
    padded_right = bool((live[:, 1:] <= live[:, :-1]).all())
    return {
        "live": live,
        "visual": visual,
        "segment": segment,
        "start": start,
        "slot_tiles": slot_tiles,
        "image_samples": image_samples,
        "gather": gather,
        "scatter": scatter,
        "map_rows": int(heights.sum()),
        "num_image_samples": int(image_samples.sum()),
        "is_causal": gather is None and one_segment and bool(live.all()),
        "is_prefix_causal": gather is None and one_segment and padded_right,
        **{f.name: getattr(schedule, f.name) for f in fields(schedule)},
    }


def _slot_tiles(visual: Tensor, start: Tensor) -> Tensor:
    """The key tiles that hold a visual key of each sample, ascending: int32 (samples, slots)."""
    n_samples = visual.shape[0]
    sample, place = visual.nonzero(as_tuple=True)
    tile = torch.div(place + start[sample], MAP_TILE, rounding_mode="floor")
    n_tiles = int(tile.max()) + 1 if len(tile) else 1
    used = torch.unique(sample * n_tiles + tile)
    owner = torch.div(used, n_tiles, rounding_mode="floor")
    count = torch.bincount(owner, minlength=n_samples)
    rank = torch.arange(len(used)) - (count.cumsum(0) - count)[owner]
    slots = torch.full((n_samples, int(count.max()) if n_samples else 0), -1, dtype=torch.int32)
    slots[owner, rank] = (used % n_tiles).to(torch.int32)
    return slots


def _check_mask(name: str, mask: Tensor, ndim: int) -> None:
    shape = "(B, N)" if ndim == 2 else "(total,)"
    expected = f"a bool tensor of shape {shape}"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise bad_argument(name, expected, mask, f"Pass {name}.bool().")
    if mask.ndim != ndim:
        remedy = "Use from_packed for packed sequences, from_mask or from_segments for batches."
        raise bad_argument(name, expected, mask, remedy)


def _check_attention_mask(visual_mask: Tensor, attention_mask: Tensor | None) -> None:
    if attention_mask is None:
        return
    _check_mask("attention_mask", attention_mask, ndim=2)
    if attention_mask.shape != visual_mask.shape:
        expected = f"the shape of visual_mask, {tuple(visual_mask.shape)}"
        remedy = "Both masks describe the same (B, N) tokens."
        raise bad_argument("attention_mask", expected, attention_mask, remedy)


def _check_segment_order(segment: Tensor, live: Tensor) -> None:
    """Refuse ids that are negative or decrease over the live tokens of a sample."""
    # Padding takes the largest id before it, so that it can neither hide nor cause a decrease.
    filled = segment.masked_fill(~live, torch.iinfo(torch.int64).min)
    running = filled.cummax(1).values if filled.numel() else filled
    bad = (live & ((segment < 0) | (segment < running))).nonzero()
    if len(bad):
        sample, token = bad[0].tolist()
        got = f"id {int(segment[sample, token])} at sample {sample}, token {token}"
        if running[sample, token] > segment[sample, token]:
            got += f" after id {int(running[sample, token])}"
        raise bad_argument(
            "segment_ids",
            "ids that start with 0 (possibly none) and never decrease inside a sample",
            got,
            "Put the shared prefix first with id 0, then the segments in order with ids 1, 2, ...",
        )


def _host_cu_seqlens(cu_seqlens: Tensor, total: int) -> Tensor:
    """Checked host copy of cu_seqlens, int64."""
    expected = "an int32 tensor of shape (S + 1,)"
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        remedy = "Pass cu_seqlens.to(torch.int32)."
        raise bad_argument("cu_seqlens", expected, cu_seqlens, remedy)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        remedy = "Pass the cumulative lengths: 0, n_1, n_1 + n_2, ..., total."
        raise bad_argument("cu_seqlens", expected, cu_seqlens, remedy)
    cu = cu_seqlens.detach().cpu().to(torch.int64)
    if int(cu[0]) != 0 or int(cu[-1]) != total or bool((cu.diff() < 0).any()):
        raise bad_argument(
            "cu_seqlens",
            f"0 first, non-decreasing, and the length of visual_mask ({total}) last",
            f"{cu.tolist() if len(cu) <= 16 else [*cu[:8].tolist(), '...', *cu[-4:].tolist()]}",
            "Pass the cumulative lengths: 0, n_1, n_1 + n_2, ..., total.",
        )
    return cu
