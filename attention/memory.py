"""Where tensors lie, as the C++ of ``csrc/partials.cpp`` takes it."""

from __future__ import annotations

from torch import Tensor


def addresses(*tensors: Tensor) -> list[int]:
    """Of each tensor its address and its strides of rows and heads, in elements."""
    return [number for t in tensors for number in (t.data_ptr(), t.stride(0), t.stride(1))]
