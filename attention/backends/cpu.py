"""CPU backend: aten's flash attention, which takes GQA, unequal lengths and a global lse in backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hdp import _partials
from hdp.attention.backends.protocol import Backend, Cuts, Scoring, refuse_cuts
from hdp.attention.mask import Shape

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

    row_axis = 2

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scoring: Scoring, cuts: Cuts | None = None
    ) -> tuple[Tensor, Tensor]:
        refuse_cuts(self, cuts)
        out, lse = _forward_first([_heads_first(t) for t in (q, k, v)], shape, scoring.scale)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)

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
        refuse_cuts(self, cuts)
        grads = _backward_first([_heads_first(t) for t in (q, k, v, do, lse, out)], shape, scoring.scale)
        dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
        return dq, dk, dv

    def lay(self, tensor: Tensor) -> Tensor:
        return _heads_first(tensor)

    def launch(
        self, inputs: Sequence[Sequence[Tensor]], shape: Shape, scoring: Scoring, cuts: Sequence[Cuts | None]
    ) -> list[Tensor]:
        one = _forward_first if len(inputs) == 3 else _backward_first
        return [result for tensors in zip(*inputs, strict=True) for result in one(tensors, shape, scoring.scale)]


# Tensors below are [1, heads, rows, head_dim], lse is [1, heads, rows].


def _forward_first(inputs: Sequence[Tensor], shape: Shape, scale: float) -> tuple[Tensor, ...]:
    """(out, lse) of (q, k, v)."""
    if shape is Shape.ANTICAUSAL:
        return _flipped(_forward_first(_flipped(inputs), Shape.CAUSAL, scale))
    causal = shape is Shape.CAUSAL
    out, lse = _forward(*inputs, 0.0, causal, scale=scale)
    if not _partials.is_plain(lse.data_ptr(), lse.stride(2), lse.stride(1), lse.shape[2], lse.shape[1]):
        rows = [t[0].transpose(0, 1) for t in (*inputs[:2], out, lse)]
        _show_what_is_not_finite(rows[0], rows[1], rows[2], rows[3], causal, scale)
    return out, lse


def _backward_first(inputs: Sequence[Tensor], shape: Shape, scale: float) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of (q, k, v, do, lse, out)."""
    if shape is Shape.ANTICAUSAL:
        return _flipped(_backward_first(_flipped(inputs), Shape.CAUSAL, scale))
    q, k, v, do, lse, out = inputs
    return _backward(do, q, k, v, out, lse, 0.0, shape is Shape.CAUSAL, scale=scale)


def _flipped(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.flip(2) for t in tensors)


def _show_what_is_not_finite(q: Tensor, k: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float) -> None:
    """Puts into (out, lse) what the kernel hides. Rows in which it finds no largest score it takes for rows without keys, and
    returns out = 0, lse = 0: also where scores are NaN (with fewer keys than a vector holds) or all -inf. bf16 rows with an
    infinite score have out = 0.
    """
    some = max(1, MOST // k[:, 0].numel())
    for pairs in (lse == 0).nonzero().split(some):
        rows, heads = pairs.unbind(1)
        keys = k[:, heads // (q.shape[1] // k.shape[1])].float()
        scores = torch.einsum("nd,knd->nk", q[rows, heads].float(), keys) * scale
        if causal:
            scores.masked_fill_(torch.arange(len(k)) > rows.unsqueeze(-1), float("-inf"))
        total = scores.logsumexp(-1)
        lse[rows, heads] = torch.where(total.isfinite(), lse[rows, heads], total)
    out.masked_fill_(~lse.isfinite().unsqueeze(-1), float("nan"))


def _heads_first(t: Tensor) -> Tensor:
    return t.unsqueeze(0).transpose(1, 2)
