"""Predicts what one schedule of one sequence takes: time, bytes and memory, by the programs' own byte and tile counts.

Programs are walked (``hdp.attention.counts``) for all members of small groups, and for some of large ones. A step takes a
little longer than the longer of its computation and its slowest link, so

    seconds = sum over steps of step_seconds + calls x call_seconds + messages x message_seconds
              + later(area / rate + squares + bytes x byte_seconds + results x sum_seconds,
                      latency + bytes on the slowest link / its rate),
    later(a, b) = (a^4 + b^4)^(1/4),

where ``squares`` are calls with as many queries as keys, by their measured times (``Rates.tiles``), ``area`` is the rest, and
``results`` are the bytes that all calls hand over. The slowest member counts, forward and backward apart. ``later`` is a little
more than the longer of the two: neither takes exactly as long as predicted, and the later one counts (figures in
``docs/attention.md``; why this form, in ``docs/log.md``).

Pure and exact: the same arguments give the same answer on every rank.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from hdp.attention.costs import cost
from hdp.attention.counts import Sizes, StepCount, count
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_schedule, lay_out

LINK_KINDS = ("nic", "peer")
WINDOW_BITS = 3
REFERENCE_CHUNK = 64  # tokens a chunk at which programs are counted when no window sets a scale
WALKED = 16  # members whose programs are counted

Static = tuple[str, int, int, HeadCount, Sizes, Mask]  # layout, group, length, ...: what decides a program


@dataclass(frozen=True, kw_only=True)
class Links:
    """How fast members reach each other."""

    kind: str = "nic"
    """``"nic"``: all of a member's traffic shares one full-duplex port (one for its node, one for other nodes).
    ``"peer"``: each pair of members has a link of its own in each direction (PCIe or HCCS mesh)."""
    inner_rate: float
    """Bytes a second, each way, to members of the same node: of the port, or of each pair's link."""
    outer_rate: float
    """The same to members of other nodes."""
    latency: float = 0.0
    """Seconds that every step with transfers takes beyond its bytes."""

    def __post_init__(self) -> None:
        if self.kind not in LINK_KINDS:
            raise ValueError(f"unknown link kind {self.kind!r}: choose one of {', '.join(LINK_KINDS)}")
        if not (self.inner_rate > 0 and self.outer_rate > 0 and self.latency >= 0):
            raise ValueError(f"link rates must be positive and the latency not negative: {self}")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a member computes attention."""

    forward: float
    """Allowed (query, key) pairs times query heads a second."""
    backward: float
    """The same in backward; about forward / 2.5."""
    step_seconds: float = 0.0
    """Fixed cost of each step on the host."""
    byte_seconds: float = 0.0
    """What a byte sent or received takes from computation: on CPUs the same core does both, on GPUs next to nothing."""
    message_seconds: float = 0.0
    """Fixed cost of each tensor sent or received on the host."""
    call_seconds: float = 0.0
    """Fixed cost of each kernel call: how many a step needs depends on where what it reads lies."""
    sum_seconds: float = 0.0
    """Cost of each byte of partial results that kernel calls hand over: it is merged, or added up."""
    tiles: tuple[tuple[int, float, float], ...] = ()
    """(tokens, seconds forward, seconds backward) of one head of a whole causal document beyond a call's fixed cost, ascending.
    Short ones attain less than long ones, and mask part of what they compute. Empty: as other pairs do."""

    def square(self, tokens: float, backward: bool) -> float:
        """Seconds of one head of a causal square of n tokens; between those measured ``a n^2 + b n``."""
        pairs = [(n, each[backward] / (n * n)) for n, *each in self.tiles]
        low, high = pairs[0], pairs[-1]
        for before, after in pairwise(pairs):
            if before[0] <= tokens <= after[0]:
                low, high = before, after
                break
        else:
            return tokens * tokens * (low if tokens < low[0] else high)[1]
        part = (1.0 / low[0] - 1.0 / tokens) / (1.0 / low[0] - 1.0 / high[0])
        return tokens * tokens * (low[1] + part * (high[1] - low[1]))

    def __post_init__(self) -> None:
        costs = (self.step_seconds, self.byte_seconds, self.message_seconds, self.call_seconds, self.sum_seconds)
        if not (self.forward > 0 and self.backward > 0 and min(costs) >= 0):
            raise ValueError(
                f"rates must be positive and costs of steps, bytes, messages and calls not negative: {self}"
            )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One direction of one schedule."""

    name: str
    seconds: float
    """Of the slowest member."""
    sent_bytes: float
    """Of the member that sends most."""
    peak_bytes: float
    """Buffers of the member that holds most, as ``hdp.attention.counts`` counts them: copies are not among them."""
    kept_bytes: float
    """From forward to backward, at the member that keeps most."""
    messages: int
    """Tensors that the member with most of them sends and receives."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that the choice depends on."""

    length: int
    """Tokens of the sequence."""
    size: int
    """Members of the group."""
    heads: HeadCount
    sizes: Sizes
    links: Links
    rates: Rates
    mask: Mask = field(default_factory=Mask)
    layout: str = "zigzag"
    nodes: tuple[int, ...] | None = None
    """Node of each member, in ring order; None: all on one node."""
    kept_limit: float | None = None
    """Bytes a layer may keep from forward to backward beside a member's own shard; None: any."""
    peak_limit: float | None = None
    """Bytes of the arena that may be used, copies included; None: any. What is chosen is lowered to find out."""
    widens: bool = False
    """As ``hdp.attention.lowered.Geometry.widens``: kernels read inputs in the dtype of sums. For ``peak_limit``."""
    allowed: tuple[str, ...] | None = None
    """Schedules to choose among; None: all that serve the group."""
    forward: str | None = None
    """Schedule of forward; None: to be chosen."""
    backward: str | None = None
    """Schedule of backward; None: to be chosen."""

    def __post_init__(self) -> None:
        if self.nodes is not None and len(self.nodes) != self.size:
            raise ValueError(f"nodes of {len(self.nodes)} members for a group of {self.size}")
        if self.size < 1 or self.length < 0:
            raise ValueError(f"cannot choose for {self.length} tokens over {self.size} ranks")
        for name in (*(self.allowed or ()), self.forward, self.backward):
            if name is not None:
                get_schedule(name)


def rounded(length: int, bits: int) -> int:
    """Down to so many significant bits: the same on every machine, unlike a logarithm."""
    shift = max(length.bit_length() - bits, 0)
    return length >> shift << shift


def static_of(case: Case) -> Static:
    """What decides programs, at one of the few lengths at which they are walked: bytes grow with the length, areas with its
    square or, under a window, with it."""
    mask = case.mask
    if mask.window is not None and mask.window >= case.length:
        mask = Mask(causal=mask.causal)
    reference = 2 * case.size * REFERENCE_CHUNK if mask.window is None else rounded(case.length, WINDOW_BITS)
    return case.layout, case.size, reference, case.heads, case.sizes, mask


def predict(name: str, case: Case, *, backward: bool) -> Prediction:
    """Time, bytes and memory of one schedule, wanted or not; what :func:`choose` compares."""
    static = static_of(case)
    reference, mask = static[2], static[5]
    scale = case.length / reference if reference else 1.0
    areas = scale * scale if mask.window is None else scale
    members = members_of(case.size, _is_closed(case.layout, mask))
    profiles = [_profile(name, backward, member, static, case.links.kind, case.nodes) for member in members]
    sent, peak, kept = _largest(name, backward, static) or (
        max(p.sent_bytes for p in profiles),
        max(p.peak_bytes for p in profiles),
        max(p.kept_bytes for p in profiles),
    )
    return Prediction(
        name=name,
        seconds=max(_seconds(p, case, scale, areas, backward) for p in profiles),
        sent_bytes=sent * scale,
        peak_bytes=peak * scale,
        kept_bytes=kept * scale,
        messages=max(p.messages for p in profiles),
    )


def members_of(size: int, is_closed: bool) -> tuple[int, ...]:
    """Those whose programs are walked: all of small groups; of large ones ends and middle and, where no closed form says who
    has most (``is_closed``), others evenly between them."""
    if size <= (WALKED // 2 if is_closed else WALKED):
        return tuple(range(size))
    even = () if is_closed else (i * (size - 1) // (WALKED - 1) for i in range(WALKED))
    return tuple(sorted({0, 1, size // 2 - 1, size // 2, size - 2, size - 1, *even}))


def _is_closed(layout: str, mask: Mask) -> bool:
    """Whether there are closed forms."""
    return mask.window is None and (layout, mask.causal) in (("zigzag", True), ("contiguous", False))


@lru_cache(maxsize=16384)
def _largest(name: str, backward: bool, static: Static) -> tuple[float, float, float] | None:
    """(sent, peak, kept) bytes of the members that have most, where there are closed forms; else None."""
    layout, size, length, heads, sizes, mask = static
    if not _is_closed(layout, mask):
        return None
    costs = [
        cost(
            name,
            backward=backward,
            length=length,
            size=size,
            member=member,
            heads=heads,
            sizes=sizes,
            causal=mask.causal,
        )
        for member in range(size)
    ]
    return max(c.sent_bytes for c in costs), max(c.peak_bytes for c in costs), max(c.kept_bytes for c in costs)


@dataclass(frozen=True, kw_only=True)
class _Profile:
    steps: tuple[tuple[tuple[int, int, int, int, int, int, int, tuple[tuple[int, int], ...]], int], ...]
    """((area, bytes on the slowest inner link, on the slowest outer link, all bytes, messages, calls, bytes of results,
    squares), how many such steps)."""
    sent_bytes: int
    peak_bytes: int
    kept_bytes: int
    messages: int


@lru_cache(maxsize=16384)
def _profile(
    name: str, backward: bool, member: int, static: Static, kind: str, nodes: tuple[int, ...] | None
) -> _Profile:
    layout_name, size, length, heads, sizes, mask = static
    layout, schedule = lay_out(make_layout(layout_name, length, size), mask, name), get_schedule(name)
    program = (schedule.backward if backward else schedule.forward)(layout, mask, heads, member)
    counted = count(program, layout, mask, heads, member, sizes, backward)
    steps = Counter(
        (
            s.area,
            _load(s, kind, nodes, member, is_outer=False),
            _load(s, kind, nodes, member, is_outer=True),
            sum(s.sent.values()) + sum(s.received.values()),
            s.messages,
            s.calls,
            s.results,
            s.squares,
        )
        for s in counted.steps
    )
    return _Profile(
        steps=tuple(steps.items()),
        sent_bytes=counted.sent_bytes,
        peak_bytes=counted.peak_bytes,
        kept_bytes=counted.kept_bytes,
        messages=sum(s.messages for s in counted.steps),
    )


def _load(step: StepCount, kind: str, nodes: tuple[int, ...] | None, member: int, is_outer: bool) -> int:
    """Bytes on the busiest link to members of the same node, or of others, in the busier direction."""
    ways = []
    for by_peer in (step.sent, step.received):
        there = [b for p, b in by_peer.items() if (nodes is not None and nodes[p] != nodes[member]) == is_outer]
        ways.append(sum(there) if kind == "nic" else max(there, default=0))
    return max(ways)


def _seconds(profile: _Profile, case: Case, scale: float, areas: float, backward: bool) -> float:
    links, rates = case.links, case.rates
    rate = rates.backward if backward else rates.forward
    total = 0.0
    for (area, inner, outer, handled, messages, calls, results, squares), times in profile.steps:
        transfer, computing = 0.0, scale * (handled * rates.byte_seconds + results * rates.sum_seconds)
        if rates.tiles:
            for tokens, heads in squares:
                area -= heads * tokens * (tokens + 1) // 2
                computing += heads * rates.square(tokens * scale, backward)
        if inner or outer:
            transfer = links.latency + max(inner * scale / links.inner_rate, outer * scale / links.outer_rate)
        total += times * (
            rates.step_seconds
            + messages * rates.message_seconds
            + calls * rates.call_seconds
            + _later(computing + area * areas / rate, transfer)
        )
    return total


def _later(a: float, b: float) -> float:
    """The fourth root of the sum of fourth powers, by roundings that are the same on every machine."""
    longer = max(a, b)
    share = min(a, b) / longer if longer else 0.0
    return longer * math.sqrt(math.sqrt(1.0 + (share * share) * (share * share)))
