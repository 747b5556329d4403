"""Every engine by one name, for tests: made from the tiny model, with its gradients and parameters in full."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tiny import make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import hdp
from hdp.parallel.ddp import replicate

ENGINES = ("fsdp-step", "fsdp-slot", "hsdp-step", "hsdp-slot", "ddp", "zero1", "zero2", "zero3")
"""Names of :func:`make_engine`; HSDP needs an even world of at least 4."""

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def regime_of(name: str) -> str:
    return "slot" if name.endswith("slot") or name in ("zero2", "zero3") else "step"


def worlds_of(name: str) -> tuple[int, ...]:
    return (4,) if name.startswith("hsdp") else (2, 3)


def make_engine(
    world: hdp.World, name: str, model: nn.Module, *, bf16: bool = False, optimizer: Optimizer | None = None
) -> hdp.Engine:
    """The engine called ``name``; DeepSpeed takes its optimizer when it is made."""
    if name == "ddp":
        return replicate(model, world)
    if name.startswith("zero"):
        return _deepspeed(world, int(name[4:]), model, bf16, optimizer)
    mesh = None
    if name.startswith("hsdp"):
        mesh = init_device_mesh("cpu", (2, world.world_size // 2), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    return hdp.shard(model, world, regime=regime_of(name), mesh=mesh, mp_policy=policy)


def _deepspeed(world: hdp.World, stage: int, model: nn.Module, bf16: bool, optimizer: Optimizer | None) -> hdp.Engine:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from hdp.parallel.deepspeed import DeepSpeedEngine

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1.0
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    made, *_ = deepspeed.initialize(model=model, optimizer=make(list(model.parameters())), config=config)
    return DeepSpeedEngine(made, world)


def full_gradients(engine: hdp.Engine) -> dict[str, Tensor | None]:
    """Gradient of each parameter, whole; a collective for sharding engines."""
    return {name: _full_gradient(engine, p) for name, p in engine.model.named_parameters() if p.requires_grad}


def _full_gradient(engine: hdp.Engine, parameter: nn.Parameter) -> Tensor | None:
    if hasattr(engine, "deepspeed"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).float()
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def full_parameters(engine: hdp.Engine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.model.named_parameters():
        if getattr(engine, "stage", 0) == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            found[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            value = parameter.detach()
            found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def plan_batch(
    world: hdp.World, engine: hdp.Engine, documents: list, capacity: int, **options: Any
) -> hdp.PlannedBatch:
    """All documents as one batch, in order."""
    (batch,) = hdp.Loader(documents, engine, tokens_per_step=10**9, capacity=capacity, seed=None, **options)
    return batch


class CollectiveRecorder(TorchDispatchMode):
    """Notes every collective that goes through c10d: its name, group and size. Transfers between two ranks are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        name = function.name()
        left_out = any(word in name for word in ("send", "recv", "monitored", "wait_tensor"))
        if name.startswith(("c10d::", "_c10d_functional::")) and not left_out:
            group = next((g for a in arguments if (g := _group_name(a))), "")
            self.calls.append((name, group, _elements(arguments)))
        return function(*arguments, **(keywords or {}))


def _group_name(argument: Any) -> str:
    try:
        return dist.ProcessGroup.unbox(argument).group_name
    except (RuntimeError, TypeError, AttributeError):
        return ""


def _elements(arguments: Any) -> int:
    if isinstance(arguments, Tensor):
        return arguments.numel()
    if isinstance(arguments, (list, tuple)):
        return sum(_elements(a) for a in arguments)
    return 0


__all__ = [
    "ENGINES",
    "CollectiveRecorder",
    "full_gradients",
    "full_parameters",
    "make_engine",
    "make_model",
    "plan_batch",
    "regime_of",
    "worlds_of",
]
