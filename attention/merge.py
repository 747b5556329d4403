"""Merging of attention partials, in fp32 (papers: TokenRing section 2.2, ring-flash-attention).

    out -= sigmoid(lse_b - lse) * (out - out_b)         lse -= logsigmoid(lse - lse_b)

which is the stable form of ``out = (out * exp(lse) + out_b * exp(lse_b)) / (exp(lse) + exp(lse_b))``. A row that no key
has reached has lse = -inf and out = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdp import _merge


def merge_partial(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """Merges (partial, partial_lse) into (out, lse) in place.

    Args:
        out: [rows, heads, head_dim], fp32 or float64. lse: [rows, heads], the same dtype.
        partial: as out, or bf16 when out is fp32. partial_lse: as lse.
    """
    fused = out.device.type == "cpu" and out.dtype == torch.float32 and partial.dtype in (torch.float32, torch.bfloat16)
    if fused and out.stride(-1) == 1 and partial.stride(-1) == 1:
        _merge.merge(
            *(out.data_ptr(), lse.data_ptr(), out.stride(0), out.stride(1), lse.stride(0), lse.stride(1)),
            *(partial.data_ptr(), partial_lse.data_ptr(), partial.stride(0), partial.stride(1)),
            *(partial_lse.stride(0), partial_lse.stride(1), *out.shape, partial.dtype == torch.bfloat16),
        )
    elif out.is_cuda and out.dtype == torch.float32 and out.stride(-1) == partial.stride(-1) == 1:
        from hdp.attention.merge_triton import merge_partial_triton

        merge_partial_triton(out, lse, partial, partial_lse)
    else:
        merge_partial_reference(out, lse, partial, partial_lse)


def merge_partial_reference(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """:func:`merge_partial` in plain torch: any device and dtype."""
    empty = torch.isneginf(partial_lse)
    untouched = torch.isneginf(lse)
    # Where one side is empty the difference is infinite or undefined: 0 stands in, and `where` picks the other side.
    difference = torch.where(empty | untouched, torch.zeros_like(lse), partial_lse - lse)
    weight = torch.sigmoid(difference)
    weight = torch.where(untouched, torch.ones_like(weight), torch.where(empty, torch.zeros_like(weight), weight))
    out.sub_(weight.unsqueeze(-1) * (out - partial.to(out.dtype)))
    both = lse - torch.nn.functional.logsigmoid(-difference)
    lse.copy_(torch.where(untouched, partial_lse, torch.where(empty, lse, both)))
