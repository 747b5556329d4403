"""What the attention calls of a micro-batch are named, on every rank alike, and in which order they ran.

[Note: call names] A forward call is named by its place among the calls of its route: 0, 1, 2. Its backward has the same name,
which lies among the tensors that are saved for it, so it does not matter in which order ranks walk their graphs: messages of
one call are never those of another. A forward that runs again inside a backward pass (a checkpoint that keeps nothing of
attention) must not be named by its place, for two ranks may begin with different layers. It is named by the node of the graph
that asked for it: how many calls had begun when that node was made, and how many have run again there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from typing import NamedTuple

import torch

AGAIN = 32
"""Names of calls that run again begin at 2 to this power: 1 + the calls before the node, then their place among those there."""


class Calls:
    """The calls of one route."""

    def __init__(self) -> None:
        self.order = array("q")
        """All calls so far: twice the name, and 1 more for backward."""
        self._begun: list[int] = []
        """Autograd's number of the last node that was made before each forward call: its own, where it has one."""
        self._again: defaultdict[int, int] = defaultdict(int)

    def begin(self) -> int:
        """Notes a forward call that runs now; returns its name."""
        node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
        if node is None:
            name = len(self._begun)
            self._begun.append(torch._C._autograd._get_sequence_nr() - 1)  # type: ignore[attr-defined]
        else:
            before = bisect_right(self._begun, node._sequence_nr())
            name = (before + 1 << AGAIN) + self._again[before]
            self._again[before] += 1
        self.order.append(2 * name)
        return name

    def begin_backward(self, name: int) -> None:
        """Notes that the backward of a call runs now."""
        self.order.append(2 * name + 1)


class RunningCall(NamedTuple):
    """What a rank computes just now. Made for every call, put into words only for messages."""

    serial: tuple[int, ...]
    """Of the route."""
    name: int
    is_backward: bool

    def __str__(self) -> str:
        return f"{describe(self.name, self.is_backward)} of micro-batch {self.serial}"


def describe(name: int, is_backward: bool) -> str:
    """A call in words: "backward of attention call 3"."""
    direction = "backward" if is_backward else "forward"
    if name < 1 << AGAIN:
        return f"{direction} of attention call {name}"
    before, place = (name >> AGAIN) - 1, name & (1 << AGAIN) - 1
    which = f"attention call {before - 1}, recomputed" if before else "an attention call inside a backward pass"
    return f"{direction} of {which}" + (f" ({place} more before it)" if place else "")
