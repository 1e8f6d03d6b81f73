"""VisualMap: a head-averaged attention map on the visual columns, stored in key tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cdfast_kernels.errors import bad_argument
from cdfast_kernels.layout import MAP_TILE, VisualLayout

# fp16 storage keeps probabilities times this: 1.0 is still in range, and values down to 2^-39
# (subnormal) stay distinct from 0.
FP16_SCALE = 2.0**15

# Storage dtype of a map by the dtype of the q it was made from.
MAP_DTYPE = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float16,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


class MapInputs(NamedTuple):
    """What one map is made from: q and k in a layout's shape, the LSE, and the softmax scale."""

    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float


# (q, k, lse, layout, scale) -> map: `visual_attention_map` of one backend.
MakeMap = Callable[[Tensor, Tensor, Tensor, VisualLayout, float], "VisualMap"]


class VisualMap:
    """S[b, i, v], the mean over heads of the probability that row i gives to visual key v.

    Only key tiles of MAP_TILE columns that hold a visual key of the sample are stored, and of each
    only the rows that can see it, as one panel: nothing above the diagonal tile, at leading padding
    or for samples without an image. Entries that are not visible or not visual are 0. Maps carry no
    gradient, and do not change.

    A map can keep `inputs` in place of numbers: the q, k and lse it is made from, which take less
    memory for long sequences. A window mean of such maps is formed where it is read, on the triton
    backend a chunk of rows at a time.

    Attributes:
        data: (layout.map_rows, MAP_TILE) the panels of layout.panels one after the other. float16
            times FP16_SCALE, float32 or float64. Row base + p, column j of the panel of slot c is
            row p, key layout.slot_tiles[b, c] * MAP_TILE + j. Of a map that keeps its inputs, made
            anew at each access.
        layout: the layout the map was made with.
        inputs: the inputs of each map of the window, () where `data` is kept.
    """

    def __init__(
        self,
        data: Tensor | None,
        layout: VisualLayout,
        inputs: tuple[MapInputs, ...] = (),
        make: MakeMap | None = None,
    ) -> None:
        assert (data is None) == bool(inputs) == (make is not None)
        if data is not None:
            expected = (layout.map_rows, MAP_TILE)
            assert tuple(data.shape) == expected, (tuple(data.shape), expected)
            assert data.dtype in MAP_DTYPE.values(), data.dtype
            assert not data.requires_grad
        self._data, self._make = data, make
        self.layout, self.inputs = layout, inputs

    @property
    def data(self) -> Tensor:
        if self._data is not None:
            return self._data
        assert self._make is not None
        maps = (self._make(x.q, x.k, x.lse, self.layout, x.scale) for x in self.inputs)
        return VisualMap.mean(maps).data

    @classmethod
    def mean(cls, maps: Iterable[VisualMap]) -> VisualMap:
        """The mean of maps of one layout: (1 / n) sum_l S_l, accumulated in float32 or wider.

        Args:
            maps: at least one VisualMap, all with the same layout, dtype and device.

        Returns:
            A VisualMap with the storage dtype of its arguments.

        Raises:
            ValueError: `maps` is empty, or the maps differ in layout, dtype or device.

        Source: the teacher window of group matching, CompoDistill, loss L_ADL.
        """
        expected, remedy = "a list of VisualMaps", "Pass the maps of at least one teacher layer."
        if not isinstance(maps, Iterable):
            raise bad_argument("maps", expected, maps, remedy)
        maps = list(maps)
        if not maps:
            raise bad_argument("maps", expected, "an empty list", remedy)
        for i, item in enumerate(maps):
            _check_same(f"maps[{i}]", item, maps[0])
        first = maps[0]
        if all(len(item.inputs) == 1 for item in maps):
            inputs = tuple(item.inputs[0] for item in maps)
            return cls(None, first.layout, inputs, first._make)
        # Widened before the sum: adding in fp16 would lose 20 times the rounding of one store.
        total = first.data.to(_wide(first.dtype), copy=True)
        for item in maps[1:]:
            total += item.data
        return cls((total / len(maps)).to(first.dtype), first.layout)

    @classmethod
    def from_batch(cls, dense: Tensor, layout: VisualLayout, dtype: torch.dtype) -> VisualMap:
        """Store a (samples, length, length) map that is 0 outside visible visual entries."""
        column = layout.map_columns()
        index = column.clamp(min=0)[:, None, :].expand(-1, layout.length, -1)
        tiles = dense.detach().gather(2, index).masked_fill((column < 0)[:, None, :], 0)
        data = layout.pack_map(tiles)
        if dtype == torch.float16:
            data = data * FP16_SCALE
        return cls(data.to(dtype), layout)

    def to_batch(self, dtype: torch.dtype) -> Tensor:
        """The map as (samples, length, length), in `dtype` (float32 or float64)."""
        layout = self.layout
        tiles = layout.unpack_map(self.data.to(dtype))
        if self.dtype == torch.float16:
            tiles = tiles / FP16_SCALE
        # Columns that are no token of the sample go to one extra column, which is cut off.
        column = layout.map_columns()
        index = column.masked_fill(column < 0, layout.length)[:, None, :].expand_as(tiles)
        dense = tiles.new_zeros(layout.num_samples, layout.length, layout.length + 1)
        return dense.scatter_(2, index, tiles)[:, :, : layout.length]

    def to_dense(self) -> Tensor | list[Tensor]:
        """The map on all keys, 0 outside visible visual entries.

        Returns:
            (B, N, N); packed: a list of S tensors (n, n). float32 (float64 for a float64 map).
        """
        dense = self.to_batch(_wide(self.dtype))
        if not self.layout.is_packed:
            return dense.contiguous()
        lengths = self.layout.live.sum(1).tolist()
        return [dense[s, :n, :n].clone() for s, n in enumerate(lengths)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VisualMap:
        """This map on `device` (itself if it is there already)."""
        layout = self.layout.to(device, non_blocking)
        if layout is self.layout:
            return self

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        if self._data is not None:
            return VisualMap(moved(self._data), layout)
        inputs = (MapInputs(moved(x.q), moved(x.k), moved(x.lse), x.scale) for x in self.inputs)
        return VisualMap(None, layout, tuple(inputs), self._make)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype; float16 entries are scaled by FP16_SCALE."""
        return MAP_DTYPE[self.inputs[0].q.dtype] if self._data is None else self._data.dtype

    @property
    def device(self) -> torch.device:
        return self.layout.device

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        held = f"{len(self.inputs)} inputs" if self.inputs else f"{self.layout.map_rows} rows"
        return f"VisualMap({held}, {dtype}, layout={self.layout!r})"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_same(name: str, item: VisualMap, first: VisualMap) -> None:
    if not isinstance(item, VisualMap):
        remedy = "Make maps with visual_attention_map."
        raise bad_argument(name, "a VisualMap", item, remedy)
    if item.device != first.device:
        remedy = "Move the maps to one device with .to(device)."
        raise bad_argument(name, f"a map on {first.device}", f"one on {item.device}", remedy)
    if item.dtype != first.dtype:
        remedy = "Make all maps of a window from q of one dtype."
        raise bad_argument(name, f"storage {first.dtype}", f"{item.dtype}", remedy)
    if item.layout != first.layout:
        remedy = "Average maps of the same batch only."
        raise bad_argument(name, f"{first.layout!r}", f"another layout, {item.layout!r}", remedy)
