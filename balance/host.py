"""What attention programs cost the host besides computing and sending: a fixed time for each call and each message.

A ring of ``n`` ranks computes one tile of each shared sequence in each of its ``n`` steps, in each direction; a whole sequence
is one tile a direction. Each block that travels, keys and values or their gradients, is one message, and a member sends one
and receives one: two messages a hop. Sequences of one micro-batch that share their ranks share them. Forward makes ``n - 1``
hops; backward ``n - 2`` with keys and values and ``n - 1`` with their gradients. On GPUs this is microseconds and kernels hide
it; on CPUs it is much of what sharing a short sequence costs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from hdp.balance.plan import PlanError


def ring_messages(size: int, backward: bool) -> int:
    """Messages that one member of a ring sends and receives in one pass of one layer."""
    if size < 2:
        return 0
    return 2 * ((size - 1) + (size - 2 if backward else 0))


@dataclass(frozen=True, kw_only=True)
class HostCosts:
    """Seconds of one rank's host. 0: hidden, or not known."""

    piece_seconds: float = 0.0
    """Of each tile of each sequence, in each layer and direction, beyond what its tokens cost."""
    message_seconds: float = 0.0
    """Of each message sent or received, in each layer, that one sequence more takes."""
    piece_setup: float = 0.0
    """Of each tile, once a micro-batch and direction: programs are made once and serve all layers."""
    message_setup: float = 0.0
    """The same once a micro-batch and direction."""
    gather_byte: float = 0.0
    """Of each byte that an all-gather yields, taken from what is computed beside it."""
    reduce_byte: float = 0.0
    """Of each byte that goes into a reduce-scatter."""
    quota_period: float = 0.0
    """A host with a CPU quota, as containers have, runs at full speed until the quota of such a period is used up; 0: none.
    All other times are then what computing takes in the long run."""
    quota_share: float = 1.0
    """Part of each period that the quota lasts for when it computes without a pause, above 0, at most 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 0 and isfinite(value)):
                raise PlanError(f"{field.name} is {value}: give zero or a positive number of seconds")
        if not 0.0 < self.quota_share <= 1.0:
            raise PlanError(f"quota_share is {self.quota_share}: give a part above 0, up to 1")

    def layer_seconds(self, size: int, backward: bool) -> float:
        """One sequence on a ring of ``size`` ranks (1: a whole sequence), in one layer."""
        return size * self.piece_seconds + ring_messages(size, backward) * self.message_seconds

    def setup_seconds(self, size: int, backward: bool) -> float:
        """The same once a micro-batch."""
        return size * self.piece_setup + ring_messages(size, backward) * self.message_setup


NO_HOST_COSTS = HostCosts()
