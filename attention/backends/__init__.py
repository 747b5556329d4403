"""Backends compute rectangles of attention and return (out, lse).

=================  ============  ================  ========  ========  =============  =============================
name               where         dtypes            varlen    soft-cap  deterministic  needs
=================  ============  ================  ========  ========  =============  =============================
``cpu``            CPU           fp32 bf16 fp16    --        --        always         torch (aten's flash op)
``flash_attn_2``   CUDA, sm_80+  bf16 fp16         fused     yes       on request     package flash-attn 2.7 or later
``flash_attn_3``   CUDA, sm_90   bf16 fp16         fused     yes       on request     package flash_attn_3
``flash_attn_4``   CUDA, sm_90+  bf16 fp16         fused     --        on request     flash_attn.cute (beta)
``torch_varlen``   CUDA, sm_80+  bf16 fp16         fused     --        --             torch 2.13 or later
``reference``      any           all, float64 too  fused     yes       always         torch; rows * keys memory
=================  ============  ================  ========  ========  =============  =============================

All take GQA and MQA, causal, bidirectional and windowed rectangles; none takes dropout. "fused": adjacent rectangles of a
round are one variable-length call. "on request": ``torch.use_deterministic_algorithms(True)``, asked at every call.

The choice is made once, by :func:`resolve_backend`, and printed by rank 0; it can be overridden by name. A name that is unknown
or cannot run here is an error, never a silent fallback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache

import torch

from hdp.attention.backends.protocol import Backend as Backend
from hdp.attention.backends.protocol import Scoring as Scoring


def _cpu(device: torch.device) -> Backend:
    from hdp.attention.backends.cpu import CpuBackend

    if device.type != "cpu":
        raise ValueError("it runs on the CPU only")
    return CpuBackend()


def _reference(device: torch.device) -> Backend:
    from hdp.attention.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _flash(version: int) -> Callable[[torch.device], Backend]:
    def make(device: torch.device) -> Backend:
        from hdp.attention.backends.flash import flash_attn

        return flash_attn(version, device)

    return make


def _varlen(device: torch.device) -> Backend:
    from hdp.attention.backends.flash import torch_varlen

    return torch_varlen(device)


MAKERS: dict[str, Callable[[torch.device], Backend]] = {
    "cpu": _cpu,
    "flash_attn_4": _flash(4),
    "flash_attn_3": _flash(3),
    "flash_attn_2": _flash(2),
    "torch_varlen": _varlen,
    "reference": _reference,
}
"""Each raises ValueError, or ImportError, where its backend cannot run. In the order in which ``auto`` tries them."""
FAMILIES = {"flash_attn": ("flash_attn_3", "flash_attn_2", "flash_attn_4")}
"""Names that stand for the first of some backends that runs."""
AUTO = {"cpu": ("cpu",), "cuda": ("flash_attn_3", "flash_attn_2", "torch_varlen")}


def backend_names() -> tuple[str, ...]:
    """All names that :func:`resolve_backend` knows."""
    return ("auto", *FAMILIES, *MAKERS)


@lru_cache(maxsize=64)
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``; ``"auto"`` picks the fastest that runs on this device with this dtype.

    Raises ValueError for an unknown name, or for one that cannot run here.
    """
    if name not in backend_names():
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(backend_names())}")
    if name == "auto":
        candidates = ("reference",) if dtype == torch.float64 else AUTO.get(device.type, ())
    else:
        candidates = FAMILIES.get(name, (name,))
    reasons = []
    for candidate in candidates:
        try:
            backend = _make(candidate, device, dtype)
        except (ValueError, ImportError) as error:
            reasons.append(f"{candidate}: {error}")
            continue
        if os.environ.get("RANK", "0") == "0":  # torchrun's; a line of every rank would say the same
            what = str(dtype).removeprefix("torch.")
            print(
                f"hdp: attention of {what} on {device}: {backend.name} ({backend.kernel})", file=sys.stderr, flush=True
            )
        return backend
    why = "; ".join(reasons) or "no backend is made for this device"
    raise ValueError(f"attention backend {name!r} cannot run {dtype} on {device} ({why}); {_fix(device, dtype)}")


def _fix(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda" and dtype == torch.float32:
        return (
            "no fast kernel computes in fp32 on a GPU: compute in bf16, with hdp.shard(..., mp_policy=MixedPrecisionPolicy("
            "param_dtype=torch.bfloat16, reduce_dtype=torch.float32)), or with a model in torch.bfloat16; 'reference' runs in"
            " fp32, slowly"
        )
    return "'reference' runs everywhere"


def _make(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    backend = MAKERS[name](device)
    if dtype not in backend.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes)
        raise ValueError(f"it computes in {known}")
    return backend
