"""Runs tables of moves (``hdp.attention.lowered.FIELDS``): on the CPU a whole table in one call of C++, on GPUs in a kernel or
two (``hdp.attention.moves_triton``), elsewhere, and in float64 there, move by move.

What each does to a row is said in ``hdp.attention.merge`` (MERGE) and ``hdp.attention.delta`` (REBUILD).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hdp import _rows
from hdp.attention.delta import out_with_delta
from hdp.attention.lowered import Op
from hdp.attention.merge import merge_partial

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Dtypes as descriptors name them."""


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tables run as kernels of Triton, which is part of torch's wheels for GPUs."""
    return device.type == "cuda" and dtype != torch.float64


def describe(tensor: Tensor, row_axis: int = 0, head_axis: int = 1) -> tuple[int, int, int, int]:
    """Address, elements from row to row and from head to head, dtype. head_dim must be dense."""
    return tensor.data_ptr(), tensor.stride(row_axis), tensor.stride(head_axis), CODES[tensor.dtype]


def run_on_cpu(tensors: np.ndarray, table: np.ndarray, dim: int) -> None:
    """All moves of a table. ``tensors``: their descriptors (:func:`describe`)."""
    _rows.run(tensors, table, dim)


def run_results_on_cpu(
    tensors: np.ndarray,
    addresses: list[int],
    lies: np.ndarray,
    skipped: int,
    table: np.ndarray,
    dim: int,
    first: int,
    last: int,
) -> None:
    """Moves [first, last) of a table of what launches return.

    Args:
        tensors: descriptors. addresses, lies: those of results, address and the rest apart, which are numbered behind
            ``tensors``, and behind as many other results as ``skipped`` says.
    """
    _rows.run_results(tensors, addresses, lies, skipped, table, dim, first, last)


def run_with_torch(tensor: Callable[[int], Tensor], table: np.ndarray) -> None:
    """All moves of a table on any device. ``tensor``: by number, [rows, heads, head_dim] or [rows, heads]."""
    for row in table.tolist():
        op, source, source_row, source_head, target, target_row, target_head, rows, heads, _, *second = row

        def part(number: int, first: int, head: int, rows: int = rows, heads: int = heads) -> Tensor:
            return tensor(number)[first : first + rows, head : head + heads]

        to = part(target, target_row, target_head)
        if op in (Op.ZERO, Op.EMPTY):
            to.fill_(0.0 if op == Op.ZERO else float("-inf"))
            continue
        of = part(source, source_row, source_head)
        if op == Op.COPY:
            to.copy_(of)
        elif op == Op.ADD:
            to.add_(of)
        elif op == Op.MERGE:
            merge_partial(to, part(*second[3:]), of, part(*second[:3]))
        else:
            to.copy_(out_with_delta(of.to(to.dtype), part(*second[:3])))
