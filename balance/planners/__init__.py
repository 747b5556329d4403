"""Planners, each by name behind one function: lengths, topology and cost model in; a plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from hdp.balance.cost import CostModel, default_cost
from hdp.balance.memory import most_moved, recomputed_capacity, refuse_no_room
from hdp.balance.plan import REGIMES, Plan, PlanError
from hdp.balance.planners.problem import Problem
from hdp.balance.planners.recompute import RECOMPUTE, FittedProblem, check_fits, everywhere, where_needed
from hdp.balance.planners.unlike import by_speed
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
    recompute: str = "off",
    seed: int = 0,
) -> Plan:
    """Plan one global batch.

    ``lengths``: tokens of each sequence; ``capacity``: tokens a rank holds in one micro-batch without offload;
    ``offload``: ``"off"``, ``"auto"`` (as much as hides behind compute) or the largest ratio allowed, 0 to 1; ``recompute``:
    ``"off"``, ``"auto"`` (layers run again in backward where a sequence does not fit otherwise, as few as fit) or ``"all"``
    (all that do not keep everything, in every micro-batch, which then holds more); ``seed``: of planners that draw
    (``static-random``). Raises :class:`PlanError` for input that cannot be planned, naming the value and what would help;
    :class:`DoesNotFit` where that is the batch's length.
    """
    problem = make_problem(
        lengths,
        topology,
        cost,
        capacity=capacity,
        regime=regime,
        planner=planner,
        offload=offload,
        recompute=recompute,
        seed=seed,
    )
    made = where_needed(problem, partial(_make, planner=planner), again=recompute == "auto")
    made = everywhere(made, problem, int(capacity)) if recompute == "all" else made
    return replace(made, kept_layers=(cost.keep_first, cost.keep_last))


def _make(problem: Problem, planner: str) -> Plan:
    make = import_module(f"{__name__}.{PLANNERS[planner]}").make
    made: Plan = make(problem, planner)
    cost = problem.cost
    if made.offload and cost.outside_memory and most_moved(made, cost) > cost.outside_memory:
        raise refuse_no_room(cost)
    return by_speed(made, problem, partial(make, name=planner)) if planner == "auto" else made


def make_problem(
    lengths: Sequence[int] | NDArray[np.integer],
    topology: Topology,
    cost: CostModel,
    *,
    capacity: int,
    regime: str,
    planner: str,
    offload: str | float = "off",
    recompute: str = "off",
    seed: int = 0,
) -> Problem:
    """Checks the arguments of :func:`plan` and gathers them.

    Under ``recompute="all"`` the cost model recomputes and ``capacity`` is what a micro-batch holds then.
    """
    if planner not in PLANNERS:
        raise PlanError(f"unknown planner {planner!r}: choose one of {', '.join(PLANNERS)}")
    if regime not in REGIMES:
        raise PlanError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
    if recompute not in RECOMPUTE:
        raise PlanError(f"unknown recompute {recompute!r}: choose one of {', '.join(RECOMPUTE)}")
    if cost.recomputed:
        raise PlanError(
            f"the cost model has {cost.recomputed} layers run again: which do is the planner's to say, see recompute"
        )
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or capacity < 1:
        raise PlanError(f"capacity is {capacity!r}: give the tokens of one micro-batch, at least 1")
    array = _check_lengths(lengths)
    ratio = _check_offload(offload, cost)
    if recompute == "all":
        cost = _recomputing_all(cost)
    problem = FittedProblem(
        lengths=array,
        topology=topology,
        cost=cost,
        costs=cost.quantise(array, topology),
        capacity=recomputed_capacity(int(capacity), cost),
        regime=regime,
        offload=ratio,
        offload_hidden_only=offload == "auto",
        seed=seed,
    )
    if recompute != "auto":
        check_fits(problem)
    return problem


def _recomputing_all(cost: CostModel) -> CostModel:
    if cost.movable_layers and not cost.recompute_bytes:
        raise PlanError(
            'recompute "all" needs the cost model\'s recompute_bytes: give what a layer keeps of a token that runs again, or'
            " run hdp profile again"
        )
    return cost.recomputing(cost.movable_layers)


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
    recompute: str = "off",
    seed: int = 0,
) -> Plan:
    """Plans one global batch: which ranks compute which sequence together, and when. :func:`plan` with defaults.

    Args:
        lengths: [sequences] tokens of each.
        world_size: ranks.
        capacity: tokens that one rank holds in one micro-batch without offload.
        regime: ``"step"`` or ``"slot"``, as the engine's.
        planner: a name of ``hdp.balance.PLANNERS``.
        cost: seconds and bytes of the model; None: a 7B model at 400 TFLOP/s.
        topology: nodes and links; None: eight ranks a node.
        offload: ``"off"``, ``"auto"``, or the largest ratio of activations that may leave, 0 to 1.
        recompute: ``"off"``, ``"auto"`` or ``"all"``.
        seed: of planners that draw.

    Raises:
        PlanError: what cannot be planned, and what would help; its subclass DoesNotFit where a sequence is too long.
    """
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
        recompute=recompute,
        seed=seed,
    )
