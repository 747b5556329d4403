"""Merging of attention partials, in fp32 (papers: TokenRing section 2.2, ring-flash-attention).

    out = sigmoid(lse - lse_b) * out + sigmoid(lse_b - lse) * out_b
    lse = max(lse, lse_b) + log1p(exp(-|lse - lse_b|))

which is the stable form of ``out = (out * exp(lse) + out_b * exp(lse_b)) / (exp(lse) + exp(lse_b))``. Both sides are weighed:
the shorter ``out -= w * (out - out_b)`` leaves the rounding of a large partial behind where that partial weighs nothing (values
of 1e8: an error of 0.4). A row that no key has reached has lse = -inf and out = 0.

``csrc/partials.h`` and ``hdp.attention.rows_triton`` do the same to one row, inside tables of moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partial(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """Merges (partial, partial_lse) into (out, lse) in place, on any device; tables of moves do it fused.

    Args:
        out: [rows, heads, head_dim], fp32 or float64. lse: [rows, heads], the same dtype.
        partial: as out, or bf16 or fp16 when out is fp32. partial_lse: as lse.
    """
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
