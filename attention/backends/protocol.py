"""What the executor asks of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdp.attention.mask import Shape

Cuts = tuple[Tensor, Tensor, int, int]
"""Several rectangles in one call: cumulative rows and keys (``cu_seqlens``, int32), longest rows and keys."""


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
    """Where rows are in what :meth:`lay` makes and launches return; heads are axis 1."""
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

    def lay(self, tensor: Tensor) -> Tensor:
        """The view of a tensor [rows, heads, head_dim] or [rows, heads] that launches read rows of, along ``row_axis``."""
        return tensor

    def launch(
        self, inputs: Sequence[Sequence[Tensor]], shape: Shape, scoring: Scoring, cuts: Sequence[Cuts | None]
    ) -> list[Tensor]:
        """Some launches: (out, lse) of each, one after the other, or (dq, dk, dv).

        ``inputs``: q, k and v of each launch, in backward do, lse and out besides: rows of what :meth:`lay` makes.
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
