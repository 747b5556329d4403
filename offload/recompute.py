"""Recomputation of one layer that keeps what attention gave, so that no message is sent twice.

The layer runs under torch's non-reentrant checkpoint. Its input is saved through the engine like any other tensor. The
outputs of the kept operators (attention's out and lse) are packed by the engine too, and when the layer runs again they
are given back instead of being computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from hdp.offload.records import Handle

Pack = Callable[[Tensor], Handle]
Unpack = Callable[[Handle], Tensor]


class _Keep(TorchDispatchMode):
    """Forward: packs the outputs of the kept operators."""

    def __init__(self, ops: frozenset[Any], kept: dict[Any, list[Any]], pack: Pack) -> None:
        super().__init__()
        self._ops, self._kept, self._pack = ops, kept, pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._ops:
            # Below autograd a detached alias has a version counter of its own unless this key is on.
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                self._kept[func].append(tree_map_only(Tensor, self._pack, out))
        return out


class _Replay(TorchDispatchMode):
    """Recomputation: gives them back in the same order."""

    def __init__(self, ops: frozenset[Any], kept: dict[Any, list[Any]], unpack: Unpack) -> None:
        super().__init__()
        self._ops, self._kept, self._unpack = ops, kept, unpack
        self._next: dict[Any, int] = defaultdict(int)

    def __enter__(self) -> Any:
        self._next.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._ops:
            return func(*args, **(kwargs or {}))
        index = self._next[func]
        self._next[func] += 1
        if index >= len(self._kept[func]):
            raise RuntimeError(
                f"{func} ran {index + 1} times when its layer was recomputed but {len(self._kept[func])} times in "
                "forward: the layer must do the same both times"
            )
        return tree_map_only(Handle, lambda handle: self._unpack(handle).detach(), self._kept[func][index])


@contextmanager
def recomputing(layer: nn.Module, pack: Pack, unpack: Unpack, ops: frozenset[Any]) -> Iterator[None]:
    """While the context is open, ``layer.forward`` saves its inputs and the outputs of ``ops`` only.

    The layer's hooks are not run again: FSDP's hooks stay outside of what is recomputed. A compiled layer runs uncompiled.
    """
    if hasattr(layer, "_orig_mod"):
        raise ValueError(
            "a layer that torch.compile has wrapped cannot run again: compile it in place, with layer.compile()"
        )
    forward = layer.forward
    had_own = "forward" in vars(layer)
    # Of compiled code no operator's output can be kept, and torch's compiler recomputes what it likes.
    compiled, layer._compiled_call_impl = layer._compiled_call_impl, None

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        kept: dict[Any, list[Any]] = defaultdict(list)
        return _Keep(ops, kept, pack), _Replay(ops, kept, unpack)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        # Tensors go in by position, wherever they came from: only those does checkpoint save through our hooks.
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run(*tensors: Tensor) -> Any:
            filled = list(others)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            return forward(*inner_args, **inner_kwargs)

        return checkpoint(run, *(leaves[i] for i in places), use_reentrant=False, context_fn=contexts)

    layer.forward = recomputed  # type: ignore[method-assign]
    try:
        yield
    finally:
        layer._compiled_call_impl = compiled
        if had_own:
            layer.forward = forward  # type: ignore[method-assign]
        else:
            del layer.forward
