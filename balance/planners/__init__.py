"""Planners, each by name behind one function: lengths, topology and cost model in; a plan out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from hdp.balance.cost import CostModel, default_cost
from hdp.balance.memory import capacity_with, most_moved, refuse_no_room, refuse_too_long
from hdp.balance.plan import REGIMES, Plan, PlanError
from hdp.balance.planners.problem import Problem
from hdp.balance.topology import Topology

PLANNERS: dict[str, str] = {
    "auto": "auto",
    "static": "static",
    "static-random": "static",
    "static-ffd": "static",
    "static-balanced": "static",
    "naive": "naive",
    "bytescale": "bytescale",
    "bytescale-pp": "bytescale",
    "flexsp": "flexsp",
}
"""Planner name to the module of this package that holds it; each module has ``make(problem, name) -> Plan``."""

STOPPED_BY_TIME = {"flexsp"}
"""Planners whose plans may differ between ranks: one plans, and the others are told."""


def plan(
    lengths: Sequence[int] | NDArray[np.integer],
    topology: Topology,
    cost: CostModel,
    *,
    capacity: int,
    regime: str = "step",
    planner: str = "auto",
    offload: str | float = "off",
    seed: int = 0,
) -> Plan:
    """Plan one global batch.

    ``lengths``: tokens of each sequence; ``capacity``: tokens a rank holds in one micro-batch without offload;
    ``offload``: ``"off"``, ``"auto"`` (as much as hides behind compute) or the largest ratio allowed, 0 to 1; ``seed``: of
    planners that draw (``static-random``). Raises :class:`PlanError` for input that cannot be planned, naming the value
    and what would help.
    """
    problem = make_problem(
        lengths, topology, cost, capacity=capacity, regime=regime, planner=planner, offload=offload, seed=seed
    )
    make: Callable[[Problem, str], Plan] = import_module(f"{__name__}.{PLANNERS[planner]}").make
    made = make(problem, planner)
    if made.offload and cost.outside_memory and most_moved(made, cost) > cost.outside_memory:
        raise refuse_no_room(cost)
    return made


def make_problem(
    lengths: Sequence[int] | NDArray[np.integer],
    topology: Topology,
    cost: CostModel,
    *,
    capacity: int,
    regime: str,
    planner: str,
    offload: str | float = "off",
    seed: int = 0,
) -> Problem:
    """Checks the arguments of :func:`plan` and gathers them."""
    if planner not in PLANNERS:
        raise PlanError(f"unknown planner {planner!r}: choose one of {', '.join(PLANNERS)}")
    if regime not in REGIMES:
        raise PlanError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or capacity < 1:
        raise PlanError(f"capacity is {capacity!r}: give the tokens of one micro-batch, at least 1")
    array = _check_lengths(lengths)
    ratio = _check_offload(offload, cost)
    largest = capacity_with(int(capacity), cost.layers, ratio)
    if array.size and int(array.max()) > topology.world_size * largest:
        worst = int(array.argmax())
        raise refuse_too_long(worst, int(array[worst]), topology.world_size, int(capacity), cost.layers, largest)
    return Problem(
        lengths=array,
        topology=topology,
        cost=cost,
        costs=cost.quantise(array, topology),
        capacity=int(capacity),
        regime=regime,
        offload=ratio,
        offload_hidden_only=offload == "auto",
        seed=seed,
    )


def _check_lengths(lengths: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PlanError(
            f"lengths are a {array.ndim}-dimensional array of {array.dtype}: give one whole number a sequence"
        )
    array = array.astype(np.int64)
    if array.size and array.min() < 0:
        bad = int(array.argmin())
        raise PlanError(f"sequence {bad} has {int(array[bad])} tokens: lengths are at least 0")
    return array


def _check_offload(offload: str | float, cost: CostModel) -> float:
    if offload == "off":
        return 0.0
    if offload == "auto":
        if cost.copy_bandwidth <= 0:
            raise PlanError('offload "auto" needs the cost model\'s copy_bandwidth: give bytes per second, or a ratio')
        return 1.0
    try:
        ratio = float(offload)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise PlanError(f'offload is {offload!r}: give "off", "auto" or a ratio from 0 to 1')
    return ratio


def make_plan(
    lengths: Sequence[int] | NDArray[np.integer],
    *,
    world_size: int,
    capacity: int,
    regime: str = "step",
    planner: str = "auto",
    cost: CostModel | None = None,
    topology: Topology | None = None,
    offload: str | float = "off",
    seed: int = 0,
) -> Plan:
    """:func:`plan` with defaults: eight ranks a node and the cost of a 7B model."""
    if topology is None:
        topology = Topology(world_size=world_size)
    elif topology.world_size != world_size:
        raise PlanError(f"topology has {topology.world_size} ranks, world_size is {world_size}: make them equal")
    return plan(
        lengths,
        topology,
        cost or default_cost(),
        capacity=capacity,
        regime=regime,
        planner=planner,
        offload=offload,
        seed=seed,
    )
