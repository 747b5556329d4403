"""Merging of attention partials, in fp32 (papers: TokenRing section 2.2, ring-flash-attention).

    out = sigmoid(lse - lse_b) * out + sigmoid(lse_b - lse) * out_b
    lse = max(lse, lse_b) + log1p(exp(-|lse - lse_b|))

which is the stable form of ``out = (out * exp(lse) + out_b * exp(lse_b)) / (exp(lse) + exp(lse_b))``. Both sides are weighed:
the shorter ``out -= w * (out - out_b)`` leaves the rounding of a large partial behind where that partial weighs nothing (values
of 1e8: an error of 0.4). A row that no key has reached has lse = -inf and out = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdp import _partials
from hdp.attention.memory import addresses


def merge_partial(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """Merges (partial, partial_lse) into (out, lse) in place.

    Args:
        out: [rows, heads, head_dim], fp32 or float64. lse: [rows, heads], the same dtype.
        partial: as out, or bf16 when out is fp32. partial_lse: as lse.
    """
    fused = out.device.type == "cpu" and out.dtype == torch.float32 and partial.dtype in (torch.float32, torch.bfloat16)
    if fused and out.stride(-1) == 1 and partial.stride(-1) == 1:
        _partials.merge(*addresses(out, lse, partial, partial_lse), *out.shape, partial.dtype == torch.bfloat16)
    elif out.is_cuda and out.dtype == torch.float32 and out.stride(-1) == partial.stride(-1) == 1:
        from hdp.attention.merge_triton import merge_partial_triton

        merge_partial_triton(out, lse, partial, partial_lse)
    else:
        merge_partial_reference(out, lse, partial, partial_lse)


def merge_partial_reference(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """:func:`merge_partial` in plain torch: any device and dtype."""
    empty, untouched = torch.isneginf(partial_lse), torch.isneginf(lse)
    one_side = empty | untouched
    # Where one side is empty the difference is infinite or undefined: 0 stands in, and `where` picks the other side.
    difference = torch.where(one_side, 0.0, partial_lse - lse)
    weights = (torch.sigmoid(side).unsqueeze(-1) for side in (-difference, difference))
    both = next(weights) * out + next(weights) * partial.to(out.dtype)
    one = torch.where(empty.unsqueeze(-1), out, partial.to(out.dtype))
    out.copy_(torch.where(one_side.unsqueeze(-1), one, both))
    both = torch.maximum(lse, partial_lse) + torch.log1p(torch.exp(-difference.abs()))
    lse.copy_(torch.where(untouched, partial_lse, torch.where(empty, lse, both)))
