"""Ranks, nodes and links: what the planner has to know about a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hdp.balance.plan import PlanError

STEPS = 1000
"""Speeds are counted in so many parts, so that plans are made of whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank can send while every other rank of its node sends too."""

    bandwidth: float
    """Bytes per second, one direction, per rank."""
    latency: float = 0.0
    """Seconds from posting a message to its first byte."""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and math.isfinite(self.bandwidth)):
            raise PlanError(f"link bandwidth is {self.bandwidth}: give a positive number of bytes per second")
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise PlanError(f"link latency is {self.latency}: give zero or a positive number of seconds")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Nodes of ``ranks_per_node`` consecutive ranks; the last node may be smaller."""

    world_size: int
    """Ranks that the batch is planned for."""
    ranks_per_node: int = 8
    """Ranks that reach each other over ``intra``; rank r lives on node r // ranks_per_node."""
    intra: Link = field(default_factory=lambda: Link(bandwidth=400e9))
    """Between ranks of one node."""
    inter: Link = field(default_factory=lambda: Link(bandwidth=50e9))
    """Between ranks of different nodes."""
    speeds: tuple[float, ...] = ()
    """How fast each rank computes, 1 being what the cost model says; empty: all alike."""

    def __post_init__(self) -> None:
        for name in ("world_size", "ranks_per_node"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.speeds and len(self.speeds) != self.world_size:
            raise PlanError(f"speeds has {len(self.speeds)} ranks, world_size is {self.world_size}: make them equal")
        if not all(0.01 <= speed < math.inf for speed in self.speeds):
            raise PlanError(f"speeds is {self.speeds}: give a number of at least 0.01 for each rank")

    def slowed(self, ticks: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """What ``ranks`` take for ``ticks`` of work, in whole ticks."""
        if not self.speeds:
            return ticks
        speeds = np.array([round(STEPS * speed) for speed in self.speeds], dtype=np.int64)
        whole, rest = np.divmod(ticks, speeds[ranks])
        return whole * STEPS + rest * STEPS // speeds[ranks]

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)

    @property
    def node_size(self) -> int:
        """Ranks of the largest node."""
        return min(self.ranks_per_node, self.world_size)

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def is_local(self, group: Sequence[int]) -> bool:
        """Whether all ranks of a group live on one node."""
        return len({rank // self.ranks_per_node for rank in group}) <= 1
