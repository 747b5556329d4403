"""What the executor asks of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hdp.attention.mask import Shape

Cuts = tuple[Tensor, Tensor, int, int]
"""Several rectangles in one call: cumulative rows and keys (``cu_seqlens``, int32), longest rows and keys."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Scoring:
    """How a score becomes a weight."""

    scale: float
    """Factor on q . k."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0: they stay as they are."""


class Backend(ABC):
    """Computes rectangles of attention. Rows are [rows, heads, head_dim] and [rows, heads]; there is no batch dimension."""

    name: str
    kernel: str
    """What runs, with its version, for the log."""
    dtypes: tuple[torch.dtype, ...]
    packs = False
    """Whether several rectangles can be one call (``cuts``)."""
    softcaps = False
    """Whether it knows a soft-cap."""
    row_axis = 0
    """Where rows are in what :meth:`cut` makes and launches return; heads are axis 1."""
    any_scale = False
    """Whether the factor on scores may be 0 or negative: fused kernels hide scores, and find the largest, before they scale."""
    widens = False
    """Whether it takes bf16 and fp16 inputs widened to fp32 where its result is merged with others: a partial is then not
    rounded before it is added, however much larger than the sum it may be."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scoring: Scoring, cuts: Cuts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Partial (out, lse) of q [rows, heads, head_dim] over k, v [keys, key_heads, head_dim].

        out has q's dtype, or fp32; lse [rows, heads] is fp32 (float64 for float64 inputs), natural logarithm.
        """

    @abstractmethod
    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        out: Tensor,
        shape: Shape,
        scoring: Scoring,
        cuts: Cuts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial (dq, dk, dv). lse and out are the final, global ones, or ``out`` any with the same sum(do * out)."""

    def cut(self, tensor: Tensor, cut: Cut) -> list[Tensor]:
        """What each launch reads of a tensor [rows, heads, head_dim] or [rows, heads]."""
        if cut.sizes is None:
            return [tensor[a:b] for a, b in cut.ranges]
        return list(tensor[cut.start : cut.stop].split_with_sizes(cut.sizes)[cut.picks])

    def launch(
        self, inputs: Sequence[Sequence[Tensor]], shape: Shape, scoring: Scoring, cuts: Sequence[Cuts | None]
    ) -> list[Tensor]:
        """Some launches: (out, lse) of each, one after the other, or (dq, dk, dv).

        ``inputs``: q, k and v of each launch, in backward do, lse and out besides, as :meth:`cut` makes them.
        """
        results: list[Tensor] = []
        if len(inputs) == 3:
            for q, k, v, some in zip(*inputs, cuts, strict=True):
                results += self.forward(q, k, v, shape, scoring, some)  # type: ignore[arg-type]
            return results
        for q, k, v, do, lse, out, some in zip(*inputs, cuts, strict=True):
            results += self.backward(do, q, k, v, lse, out, shape, scoring, some)  # type: ignore[arg-type]
        return results

    def check(self, scoring: Scoring, head_dim: int) -> None:
        """Raises ValueError for what this backend cannot compute."""
        if scoring.softcap and not self.softcaps:
            raise ValueError(
                f"attention backend {self.name!r} has no logit soft-cap (this layer asks for {scoring.softcap}):"
                " choose backend='flash_attn' on a GPU, or 'reference'"
            )
        if scoring.scale <= 0 and not self.any_scale:
            raise ValueError(
                f"attention backend {self.name!r} scales scores by a positive number, not by {scoring.scale}: give another"
                " scale (with its sign in q), or choose backend='reference'"
            )


def refuse_cuts(backend: Backend, cuts: Cuts | None) -> None:
    """For backends that take one rectangle a call."""
    assert cuts is None, f"backend {backend.name} was given several rectangles at once"
