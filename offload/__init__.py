"""Saved activations: what leaves device memory, where to, when it comes back.

Names load when they are used (PEP 562): the pure half (policies, memory model, ``auto``) needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdp.offload.auto import Decision, choose
    from hdp.offload.bandwidth import measure_bandwidth
    from hdp.offload.engine import OffloadEngine
    from hdp.offload.errors import OffloadError
    from hdp.offload.file_tier import FileTier
    from hdp.offload.layers import find_layers
    from hdp.offload.micro_batch import MicroBatch
    from hdp.offload.policy import POLICIES, LayerAction, layer_actions
    from hdp.offload.tiers import HostTier, Tier

_HOMES = {
    "Decision": "auto",
    "FileTier": "file_tier",
    "HostTier": "tiers",
    "LayerAction": "policy",
    "MicroBatch": "micro_batch",
    "OffloadEngine": "engine",
    "OffloadError": "errors",
    "POLICIES": "policy",
    "Tier": "tiers",
    "choose": "auto",
    "find_layers": "layers",
    "layer_actions": "policy",
    "measure_bandwidth": "bandwidth",
}

__all__ = [
    "POLICIES",
    "Decision",
    "FileTier",
    "HostTier",
    "LayerAction",
    "MicroBatch",
    "OffloadEngine",
    "OffloadError",
    "Tier",
    "choose",
    "find_layers",
    "layer_actions",
    "measure_bandwidth",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
