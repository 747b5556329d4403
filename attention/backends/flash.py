"""GPU backends on variable-length flash kernels: the flash-attn packages 2, 3 and 4, and torch's own.

All of them take packed rows and ``cu_seqlens``, and a window instead of a shape: CAUSAL is a window that ends at the
diagonal, ANTICAUSAL one that begins there (both shapes are square, so how a kernel aligns unequal lengths does not matter).
They return lse as [heads, rows]. :class:`VarlenBackend` does what they have in common, a :class:`Kernel` what they have not.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hdp.attention.backends.protocol import Backend, Cuts, Scoring
from hdp.attention.mask import Shape


@dataclass(frozen=True)
class Variant:
    """One call's options."""

    cuts: Cuts
    scale: float
    shape: Shape
    softcap: float
    deterministic: bool

    @property
    def causal(self) -> bool:
        return self.shape is Shape.CAUSAL

    @property
    def window(self) -> tuple[int, int]:
        """Keys that a query sees before and after its own; -1: all."""
        return (0, -1) if self.shape is Shape.ANTICAUSAL else (-1, -1)


class Kernel(Protocol):
    """A package's forward and backward. lse is [heads, rows], fp32; in backward it is the global one, contiguous."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class VarlenBackend(Backend):
    """See ``hdp.attention.backends``."""

    dtypes = (torch.bfloat16, torch.float16)
    packs = True

    def __init__(self, name: str, kernel: Kernel, version: str, *, softcaps: bool) -> None:
        self.name, self.kernel, self._kernel, self.softcaps = name, version, kernel, softcaps

    @property
    def deterministic(self) -> bool:
        """Whether backward must add in one order; whoever asks for it may do so at any time."""
        return torch.are_deterministic_algorithms_enabled()

    def check(self, scoring: Scoring, head_dim: int) -> None:
        super().check(scoring, head_dim)
        if head_dim % 8 or head_dim > 256:
            raise ValueError(
                f"attention backend {self.name!r} takes head dimensions that are multiples of 8 up to 256, not {head_dim};"
                " 'reference' takes any"
            )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scoring: Scoring, cuts: Cuts | None = None
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._kernel.forward(q, k, v, self._variant(q, k, shape, scoring, cuts))
        return out, lse.transpose(0, 1)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        out: Tensor,
        shape: Shape,
        scoring: Scoring,
        cuts: Cuts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        variant = self._variant(q, k, shape, scoring, cuts)
        return self._kernel.backward(do, q, k, v, out, lse.transpose(0, 1).contiguous(), variant)

    def _variant(self, q: Tensor, k: Tensor, shape: Shape, scoring: Scoring, cuts: Cuts | None) -> Variant:
        if cuts is None:
            ends = [torch.tensor([0, len(t)], dtype=torch.int32, device=t.device) for t in (q, k)]
            cuts = ends[0], ends[1], len(q), len(k)
        return Variant(cuts, scoring.scale, shape, scoring.softcap, self.deterministic)


class FlashAttn2:
    """Package ``flash-attn`` 2.7 or later: 2.6 took windows as one argument and returned other things."""

    def __init__(self, module: Any) -> None:
        self._forward = _with(module._flash_attn_varlen_forward, "window_size_left", "softcap")
        self._backward = _with(module._flash_attn_varlen_backward, "window_size_left", "softcap", "deterministic")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
        left, right = variant.window
        out, lse, *_ = self._forward(
            *(q, k, v, *variant.cuts),
            dropout_p=0.0,
            softmax_scale=variant.scale,
            causal=variant.causal,
            window_size_left=left,
            window_size_right=right,
            softcap=variant.softcap,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = variant.window
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        self._backward(
            *(do, q, k, v, out, lse, dq, dk, dv, *variant.cuts),
            dropout_p=0.0,
            softmax_scale=variant.scale,
            causal=variant.causal,
            window_size_left=left,
            window_size_right=right,
            softcap=variant.softcap,
            alibi_slopes=None,
            deterministic=variant.deterministic,
        )
        return dq, dk, dv


class FlashAttn3:
    """Package ``flash_attn_3`` (``flash_attn_interface``), Hopper."""

    def __init__(self, module: Any) -> None:
        self._forward = _with(module._flash_attn_forward, "cu_seqlens_q", "window_size_left", "softcap")
        self._backward = _with(
            module._flash_attn_backward, "cu_seqlens_q", "window_size_left", "softcap", "deterministic"
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
        left, right = variant.window
        out, lse, *_ = self._forward(
            *(q, k, v),
            **_cu_seqlens(variant.cuts),
            softmax_scale=variant.scale,
            causal=variant.causal,
            window_size_left=left,
            window_size_right=right,
            softcap=variant.softcap,
        )
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = variant.window
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        self._backward(
            *(do, q, k, v, out, lse),
            **_cu_seqlens(variant.cuts),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=variant.scale,
            is_causal=variant.causal,
            window_size_left=left,
            window_size_right=right,
            softcap=variant.softcap,
            deterministic=variant.deterministic,
        )
        return dq, dk, dv


class FlashAttn4:
    """Package ``flash_attn.cute`` (beta): no window is None here, and some versions have no windowed backward."""

    def __init__(self, module: Any) -> None:
        self._forward = _with(module._flash_attn_fwd, "cu_seqlens_q", "window_size_left", "return_lse")
        self._backward = _with(module._flash_attn_bwd, "cu_seqlens_q", "causal")
        self._takes = set(inspect.signature(self._backward).parameters)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
        cu_q, cu_k, max_q, max_k = variant.cuts
        left, right = (None if side < 0 else side for side in variant.window)
        out, lse, *_ = self._forward(
            *(q, k, v),
            **_known(self._forward, _cu_seqlens((cu_q, cu_k, max_q, max_k))),
            softmax_scale=variant.scale,
            causal=variant.causal,
            window_size_left=left,
            window_size_right=right,
            return_lse=True,
        )
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {}
        if variant.shape is Shape.ANTICAUSAL:
            options["window_size_left"] = 0
        if variant.deterministic:
            options["deterministic"] = True
        for name in options.keys() - self._takes:
            raise ValueError(f"this version of flash_attn.cute has no {name} in backward: choose another backend")
        known = _known(self._backward, _cu_seqlens(variant.cuts))
        dq, dk, dv, *_ = self._backward(
            *(q, k, v, out, do, lse), softmax_scale=variant.scale, causal=variant.causal, **known, **options
        )
        return dq, dk, dv


class TorchVarlen:
    """torch's own variable-length flash op (``torch.nn.attention.varlen``).

    Its public backward uses the lse of its own forward; the op beneath takes any, so the global one is given to it. That op
    is private: its arguments are compared with those that this was written for.
    """

    FORWARD = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
    BACKWARD = (
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "rng_state", "unused"),
    )

    def __init__(self, forward: Any, backward: Any) -> None:
        self._forward, self._backward = forward, backward
        for op, names in ((forward, self.FORWARD), (backward, self.BACKWARD)):
            found = tuple(a.name for a in op._schema.arguments)
            options = {"scale", "window_size_left", "window_size_right"}
            if found[: len(names)] != names or not options <= set(found):
                raise ValueError(
                    f"torch {torch.__version__} has another {op._schema.name} than this was written for ({found});"
                    " use torch 2.13 or a flash-attn package"
                )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
        left, right = variant.window
        out, lse, *_ = self._forward(
            *(q, k, v, *variant.cuts, 0.0, variant.causal, False),
            scale=variant.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor, Tensor]:
        if variant.deterministic:
            raise ValueError("attention backend 'torch_varlen' has no deterministic backward: choose 'flash_attn'")
        left, right = variant.window
        random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        dq, dk, dv = self._backward(
            *(do, q, k, v, out, lse, *variant.cuts, 0.0, variant.causal, random_state, lse.new_empty(0)),
            scale=variant.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return dq, dk, dv


def flash_attn(version: int, device: torch.device) -> Backend:
    """Flash-attn 2, 3 or 4. ValueError or ImportError where it cannot run."""
    if version == 2:
        require_gpu(device, (8, 0), None)
        module = importlib.import_module("flash_attn.flash_attn_interface")
        return VarlenBackend("flash_attn_2", FlashAttn2(module), _version("flash_attn"), softcaps=True)
    if version == 3:
        require_gpu(device, (9, 0), (9, 0))
        module = importlib.import_module("flash_attn_interface")
        return VarlenBackend("flash_attn_3", FlashAttn3(module), _version("flash_attn_3"), softcaps=True)
    require_gpu(device, (9, 0), None)
    module = importlib.import_module("flash_attn.cute.interface")
    return VarlenBackend("flash_attn_4", FlashAttn4(module), _version("flash_attn"), softcaps=False)


def torch_varlen(device: torch.device) -> Backend:
    """torch's variable-length op. ValueError where it cannot run."""
    require_gpu(device, (8, 0), None)
    aten = torch.ops.aten
    kernel = TorchVarlen(aten._flash_attention_forward.default, aten._flash_attention_backward.default)
    return VarlenBackend("torch_varlen", kernel, f"torch {torch.__version__}", softcaps=False)


def require_gpu(device: torch.device, least: tuple[int, int], most: tuple[int, int] | None) -> None:
    """Raises ValueError unless ``device`` is a GPU of a capability in between."""
    if device.type != "cuda":
        raise ValueError("it runs on CUDA devices only")
    found = torch.cuda.get_device_capability(device)
    if found < least or (most is not None and found > most):
        raise ValueError(f"it needs compute capability {least[0]}.{least[1]}, this GPU has {found[0]}.{found[1]}")


def _cu_seqlens(cuts: Cuts) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, cuts, strict=True))


def _known(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a function takes: some versions derive the longest lengths themselves."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def _with(function: Any, *names: str) -> Any:
    """``function``, if it takes these arguments; ValueError if its package is too old."""
    plain = getattr(function, "_init_fn", function)  # custom ops hide their signature
    missing = [name for name in names if name not in inspect.signature(plain).parameters]
    if missing:
        raise ValueError(f"{getattr(plain, '__name__', plain)} has no argument {missing[0]!r}: update the package")
    return function


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
