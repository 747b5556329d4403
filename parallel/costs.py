"""What plans assume about this model on these ranks when nothing was measured and the user said nothing.

From the model's config, the dtype that it computes in, and a table of known devices (``hdp.balance.devices``); the same on
every rank. ``hdp profile`` measures instead.
"""

from __future__ import annotations

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

MESSAGE_SECONDS = {"cpu": 1.2e-4}
CALL_SECONDS = {"cpu": 7e-5}
"""What a message and a kernel call take from a whole core beyond their bytes and their work: on half cores 237 to 700 us a
message and 150 us a call were fitted to measured steps (``benchmarks/attention.py``, gloo, AMD EPYC, 2026-11-25)."""
HOST_SECONDS = 1e-5
"""The same on the host of a GPU, an estimate."""


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
    message_seconds: float = HOST_SECONDS
    """Seconds on the host of each message sent or received, whatever its size."""
    call_seconds: float = HOST_SECONDS
    """Seconds on the host of each kernel call, whatever its work."""


def assume(
    model: nn.Module,
    device: torch.device,
    world_size: int,
    dtype: torch.dtype,
    ranks_per_node: int | None = None,
) -> Assumptions | None:
    """For a transformers model; None for a model whose shape no config tells. ``ranks_per_node`` None: all share one."""
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
    return Assumptions(
        cost=replace(cost, constant=LAYER_OVERHEAD.get(device.type, 0.0)),
        topology=Topology(
            world_size=world_size, ranks_per_node=ranks_per_node or world_size, intra=known.intra, inter=known.inter
        ),
        flops=flops,
        device=name,
        byte_seconds=BYTE_SECONDS.get(device.type, 0.0),
        message_seconds=MESSAGE_SECONDS.get(device.type, HOST_SECONDS),
        call_seconds=CALL_SECONDS.get(device.type, HOST_SECONDS),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    matches = [name for name in DEVICES if name.split("-")[0] in words]
    return matches[0] if matches else FALLBACK
