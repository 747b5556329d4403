"""Triton kernels compiled ahead of time, for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


def compile_ahead(
    kernel: Any,
    capability: int,
    pointers: dict[str, torch.dtype],
    constants: dict[str, Any],
    reals: tuple[str, ...] = (),
) -> str:
    """A kernel's PTX for a GPU such as 90 for sm_90.

    Args:
        pointers: the dtype of each argument that is a tensor. constants: of the ``tl.constexpr``. reals: arguments that are
            fp32 numbers; the others are whole ones.
    """
    kinds = {name: POINTERS[dtype] for name, dtype in pointers.items()} | dict.fromkeys(reals, "fp32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
