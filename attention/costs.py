"""Bytes, tiles, steps and buffers of every schedule in closed form, without making a program.

For the masks and layouts that go together: causal with zigzag, bidirectional with contiguous. Exact when the group divides
the length (zigzag: twice the group; a double ring: its parts as well); otherwise a few tokens off. Sliding windows have no
closed form worth the name: count their programs (``hdp.attention.counts``), which is what tests hold these formulas equal to.

[Note: weights] Of a block of ``s`` tokens either all counts or, with a causal mask, one half. Member ``m`` of ``n`` looks at
the front half of a lower member's block and at both halves of a higher one's, so it reads n - 1 - m/2 blocks of others, and
its own is read (n - 1 + m)/2 times. A ring passes on whole blocks, except that nobody looks at the back half of member 0's.
Queries on tour lose their front half when they have passed member 0.
"""

from __future__ import annotations

from hdp.attention.costs_nested import double_ring_cost, hybrid_cost, ulysses_cost, ulysses_home_cost
from hdp.attention.costs_ring import ring_cost
from hdp.attention.costs_shape import Cost, Shape, inside, peak
from hdp.attention.counts import Sizes
from hdp.attention.program import HeadCount, Kind
from hdp.attention.schedules import get_schedule
from hdp.attention.schedules.sight import split

__all__ = ["Cost", "cost"]


def cost(
    name: str, *, backward: bool, length: int, size: int, member: int, heads: HeadCount, sizes: Sizes, causal: bool
) -> Cost:
    """What one member sends, computes and holds in one direction. ValueError for an unknown schedule."""
    get_schedule(name)
    shape = Shape(length=length, size=size, member=member, heads=heads, sizes=sizes, causal=causal)
    base, _, number = name.partition(":")
    if (base == "local" and size > 1) or (base in ("hybrid", "double_ring") and size % int(number)):
        raise ValueError(f"schedule {name!r} does not serve a group of {size} ranks")
    if size == 1:
        return Cost(sent_bytes=0, area=shape.area, steps=1, peak_bytes=0, kept_bytes=0)
    if base == "ring" or (base == "ring_q" and not backward):
        return ring_cost(shape, backward, keeps=base == "ring")
    if base in ("ring_q", "token_ring"):
        return _tour(shape, backward, straight=base == "token_ring")
    if base == "direct":
        return _direct(shape, backward)
    if base == "all_gather":
        return _all_gather(shape, backward, int(number or 1))
    if base in ("ulysses", "ulysses_home"):
        return (ulysses_cost if base == "ulysses" else ulysses_home_cost)(shape, backward, int(number or 1))
    nested = {"hybrid": hybrid_cost, "double_ring": double_ring_cost}[base]
    return nested(shape, backward, int(number))


def _tour(shape: Shape, backward: bool, straight: bool) -> Cost:
    """``token_ring``, and the backward of ``ring_q``: the same bytes, results on other ways."""
    n, m = shape.size, shape.member
    inputs = shape.bytes(Kind.Q) + (shape.bytes(Kind.DO) if backward else 0)
    result = shape.bytes(Kind.DQ if backward else Kind.OUT)

    def visit(t: int) -> float:  # the block of m + t, which has lost its front half if it has passed member 0
        return shape.half_if(m + t >= n)

    def home(t: int) -> float:  # own results that arrive at step t
        if straight:
            return inside(lambda hop: shape.half_if(hop > m), t - 1, 1, n - 1)
        if not shape.causal:
            return float(t == n)
        return 0.5 * (t == n) + 0.5 * (t == m + 1 and m > 0)

    def live(t: int) -> float:
        made, left = inside(visit, t, 1, n - 1), inside(visit, t - 1, 1, n - 1)
        passing = 0.0 if straight else inside(visit, t, 2, n - 1)
        return inputs * (made + inside(visit, t + 1, 1, n - 1)) + result * (made + left + passing + home(t))

    travels = (n - 1) / 2 + (n - m) / 2 * (m > 0) if shape.causal else n - 1
    return Cost(
        sent_bytes=travels * inputs + shape.reads * result,
        area=shape.area,
        steps=n + 1,
        peak_bytes=peak(live(t) for t in range(n + 1)),
        kept_bytes=0,
    )


def _direct(shape: Shape, backward: bool) -> Cost:
    n, m = shape.size, shape.member
    block, sums = shape.bytes(Kind.KV), shape.bytes(Kind.DKV) if backward else 0

    def source(t: int) -> float:  # of the block of m - t
        return shape.half_if(t <= m)

    def reader(t: int) -> float:  # of this member's block, at member m + t
        return shape.half_if(m + t < n)

    def live(t: int) -> float:
        made, left, home = inside(source, t, 1, n - 1), inside(source, t - 1, 1, n - 1), inside(reader, t - 1, 1, n - 1)
        return block * (made + inside(source, t + 1, 1, n - 1)) + sums * (made + left + home)

    return Cost(
        sent_bytes=shape.read * block + shape.reads * sums,
        area=shape.area,
        steps=n + backward,
        peak_bytes=peak(live(t) for t in range(n + backward)),
        kept_bytes=0,
    )


def _all_gather(shape: Shape, backward: bool, slices: int) -> Cost:
    cuts = split(0, shape.heads.key, min(slices, shape.heads.key))
    count = len(cuts)
    block, sums = shape.bytes(Kind.KV, 1), shape.bytes(Kind.DKV, 1) if backward else 0  # of one head

    def share(i: int) -> float:
        return inside(lambda j: cuts[j][1] - cuts[j][0], i, 0, count - 1)

    def live(i: int) -> float:
        held, left = share(i - 1), share(i - 2)
        return shape.reads * (block * (share(i) + held) + sums * (held + left)) + shape.read * sums * left

    return Cost(
        sent_bytes=shape.heads.key * (shape.read * block + shape.reads * sums),
        area=shape.area,
        steps=count + 1 + backward,
        peak_bytes=peak(live(i) for i in range(count + 1 + backward)),
        kept_bytes=0,
    )
