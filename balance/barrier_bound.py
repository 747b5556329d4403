"""The sharper bound of regime ``slot``: what no sequence of barriers can beat. Needs scipy (extra ``flexsp``).

A slot of duration M has world x M ticks and world x capacity tokens, and may hold only sequences whose best share takes at
most M. The bound is a linear programme over how many slots there are of each duration and which part of each sequence
runs in them; two rules make it sharp: a sequence runs in a slot at most once (so a giant needs a whole slot as long as
itself, whatever it leaves idle), and a sequence shared over more ranks works longer in total where its ring shows.
The programme counts slots and adds up their durations by intervals of duration, each slot with the constant of a
micro-batch; within an interval a slot may hold what its upper end allows, so that the bound holds for any grid. The grid
is refined where the solution uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp.balance.bounds import fewest_ranks, host_ticks, shortest_share, step_bound, ticks_spent
from hdp.balance.memory import capacity_with
from hdp.balance.plan import IntArray, PlanError
from hdp.balance.planners.problem import Problem

SINGLE = 32
"""Longest sequences that have variables of their own."""
CLASS_RATIO = 1.1
"""Lengths within one class of the others differ by at most this factor."""
GRID = 24
"""Durations per round."""
ROUNDS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Classes:
    """Sequences grouped by length."""

    first: IntArray
    """The shortest sequence of each class: its numbers stand for all, so that the bound holds."""
    count: IntArray
    tokens: IntArray
    """Of one sequence."""


def slot_bound(problem: Problem) -> int:
    """Lower bound in ticks for regime ``slot``; at least :func:`step_bound`."""
    base = step_bound(problem)
    order = problem.descending
    if not len(order):
        return 0
    classes = _classes(problem, order)
    shortest = shortest_share(problem, classes.first)
    low, high = float(max(1, shortest.min())), float(2 * max(base, int(shortest.max())))
    every = max(1, len(shortest) // GRID)
    grid = np.unique(np.concatenate([np.geomspace(low, high, GRID), shortest[::every].astype(np.float64)]))
    best = 0.0
    for _ in range(ROUNDS):
        value, used = _solve(problem, classes, shortest, grid)
        best = max(best, value)
        grid = _refined(grid, used)
    return max(base, int(best * (1 - 1e-6)))


def _classes(problem: Problem, order: IntArray) -> _Classes:
    lengths = problem.lengths[order]
    starts, at = [], 0
    while at < len(order):
        starts.append(at)
        if at < SINGLE:
            at += 1
        else:
            at = int(np.searchsorted(-lengths, -lengths[at] / CLASS_RATIO, side="right"))
    ends = np.array([*starts[1:], len(order)])
    first = order[ends - 1]
    return _Classes(first=first, count=ends - np.array(starts), tokens=problem.lengths[first])


def _refined(grid: NDArray[np.float64], used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Three points more in each interval in use; interval g ends at grid[g]."""
    more = [grid]
    for g in np.flatnonzero(used).tolist():
        if 0 < g < len(grid):
            more.append(np.geomspace(grid[g - 1], grid[g], 5))
    return np.unique(np.concatenate(more))


class _Rows:
    """Rows of an inequality system A x <= b, gathered one block at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[Any] = []
        self.columns: list[Any] = []
        self.values: list[Any] = []
        self.limits: list[float] = []

    def add(self, columns: Any, values: Any, limit: float = 0.0) -> None:
        """One row."""
        self.rows.append(np.full(len(columns), self.count))
        self.columns.append(np.asarray(columns))
        self.values.append(np.asarray(values, dtype=np.float64))
        self.limits.append(limit)
        self.count += 1

    def at_most_once(self, variables: IntArray, slots: int, counts: IntArray) -> None:
        """Per class one row: of ``counts`` sequences each runs at most once a slot."""
        each = self.count + np.arange(len(variables))
        self.rows += [each, each]
        self.columns += [variables, np.full(len(variables), slots)]
        self.values += [np.ones(len(variables)), -counts.astype(np.float64)]
        self.limits += [0.0] * len(variables)
        self.count += len(variables)


def _solve(
    problem: Problem, classes: _Classes, shortest: IntArray, grid: NDArray[np.float64]
) -> tuple[float, NDArray[np.bool_]]:
    """Value of the programme, and in which intervals of duration it has slots.

    Variables: per interval how many slots lie in it, then their durations added up; then per interval and class how many
    sequences run there.
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_matrix
    except ImportError as error:
        raise PlanError("the bound of regime slot needs scipy: pip install 'hdp[flexsp]'") from error
    room = float(problem.world_size * capacity_with(problem.capacity, problem.cost, problem.offload))
    scale = float(grid[-1])
    lower = np.concatenate([[0.0], grid]) / scale
    upper = np.concatenate([grid, [1e3 * grid[-1]]]) / scale
    slots, column = len(lower), 2 * len(lower)
    system = _Rows()
    covers: list[tuple[IntArray, IntArray]] = []
    for g in range(slots):
        system.add([g, slots + g], [lower[g], -1.0])
        system.add([g, slots + g], [-upper[g], 1.0])
        may = np.flatnonzero(shortest <= upper[g] * scale)
        variables = column + np.arange(len(may))
        column += len(may)
        work = _work_within(problem, classes.first[may], upper[g] * scale) / (problem.world_size * scale)
        system.add([*variables, g], [*(classes.tokens[may] / room), -1.0])
        system.add([*variables, slots + g], [*work, -1.0])
        system.at_most_once(variables, g, classes.count[may])
        covers.append((may, variables))
    # All work and all tokens, exactly: classes round them down.
    total_work = float(problem.costs.work.sum()) / problem.world_size / scale
    system.add(slots + np.arange(slots), -np.ones(slots), -total_work)
    system.add(np.arange(slots), -np.ones(slots), -float(np.ceil(problem.lengths.sum() / room)))
    rows, columns = (np.concatenate(part) for part in zip(*covers, strict=True))
    result = linprog(
        np.concatenate([np.full(slots, problem.costs.constant / scale), np.ones(slots), np.zeros(column - 2 * slots)]),
        A_ub=coo_matrix(
            (np.concatenate(system.values), (np.concatenate(system.rows), np.concatenate(system.columns))),
            (system.count, column),
        ),
        b_ub=np.array(system.limits),
        A_eq=coo_matrix((np.ones(len(rows)), (rows, columns)), (len(classes.first), column)),
        b_eq=classes.count.astype(np.float64),
        method="highs",
    )
    if result.status != 0:
        raise PlanError(f"the bound of regime slot was not found: {result.message}")
    return float(result.fun) * scale, np.asarray(result.x[:slots] > 1e-9)


def _work_within(problem: Problem, sequences: IntArray, ticks: float) -> NDArray[np.float64]:
    """Total ticks of each sequence on the fewest ranks that keep its share within ``ticks``."""
    work = problem.costs.work[sequences].astype(np.float64)
    long = np.flatnonzero(work > ticks)
    if len(long):
        sizes, across = fewest_ranks(problem, sequences[long], int(ticks))
        spent = ticks_spent(problem, sequences[long], sizes, across)
        host = host_ticks(problem, sequences[long], sizes)
        work[long] = np.maximum(work[long], (spent - 4 * sizes).astype(np.float64)) + host  # 4: rounding of shares
    return work
