"""The merge of attention partials as one Triton kernel: out, lse and the partial are read once, out and lse written once.

Triton is part of torch's CUDA wheels; nothing is compiled on the user's machine but by Triton itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdp.attention.ahead import compile_ahead

BLOCK = 16  # rows x heads that one program merges


@triton.jit
def merged(mine, old, theirs, new):
    """(out, lse) of two partials: mine, theirs [pairs, width] with lse old, new [pairs]."""
    empty = new == float("-inf")
    untouched = old == float("-inf")
    # Where one side is empty the difference is infinite or undefined: 0 stands in, and `where` picks the other side.
    difference = tl.where(empty | untouched, 0.0, new - old)
    small = tl.exp(-tl.abs(difference))
    total = 1.0 + small
    more = tl.div_rn(tl.full(small.shape, 1.0, tl.float32), total)
    less = tl.div_rn(small, total)
    old_weight = tl.where(difference > 0, less, more)
    new_weight = tl.where(difference > 0, more, less)
    # log1p(small), which Triton has only in libdevice: log(total) misses what the sum rounds off, the quotient puts it back.
    added = total - 1.0
    rest = tl.where(added == 0.0, small, tl.log(total) * tl.div_rn(small, tl.where(added == 0.0, 1.0, added)))
    both = tl.maximum(old, new) + rest
    lse = tl.where(untouched, new, tl.where(empty, old, both))
    out = old_weight[:, None] * mine + new_weight[:, None] * theirs
    # A row that had nothing takes the partial as it is, whatever its memory holds; an empty partial changes nothing.
    out = tl.where(untouched[:, None], theirs, tl.where(empty[:, None], mine, out))
    keep = empty & untouched
    return tl.where(keep[:, None], mine, out), lse


@triton.jit
def merge_kernel(
    out,
    lse,
    partial,
    partial_lse,
    pairs,
    heads,
    out_row,
    out_head,
    lse_row,
    lse_head,
    partial_row,
    partial_head,
    partial_lse_row,
    partial_lse_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Pairs (row, head) of one block; WIDTH is DIM rounded up to a power of two."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = pair < pairs
    row = pair // heads
    head = pair % heads
    column = tl.arange(0, WIDTH)
    cells = inside[:, None] & (column < DIM)[None, :]
    lse_at = lse + row * lse_row + head * lse_head
    old = tl.load(lse_at, mask=inside, other=0.0)
    new = tl.load(partial_lse + row * partial_lse_row + head * partial_lse_head, mask=inside, other=0.0)
    out_at = out + (row * out_row + head * out_head)[:, None] + column[None, :]
    mine = tl.load(out_at, mask=cells, other=0.0)
    theirs = tl.load(
        partial + (row * partial_row + head * partial_head)[:, None] + column[None, :], mask=cells, other=0.0
    ).to(tl.float32)
    value, both = merged(mine, old, theirs, new)
    tl.debug_barrier()  # no thread may write an lse that another one has not read
    tl.store(lse_at, both, mask=inside)
    tl.store(out_at, value, mask=cells)


def merge_partial_triton(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """Merges (partial, partial_lse) into (out, lse) in place; see ``hdp.attention.merge``. fp32; partial may be bf16, fp16.

    out, partial: [rows, heads, head_dim] with head_dim dense. lse, partial_lse: [rows, heads].
    """
    rows, heads, dim = out.shape
    pairs = rows * heads
    if not pairs:
        return
    merge_kernel[(triton.cdiv(pairs, BLOCK),)](
        *(out, lse, partial, partial_lse, pairs, heads),
        *(out.stride(0), out.stride(1), lse.stride(0), lse.stride(1)),
        *(partial.stride(0), partial.stride(1), partial_lse.stride(0), partial_lse.stride(1)),
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        BLOCK_PAIRS=BLOCK,
    )


def compile_for(capability: int, dim: int = 128, partial_dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernel's PTX for a GPU that need not be here, such as 90 for sm_90."""
    pointers = dict.fromkeys(("out", "lse", "partial_lse"), torch.float32) | {"partial": partial_dtype}
    constants = {"DIM": dim, "WIDTH": triton.next_power_of_2(dim), "BLOCK_PAIRS": BLOCK}
    return compile_ahead(merge_kernel, capability, pointers, constants)
