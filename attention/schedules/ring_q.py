"""Ring with travelling queries in backward: Q, DO and DQ go round instead of K, V, DK and DV (BurstAttention).

Per step a member sends 3 units of its queries' size instead of 4/g (g query heads per key/value head): a quarter fewer
bytes for multi-head attention, more for grouped queries. K/V stay with their owner, whose DKV grows in place; a sum of
DQ follows its queries one step behind and goes home from the last member that they visit: size - 1 sends.

Backward only needs what every forward leaves (Q, KV and DO at their owners), so it follows any forward. The forward of
this name is that of ``ring``.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step
from hdp.attention.schedules import ring
from hdp.attention.schedules.query_tour import QueryTour


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    return RankProgram(steps=ring.forward(layout, mask, heads, member).steps)


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    tour = QueryTour(layout, mask, heads, member)
    steps = []
    for step in range(tour.steps):
        sends, receives = tour.travel(step, (Kind.Q, Kind.DO))
        sums_out, sums_in = tour.along(step, Kind.DQ)
        steps.append(Step(sends=sends + sums_out, receives=receives + sums_in, tiles=tour.visit(step)))
    return RankProgram(steps=tuple(steps))
