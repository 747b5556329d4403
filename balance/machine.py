"""The machine: what its ranks compute, what their links carry, what their hosts pay, and what one model costs on them.

One frozen value, measured (``hdp profile``, and at the start of a job), read from a file, or assumed from a model and a device.
Planner, choice of schedules, offload and simulator are given it; nothing changes it.

    machine = Machine.read("machine.json")
    plan(lengths, machine.topology(world_size=64), machine.planning, ...)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from hdp.balance.cost import CostModel
from hdp.balance.host import NO_HOST_COSTS, HostCosts
from hdp.balance.measured import Sample
from hdp.balance.models import ModelShape
from hdp.balance.plan import PlanError
from hdp.balance.topology import Link, Topology

FORMAT = 3
GRADIENT_BYTES = 4
"""Of an element: ``hdp.shard`` reduces gradients in fp32."""
SOURCES = ("measured", "assumed")
LINK_KINDS = ("nic", "peer")
SLOW = 0.9
"""Of the median rank's speed: what is slower is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRates:
    """Bytes per second of one rank between device and where activations go, all ranks of a node copying at once."""

    out: float
    """From the device."""
    back: float
    """To the device."""

    @property
    def least(self) -> float:
        """What Eq. 3 wants: min(B_d2h, B_h2d)."""
        return min(self.out, self.back)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWork:
    """One layer on one micro-batch."""

    forward_seconds: float
    """Time of the layer's forward."""
    bytes_all: int
    """Bytes it saves when everything is kept."""
    bytes_kept: int
    """Bytes of its input and of attention's out and lse."""
    attention_seconds: float = 0.0
    """Part of the forward that is attention, which a recomputation leaves out."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One kernel call of attention: as many tokens of queries as of keys, causal, all heads of the model."""

    tokens: int
    forward: float
    """Seconds."""
    backward: float
    """Seconds."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What half a second tells of the ranks, all at once: a later start compares its own with it."""

    compute: tuple[float, ...]
    """Of each rank: pieces of work a second."""
    size: int
    """Bytes of the message that each rank sends to the next."""
    seconds: tuple[float, ...]
    """Of each rank: until it has sent and received it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks, their nodes and links, and one model on them. Times are of the median rank."""

    source: str = "measured"
    """``"measured"`` or ``"assumed"``."""
    model: str
    """The model, in words."""
    device: str
    """What computes, in words."""
    nodes: tuple[int, ...]
    """Ranks of each node; rank 0 is the first one's first."""
    cost: CostModel
    flops: float
    """Operations a second that attention attains on one rank, in tiles long enough."""
    intra: Link | None = None
    """Between ranks of one node, all sending at once; None: not known."""
    inter: Link | None = None
    """The same between nodes."""
    link_kind: str = "nic"
    """``"nic"``: all of a rank's traffic shares one port. ``"peer"``: each pair of ranks has a link of its own."""
    speeds: tuple[float, ...] = ()
    """How fast each rank computes, the median being 1; empty: all alike, or not known."""
    tiles: tuple[Tile, ...] = ()
    """Kernel calls of attention from small to large; empty: not measured."""
    overlap: float = 1.0
    """Part of the shorter of compute and messages that hides behind the longer when both run at once, 0 to 1."""
    gather_bandwidth: float = 0.0
    """Bytes per second of an all-gather over all ranks, counted by its result; 0: not measured."""
    reduce_bandwidth: float = 0.0
    """Bytes per second of a reduce-scatter over all ranks, counted by its input; 0: not measured."""
    host: HostCosts = NO_HOST_COSTS
    """What rounds, messages, bytes and kernel calls of attention cost the host, and gathering and reducing, FSDP2's own work
    included; zeros: not measured."""
    copies: CopyRates | None = None
    """Between device and where activations go; None: not measured."""
    samples: tuple[Sample, ...] = ()
    """Micro-batches that the cost model was fitted to."""
    parameters: int = 1
    """Of the model."""
    element_bytes: int = 4
    """Of an element of the parameters, as they are gathered."""
    whole: float = 0.0
    """What all layers at once took over what one of each kind says, by which ``cost`` is mended where it is far from 1; 0: the
    model was too large to run whole."""
    root_share: float = 0.0
    """Part of the parameters that belongs to no layer (embeddings, head); 0: not known."""
    shape: ModelShape | None = None
    """Of the model; None: not known."""
    probe: Probe | None = None
    """What a short probe found when the rest was measured; None: nothing to compare with."""

    def __post_init__(self) -> None:
        for name, choices in (("source", SOURCES), ("link_kind", LINK_KINDS)):
            if getattr(self, name) not in choices:
                raise PlanError(f"machine: {name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name in ("parameters", "element_bytes"):
            _check_count(name, getattr(self, name))
        if not self.nodes:
            raise PlanError("machine: nodes is empty: give the ranks of each node, (8, 8) for two of eight")
        for size in self.nodes:
            _check_count("nodes", size)
        for name in ("overlap", "gather_bandwidth", "reduce_bandwidth", "whole", "root_share", "flops"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise PlanError(f"machine: {name} is {value!r}, must be a number of at least 0")
        if self.flops == 0:
            raise PlanError("machine: flops is 0: give the operations a second that attention attains")
        if self.speeds and len(self.speeds) != self.world_size:
            raise PlanError(f"machine: speeds has {len(self.speeds)} ranks, nodes has {self.world_size}")
        if not all(isinstance(speed, int | float) and 0 < speed < math.inf for speed in self.speeds):
            raise PlanError(f"machine: speeds is {self.speeds}: give a positive number for each rank")

    @property
    def world_size(self) -> int:
        return sum(self.nodes)

    @property
    def ranks_per_node(self) -> int:
        """Ranks r with the same r // ranks_per_node share a node: of nodes of unlike size, as many as that is true for."""
        return ranks_per_node(self.nodes)

    @property
    def parameter_bytes(self) -> float:
        """Of all parameters, as they are gathered."""
        return float(self.element_bytes) * self.parameters

    @property
    def gradient_bytes(self) -> float:
        """Of all gradients, as they are reduced."""
        return float(GRADIENT_BYTES) * self.parameters

    @property
    def sharding_seconds(self) -> float:
        """What gathering all parameters and reducing all gradients once takes the host."""
        return self.host.gather_byte * self.parameter_bytes + self.host.reduce_byte * self.gradient_bytes

    @property
    def slow_ranks(self) -> dict[int, float]:
        """Ranks below 0.9 of the median's speed, and their speed."""
        return {rank: speed for rank, speed in enumerate(self.speeds) if speed < SLOW * median(self.speeds)}

    def topology(self, *, world_size: int | None = None, ranks_per_node: int | None = None) -> Topology:
        """Nodes and links. Where only one kind of link is known, it stands for both.

        A machine of one rank, which needs no links, has the defaults of :class:`Topology`. Speeds of ranks are among it where
        some rank is slow; smaller differences are noise.
        """
        ranks, per_node = world_size or self.world_size, ranks_per_node or self.ranks_per_node
        links = [link for link in (self.intra, self.inter) if link is not None]
        if not links and ranks == 1:
            return Topology(world_size=1, ranks_per_node=1)
        if not links:
            raise PlanError(
                "the machine has no links: measure with two ranks or more (torchrun), or give bandwidths (--intra-bandwidth,"
                " --inter-bandwidth)"
            )
        unlike = ranks == self.world_size and bool(self.slow_ranks)
        return Topology(
            world_size=ranks,
            ranks_per_node=per_node,
            intra=self.intra or links[0],
            inter=self.inter or links[0],
            speeds=tuple(max(speed, 0.01) for speed in self.speeds) if unlike else (),
        )

    def layer(self, lengths: Sequence[int], sharers: Sequence[int] = ()) -> LayerWork:
        """One layer on a micro-batch of one rank: documents of these lengths, each shared by so many ranks (empty: by none)."""
        cost, ranks = self.cost, tuple(sharers) or (1,) * len(lengths)
        tokens = sum(length / size for length, size in zip(lengths, ranks, strict=True))
        whole = cost.attention_seconds(list(lengths)).tolist()
        attention = sum(seconds / size for seconds, size in zip(whole, ranks, strict=True)) / cost.layers
        return LayerWork(
            forward_seconds=tokens * cost.linear + attention + cost.constant / 3.0,
            bytes_all=round(tokens * cost.activation_bytes),
            bytes_kept=round(tokens * (cost.recompute_bytes or cost.activation_bytes)),
            attention_seconds=attention,
        )

    def with_layers(self, layers: int) -> Machine:
        """Of the same model with more layers than were measured."""
        times = layers / self.cost.layers
        windows = round(self.cost.window_layers * times)
        root = self.parameters * self.root_share
        parameters = round(root + (self.parameters - root) * times)
        return replace(
            self,
            cost=replace(self.cost, layers=layers, window_layers=windows),
            parameters=parameters,
            root_share=root / parameters,
            shape=replace(self.shape, layers=layers, window_layers=windows) if self.shape else None,
        )

    @cached_property
    def planning(self) -> CostModel:
        """``cost`` with what sharing takes the host, as planners count it."""
        host, layers = self.host, self.cost.layers
        return replace(
            self.cost,
            tile_seconds=host.piece_seconds + host.piece_setup / layers,
            message_seconds=host.message_seconds + host.message_setup / layers,
            round_seconds=host.round_seconds,
            byte_seconds=host.message_byte,
        )

    @cached_property
    def digest(self) -> str:
        """The same for equal machines, on every rank."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "the text") -> Machine:
        """Raises PlanError for what is no machine, or one of another version; ``name`` is what messages call it."""
        try:
            fields: dict[str, Any] = json.loads(text)
            if not isinstance(fields, dict) or "format" not in fields:
                raise PlanError(f"{name} is no machine: give a file that hdp profile --out wrote")
            if fields.pop("format") != FORMAT:
                raise PlanError(f"{name} is of another version, which measured other things: run hdp profile again")
            parts: dict[str, Any] = {
                "cost": CostModel(**fields["cost"]),
                "host": HostCosts(**fields["host"]),
                "samples": tuple(Sample(**sample) for sample in fields["samples"]),
                "tiles": tuple(Tile(**tile) for tile in fields["tiles"]),
                "nodes": tuple(fields["nodes"]),
                "speeds": tuple(fields["speeds"]),
                "probe": _probe(fields["probe"]),
            }
            kinds: tuple[tuple[str, type], ...] = (
                ("intra", Link),
                ("inter", Link),
                ("copies", CopyRates),
                ("shape", ModelShape),
            )
            parts |= {field: kind(**fields[field]) if fields[field] else None for field, kind in kinds}
            return cls(**{**fields, **parts})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"{name} is no machine of hdp profile ({error}): write one with hdp profile --out"
            ) from error

    def write(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Machine:
        """Raises PlanError for a file that is none, or one of another version."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{str(path)!r} is no machine of hdp profile ({error}): write one with hdp profile --out"
            ) from error
        return cls.from_json(text, repr(str(path)))


def _probe(fields: dict[str, Any] | None) -> Probe | None:
    if not fields:
        return None
    return Probe(compute=tuple(fields["compute"]), size=fields["size"], seconds=tuple(fields["seconds"]))


def ranks_per_node(nodes: Sequence[int]) -> int:
    """The largest n for which ranks r with the same r // n share a node; only the last node may have fewer."""
    first, borders = nodes[0], list(accumulate(nodes))[:-1]
    if all(border % first == 0 for border in borders) and max(nodes) <= first:
        return first
    return math.gcd(*borders)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"machine: {name} is {value!r}, must be a whole number of at least 1")
