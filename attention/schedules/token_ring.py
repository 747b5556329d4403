"""TokenRing: K/V stay, queries go one way, partial results return straight to their owner the other way (2412.20501).

Forward: at step ``t`` member ``m`` computes with the queries of ``m + t`` and passes them on to ``m - 1`` on lane 0; what it
computed at step ``t - 1`` returns to its owner ``m + t - 1`` on lane 1, so both directions of a link carry data. A chunk
that no later member's keys interest stops (zigzag: the front half, when the ring wraps round).

Backward, which its authors did not publish: Q and DO travel, the partial DQ returns straight on lane 1, DKV grows in place.

The last partials return in a step of their own without computation: size + 1 steps, fewer under a window.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step
from hdp.attention.schedules.query_tour import QueryTour


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    return _program(QueryTour(layout, mask, heads, member), (Kind.Q,), Kind.OUT)


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    return _program(QueryTour(layout, mask, heads, member), (Kind.Q, Kind.DO), Kind.DQ)


def _program(tour: QueryTour, inputs: tuple[Kind, ...], result: Kind) -> RankProgram:
    steps = []
    for step in range(tour.steps):
        sends, receives = tour.travel(step, inputs)
        results_out, results_in = tour.straight_home(step, result)
        steps.append(Step(sends=sends + results_out, receives=receives + results_in, tiles=tour.visit(step)))
    return RankProgram(steps=tuple(steps))
