"""What every planner gets, and what every planner hands back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hdp.balance.cost import CostModel, Costs
from hdp.balance.memory import fewest_ranks, hidden_ratio, ratio_for, refuse_no_room
from hdp.balance.plan import IntArray, Plan
from hdp.balance.topology import Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One global batch to be planned, checked."""

    lengths: IntArray
    """Tokens of each sequence."""
    topology: Topology
    cost: CostModel
    costs: Costs
    """Terms of every sequence in ticks."""
    capacity: int
    """Tokens of a micro-batch without offload."""
    regime: str
    offload: float
    """Largest offload ratio a micro-batch may use."""
    offload_hidden_only: bool
    """Only what hides behind compute is offloaded, unless a sequence does not fit otherwise."""
    seed: int

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @cached_property
    def descending(self) -> IntArray:
        """Sequences that hold tokens, longest first; equal lengths in the order of the batch."""
        order = np.argsort(-self.lengths, kind="stable")
        return order[: np.count_nonzero(self.lengths)]

    def smallest_group(self, length: int) -> tuple[int, float]:
        """Fewest ranks that can hold a sequence, and the offload ratio they need (Eq. 3, see :func:`fewest_ranks`)."""
        most = self.offload
        if length > self.capacity and self.offload_hidden_only:
            most = min(most, hidden_ratio(length, self.cost))
        ranks, ratio = fewest_ranks(length, self.capacity, self.cost, most)
        if ranks > self.world_size and most < self.offload:  # a copy that shows is better than no step
            ranks, ratio = fewest_ranks(length, self.capacity, self.cost, self.offload)
        if ranks > self.world_size:
            raise refuse_no_room(self.cost)
        return ranks, ratio

    def plan(self, groups: Iterable[Sequence[int]], slots: Iterable[int], *, planner: str, **fields: Any) -> Plan:
        """A plan of this problem from one group and one slot a sequence, with offload ratios where shares exceed capacity."""
        made = Plan.from_groups(
            self.lengths,
            groups,
            slots,
            world_size=self.world_size,
            capacity=self.capacity,
            regime=self.regime,
            planner=planner,
            **fields,
        )
        return self.with_offload(made) if self.offload > 0 else made

    def with_offload(self, made: Plan) -> Plan:
        """``made`` with the smallest ratio that lets each micro-batch fit."""
        ranks, slots, held = made.held()
        entries = []
        for i in np.flatnonzero(held > self.capacity).tolist():
            ratio = ratio_for(int(held[i]), self.capacity, self.cost.layers)
            entries.append((int(ranks[i]), int(slots[i]), 1.0 if ratio is None else ratio))
        fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
        return Plan(**{**fields, "offload": tuple(entries)})
