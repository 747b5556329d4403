"""Backends compute one rectangle of attention and return (out, lse).

====================  ============================  =================  ==========================
name                  where                         dtypes             needs
====================  ============================  =================  ==========================
``cpu``               CPU                           fp32, bf16, fp16   torch (aten's flash op)
``reference``         any device, O(rows * keys)    all; exact         torch
====================  ============================  =================  ==========================

The choice is made once, by :func:`resolve_backend`, and can be overridden by name; a name that is unknown or cannot run
here is an error, never a silent fallback.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hdp.attention.mask import Shape


class Backend(Protocol):
    """Computes one rectangle. Rows are [rows, heads, head_dim] and [rows, heads]; there is no batch dimension."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
        """Partial (out, lse) of q [rows, heads, head_dim] over k, v [keys, key_heads, head_dim].

        out has q's dtype, or fp32; lse [rows, heads] is fp32 (float64 for float64 inputs), natural logarithm.
        """
        ...

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        out: Tensor | None,
        delta: Tensor | None,
        shape: Shape,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial (dq, dk, dv). lse and out (or delta = sum(do * out), [rows, heads]) are the final, global ones."""
        ...


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``; ``"auto"`` picks the fastest that runs on this device with this dtype.

    Raises ValueError for an unknown name, or for one that cannot run here.
    """
    from hdp.attention.backends.cpu import CpuBackend
    from hdp.attention.backends.reference import ReferenceBackend

    if name == "auto":
        fast = device.type == "cpu" and dtype in CpuBackend.dtypes
        name = "cpu" if fast else "reference" if dtype == torch.float64 else ""
        if not name:
            raise ValueError(f"no attention backend runs {dtype} on {device}: choose one by name")
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        if device.type != "cpu" or dtype not in CpuBackend.dtypes:
            raise ValueError(f"attention backend 'cpu' runs fp32, bf16 and fp16 on the CPU, not {dtype} on {device}")
        return CpuBackend()
    raise ValueError(f"unknown attention backend {name!r}: choose one of auto, cpu, reference")
