"""The exact optimum of small batches, as a mixed-integer programme (HiGHS): what the planners are tested against.

Every sequence chooses one set of ranks and one slot. Regime ``slot``: the sum of the slots' durations is minimised. Regime
``step``: the busiest rank, as if no rank ever waited for a sharer, so no plan is shorter. Shares are those of one
sequence on its own; rings packed together are not in the programme.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from hdp.balance.plan import PlanError
from hdp.balance.planners.problem import Problem

MOST_VARIABLES = 6000


def exact_optimum(problem: Problem, *, slots: int, seconds: float = 60.0) -> int:
    """Ticks of the optimum with at most ``slots`` slots. Raises PlanError for batches that are not small."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ImportError as error:
        raise PlanError("the exact optimum needs scipy: pip install 'hdp[flexsp]'") from error
    order = problem.descending.tolist()
    world = problem.world_size
    groups = [g for size in range(1, world + 1) for g in combinations(range(world), size)]
    count = len(order) * len(groups) * slots
    if count > MOST_VARIABLES:
        raise PlanError(f"{count} choices of group and slot: the exact optimum takes at most {MOST_VARIABLES}")
    ends = slots if problem.regime == "slot" else 1  # durations: of each slot, or of the step
    scale = float(problem.costs.work.sum()) or 1.0
    entries: list[tuple[int, int, float]] = []
    once = len(order)
    ticks_row, token_row = once, once + world * ends
    for i, sequence in enumerate(order):
        for g, group in enumerate(groups):
            across = int(not problem.topology.is_local(group))
            ticks = float(problem.costs.share(sequence, len(group), across)) / scale
            length = int(problem.lengths[sequence])
            for slot in range(slots):
                v = (i * len(groups) + g) * slots + slot
                entries.append((i, v, 1.0))
                for m, rank in enumerate(group):
                    part = length // len(group) + (m < length % len(group))
                    entries.append((ticks_row + rank * ends + slot % ends, v, ticks))
                    entries.append((token_row + rank * slots + slot, v, float(part)))
    for rank in range(world):
        for end in range(ends):
            entries.append((ticks_row + rank * ends + end, count + end, -1.0))
    rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
    total_rows = token_row + world * slots
    low = np.concatenate([np.ones(once), np.full(total_rows - once, -np.inf)])
    high = np.concatenate([np.ones(once), np.zeros(world * ends), np.full(world * slots, float(problem.capacity))])
    objective = np.concatenate([np.zeros(count), np.ones(ends)])
    result = milp(
        objective,
        constraints=LinearConstraint(
            coo_matrix((values, (rows, columns)), (total_rows, count + ends)).tocsr(), low, high
        ),
        integrality=np.concatenate([np.ones(count), np.zeros(ends)]),
        bounds=Bounds(np.zeros(count + ends), np.concatenate([np.ones(count), np.full(ends, np.inf)])),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if result.status != 0:
        raise PlanError(f"the exact optimum was not found: {result.message}")
    return round(result.fun * scale)
