"""CPU backend: aten's flash attention, which takes GQA, unequal lengths and a global lse in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from hdp import _partials
from hdp.attention.backends.protocol import Backend, Cuts, Scoring, refuse_cuts
from hdp.attention.delta import out_with_delta
from hdp.attention.mask import Shape
from hdp.attention.memory import addresses

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

MOST = 1 << 22
"""Elements of keys that are copied at once to look at rows that the kernel left out."""


class CpuBackend(Backend):
    """See ``hdp.attention.backends``. ANTICAUSAL rectangles are computed as CAUSAL ones on rows in reverse order."""

    name = "cpu"
    kernel = "aten flash attention for CPU"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    widens = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scoring: Scoring, cuts: Cuts | None = None
    ) -> tuple[Tensor, Tensor]:
        refuse_cuts(self, cuts)
        if shape is Shape.ANTICAUSAL:
            out, lse = self.forward(q.flip(0), k.flip(0), v.flip(0), Shape.CAUSAL, scoring)
            return out.flip(0), lse.flip(0)
        causal = shape is Shape.CAUSAL
        out, lse = _forward(_heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=scoring.scale)
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
        if not _partials.is_plain(*addresses(lse), *lse.shape):
            _show_what_is_not_finite(q, k, out, lse, causal, scoring)
        return out, lse

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
        scoring: Scoring,
        cuts: Cuts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        refuse_cuts(self, cuts)
        if out is None:
            assert delta is not None
            out = out_with_delta(do, delta)
        if shape is Shape.ANTICAUSAL:
            do, q, k, v, lse, out = (t.flip(0) for t in (do, q, k, v, lse, out))
            dq, dk, dv = self.backward(do, q, k, v, lse, out, None, Shape.CAUSAL, scoring)
            return dq.flip(0), dk.flip(0), dv.flip(0)
        inputs = [_heads_first(t) for t in (do, q, k, v, out)]
        causal = shape is Shape.CAUSAL
        grads = _backward(*inputs, lse.unsqueeze(0).transpose(1, 2), 0.0, causal, scale=scoring.scale)
        dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
        return dq, dk, dv


def _show_what_is_not_finite(q: Tensor, k: Tensor, out: Tensor, lse: Tensor, causal: bool, scoring: Scoring) -> None:
    """Puts into (out, lse) what the kernel hides. Rows in which it finds no largest score it takes for rows without keys, and
    returns out = 0, lse = 0: also where scores are NaN (with fewer keys than a vector holds) or all -inf. bf16 rows with an
    infinite score have out = 0.
    """
    some = max(1, MOST // k[:, 0].numel())
    for pairs in (lse == 0).nonzero().split(some):
        rows, heads = pairs.unbind(1)
        keys = k[:, heads // (q.shape[1] // k.shape[1])].float()
        scores = torch.einsum("nd,knd->nk", q[rows, heads].float(), keys) * scoring.scale
        if causal:
            scores.masked_fill_(torch.arange(len(k)) > rows.unsqueeze(-1), float("-inf"))
        total = scores.logsumexp(-1)
        lse[rows, heads] = torch.where(total.isfinite(), lse[rows, heads], total)
    out.masked_fill_(~lse.isfinite().unsqueeze(-1), float("nan"))


def _heads_first(t: Tensor) -> Tensor:
    return t.unsqueeze(0).transpose(1, 2)
