"""Hybrid data parallelism for PyTorch: communication groups made anew for every batch.

    world = hdp.init()                                     # under torchrun, or alone
    engine = hdp.shard(model, world)                       # a transformers model with attn_implementation="hdp"
    for batch in hdp.Loader(documents, engine, tokens_per_step=65536):
        result = engine.forward_backward(batch)
        optimizer.step()
        optimizer.zero_grad()

Names load on first use (PEP 562): planning works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdp.attention.checkpoint import keep_attention
    from hdp.attention.huggingface import register as register_attention
    from hdp.attention.op import attend
    from hdp.attention.route import Route, RouteShard
    from hdp.balance import Plan, PlanError, make_plan
    from hdp.parallel.activations import Activations
    from hdp.parallel.batch import PlannedBatch
    from hdp.parallel.ddp import replicate
    from hdp.parallel.deepspeed import DeepSpeedEngine
    from hdp.parallel.engine import Engine
    from hdp.parallel.errors import CallMismatch, HdpError, PeerError, PlanMismatch
    from hdp.parallel.fsdp import shard
    from hdp.parallel.loader import Loader
    from hdp.parallel.metrics import Span, StepResult
    from hdp.parallel.world import World, init

__version__ = "0.1.0"

_LAZY = {
    "replicate": "hdp.parallel.ddp",
    "DeepSpeedEngine": "hdp.parallel.deepspeed",
    "Activations": "hdp.parallel.activations",
    "CallMismatch": "hdp.parallel.errors",
    "Engine": "hdp.parallel.engine",
    "HdpError": "hdp.parallel.errors",
    "Loader": "hdp.parallel.loader",
    "PeerError": "hdp.parallel.errors",
    "Plan": "hdp.balance",
    "PlanError": "hdp.balance",
    "PlanMismatch": "hdp.parallel.errors",
    "PlannedBatch": "hdp.parallel.batch",
    "Route": "hdp.attention.route",
    "RouteShard": "hdp.attention.route",
    "Span": "hdp.parallel.metrics",
    "StepResult": "hdp.parallel.metrics",
    "World": "hdp.parallel.world",
    "attend": "hdp.attention.op",
    "init": "hdp.parallel.world",
    "keep_attention": "hdp.attention.checkpoint",
    "make_plan": "hdp.balance",
    "register_attention": "hdp.attention.huggingface:register",
    "shard": "hdp.parallel.fsdp",
}

__all__ = [
    "Activations",
    "CallMismatch",
    "DeepSpeedEngine",
    "Engine",
    "HdpError",
    "Loader",
    "PeerError",
    "Plan",
    "PlanError",
    "PlanMismatch",
    "PlannedBatch",
    "Route",
    "RouteShard",
    "Span",
    "StepResult",
    "World",
    "attend",
    "init",
    "keep_attention",
    "make_plan",
    "register_attention",
    "replicate",
    "shard",
]


_FOLDERS = ("data", "offload", "report")


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"hdp.{name}")
    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
