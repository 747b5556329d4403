"""What stands in for an engine where batches are planned and none is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hdp.balance import CostModel, Machine, Topology
from hdp.balance.cost import DEFAULT_FLOPS, default_cost


def machine_of(
    world_size: int, cost: CostModel | None = None, topology: Topology | None = None, **fields: Any
) -> Machine:
    """A machine with this cost and these links; by default a 7B model on one fast node."""
    topology = topology or Topology(world_size=world_size, ranks_per_node=world_size)
    whole, rest = divmod(world_size, topology.ranks_per_node)
    nodes = (topology.ranks_per_node,) * whole + ((rest,) if rest else ())
    return Machine(
        **{
            "source": "assumed",
            "model": "made up",
            "device": "made up",
            "nodes": nodes,
            "cost": cost or default_cost(),
            "flops": DEFAULT_FLOPS,
            "intra": topology.intra,
            "inter": topology.inter,
            **fields,
        }
    )


def alone(world_size: int = 2, device: str = "cpu") -> Any:
    """As much of a world as planning needs: rank 0 of so many."""
    return SimpleNamespace(
        rank=0,
        world_size=world_size,
        nodes=(world_size,),
        device=torch.device(device),
        runtime=SimpleNamespace(schedule=None, chooser=None),
    )


def planning(world: Any = None, **fields: Any) -> Any:
    """An engine that knows a machine and has no model."""
    world = world or alone()
    return SimpleNamespace(
        **{
            "world": world,
            "regime": "step",
            "machine": machine_of(world.world_size),
            "activations": None,
            "model": torch.nn.Linear(2, 2),
            "dtype": torch.float32,
            "is_assumed": False,
            "foresee": lambda machine=None: None,
            **fields,
        }
    )
