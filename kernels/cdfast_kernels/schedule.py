"""The tables of a layout that compiled kernels read, made on the host with the layout.

Kernels see one *axis* per sample: positions 0..N-1 of a padded batch, or the token axis shared by
all samples of a packed one. All positions below are on that axis; flat tokens are numbered
b * N + position, or position.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Code of a token that is padding; live tokens have 2 * segment rank + visual >= 0.
DEAD = -1


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a kernel needs to know of a batch, int32 where not said otherwise.

    Attributes:
        samples: (S, 5) per sample: its first position, one past its last, the first live one, one
            past the last live one, one past the last token of the shared prefix.
        codes: (tokens,) 2 * rank of the segment + visual, rank 0 for the prefix; DEAD at padding.
        bounds: (tokens, 2) the first position of the token's segment and one past its last;
            padding repeats the token before it.
        panels: int64 (S, slots, 3) what a stored map keeps of each slot: (base, first, end); see
            VisualLayout.panels.
        tiles: int64 (S, tiles, 3) per key tile, from the one of the sample's first position: base
            and end of its panel (0, 0 without a visual key), and the number of slots up to and
            including it.
        entries: (tokens,) visible visual keys of each row, 0 at padding.
        counts: int64 (S, 2) rows that see a visual key, and visible visual entries.
        contiguous: every sample is one segment on one run of live tokens.
    """

    samples: Tensor
    codes: Tensor
    bounds: Tensor
    panels: Tensor
    tiles: Tensor
    entries: Tensor
    counts: Tensor
    contiguous: bool

    def tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def build_schedule(
    live: Tensor,
    visual: Tensor,
    segment: Tensor,
    start: Tensor,
    slot_tiles: Tensor,
    scatter: Tensor | None,
    map_tile: int,
) -> Schedule:
    """The schedule of host tensors in the batch view (samples, length)."""
    n_samples, length = live.shape
    place = torch.arange(length).expand(n_samples, length)
    rank = _segment_rank(live, segment)
    first_live, end_live = _range_of(live, place)
    in_prefix = live & (rank == 0)
    _, end_prefix = _range_of(in_prefix, place)
    end_prefix = torch.where(in_prefix.any(1), end_prefix, first_live)
    lengths = torch.full_like(start, length) if scatter is None else live.sum(1)
    columns = (torch.zeros_like(start), lengths, first_live, end_live, end_prefix)
    entries = _entries(live, visual, rank)
    holes = (live.sum(1) != end_live - first_live).any()

    def flat(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return (x if scatter is None else x[scatter]).to(torch.int32).contiguous()

    bounds = _segment_bounds(live, rank, place, first_live, end_live) + start[:, None, None]
    # One past the last row that sees a key: every row sees the prefix.
    seen_until = torch.where(rank == 0, (end_live + start)[:, None], bounds[:, :, 1])
    panels = _panels(visual, seen_until, start, first_live + start, slot_tiles, map_tile)
    return Schedule(
        samples=(torch.stack(columns, 1) + start[:, None]).to(torch.int32),
        codes=flat(torch.where(live, 2 * rank + visual, DEAD)),
        bounds=flat(bounds),
        panels=panels,
        tiles=_tile_table(start, lengths, slot_tiles, panels, map_tile),
        entries=flat(entries),
        counts=torch.stack(((entries > 0).sum(1), entries.sum(1)), 1),
        contiguous=not bool(holes) and bool((rank.amax(1) == rank_at_first(rank, live)).all())
        if length
        else True,
    )


def rank_at_first(rank: Tensor, live: Tensor) -> Tensor:
    """Rank of the first live token of each sample (0 where there is none)."""
    first = live.to(torch.uint8).argmax(1, keepdim=True)
    return rank.gather(1, first).squeeze(1)


def _segment_rank(live: Tensor, segment: Tensor) -> Tensor:
    """Segments numbered 1, 2, ... in order, the prefix 0; padding repeats the token before it."""
    if not live.numel():
        return torch.zeros(live.shape, dtype=torch.int64)
    running = segment.masked_fill(~live, 0).cummax(1).values
    before = torch.cat((torch.zeros_like(running[:, :1]), running[:, :-1]), 1)
    return (running != before).cumsum(1)


def _range_of(mask: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """First place and one past the last place where `mask` holds; 0, 0 where it never does."""
    if not mask.numel():
        zero = torch.zeros(mask.shape[0], dtype=torch.int64)
        return zero, zero
    some = mask.any(1)
    first = place.masked_fill(~mask, mask.shape[1]).amin(1)
    end = place.masked_fill(~mask, -1).amax(1) + 1
    return torch.where(some, first, 0), torch.where(some, end, 0)


def _segment_bounds(
    live: Tensor, rank: Tensor, place: Tensor, first_live: Tensor, end_live: Tensor
) -> Tensor:
    """(samples, length, 2): where the segment of each token begins and ends."""
    if not live.numel():
        return torch.zeros(*live.shape, 2, dtype=torch.int64)
    changes = torch.ones_like(live)
    changes[:, 1:] = rank[:, 1:] != rank[:, :-1]
    begin = torch.where(changes, place, 0).cummax(1).values
    begin = torch.maximum(begin, first_live[:, None])
    # From the right: the next change to the right of a token ends its segment.
    ends = torch.cat((changes[:, 1:], torch.ones_like(changes[:, :1])), 1)
    after = torch.where(ends, place + 1, live.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.stack((begin, torch.minimum(after, end_live[:, None])), 2)


def _entries(live: Tensor, visual: Tensor, rank: Tensor) -> Tensor:
    """Visible visual keys of each row: those of the prefix and of its own segment up to it."""
    if not live.numel():
        return torch.zeros(live.shape, dtype=torch.int64)
    seen = visual.cumsum(1)
    prefix = (visual & (rank == 0)).sum(1, keepdim=True)
    changes = torch.zeros_like(live)
    changes[:, 1:] = rank[:, 1:] != rank[:, :-1]
    before = torch.where(changes, seen - visual.long(), 0).cummax(1).values
    # A sample may begin with segment 1 at once, without a change.
    own = torch.where(rank == 0, seen, seen - before + prefix)
    return torch.where(live, own, 0)


def _panels(
    visual: Tensor,
    seen_until: Tensor,
    start: Tensor,
    first_live: Tensor,
    slot_tiles: Tensor,
    map_tile: int,
) -> Tensor:
    """The rows of each slot that can see a visual key of its tile, one panel after the other."""
    if not slot_tiles.numel():
        return torch.zeros(*slot_tiles.shape, 3, dtype=torch.int64)
    # The largest over the keys of each slot; a packed tile may begin before its sample.
    place = slot_tiles[:, :, None] * map_tile + torch.arange(map_tile) - start[:, None, None]
    inside = (place >= 0) & (place < visual.shape[1])
    index = place.clamp(0, visual.shape[1] - 1).flatten(1)
    end = torch.where(visual, seen_until, 0).gather(1, index).view(place.shape)
    end = end.masked_fill(~inside, 0).amax(2)
    first = torch.maximum(slot_tiles.long() * map_tile, first_live[:, None])
    used = slot_tiles >= 0
    height = torch.where(used, end - first, 0).flatten()
    base = (height.cumsum(0) - height).view(first.shape) - first
    return torch.stack((base, first, end), 2).masked_fill(~used[:, :, None], 0)


def _tile_table(
    start: Tensor, lengths: Tensor, slot_tiles: Tensor, panels: Tensor, map_tile: int
) -> Tensor:
    first = torch.div(start, map_tile, rounding_mode="floor")
    last = torch.div(start + lengths.clamp(min=1) - 1, map_tile, rounding_mode="floor")
    n_tiles = int((last - first).max()) + 1 if len(start) else 1
    table = torch.zeros(len(start), n_tiles, 3, dtype=torch.int64)
    sample, slot = (slot_tiles >= 0).nonzero(as_tuple=True)
    tile = slot_tiles[sample, slot].long() - first[sample]
    table[sample, tile, 0] = panels[sample, slot, 0]
    table[sample, tile, 1] = panels[sample, slot, 2]
    table[sample, tile, 2] = 1
    table[:, :, 2] = table[:, :, 2].cumsum(1)
    return table
