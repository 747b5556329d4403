"""What a sequence costs on a group of ranks: time, in whole ticks.

A layer costs a*s^2 + b*s for a sequence of s tokens and c for a micro-batch; a group divides the first two and adds its
ring, whose hops run behind attention. Everything a planner compares is an integer: the terms of each sequence are
rounded to ticks once, at the border, and what follows is integer arithmetic, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp.balance.models import ModelShape, model_shape
from hdp.balance.plan import IntArray, PlanError
from hdp.balance.topology import Topology

TICK = 2.0**-32
"""Seconds of one tick: 0.23 ns; int64 then holds a 10-minute step on a million ranks."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds and bytes of one model on one device. Times are of the forward pass; backward is a multiple of it."""

    layers: int
    quadratic: float
    """a: seconds per layer and squared token of a causal sequence."""
    linear: float
    """b: seconds per layer and token."""
    constant: float = 0.0
    """c: seconds per layer and micro-batch, forward and backward together."""
    head: float = 0.0
    """Seconds per token outside the layers (the language model head)."""
    backward_quadratic: float = 2.5
    """Backward of attention over its forward."""
    backward_linear: float = 2.0
    """Backward of all else over its forward."""
    ring_bytes: float = 0.0
    """Bytes per layer that a token's keys and values take in one forward hop of a ring."""
    ring_bytes_backward: float = 0.0
    """The same in one hop of backward, gradients of keys and values included."""
    window: int = 0
    """Tokens of the sliding window; 0 for none."""
    window_layers: int = 0
    """Layers with the window."""
    activation_bytes: float = 0.0
    """Bytes per layer that a token keeps from forward to backward."""
    recompute_bytes: float = 0.0
    """The same of a layer that runs again in backward: its input, attention's out and lse. 0: unknown, spares nothing."""
    keep_first: int = 1
    """First layers whose activations stay on the device: they neither leave nor are computed again."""
    keep_last: int = 1
    """The same of the last layers."""
    in_flight: int = 0
    """Layers on the device at once while they leave or return, the last ones counted. 0: none beside those that stay, as Eq. 3
    has it; 2 is what ``hdp.offload`` needs, and what plans count with after ``hdp.Activations.open``."""
    recomputed: int = 0
    """Layers between those that run again in backward; see :meth:`recomputing`."""
    state_bytes: float = 0.0
    """Bytes of parameters, gradients and optimizer state on one rank."""
    device_memory: float = 0.0
    """Bytes of device memory of one rank; 0 when unknown."""
    host_memory: float = 0.0
    """Bytes of host memory for one rank's offloaded activations; 0 when unlimited."""
    disk_memory: float = 0.0
    """Bytes on a local disk for what host memory does not hold."""
    copy_bandwidth: float = 0.0
    """Bytes per second between device and host, per rank, all ranks of a node copying at once; 0 for no offload."""
    tile_seconds: float = 0.0
    """Of the host per layer and pass, for each tile of each document beyond what its tokens cost: ``n`` tiles of one that ``n``
    ranks share, one of one that is whole. This and the three below are 0 where they are hidden, or not known."""
    message_seconds: float = 0.0
    """Of the host per layer, for each message of a ring, sent or received."""
    round_seconds: float = 0.0
    """Of the host per layer and pass, for each round of a ring."""
    byte_seconds: float = 0.0
    """For each byte sent or received, taken from computation: on CPUs the same core copies it."""
    is_default: bool = False
    """Whether nobody said which model this is (:func:`default_cost`): errors then do not speak of its layers."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise PlanError(f"cost model has {self.layers} layers: at least 1")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (value >= 0 and np.isfinite(value)):
                raise PlanError(f"cost model: {name} is {value}, must be a number of at least 0")
        if self.quadratic == 0 and self.linear == 0:
            raise PlanError("cost model: quadratic and linear are both 0, so that tokens cost nothing")
        if self.recomputed > self.movable_layers:
            raise PlanError(
                f"cost model: {self.recomputed} layers are computed again, {self.movable_layers} can be: {self.layers} less "
                f"keep_first {self.keep_first} and keep_last {self.keep_last}"
            )

    @classmethod
    def from_shape(
        cls,
        model: str | Path | ModelShape | Any,
        *,
        flops: float,
        bytes_per_element: int = 2,
        gradient_bytes: int = 2,
        copy_bandwidth: float = 0.0,
        device_memory: float = 0.0,
        host_memory: float = 0.0,
        world_size: int = 1,
    ) -> CostModel:
        """From a model's shape and what a device attains.

        ``flops``: operations per second that kernels reach (not the peak of the data sheet); ``gradient_bytes``: bytes
        of one travelling element of dK and dV; ``world_size``: ranks over which optimizer state is divided (ZeRO-1).
        """
        if not (flops > 0 and np.isfinite(flops)):
            raise PlanError(f"flops is {flops}: give the operations per second that one rank attains, such as 400e12")
        shape = model_shape(model)
        width = shape.heads * shape.head_dim
        kv = 2 * shape.kv_heads * shape.head_dim
        # Saved by a layer: two norm inputs, q, k, v, attention output, the residual, and three MLP activations.
        kept = 4 * shape.hidden + 2 * width + kv + shape.active_experts * shape.mlp_matrices * shape.intermediate
        return cls(
            layers=shape.layers,
            quadratic=2.0 * width / flops,
            linear=2.0 * shape.layer_weights / flops,
            head=2.0 * shape.hidden * shape.vocabulary / flops,
            ring_bytes=float(kv * bytes_per_element),
            ring_bytes_backward=float(kv * (bytes_per_element + gradient_bytes)),
            window=shape.window,
            window_layers=shape.window_layers,
            activation_bytes=float(kept * bytes_per_element),
            recompute_bytes=recompute_bytes(shape, bytes_per_element),
            state_bytes=shape.parameters * (bytes_per_element + 4 + 12.0 / world_size),
            device_memory=device_memory,
            host_memory=host_memory,
            copy_bandwidth=copy_bandwidth,
        )

    @property
    def outside_memory(self) -> float:
        """Bytes of all tiers outside the device; 0 when unlimited."""
        return self.host_memory + self.disk_memory if self.host_memory else 0.0

    @property
    def movable_layers(self) -> int:
        """Layers whose activations may leave the device or be computed again: the l - 2 of Eq. 3."""
        return max(self.layers - self.keep_first - self.keep_last, 0)

    @property
    def movable_bytes(self) -> float:
        """Bytes of a token that may leave the device: what the movable layers save."""
        plain = (self.movable_layers - self.recomputed) * self.activation_bytes
        return plain + self.recomputed * (self.recompute_bytes or self.activation_bytes)

    def recomputing(self, layers: int) -> CostModel:
        """The same model when ``layers`` of its layers run again in backward: more to compute, fewer bytes.

        Attention's out and lse are kept, so that neither its tiles nor its messages come again.
        """
        return replace(self, recomputed=layers)

    def attention_seconds(self, lengths: Sequence[int] | IntArray) -> FloatArray:
        """Forward attention of whole sequences, all layers, in seconds."""
        s = np.asarray(lengths, dtype=np.float64)
        full = s * s * self.quadratic * (self.layers - self.window_layers)
        if not self.window_layers:
            return full
        w = np.minimum(s, float(self.window))
        return full + (2.0 * s * w - w * w) * self.quadratic * self.window_layers

    def quantise(self, lengths: Sequence[int] | IntArray, topology: Topology) -> Costs:
        """The terms of every sequence, in ticks."""
        s = np.asarray(lengths, dtype=np.float64)
        attention = self.attention_seconds(lengths)
        once = self.layers * self.linear + self.head
        linear = s * once * (1.0 + self.backward_linear)
        forward, constant = 1.0 / (1.0 + self.backward_linear), self.layers * self.constant
        if self.recomputed:
            linear = linear + s * (self.recomputed * self.linear)
            forward = once / (once * (1.0 + self.backward_linear) + self.recomputed * self.linear) if once else forward
            constant += self.recomputed * self.constant / 3.0  # of both passes a third is forward
        sizes = (self.ring_bytes, self.ring_bytes_backward)
        rings = [
            s * (self.layers * size / link.bandwidth) for link in (topology.intra, topology.inter) for size in sizes
        ]
        latency = [round(self.layers * link.latency / TICK) for link in (topology.intra, topology.inter)]
        costs = Costs(
            lengths=np.asarray(lengths, dtype=np.int64),
            linear=_ticks(linear),
            attention=np.stack([_ticks(attention), _ticks(attention * self.backward_quadratic)]),
            ring=np.stack([_ticks(r) for r in rings]).reshape(2, 2, -1),
            latency=(latency[0], latency[1]),
            constant=round(constant / TICK),
            forward=forward,
            copy=self.movable_bytes / self.copy_bandwidth / TICK if self.copy_bandwidth else 0.0,
            tile=self._host_ticks(self.tile_seconds),
            message=self._host_ticks(self.message_seconds),
            round=self._host_ticks(self.round_seconds),
            handling=np.stack([_ticks(s * (2.0 * self.layers * size * self.byte_seconds)) for size in sizes]),
        )
        if float(costs.work.astype(np.float64).sum()) > 2.0**62:
            raise PlanError("the batch costs more than 2^62 ticks of 2^-32 s: check the cost model's units (seconds)")
        return costs

    def _host_ticks(self, seconds: float) -> int:
        return round(self.layers * seconds / TICK)


def recompute_bytes(shape: ModelShape, bytes_per_element: int) -> float:
    """Bytes per token that a layer keeps when it runs again in backward: its input, what attention gave, lse in fp32.

    Attention of a shared sequence also keeps the keys and values that it received last, from which its backward sets out.
    """
    kv = 2 * shape.kv_heads * shape.head_dim
    return float((shape.hidden + shape.heads * shape.head_dim + kv) * bytes_per_element + 4 * shape.heads)


def _ticks(seconds: FloatArray) -> IntArray:
    if seconds.size and float(seconds.max()) / TICK > 2.0**61:
        raise PlanError(f"a sequence takes {float(seconds.max()):.3g} s: check the cost model's units (seconds)")
    ticks = seconds * (1.0 / TICK)  # exact: a power of two
    return np.rint(ticks, out=ticks).astype(np.int64)


def ring_phase(attention: Any, ring: Any, latency: Any, size: Any) -> Any:
    """Ticks of one pass of ring attention on a group: ``size`` tiles, each but the last hiding the next hop.

    ``attention``: ticks of the whole sequence on one rank; ``ring``: ticks that all of it takes over one link. Integers
    or int64 arrays.
    """
    tile_sum = -(-attention // size)
    hops = (size - 1) * latency + -(-((size - 1) * ring) // size) + attention // (size * size)
    return np.maximum(tile_sum, hops)


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """Per sequence the terms of its cost, in ticks."""

    lengths: IntArray
    """Tokens."""
    linear: IntArray
    """Everything but attention, forward and backward."""
    attention: IntArray
    """[2, sequences]: forward, backward."""
    ring: IntArray
    """[2, 2, sequences]: within a node, across nodes; forward, backward: the whole sequence over one link."""
    latency: tuple[int, int]
    """One hop in all layers: within a node, across nodes."""
    constant: int
    """One micro-batch."""
    forward: float
    """Share of the forward pass in ``linear``."""
    copy: float
    """One token's activations of all layers but those that stay, one way between device and host; 0: free."""
    tile: int
    """The host's, of one tile in one pass."""
    message: int
    round: int
    handling: IntArray
    """[2, sequences]: the host's, forward and backward, of sending and receiving all bytes that a ring passes on."""

    @property
    def work(self) -> IntArray:
        """Ticks of each sequence on one rank."""
        return self.linear + self.attention[0] + self.attention[1] + 2 * self.tile

    @property
    def has_host(self) -> bool:
        """Whether sharing takes the host anything."""
        return bool(self.tile or self.message or self.round or self.handling.any())

    def without_host(self) -> Costs:
        """The same terms where sharing takes the host nothing."""
        return replace(self, tile=0, message=0, round=0, handling=0 * self.handling)

    def host(self, phase: int, documents: Any, handling: Any, size: Any) -> Any:
        """Ticks that one pass of a ring of ``size`` (above 1) takes each member's host: tiles of its ``documents``, rounds and
        messages once for all of them (:mod:`hdp.balance.host`), and ``handling``, the sum of theirs."""
        messages = 2 * ((size - 1) + phase * (size - 2))
        bytes_ = -(-((size - 1) * handling) // size)
        return documents * size * self.tile + size * self.round + messages * self.message + bytes_

    def share(self, index: Any, size: Any, across: Any) -> Any:
        """Ticks of one member's share of sequences ``index`` on groups of ``size``; ``across``: spans nodes (0 or 1)."""
        size = np.asarray(size, dtype=np.int64)
        across = np.asarray(across, dtype=np.int64)
        latency = np.where(across == 1, self.latency[1], self.latency[0])
        total = -(-self.linear[index] // size)
        for phase in (0, 1):
            ring = np.where(across == 1, self.ring[1, phase][index], self.ring[0, phase][index])
            alone = self.attention[phase][index]
            shared = ring_phase(alone, ring, latency, size) + self.host(phase, 1, self.handling[phase][index], size)
            total = total + np.where(size > 1, shared, alone + self.tile)
        return total


DEFAULT_SHAPE = ModelShape(
    name="default",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=11008,
    vocabulary=32000,
)
DEFAULT_FLOPS = 400e12


def default_cost() -> CostModel:
    """A 7B model with 8 key/value heads on a device that attains 400 TFLOP/s: what plans assume unless told better."""
    return replace(CostModel.from_shape(DEFAULT_SHAPE, flops=DEFAULT_FLOPS), is_default=True)
