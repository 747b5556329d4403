"""What the simulator has to know about a cluster beyond its topology."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hdp.balance.host import NO_HOST_COSTS, HostCosts
from hdp.balance.machine import Machine
from hdp.balance.models import ModelShape
from hdp.balance.plan import PlanError
from hdp.balance.topology import Topology

NUMBERS = ("parameter_bytes", "gradient_bytes", "gather_bandwidth", "reduce_bandwidth", "stage_token_bytes")
SHARDINGS = ("none", "replicated", "sharded")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks, links and how parameters are kept on them. The planned world is that of one pipeline stage."""

    topology: Topology
    ranks_per_nic: int = 1
    """Ranks of a node that share one NIC; it has their added bandwidth, which one alone may use."""
    sharding: str = "none"
    """``"none"``: no collectives. ``"replicated"``: gradients are all-reduced behind the last backward (DDP, ZeRO-1).
    ``"sharded"``: parameters are gathered and gradients reduce-scattered (FSDP2, ZeRO-3): once a step, or layer by layer in
    every slot, as the plan's regime says."""
    parameter_bytes: float = 0.0
    """Of all parameters of one stage, as they are gathered."""
    gradient_bytes: float = 0.0
    """Of all gradients of one stage, as they are reduced."""
    root_share: float = 0.0
    """Part of parameters and gradients that belongs to no layer (embeddings, head): gathered first and reduced last."""
    blocking: bool = False
    """Nothing is computed during a collective. False: layers are gathered and reduced while others compute, which FSDP2
    does on accelerators by itself and ``hdp.shard`` on CPUs."""
    overlap: float = 1.0
    """Part of the shorter of compute and messages of a round that hides behind the longer, 0 to 1."""
    stages: int = 1
    """Pipeline stages, each on nodes of its own, scheduled one forward, one backward."""
    stage_token_bytes: float = 0.0
    """Bytes that a token's activations take from stage to stage, one way."""
    gather_bandwidth: float = 0.0
    """Bytes per second of an all-gather over all ranks, where it was measured; 0: from the links."""
    reduce_bandwidth: float = 0.0
    """The same of a reduce-scatter."""
    host: HostCosts = NO_HOST_COSTS
    """What rounds, messages and tiles of attention cost the host, as ``hdp profile`` measures it."""
    shape: ModelShape | None = None
    """The model's shape, for schedules other than the ring, whose bytes depend on its heads."""
    element_bytes: int = 2
    """Bytes of an element of queries, keys and values, for schedules other than the ring."""

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise PlanError(f"unknown sharding {self.sharding!r}: choose one of {', '.join(SHARDINGS)}")
        for name in ("ranks_per_nic", "stages"):
            _check_count(name, getattr(self, name))
        for name in NUMBERS:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise PlanError(f"{name} is {value}: give zero or a positive number")
        for name in ("overlap", "root_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise PlanError(f"{name} is {getattr(self, name)}: give a part from 0 to 1")
        if self.sharding != "none" and not self.gradient_bytes:
            raise PlanError(
                f"sharding {self.sharding!r} reduces gradients: give gradient_bytes, or take Cluster.of_model"
            )

    @classmethod
    def of_model(
        cls,
        shape: ModelShape,
        topology: Topology,
        *,
        sharding: str = "sharded",
        stages: int = 1,
        parameter_element: int = 2,
        gradient_element: int = 4,
        **fields: object,
    ) -> Cluster:
        """With the bytes of a model: bf16 parameters, gradients reduced in fp32 unless said otherwise."""
        _check_count("stages", stages)
        if shape.layers % stages:
            raise PlanError(f"{shape.layers} layers do not divide into {stages} stages: choose a divisor")
        return cls(
            topology=topology,
            sharding=sharding,
            stages=stages,
            parameter_bytes=shape.parameters * parameter_element / stages,
            gradient_bytes=shape.parameters * gradient_element / stages,
            stage_token_bytes=float(shape.hidden * parameter_element),
            shape=shape,
            **fields,  # type: ignore[arg-type]
        )

    @classmethod
    def of_machine(
        cls,
        machine: Machine,
        topology: Topology | None = None,
        *,
        sharding: str = "sharded",
        stages: int = 1,
        **fields: object,
    ) -> Cluster:
        """What ``hdp simulate --machine`` and its comparison with real steps simulate.

        ``topology``: None for the ranks of the machine. On others collectives are as much faster or slower as their links say.
        Raises PlanError for a machine without links and for fields that are wrong.
        """
        _check_count("stages", stages)
        if topology is None:
            topology = machine.topology()
        gather, reduce = machine.gather_bandwidth, machine.reduce_bandwidth
        if gather or reduce:
            here = _once_around(topology)
            times = _once_around(machine.topology()) / here if here else 0.0
            gather, reduce = gather * times, reduce * times
        shape = machine.shape
        return cls(
            topology=topology,
            sharding=sharding,
            stages=stages,
            parameter_bytes=machine.parameter_bytes / stages,
            gradient_bytes=machine.gradient_bytes / stages,
            root_share=machine.root_share,
            overlap=machine.overlap,
            stage_token_bytes=float(shape.hidden * machine.element_bytes) if shape else 0.0,
            gather_bandwidth=gather,
            reduce_bandwidth=reduce,
            host=machine.host,
            shape=shape,
            element_bytes=machine.element_bytes,
            **fields,  # type: ignore[arg-type]
        )

    @property
    def nics_per_node(self) -> int:
        return -(-self.topology.node_size // self.ranks_per_nic)

    def collective_seconds(self, size: float, layers: int) -> float:
        """An all-gather or reduce-scatter of ``size`` bytes in ``layers`` calls over one stage's ranks.

        Bandwidth-optimal on two levels, all NICs of a node at once; as many hops of latency as a tree is deep.
        """
        topology = self.topology
        node, nodes = topology.node_size, topology.nodes
        depth = (
            math.ceil(math.log2(node)) * topology.intra.latency + math.ceil(math.log2(nodes)) * topology.inter.latency
        )
        return size * _once_around(topology) + layers * depth

    def gather_seconds(self, layers: int) -> float:
        """All parameters of a stage, once."""
        if self.sharding != "sharded":
            return 0.0
        if self.gather_bandwidth:
            return self.parameter_bytes / self.gather_bandwidth
        return self.collective_seconds(self.parameter_bytes, layers)

    def reduce_seconds(self, layers: int) -> float:
        """All gradients of a stage, once."""
        if self.sharding == "none":
            return 0.0
        if self.reduce_bandwidth:
            once = self.gradient_bytes / self.reduce_bandwidth
        else:
            once = self.collective_seconds(self.gradient_bytes, layers)
        return once * (2 if self.sharding == "replicated" else 1)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{name} is {value!r}: give a whole number of at least 1")


def _once_around(topology: Topology) -> float:
    """Seconds a byte of an all-gather's result over all ranks, or of what goes into a reduce-scatter; 0: one rank."""
    node, nodes = topology.node_size, topology.nodes
    inside = (node - 1) / node / topology.intra.bandwidth
    across = (nodes - 1) / nodes / (node * topology.inter.bandwidth)
    return max(inside, across)
