"""Views of the rows that kernels read: how each is made of its tensor by one operation, worked out once for all layers.

Layers differ in where their tensors lie, not in how: a :class:`Recipe` holds shapes, strides and offsets, so that a layer
pays one ``as_strided`` for a view, whatever slices and transposes lead to it (1.4 us of the host; three of them take 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hdp.attention.program import Heads


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges of rows of one tensor, one for each launch."""

    start: int
    stop: int
    """First row of the first range, and the row behind the last."""
    sizes: list[int] | None
    """Rows of all pieces in between, ranges and gaps; None: one range, or ranges that do not ascend."""
    picks: slice
    """Which of the pieces are ranges."""
    ranges: list[tuple[int, int]]

    def from_first(self) -> Cut:
        """These ranges in a tensor that holds only the rows from the first range to the last."""
        ranges = [(a - self.start, b - self.start) for a, b in self.ranges]
        return Cut(0, self.stop - self.start, self.sizes, self.picks, ranges)

    @classmethod
    def of(cls, starts: np.ndarray, stops: np.ndarray) -> Cut:
        ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
        start, stop = int(starts.min()), int(stops.max())
        gaps = starts[1:] - stops[:-1]
        if len(ranges) == 1 or (gaps < 0).any():
            return cls(start, stop, None, slice(None), ranges)
        if not gaps.any():
            return cls(start, stop, (stops - starts).tolist(), slice(None), ranges)
        sizes = np.empty(2 * len(ranges) - 1, dtype=np.int64)
        sizes[::2], sizes[1::2] = stops - starts, gaps
        return cls(start, stop, sizes.tolist(), slice(0, None, 2), ranges)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the views of one tensor are made, one for each launch."""

    pieces: list[tuple[tuple[int, ...], tuple[int, ...], int]]
    """Shape, strides and first element, from the tensor's own, of each view, or of the one that holds them all."""
    sizes: list[int] | None
    """As ``Cut.sizes``: what the one view is split into."""
    picks: slice
    axis: int
    """Where rows are."""

    @classmethod
    def of(cls, tensor: Tensor, cut: Cut, heads: Heads | None, lay: Callable[[Tensor], Tensor], axis: int) -> Recipe:
        """For tensors that lie as this one.

        Args:
            tensor: [rows, heads, head_dim] or [rows, heads]. cut: its rows. heads: which of its heads; None: all.
            lay: what makes of a tensor a view with rows along ``axis``, as kernels take it (``Backend.lay``).
        """
        laid = lay(tensor if heads is None else tensor[:, heads[0] : heads[1]])
        spans = cut.ranges if cut.sizes is None else [(cut.start, cut.stop)]
        parts = [laid.narrow(axis, a, b - a) for a, b in spans]
        first = tensor.storage_offset()
        pieces = [(tuple(p.shape), p.stride(), int(p.storage_offset() - first)) for p in parts]
        return cls(pieces, cut.sizes, cut.picks, axis)

    def moved(self, elements: int) -> Recipe:
        """The same views of a tensor that begins so many elements earlier."""
        pieces = [(shape, stride, first + elements) for shape, stride, first in self.pieces]
        return Recipe(pieces, self.sizes, self.picks, self.axis)

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Of a tensor that lies as the recipe's, with its own first element."""
        start = tensor.storage_offset()
        if self.sizes is None:
            return [torch.as_strided(tensor, shape, stride, start + first) for shape, stride, first in self.pieces]
        ((shape, stride, first),) = self.pieces
        whole = torch.as_strided(tensor, shape, stride, start + first)
        return list(whole.split_with_sizes(self.sizes, self.axis)[self.picks])
