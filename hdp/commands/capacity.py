"""``--capacity auto``: the tokens of a micro-batch that fit a device's memory, from the model's shape."""

from __future__ import annotations

import argparse
import sys

from hdp.balance import PlanError
from hdp.balance.capacity import MARGIN, at_capacity, find_capacity
from hdp.balance.devices import DEVICES, find_device, recognise
from hdp.balance.footprint import shape_footprint
from hdp.balance.held import EngineMemory
from hdp.balance.machine import Machine
from hdp.balance.models import ModelShape, model_shape

AUTO = "auto"
MOST = 1 << 24
"""Tokens beyond which no capacity is looked for."""
MOST_LOGITS = 1 << 24
"""Of one chunk of the loss, as ``hdp.parallel.loss`` has it."""


def capacity_argument(text: str) -> int | str:
    """A whole number of at least 1, or ``auto``, for argparse."""
    if text == AUTO:
        return AUTO
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of at least 1 nor {AUTO}")
    return int(text)


def settle_capacity(arguments: argparse.Namespace, command: str) -> None:
    """Puts the number in place of ``auto``, and says so in a line on standard error.

    For bf16 with weights, gradients and Adam's state in fp32, divided over all ranks (FSDP2), as ``hdp.shard`` holds them.

    Raises:
        PlanError: neither a device nor ``--memory`` says how much there is, or not even the model fits.
    """
    if arguments.capacity != AUTO:
        return
    shape, memory = _shape_of(arguments), _memory_of(arguments)
    model = shape_footprint(shape)
    engine = EngineMemory(
        kind="fsdp",
        regime=arguments.regime,
        sharers=arguments.world_size,
        ranks=arguments.world_size,
        computed=2,
        loss_rows=max(MOST_LOGITS // shape.vocabulary, 1),
    )
    found = find_capacity(model, engine, memory, MOST)
    if found < 1:
        least = at_capacity(model, engine, 1)
        raise PlanError(
            f"{shape.name} does not fit {arguments.world_size} ranks of {memory / 1e9:.4g} GB less a margin of {MARGIN:.0%}:"
            f" one token a micro-batch takes {least.bytes / 1e9:.4g} GB ({least}); use more ranks, --regime slot or --memory"
        )
    peak = at_capacity(model, engine, found)
    print(
        f"{command}: --capacity auto is {found:,} tokens a micro-batch: {peak.bytes / 1e9:.4g} of {memory / 1e9:.4g} GB a rank"
        f" ({peak})",
        file=sys.stderr,
    )
    arguments.capacity = found


def _shape_of(arguments: argparse.Namespace) -> ModelShape:
    if arguments.model or not arguments.machine:
        return model_shape(arguments.model)
    shape = Machine.read(arguments.machine).shape
    if shape is None:
        raise PlanError("--machine does not know the model's shape: give --model or --capacity")
    return shape


def _memory_of(arguments: argparse.Namespace) -> float:
    if arguments.memory is not None:
        return float(arguments.memory)
    name = arguments.device
    if name is None and arguments.machine:
        name = recognise(Machine.read(arguments.machine).device)
    if name is None or name not in DEVICES:
        raise PlanError(
            "--capacity auto needs to know the memory of a rank: give --memory BYTES, --device or --capacity"
        )
    return find_device(name).memory
