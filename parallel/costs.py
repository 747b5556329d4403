"""The machine as it is assumed where nothing is measured.

From the model's config or its modules (``hdp.parallel.shapes``), the dtype that it computes in, and a table of known devices
(``hdp.balance.devices``); the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from hdp.balance import CostModel
from hdp.balance.devices import DEVICES, Device, recognise
from hdp.balance.host import HostCosts
from hdp.balance.machine import Machine
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
ROUND_SECONDS = 3e-5
"""What a step of a program takes the host beyond its messages and calls, an estimate."""


class NotKnown(ValueError):
    """Nothing can be assumed of a model or its device; the message says what is missing and how to give it."""


def assume(
    model: nn.Module, device: torch.device, world_size: int, dtype: torch.dtype, nodes: Sequence[int] = ()
) -> Machine:
    """What is known of a model on a device. ``nodes``: ranks of each; empty: all share one.

    Raises :class:`NotKnown` for a device that is not in the table, and for a model of which neither a config nor its modules
    tell a shape.
    """
    name = device_name(device)
    known: Device = DEVICES[name]
    seen = see_shape(model)
    if seen is None:
        raise NotKnown(
            f"{type(model).__name__} has no config that tells its shape, and neither layers with weights nor an output head are"
            " to be seen: give hdp.Loader(machine=Machine(cost=CostModel(...), ...))"
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
    return Machine(
        source="assumed",
        model=str(seen),
        device=name,
        nodes=tuple(nodes) or (world_size,),
        cost=replace(cost, constant=LAYER_OVERHEAD.get(device.type, 0.0)),
        flops=flops,
        intra=known.intra,
        inter=known.inter,
        host=HostCosts(
            message_byte=BYTE_SECONDS.get(device.type, 0.0),
            message_seconds=MESSAGE_SECONDS.get(device.type, HOST_SECONDS),
            piece_seconds=CALL_SECONDS.get(device.type, HOST_SECONDS),
            round_seconds=ROUND_SECONDS,
        ),
        parameters=max(int(seen.shape.parameters), 1),
        element_bytes=dtype.itemsize,
        shape=seen.shape,
    )


def device_name(device: torch.device) -> str:
    """A device's name in the table; raises :class:`NotKnown` for one that is not there."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    found = recognise(name)
    if found is None:
        raise NotKnown(
            f"the device {name!r} is not in the table, so its speed and its links are not known: measure them"
            ' (hdp.Loader(machine="measure")), give a file of hdp profile (machine="machine.json"), or add it to'
            " hdp.balance.devices.DEVICES before the loader is made"
        )
    return found
