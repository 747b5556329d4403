"""Reference backend: attention written out. Slow, needs rows * keys memory, exact in the dtype it is given."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hdp.attention.backends.protocol import Backend, Cuts, Scoring
from hdp.attention.mask import Shape


class ReferenceBackend(Backend):
    """See ``hdp.attention.backends``. Computes in fp32 at least; float64 inputs are computed in float64."""

    name = "reference"
    kernel = "plain torch"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    packs = True
    softcaps = True
    any_scale = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scoring: Scoring, cuts: Cuts | None = None
    ) -> tuple[Tensor, Tensor]:
        if cuts is not None:
            parts = [self.forward(q[a], k[b], v[b], shape, scoring) for a, b in _rectangles(cuts)]
            return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
        scores, _, wide_v, _ = self._scores(q, k, v, shape, scoring)
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
        out: Tensor,
        shape: Shape,
        scoring: Scoring,
        cuts: Cuts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if cuts is not None:
            grads = [
                self.backward(do[a], q[a], k[b], v[b], lse[a], out[a], shape, scoring) for a, b in _rectangles(cuts)
            ]
            dq, dk, dv = (torch.cat(parts) for parts in zip(*grads, strict=True))
            return dq, dk, dv
        delta = (do.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        scores, wide_k, wide_v, slope = self._scores(q, k, v, shape, scoring)
        wide_do, wide_q = do.to(scores.dtype), q.to(scores.dtype)
        probabilities = torch.exp(scores - lse.transpose(0, 1).unsqueeze(-1))
        dv = torch.einsum("hqk,qhd->khd", probabilities, wide_do)
        dp = torch.einsum("qhd,khd->hqk", wide_do, wide_v)
        ds = probabilities * (dp - delta.transpose(0, 1).unsqueeze(-1)) * scoring.scale
        if slope is not None:
            ds = ds * slope
        dq = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk = torch.einsum("hqk,qhd->khd", ds, wide_q)
        return dq, _sum_groups(dk, k.shape[1]), _sum_groups(dv, k.shape[1])

    def _scores(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[heads, rows, keys] with -inf where the shape forbids; k, v repeated to the query heads; the soft-cap's slope."""
        wide = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (t.to(wide).repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.to(wide), wide_k) * scoring.scale
        slope = None
        if scoring.softcap:
            bent = torch.tanh(scores / scoring.softcap)
            scores, slope = bent * scoring.softcap, 1 - bent * bent
        if shape is not Shape.FULL:
            allowed = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            allowed = allowed.tril() if shape is Shape.CAUSAL else allowed.triu()
            scores = scores.masked_fill(~allowed, float("-inf"))
        return scores, wide_k, wide_v, slope


def _rectangles(cuts: Cuts) -> list[tuple[slice, slice]]:
    rows, keys = cuts[0].tolist(), cuts[1].tolist()
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(rows), pairwise(keys), strict=True)]


def _sum_groups(grad: Tensor, key_heads: int) -> Tensor:
    return grad.unflatten(1, (key_heads, -1)).sum(2)
