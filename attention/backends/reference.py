"""Reference backend: attention written out. Slow, needs rows * keys memory, exact in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from hdp.attention.mask import Shape


class ReferenceBackend:
    """See ``hdp.attention.backends``. Computes in fp32 at least; float64 inputs are computed in float64."""

    name = "reference"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
        scores, _, wide_v = self._scores(q, k, v, shape, scale)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.einsum("hqk,khd->qhd", torch.exp(scores - lse.unsqueeze(-1)), wide_v)
        return out, lse.transpose(0, 1)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        out: Tensor | None,
        delta: Tensor | None,
        shape: Shape,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, wide_k, wide_v = self._scores(q, k, v, shape, scale)
        wide_do, wide_q = do.to(scores.dtype), q.to(scores.dtype)
        if delta is None:
            assert out is not None
            delta = (wide_do * out.to(scores.dtype)).sum(-1)
        probabilities = torch.exp(scores - lse.transpose(0, 1).unsqueeze(-1))
        dv = torch.einsum("hqk,qhd->khd", probabilities, wide_do)
        dp = torch.einsum("qhd,khd->hqk", wide_do, wide_v)
        ds = probabilities * (dp - delta.transpose(0, 1).unsqueeze(-1)) * scale
        dq = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk = torch.einsum("hqk,qhd->khd", ds, wide_q)
        return dq, _sum_groups(dk, k.shape[1]), _sum_groups(dv, k.shape[1])

    def _scores(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """[heads, rows, keys] with -inf where the shape forbids, and k, v repeated to the query heads."""
        wide = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (t.to(wide).repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.to(wide), wide_k) * scale
        if shape is not Shape.FULL:
            allowed = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            allowed = allowed.tril() if shape is Shape.CAUSAL else allowed.triu()
            scores = scores.masked_fill(~allowed, float("-inf"))
        return scores, wide_k, wide_v


def _sum_groups(grad: Tensor, key_heads: int) -> Tensor:
    return grad.unflatten(1, (key_heads, -1)).sum(2)
