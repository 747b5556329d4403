"""Single moves, as the executor runs them within tables: in C++ on the CPU, and by Triton's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdp.attention.lowered import Op
from hdp.attention.moves import describe, run_on_cpu


def merge_move(shape: torch.Size) -> np.ndarray:
    """Tensors: out, lse, partial, its lse."""
    rows, heads, _ = shape
    return np.array([[Op.MERGE, 2, 0, 0, 0, 0, 0, rows, heads, 1, 3, 0, 0, 1, 0, 0]])


def rebuild_move(shape: torch.Size) -> np.ndarray:
    """Tensors: do, delta, out."""
    rows, heads, _ = shape
    return np.array([[Op.REBUILD, 0, 0, 0, 2, 0, 0, rows, heads, 1, 1, 0, 0, -1, 0, 0]])


def merged_on_cpu(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """``hdp.attention.merge.merge_partial`` in C++."""
    tensors = np.array([describe(t) for t in (out, lse, partial, partial_lse)])
    run_on_cpu(tensors, merge_move(out.shape), out.shape[2])


def rebuilt_on_cpu(do: Tensor, delta: Tensor) -> Tensor:
    """``hdp.attention.delta.out_with_delta`` in C++."""
    out = torch.full(do.shape, torch.nan, dtype=do.dtype)
    run_on_cpu(np.array([describe(t) for t in (do, delta, out)]), rebuild_move(do.shape), do.shape[2])
    return out


def run_on_device(tensors: list[Tensor], move: np.ndarray, dim: int) -> None:
    """Needs a GPU, or TRITON_INTERPRET=1 before triton is imported."""
    from hdp.attention import moves_triton

    descriptors = torch.tensor([describe(t) for t in tensors])
    places = np.array([[number, 0, 1] for number in range(len(tensors))])
    table = moves_triton.on_device(move, places, descriptors[:, 3].numpy(), torch.device("cpu"))
    moves_triton.run_on_device(descriptors, table, dim)


def merged_on_device(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> None:
    """``hdp.attention.merge.merge_partial`` by Triton."""
    run_on_device([out, lse, partial, partial_lse], merge_move(out.shape), out.shape[2])


def rebuilt_on_device(do: Tensor, delta: Tensor) -> Tensor:
    """``hdp.attention.delta.out_with_delta`` by Triton."""
    out = torch.full(do.shape, torch.nan, dtype=do.dtype)
    run_on_device([do, delta, out], rebuild_move(do.shape), do.shape[2])
    return out


def in_interpreter(script: str, last: str) -> None:
    """Runs a script under Triton's interpreter, which ends with a line ``last``."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], check=False, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == last, done.stderr
