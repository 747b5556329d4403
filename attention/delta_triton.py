"""delta, and an out that has it, as Triton kernels: every tensor is read or written once. See ``hdp.attention.delta``."""

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


@triton.jit
def stand_in(grad, total, cells, column, limit, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """An out [pairs, WIDTH] of DTYPE, as fp32, with sum(grad * out) = total [pairs]; limit: the largest number of DTYPE."""
    # Magnitudes are in the order of their bits, and NaN above all of them: no comparison can lose it.
    size = tl.where(cells, grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    most = tl.max(size, axis=1)
    first = tl.min(tl.where(size == most[:, None], column, WIDTH), axis=1)
    is_first = column == first[:, None]
    at_first = tl.sum(tl.where(is_first, grad, 0.0), axis=1)
    largest = tl.abs(at_first)
    alone = tl.where(total == 0.0, 0.0, tl.div_rn(total, at_first))
    weight = tl.sum(tl.div_rn(tl.abs(grad), tl.broadcast_to(largest[:, None], grad.shape)), axis=1)
    share = tl.div_rn(tl.div_rn(total, weight), largest)  # in this order: nothing leaves the range
    share = tl.where(share > limit, limit, tl.where(share < -limit, -limit, share))
    too_large = (tl.abs(alone) > limit) & (tl.abs(total) < float("inf")) & (largest > 0.0)
    spread = tl.where(grad < 0.0, -share[:, None], share[:, None])
    value = tl.where(too_large[:, None], spread, tl.where(is_first, alone[:, None], 0.0))
    if tl.float32 != DTYPE:
        value = value.to(DTYPE).to(tl.float32)
        rest = total - tl.sum(grad * value, axis=1)
        others = tl.where(is_first, -1, size)
        second = tl.min(tl.where(others == tl.max(others, axis=1)[:, None], column, WIDTH), axis=1)
        is_target = column == tl.where(too_large, first, second)[:, None]
        more = tl.div_rn(rest, tl.sum(tl.where(is_target, grad, 0.0), axis=1))
        mended = value + more[:, None]
        finite = tl.abs(mended) < float("inf")  # false for NaN
        mended = tl.where(mended > limit, limit, tl.where(mended < -limit, -limit, mended))
        value = tl.where(is_target & finite, mended, value)
    return value


@triton.jit
def out_with_delta_kernel(
    out,
    do,
    delta,
    pairs,
    heads,
    out_row,
    out_head,
    do_row,
    do_head,
    delta_row,
    delta_head,
    limit,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Writes an out with sum(do * out) = delta for the pairs of one block; limit: the largest number of out's dtype."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = pair < pairs
    row = pair // heads
    head = pair % heads
    column = tl.arange(0, WIDTH)[None, :]
    cells = inside[:, None] & (column < DIM)
    grad = tl.load(do + (row * do_row + head * do_head)[:, None] + column, mask=cells, other=0.0).to(tl.float32)
    total = tl.load(delta + row * delta_row + head * delta_head, mask=inside, other=0.0)
    value = stand_in(grad, total, cells, column, limit, out.dtype.element_ty, WIDTH)
    tl.store(out + (row * out_row + head * out_head)[:, None] + column, value.to(out.dtype.element_ty), mask=cells)


def delta_of_triton(do: Tensor, out: Tensor) -> Tensor:
    """delta = sum(do * out) on a GPU: do, out [rows, heads, head_dim] with head_dim dense, fp32, bf16 or fp16."""
    delta = torch.empty(do.shape[:2], dtype=torch.float32, device=do.device)
    _launch(delta_kernel, do.shape, delta, do, out)
    return delta


def out_with_delta_triton(do: Tensor, delta: Tensor) -> Tensor:
    """An out with a given delta, on a GPU: do [rows, heads, head_dim] with head_dim dense, fp32, bf16 or fp16; delta fp32."""
    out = torch.empty(do.shape, dtype=do.dtype, device=do.device)
    limit = torch.finfo(do.dtype).max
    _launch(out_with_delta_kernel, do.shape, out, do, delta, limit)
    return out


def _launch(kernel, shape: torch.Size, *arguments: Tensor | float) -> None:
    rows, heads, dim = shape
    pairs = rows * heads
    if not pairs:
        return
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    strides = [t.stride(axis) for t in tensors for axis in (0, 1)]
    kernel[(triton.cdiv(pairs, BLOCK),)](*(*tensors, pairs, heads, *strides, *arguments[len(tensors) :]), **_sizes(dim))


def _sizes(dim: int) -> dict[str, int]:
    return {"DIM": dim, "WIDTH": triton.next_power_of_2(dim), "BLOCK_PAIRS": BLOCK}


def compile_for(capability: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernels' PTX for a GPU that need not be here, such as 90 for sm_90."""
    pointers = {"delta": torch.float32, "do": dtype, "out": dtype}
    return compile_ahead(delta_kernel, capability, pointers, _sizes(dim)) + compile_ahead(
        out_with_delta_kernel, capability, pointers, _sizes(dim), reals=("limit",)
    )
