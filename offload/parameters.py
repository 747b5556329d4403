"""Which saved tensors are parameters: these are left where they are.

Three disguises, all met in practice. A linear layer saves a *view* of its weight. FSDP2 gathers parameters into storages
of its own, which appear in no ``parameters()`` before forward, and frees and refills them behind the tensors' backs.
Autocast casts a weight once and caches the copy: it shares no storage with the weight and looks like an activation, but
is alive throughout the context, so that moving it out frees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_SHAPE_OR_CAST = frozenset(
    {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "UnsafeViewBackward0", "AliasBackward0",
     "ReshapeAliasBackward0", "PermuteBackward0", "UnsqueezeBackward0", "SqueezeBackward1", "ExpandBackward0"}
)  # fmt: skip
_DEPTH = 4


def derives_from_parameter(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter, a view of one, or a cast of one made by autocast."""
    base = tensor._base if tensor._base is not None else tensor
    if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
        return True
    node: Any = tensor.grad_fn if base.grad_fn is None else base.grad_fn
    for _ in range(_DEPTH):
        if node is None:
            return False
        if node.name() == "torch::autograd::AccumulateGrad":
            return isinstance(node.variable, nn.Parameter)
        if node.name() not in _SHAPE_OR_CAST or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return False


class ParameterStorages:
    """Live storages of a model's parameters and buffers, known by identity.

    A weak reference keeps the identity of a storage from being reused while it is remembered, not its memory.
    """

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def refresh(self, module: nn.Module) -> None:
        """Learns the storages that the module's parameters and buffers have now; called before it runs."""
        for tensor in _tensors(module):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = StorageWeakRef(storage)

    def owns(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known or derives_from_parameter(tensor)

    def forget_dead(self) -> None:
        self._known = {key: ref for key, ref in self._known.items() if not ref.expired()}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        yield local_of(tensor)
    for child in module.modules():
        yield from _fsdp_tensors(child)


def _fsdp_tensors(module: nn.Module) -> Iterator[Tensor]:
    """What FSDP2 has gathered for a module it manages (guarded: these names are not public)."""
    get_state = getattr(module, "_get_fsdp_state", None)
    if get_state is None:
        return
    state = get_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        for param in getattr(group, "fsdp_params", ()):
            yield from param.all_gather_outputs
            unsharded = getattr(param, "_unsharded_param", None)
            if unsharded is not None:
                yield local_of(unsharded)


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over several; else the tensor."""
    local = getattr(tensor, "_local_tensor", None)
    return local if isinstance(local, torch.Tensor) else tensor
