"""Tables of moves on a GPU: moves of one kind that do not wait for each other in one Triton kernel (``hdp.attention.moves``).

A table's rows are the same for all layers, so they lie on the device, and with them which block of (row, head) pairs of which
move each program of the kernel takes. Addresses come as numbers: one small copy to the device for each attention call, and one
for each kernel whose results are moved.

[Note: waves] Programs of one kernel run in any order. Moves that touch the same rows and heads, one of them writing, are in
different *waves*, which run in the order of the table. Nearly all tables have one or two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hdp import _tables
from hdp.attention.ahead import compile_ahead
from hdp.attention.lowered import Op
from hdp.attention.rows_triton import merged, stand_in

PAIRS = 16  # rows x heads of one program
ADD, EMPTY = tl.constexpr(int(Op.ADD)), tl.constexpr(int(Op.EMPTY))
PLAIN, FILL, MERGE, REBUILD_FLOAT32, REBUILD_BFLOAT16, REBUILD_FLOAT16 = (tl.constexpr(n) for n in range(6))
"""Kinds of moves, each a kernel of its own: a copy needs few registers, a rebuilt out many."""
FLOAT32, BFLOAT16 = tl.constexpr(0), tl.constexpr(2)  # hdp.attention.moves.CODES; else fp16


@triton.jit
def _at(tensors, number, row, head, first_row, first_head):
    """Elements from the tensor's address to each (row, head) pair."""
    one = tensors + number * 4
    return (first_row + row) * tl.load(one + 1) + (first_head + head) * tl.load(one + 2)


@triton.jit
def _read(tensors, number, offsets, mask):
    address, code = tl.load(tensors + number * 4), tl.load(tensors + number * 4 + 3)
    if code == FLOAT32:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif code == BFLOAT16:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _write(tensors, number, offsets, value, mask):
    address, code = tl.load(tensors + number * 4), tl.load(tensors + number * 4 + 3)
    if code == FLOAT32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, value, mask=mask)
    elif code == BFLOAT16:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offsets, value.to(tl.bfloat16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, value.to(tl.float16), mask=mask)


@triton.jit
def moves_kernel(
    blocks, table, tensors, KIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    """One block of pairs of one move of a kind. blocks: [programs, 2], move and first pair; tensors: [tensors, 4]."""
    program = tl.program_id(0)
    move = table + tl.load(blocks + 2 * program) * 16
    pair = tl.load(blocks + 2 * program + 1) + tl.arange(0, BLOCK_PAIRS)
    heads = tl.load(move + 8)
    inside = pair < tl.load(move + 7) * heads
    row = pair // heads
    head = pair % heads
    column = tl.arange(0, WIDTH)[None, :]
    cells = inside[:, None] & (column < tl.where(tl.load(move + 9) != 0, DIM, 1))
    target = tl.load(move + 4)
    to = _at(tensors, target, row, head, tl.load(move + 5), tl.load(move + 6))
    to_cells = to[:, None] + column
    if KIND == FILL:
        filled = tl.full([BLOCK_PAIRS, WIDTH], 0.0, tl.float32)
        if tl.load(move) == EMPTY:
            filled = tl.full([BLOCK_PAIRS, WIDTH], float("-inf"), tl.float32)
        _write(tensors, target, to_cells, filled, cells)
    else:
        source = tl.load(move + 1)
        of = _at(tensors, source, row, head, tl.load(move + 2), tl.load(move + 3))
        value = _read(tensors, source, of[:, None] + column, cells)
        if KIND == PLAIN:
            if tl.load(move) == ADD:
                value += _read(tensors, target, to_cells, cells)
            _write(tensors, target, to_cells, value, cells)
        else:
            source2 = tl.load(move + 10)
            of2 = _at(tensors, source2, row, head, tl.load(move + 11), tl.load(move + 12))
            new = _read(tensors, source2, of2, inside)
            if KIND == MERGE:
                target2 = tl.load(move + 13)
                to2 = _at(tensors, target2, row, head, tl.load(move + 14), tl.load(move + 15))
                old = _read(tensors, target2, to2, inside)
                out, lse = merged(_read(tensors, target, to_cells, cells), old, value, new)
                tl.debug_barrier()  # no thread may write an lse that another one has not read
                _write(tensors, target2, to2, lse, inside)
                _write(tensors, target, to_cells, out, cells)
            elif KIND == REBUILD_FLOAT32:
                out = stand_in(value, new, cells, column, 3.4028234663852886e38, tl.float32, WIDTH)
                _write(tensors, target, to_cells, out, cells)
            elif KIND == REBUILD_BFLOAT16:
                out = stand_in(value, new, cells, column, 3.3895313892515355e38, tl.bfloat16, WIDTH)
                _write(tensors, target, to_cells, out, cells)
            else:
                out = stand_in(value, new, cells, column, 65504.0, tl.float16, WIDTH)
                _write(tensors, target, to_cells, out, cells)


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """A table of moves on the device, and its waves."""

    moves: Tensor
    """[moves, 16]."""
    launches: tuple[tuple[int, Tensor], ...]
    """The kind and [programs, 2] of each kernel, wave after wave."""


def on_device(table: np.ndarray, places: np.ndarray, codes: np.ndarray, device: torch.device) -> DeviceTable:
    """A table as :func:`run_on_device` takes it.

    Args:
        table: [moves, 16] (``hdp.attention.lowered.FIELDS``).
        places: [tensors, 3], where each tensor of the program lies: number of its memory, first byte, end. Tensors beyond have
            memory of their own.
        codes: [tensors], their dtypes (``hdp.attention.moves.CODES``).
    """
    op = table[:, 0]
    kinds = np.select([op <= Op.ADD, op == Op.MERGE, op >= Op.ZERO], [PLAIN.value, MERGE.value, FILL.value], -1)
    rebuilt = np.flatnonzero(kinds < 0)
    of_code = np.array([REBUILD_FLOAT32.value, -1, REBUILD_BFLOAT16.value, REBUILD_FLOAT16.value])
    kinds[rebuilt] = of_code[codes[table[rebuilt, 4]]]
    order = _tables.waves(table, places) * len(of_code) * 2 + kinds
    launches = []
    for number in np.unique(order).tolist():
        chosen = np.flatnonzero(order == number)
        counts = -(-table[chosen, 7] * table[chosen, 8] // PAIRS)
        firsts = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        blocks = np.stack([np.repeat(chosen, counts), firsts * PAIRS], axis=1)
        launches.append((int(kinds[chosen[0]]), torch.from_numpy(blocks).to(device)))
    return DeviceTable(torch.from_numpy(table).to(device), tuple(launches))


def run_on_device(tensors: Tensor, table: DeviceTable, dim: int) -> None:
    """All moves of a table. tensors: int64 [tensors, 4] on the device, descriptors (``hdp.attention.moves.describe``)."""
    for kind, blocks in table.launches:
        moves_kernel[(len(blocks),)](blocks, table.moves, tensors, KIND=kind, **_sizes(dim))


def _sizes(dim: int) -> dict[str, int]:
    return {"DIM": dim, "WIDTH": triton.next_power_of_2(dim), "BLOCK_PAIRS": PAIRS}


def compile_for(capability: int, kind: int, dim: int = 128) -> str:
    """PTX of one kind's kernel for a GPU that need not be here, such as 90 for sm_90."""
    pointers = dict.fromkeys(("blocks", "table", "tensors"), torch.int64)
    return compile_ahead(moves_kernel, capability, pointers, {"KIND": kind, **_sizes(dim)})
