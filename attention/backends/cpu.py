"""CPU backend: aten's flash attention, which takes GQA, unequal lengths and a global lse in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from hdp.attention.backends.protocol import Backend, Cuts, Scoring, refuse_cuts
from hdp.attention.delta import out_with_delta
from hdp.attention.mask import Shape

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)

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


def _heads_first(t: Tensor) -> Tensor:
    return t.unsqueeze(0).transpose(1, 2)
