"""What plans assume about this model on these ranks when nothing was measured and the user said nothing.

From the model's config, the dtype that it computes in, and a table of known devices (``hdp.balance.devices``); the same on
every rank. ``hdp profile`` measures instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from hdp.balance import CostModel, Topology
from hdp.balance.devices import DEVICES, Device
from hdp.balance.plan import PlanError

FALLBACK = "h100-sxm"
LAYER_OVERHEAD = {"cpu": 1.5e-3, "cuda": 1e-4}
"""Seconds per layer and micro-batch, forward and backward, that do not depend on tokens (launches, Python): one token
through a layer took 1.5 ms on a core of an AMD EPYC (2026-11-22); a GPU's figure is an estimate."""

BYTE_SECONDS = {"cpu": 5e-10}
"""What a byte sent or received takes from computation: on a CPU the same core copies it (ring over four hosts on gloo, AMD
EPYC, 2026-11-22); a GPU's network card does without."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a planner is told about the model and the ranks."""

    cost: CostModel
    topology: Topology
    flops: float
    """Operations a second that one rank attains in the model's dtype."""
    device: str
    """Name in the table of devices."""
    byte_seconds: float = 0.0
    """What a byte sent or received takes from computation."""


def assume(model: nn.Module, device: torch.device, world_size: int, dtype: torch.dtype) -> Assumptions | None:
    """For a transformers model; None for a model whose shape no config tells."""
    name = _device_name(device)
    known: Device = DEVICES[name]
    # The table's peak is that of 16-bit kernels; fp32 runs at about half on a CPU, through tf32 on GPUs.
    flops = known.attained / (dtype.itemsize / 2)
    try:
        cost = CostModel.from_shape(
            getattr(model, "config", None),
            flops=flops,
            bytes_per_element=dtype.itemsize,
            gradient_bytes=4,
            copy_bandwidth=known.copy_bandwidth,
            world_size=world_size,
        )
    except (PlanError, AttributeError, TypeError):
        return None
    ranks_per_node = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    return Assumptions(
        cost=replace(cost, constant=LAYER_OVERHEAD.get(device.type, 0.0)),
        topology=Topology(world_size=world_size, ranks_per_node=ranks_per_node, intra=known.intra, inter=known.inter),
        flops=flops,
        device=name,
        byte_seconds=BYTE_SECONDS.get(device.type, 0.0),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    matches = [name for name in DEVICES if name.split("-")[0] in words]
    return matches[0] if matches else FALLBACK
