"""Gradients that are there before a step: they are put aside, so that a step adds to them, and one that fails leaves them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Earlier:
    """What parameters hold when a step begins."""

    def __init__(self, *, copied: bool = False) -> None:
        """``copied``: gradients lie in buffers that the step writes to."""
        self.copied = copied
        self.held: dict[nn.Parameter, Tensor | None] = {}

    def put_aside(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if not parameter.requires_grad or has_hook(parameter):
                continue
            grad = parameter.grad
            self.held[parameter] = grad.clone() if grad is not None and self.copied else grad
            parameter.grad = None

    def add_back(self) -> None:
        """After a step."""
        for parameter, grad in self.held.items():
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = grad
            else:
                local(parameter.grad).add_(local(grad))
        self.held.clear()

    def restore(self) -> None:
        """After a step that failed."""
        for parameter, grad in self.held.items():
            parameter.grad = grad
        self.held.clear()


def has_hook(parameter: nn.Parameter) -> bool:
    """Whether somebody reads the gradient as soon as it is there, such as an optimizer inside the backward pass."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of gradients that may be spread over different meshes (FSDP alone, FSDP x tensor parallel)."""
    meshes: dict[object, list[Tensor]] = {}
    for grad in grads:
        meshes.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(group) for group in meshes.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())
