"""delta = sum(do * out), which is all that backward reads of out; and an out that has a given delta.

Queries that travel in backward take along delta, one number a row and head, instead of out. Kernels take out. They are given
one with this delta, whose elements do not matter otherwise (:func:`out_with_delta`): all of delta is put into one element,

    out[j] = delta / do[j],   j = argmax |do|

so that do[j] * out[j] is delta to one rounding, whatever the scale of do (a vector along do needs its norm, whose square
underflows where gradients are below 1e-19). out[j] is at most head_dim times as large as the largest element of the true out.
Where that leaves the range of do's dtype, the vector with this delta whose largest element is smallest stands in; no element of
it is larger than the largest of the true out:

    out[i] = sign(do[i]) * delta / sum(|do|)

In bf16 and fp16 the rounding of out[j] would be an error of all of delta. What it leaves goes into the element in which do is
second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdp import _partials


def delta_of(do: Tensor, out: Tensor) -> Tensor:
    """sum(do * out) over head_dim: [rows, heads], fp32 (float64 for float64).

    Args:
        do, out: [rows, heads, head_dim], one dtype.
    """
    dense = do.stride(-1) == out.stride(-1) == 1
    if do.device.type == "cpu" and do.dtype == out.dtype and do.dtype in (torch.float32, torch.bfloat16) and dense:
        delta = torch.empty(do.shape[:2], dtype=torch.float32)
        lies = [n for t in (delta, do, out) for n in (t.data_ptr(), t.stride(0), t.stride(1))]
        _partials.delta(*lies, *do.shape, do.dtype == torch.bfloat16)
        return delta
    if do.is_cuda and do.dtype != torch.float64 and dense:
        from hdp.attention.delta_triton import delta_of_triton

        return delta_of_triton(do, out)
    return delta_of_reference(do, out)


def delta_of_reference(do: Tensor, out: Tensor) -> Tensor:
    """:func:`delta_of` in plain torch: any device and dtype."""
    wide = torch.promote_types(do.dtype, torch.float32)
    return (do.to(wide) * out.to(wide)).sum(-1)


def out_with_delta(do: Tensor, delta: Tensor) -> Tensor:
    """An ``out`` with sum(do * out) = delta, as exactly as its dtype allows: see the head of this module.

    What is not finite in do or delta makes that sum not finite. Any device; tables of moves do it fused.

    Args:
        do: [rows, heads, head_dim]. delta: [rows, heads], fp32 (float64 for float64), sums of do with some out in do's dtype.

    Returns:
        As do.
    """
    limit = torch.finfo(do.dtype).max
    wide, delta = do.to(delta.dtype), delta.unsqueeze(-1)
    largest, first = wide.abs().max(-1, keepdim=True)  # NaN is above all
    alone = torch.where(delta == 0, 0.0, delta / wide.gather(-1, first))
    out = torch.zeros_like(wide).scatter_(-1, first, alone)
    share = delta / (wide.abs() / largest).sum(-1, keepdim=True) / largest  # in this order: nothing leaves the range
    spread = torch.where(wide < 0, -1.0, 1.0) * share.clamp(-limit, limit)
    too_large = (alone.abs() > limit) & delta.isfinite() & (largest > 0)
    out = torch.where(too_large, spread, out).to(do.dtype)
    if do.dtype == delta.dtype:
        return out
    others = wide.abs().scatter(-1, first, -1.0)
    target = torch.where(too_large, first, others.argmax(-1, keepdim=True))
    rest = delta - (wide * out.to(delta.dtype)).sum(-1, keepdim=True)
    mended = out.gather(-1, target).to(delta.dtype) + rest / wide.gather(-1, target)
    mended = torch.where(mended.isfinite(), mended.clamp(-limit, limit).to(do.dtype), out.gather(-1, target))
    return out.scatter(-1, target, mended)
