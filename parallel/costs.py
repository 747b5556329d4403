"""What plans assume about this model on these ranks when nothing was measured and the user said nothing.

From the model's config or its modules (``hdp.parallel.shapes``), the dtype that it computes in, and a table of known devices
(``hdp.balance.devices``); the same on every rank. ``hdp profile`` measures instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from hdp.balance import CostModel, Topology
from hdp.balance.devices import DEVICES, Device, recognise
from hdp.parallel.shapes import see_shape

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
    model: str = ""
    """The model's shape in words, and what of it is a guess."""
    has_config: bool = True
    """Whether a config told the shape; otherwise the modules did."""


class NotKnown(ValueError):
    """Nothing can be assumed of a model or its device; the message says what is missing and how to give it."""


def assume(
    model: nn.Module,
    device: torch.device,
    world_size: int,
    dtype: torch.dtype,
    ranks_per_node: int | None = None,
) -> Assumptions:
    """What is known of a model on a device. ``ranks_per_node`` None: all share one.

    Raises :class:`NotKnown` for a device that is not in the table, and for a model of which neither a config nor its modules
    tell a shape.
    """
    name = device_name(device)
    known: Device = DEVICES[name]
    seen = see_shape(model)
    if seen is None:
        raise NotKnown(
            f"{type(model).__name__} has no config that tells its shape, and neither layers with weights nor an output head are"
            " to be seen: give hdp.Loader(cost=CostModel(...)), or measure with hdp profile"
        )
    # The table's peak is that of 16-bit kernels; fp32 runs at about half on a CPU, through tf32 on GPUs.
    flops = known.attained / (dtype.itemsize / 2)
    cost = CostModel.from_shape(
        seen.shape,
        flops=flops,
        bytes_per_element=dtype.itemsize,
        gradient_bytes=4,
        copy_bandwidth=known.copy_bandwidth,
        world_size=world_size,
    )
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
        model=str(seen),
        has_config=seen.has_config,
    )


def device_name(device: torch.device) -> str:
    """A device's name in the table; raises :class:`NotKnown` for one that is not there."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    found = recognise(name)
    if found is None:
        raise NotKnown(
            f"the device {name!r} is not in the table, so its speed and its links are not known: measure them (hdp profile"
            " --out profile.json) and give hdp.Loader(cost=profile.cost, topology=profile.topology()), or add it to"
            " hdp.balance.devices.DEVICES before the engine is made"
        )
    return found
