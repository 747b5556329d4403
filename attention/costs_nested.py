"""Closed forms of the schedules that deal out heads or nest rings. See [Note: weights] in ``hdp.attention.costs``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from hdp.attention.costs_ring import RingForm
from hdp.attention.costs_shape import Cost, Shape, inside, peak
from hdp.attention.program import HeadCount, Heads, Kind
from hdp.attention.schedules.sight import split, whole_groups


@dataclass(frozen=True)
class _Deal:
    """Query heads dealt to ``parts`` members, each share in ``slices`` slices."""

    heads: HeadCount
    parts: int
    slices: int = 1

    def queries(self, part: int, slice_: int) -> Heads:
        if not 0 <= slice_ < self.slices:
            return 0, 0
        return split(*self._share(part), self.slices)[slice_]

    def _share(self, part: int) -> Heads:
        return self.heads.query * part // self.parts, self.heads.query * (part + 1) // self.parts

    def query_count(self, part: int, slice_: int) -> int:
        start, stop = self.queries(part, slice_)
        return stop - start

    def key_count(self, part: int, first: int = 0, last: int | None = None) -> int:
        """Key/value heads that slices ``first`` .. ``last`` read together."""
        last = self.slices - 1 if last is None else min(last, self.slices - 1)
        ranges = [self.queries(part, i) for i in range(max(first, 0), last + 1)]
        used = [r for r in ranges if r[0] < r[1]]
        if not used:
            return 0
        start, stop = self.heads.keys_for((used[0][0], used[-1][1]))
        return stop - start

    def returned(self, part: int, slice_: int) -> tuple[int, int]:
        """(complete, partial) key/value heads whose gradients are ready after a slice."""
        queries, (begin, end), group = self.queries(part, slice_), self._share(part), self.heads.group
        complete = partial = 0
        for piece in whole_groups(queries, group) if queries[0] < queries[1] else ():
            start, stop = self.heads.keys_for(piece)
            if stop * group > queries[1] and end > queries[1]:
                continue  # the next slice adds to it
            if begin <= start * group and stop * group <= end:
                complete += stop - start
            else:
                partial += stop - start
        return complete, partial

    def gradient_bytes(self, shape: Shape, part: int, slice_: int) -> float:
        """DKV of a block as it returns from ``part``."""
        complete, partial = self.returned(part, slice_)
        return shape.bytes(Kind.DKV, complete, final=True) + shape.bytes(Kind.DKV, partial)


def ulysses_cost(shape: Shape, backward: bool, slices: int) -> Cost:
    n, m, heads = shape.size, shape.member, shape.heads
    deal = _Deal(heads, n, min(slices, -(-heads.query // n)))
    others, turns = [p for p in range(n) if p != m], range(deal.slices)
    mine = sum(deal.query_count(m, i) for i in turns)
    kept = n * (shape.bytes(Kind.Q, mine) + shape.bytes(Kind.KV, deal.key_count(m)))
    if backward:
        sent = shape.bytes(Kind.DO, heads.query - mine) + (n - 1) * shape.bytes(Kind.DQ, mine, final=True)
        sent += (n - 1) * sum(deal.gradient_bytes(shape, m, i) for i in turns)
    else:
        keys = sum(deal.key_count(p) for p in others)
        sent = shape.bytes(Kind.Q, heads.query - mine) + shape.bytes(Kind.KV, keys)
        sent += (n - 1) * shape.bytes(Kind.OUT, mine, final=True)
    live = (_ulysses_live(shape, deal, t, backward) for t in range(deal.slices + 2))
    area = shape.pairs * n * mine
    return Cost(sent_bytes=sent, area=area, steps=deal.slices + 2, peak_bytes=peak(live), kept_bytes=kept)


def _ulysses_live(shape: Shape, deal: _Deal, t: int, backward: bool) -> float:
    """At step ``t`` slice t arrives, t - 1 is computed, t - 2 returns."""
    n, m = shape.size, shape.member
    others = [p for p in range(n) if p != m]
    computed, returning = deal.query_count(m, t - 1), deal.query_count(m, t - 2)
    coming = sum(deal.query_count(p, t - 2) for p in others)
    if not backward:
        mine = (n - 1) * shape.bytes(Kind.OUT, computed + returning)
        return mine + shape.bytes(Kind.OUT, coming, final=True)
    waiting = sum(deal.query_count(m, i) for i in range(max(t - 1, 0), deal.slices))
    total = shape.bytes(Kind.Q, waiting) + shape.bytes(Kind.KV, deal.key_count(m, t - 1))
    total += shape.bytes(Kind.DO, deal.query_count(m, t) + computed)
    total += shape.bytes(Kind.DQ, computed + returning) + shape.bytes(Kind.DKV, deal.key_count(m, t - 2, t - 1))
    arriving = shape.bytes(Kind.DQ, coming, final=True)
    return (n - 1) * total + arriving + sum(deal.gradient_bytes(shape, p, t - 2) for p in others)


def ulysses_home_cost(shape: Shape, backward: bool, slices: int) -> Cost:
    """What ``ulysses_home`` costs: half of member 0's tokens meet nobody else's if the mask is causal; sums return partial."""
    n, m, heads = shape.size, shape.member, shape.heads
    deal = _Deal(heads, n, min(slices, -(-heads.query // n)))
    others, turns = [p for p in range(n) if p != m], range(deal.slices)
    own = shape.half_if(m == 0)
    theirs = sum(shape.half_if(p == 0) for p in others)
    mine = sum(deal.query_count(m, i) for i in turns)
    kept = (own + theirs) * (shape.bytes(Kind.Q, mine) + shape.bytes(Kind.KV, deal.key_count(m)))
    if backward:
        sums = sum(sum(deal.returned(m, i)) for i in turns)
        sent = own * shape.bytes(Kind.DO, heads.query - mine)
        sent += theirs * (shape.bytes(Kind.DQ, mine) + shape.bytes(Kind.DKV, sums))
    else:
        keys = sum(deal.key_count(p) for p in others)
        sent = own * (shape.bytes(Kind.Q, heads.query - mine) + shape.bytes(Kind.KV, keys))
        sent += theirs * shape.bytes(Kind.OUT, mine)
    home = shape.home_pairs
    return Cost(
        sent_bytes=sent,
        area=home * heads.query + (shape.pairs - home) * n * mine,
        steps=deal.slices + 2,
        peak_bytes=peak(_ulysses_home_live(shape, deal, t, backward) for t in range(deal.slices + 2)),
        kept_bytes=kept,
    )


def _ulysses_home_live(shape: Shape, deal: _Deal, t: int, backward: bool) -> float:
    """At step ``t`` slice t arrives, t - 1 is computed, t - 2 returns."""
    n, m = shape.size, shape.member
    others = [p for p in range(n) if p != m]
    own, theirs = shape.half_if(m == 0), sum(shape.half_if(p == 0) for p in others)
    computed, returning = deal.query_count(m, t - 1), deal.query_count(m, t - 2)
    coming = sum(deal.query_count(p, t - 2) for p in others)
    if not backward:
        return theirs * shape.bytes(Kind.OUT, computed + returning) + own * shape.bytes(Kind.OUT, coming)
    waiting = sum(deal.query_count(m, i) for i in range(max(t - 1, 0), deal.slices))
    total = shape.bytes(Kind.Q, waiting) + shape.bytes(Kind.KV, deal.key_count(m, t - 1))
    total += shape.bytes(Kind.DO, deal.query_count(m, t) + computed)
    total += shape.bytes(Kind.DQ, computed + returning) + shape.bytes(Kind.DKV, deal.key_count(m, t - 2, t - 1))
    sums = sum(sum(deal.returned(p, t - 2)) for p in others)
    return theirs * total + own * (shape.bytes(Kind.DQ, coming) + shape.bytes(Kind.DKV, sums))


def hybrid_cost(shape: Shape, backward: bool, degree: int) -> Cost:
    node, place = divmod(shape.member, degree)
    deal, others = _Deal(shape.heads, degree), degree - 1
    queries, keys = deal.query_count(place, 0), deal.key_count(place)
    ring = RingForm(
        places=shape.size // degree,
        place=node,
        causal=shape.causal,
        block=degree * shape.bytes(Kind.KV, keys),
        sums=degree * shape.bytes(Kind.DKV, keys),
    )
    peers = [p for p in range(degree) if p != place]
    inputs = degree * (shape.bytes(Kind.Q, queries) + shape.bytes(Kind.KV, keys)) if others else 0
    rest = shape.heads.query - queries
    if backward:
        sent = shape.bytes(Kind.DO, rest) + others * shape.bytes(Kind.DQ, queries, final=True)
        sent += others * deal.gradient_bytes(shape, place, 0) + ring.backward_bytes
        live = _hybrid_live_backward(shape, deal, ring, place, peers)
    else:
        sent = shape.bytes(Kind.Q, rest) + shape.bytes(Kind.KV, sum(deal.key_count(p) for p in peers))
        sent += others * shape.bytes(Kind.OUT, queries, final=True) + ring.forward_bytes
        outs = others * shape.bytes(Kind.OUT, queries)
        live = [outs + ring.forward_live(hop, keeps=True) for hop in range(ring.places)]
        live.append(outs + shape.bytes(Kind.OUT, rest if others else 0, final=True))
    return Cost(
        sent_bytes=sent,
        area=shape.pairs * degree * queries,
        steps=ring.places + (2 if degree > 1 else 0),
        peak_bytes=peak(live),
        kept_bytes=inputs + ring.kept_bytes,
    )


def _hybrid_live_backward(shape: Shape, deal: _Deal, ring: RingForm, place: int, peers: list[int]) -> list[float]:
    queries, keys, others = deal.query_count(place, 0), deal.key_count(place), len(peers)
    found = others * (shape.bytes(Kind.Q, queries) + shape.bytes(Kind.KV, keys) + shape.bytes(Kind.DO, queries))
    dq, dkv = others * shape.bytes(Kind.DQ, queries), others * shape.bytes(Kind.DKV, keys)
    live = [found + ring.kept_bytes] if others else []
    for hop in range(ring.places):
        # A higher node's keys are seen by back halves only, so the front half of DQ begins with the first lower one's.
        begun = 0.5 if ring.causal and hop > ring.place else 1.0
        live.append(found + ring.backward_live(hop) + begun * dq + (dkv if hop == 0 else 0))
    if others:
        arriving = shape.bytes(Kind.DQ, shape.heads.query - queries, final=True)
        live.append(dq + dkv + arriving + sum(deal.gradient_bytes(shape, p, 0) for p in peers))
    return live


@dataclass(frozen=True)
class _Rings:
    """The double ring as the member at (node, place) sees it; weights of blocks at (round, turn)."""

    shape: Shape
    inner: int

    @property
    def nodes(self) -> int:
        return self.shape.size // self.inner

    @property
    def node(self) -> int:
        return self.shape.member // self.inner

    @property
    def place(self) -> int:
        return self.shape.member % self.inner

    def held(self, round_: int, turn: int) -> float:
        """Which part travels of what came round the inner ring (turn > 0)."""
        if round_ == 0:
            return self.shape.half_if((self.place - turn) % self.inner == 0)
        return self.shape.half_if(round_ <= self.node)

    def seen(self, round_: int, turn: int) -> float:
        """Which part of the block at hand this member looks at."""
        return self.shape.half_if(turn <= self.place if round_ == 0 else round_ <= self.node)

    def passing(self, round_: int, turn: int) -> float:
        """Which part of the block at hand has sums that arrive from the member before."""
        if round_ > 0:
            return self.seen(round_, turn) if turn > 0 else 0.0
        if not self.shape.causal:
            return float(turn > 1)
        return 0.5 * (turn > 1) + 0.5 * (turn > self.place > 0)

    def home_at(self, step: int) -> float:
        """Parts of the own sums that arrive."""
        round_, turn = step // self.inner - 1, step % self.inner
        if round_ == 0 and turn == 0 and self.inner > 1:
            return len(self.parts) * self.shape.half_if(self.place == 0)
        if round_ < 1:
            return 0
        is_halved = self.shape.causal and self.node + round_ < self.nodes
        return self._of_parts(lambda t: t == turn or step == self.shape.size, is_halved)

    def waiting_at(self, step: int) -> int:
        """Parts of the sums of the round before, made at this place last, that have yet to go home or go now."""
        round_, turn = step // self.inner - 1, step % self.inner
        if round_ < 1:
            return 0
        is_halved = self.shape.causal and round_ <= self.node
        return self._of_parts(lambda t: t >= turn, is_halved)

    @cached_property
    def parts(self) -> list[tuple[int, bool]]:
        """Equal parts of a block: (turn at which it crosses between nodes, whether it is of the back half)."""
        halves = 2 if self.shape.causal else 1
        count = halves * (self.inner // gcd(self.inner, halves))
        return [((2 * i + 1) * self.inner // (2 * count), self.shape.causal and 2 * i >= count) for i in range(count)]

    def _of_parts(self, counts: Callable[[int], bool], is_halved: bool) -> int:
        """Parts that cross at turns that count; ``is_halved``: of the front half only."""
        return sum(counts(turn) and not (is_back and is_halved) for turn, is_back in self.parts)

    def start_live(self) -> list[int]:
        """Per step, parts of blocks held that came from the node before."""
        held = [0] * (self.shape.size + 1)
        for round_ in range(1, self.nodes):
            first_owner = (self.node - round_) % self.nodes == 0
            goes_on = round_ < self.nodes - 1
            for turn, is_back in self.parts:
                if is_back and first_owner:
                    continue
                begin, end = (round_ - 1) * self.inner + turn, round_ * self.inner + (turn if goes_on else 0)
                for step in range(begin, end + 1):
                    held[step] += 1
        return held


def double_ring_cost(shape: Shape, backward: bool, inner: int) -> Cost:
    rings = _Rings(shape, inner)
    n, nodes, node, place = shape.size, rings.nodes, rings.node, rings.place
    lower = node if shape.causal else 0  # rounds whose blocks lose their back half
    first = inner - 1 - 0.5 * (shape.causal and inner > 1 and place != inner - 1)
    sent = first + (inner - 1) * (nodes - 1 - lower / 2)
    sent += nodes - 1 - 0.5 * (shape.causal and node != nodes - 1)
    block, sums = shape.bytes(Kind.KV), shape.bytes(Kind.DKV) if backward else 0
    result = inner - 1 - (place / 2 if shape.causal else 0) + inner * (nodes - 1 - lower / 2)
    starts, parts = rings.start_live(), len(rings.parts)

    def at(step: int) -> tuple[int, int]:
        return divmod(step, inner)

    def circling(step: int) -> float:
        return rings.held(*at(step)) if step % inner else 0.0

    def live(step: int) -> float:
        inputs = inside(circling, step, 0, n - 1) + inside(circling, step + 1, 0, n - 1)
        made = inside(lambda s: rings.seen(*at(s)), step, 1, n - 1)
        goes_at_once = step % inner or step == inner  # else it waits for its turn in this round
        left = inside(lambda s: rings.seen(*at(s)), step - 1, 1, n - 1) if goes_at_once else 0.0
        passing = inside(lambda s: rings.passing(*at(s)), step, 0, n - 1)
        inputs = inputs * parts + starts[step]
        results = (made + left + passing) * parts + rings.waiting_at(step) + rings.home_at(step)
        return (block * inputs + sums * results) / parts

    return Cost(
        sent_bytes=block * sent + sums * result,
        area=shape.area,
        steps=n + backward,
        peak_bytes=peak(live(s) for s in range(n + backward)),
        kept_bytes=0,
    )
