"""delta as a Triton kernel: every tensor is read or written once. See ``hdp.attention.delta``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdp.attention.ahead import compile_ahead

BLOCK = 16  # rows x heads of one program


@triton.jit
def delta_kernel(
    delta,
    do,
    out,
    pairs,
    heads,
    delta_row,
    delta_head,
    do_row,
    do_head,
    out_row,
    out_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Pairs (row, head) of one block; WIDTH is DIM rounded up to a power of two."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = pair < pairs
    row = pair // heads
    head = pair % heads
    column = tl.arange(0, WIDTH)[None, :]
    cells = inside[:, None] & (column < DIM)
    grad = tl.load(do + (row * do_row + head * do_head)[:, None] + column, mask=cells, other=0.0).to(tl.float32)
    value = tl.load(out + (row * out_row + head * out_head)[:, None] + column, mask=cells, other=0.0).to(tl.float32)
    tl.store(delta + row * delta_row + head * delta_head, tl.sum(grad * value, axis=1), mask=inside)


def delta_of_triton(do: Tensor, out: Tensor) -> Tensor:
    """delta = sum(do * out) on a GPU: do, out [rows, heads, head_dim] with head_dim dense, fp32, bf16 or fp16."""
    rows, heads, dim = do.shape
    delta = torch.empty(do.shape[:2], dtype=torch.float32, device=do.device)
    pairs = rows * heads
    if pairs:
        strides = [t.stride(axis) for t in (delta, do, out) for axis in (0, 1)]
        delta_kernel[(triton.cdiv(pairs, BLOCK),)](delta, do, out, pairs, heads, *strides, **_sizes(dim))
    return delta


def _sizes(dim: int) -> dict[str, int]:
    return {"DIM": dim, "WIDTH": triton.next_power_of_2(dim), "BLOCK_PAIRS": BLOCK}


def compile_for(capability: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernel's PTX for a GPU that need not be here, such as 90 for sm_90."""
    pointers = {"delta": torch.float32, "do": dtype, "out": dtype}
    return compile_ahead(delta_kernel, capability, pointers, _sizes(dim))
