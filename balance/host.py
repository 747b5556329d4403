"""What attention programs cost the host besides computing and sending: a fixed time a round, a message, and a document's tile.

Documents of one micro-batch that share a group run one program, and all groups' programs run round by round together. What goes
from one rank to another in a round and lane is one message for inputs and one for sums, whatever the number of documents and
groups in it: so many messages a group and micro-batch, none a document. Kernels, and what they give, are still each document's
own: a ring of ``n`` ranks has ``n`` tiles a document and direction, a whole document one.

A member of a ring sends one block and receives one in each hop: keys and values, or their gradients. Forward makes ``n - 1``
hops; backward ``n - 2`` with keys and values and ``n - 1`` with their gradients. On GPUs this is microseconds and kernels hide
it; on CPUs it is much of what sharing short documents costs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from hdp.balance.plan import PlanError


def ring_messages(size: int, backward: bool) -> int:
    """Messages that one member of a ring sends and receives in one pass of one layer, for all its documents together."""
    if size < 2:
        return 0
    return 2 * ((size - 1) + (size - 2 if backward else 0))


@dataclass(frozen=True, kw_only=True)
class HostCosts:
    """Seconds of one rank's host. 0: hidden, or not known."""

    piece_seconds: float = 0.0
    """Of each tile of each document, in each layer and direction, beyond what its tokens cost."""
    message_seconds: float = 0.0
    """Of each message sent or received, in each layer."""
    round_seconds: float = 0.0
    """Of each round of a micro-batch's programs, in each layer: step k of all groups is round k."""
    message_byte: float = 0.0
    """Of each byte sent or received, taken from computation: on CPUs the same core copies it."""
    sum_byte: float = 0.0
    """Of each byte of a tile's results, which are added to others'."""
    piece_setup: float = 0.0
    """Of each tile of each document, once a micro-batch and direction: programs are made once and serve all layers."""
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

    def layer_seconds(self, documents: int, size: int, backward: bool) -> float:
        """One layer of ``documents`` on one ring of ``size`` ranks (1: whole documents), in one micro-batch."""
        rounds = size * self.round_seconds if size > 1 else 0.0
        messages = ring_messages(size, backward) * self.message_seconds
        return documents * size * self.piece_seconds + messages + rounds

    def setup_seconds(self, documents: int, size: int, backward: bool) -> float:
        """The same once a micro-batch."""
        return documents * size * self.piece_setup + ring_messages(size, backward) * self.message_setup


NO_HOST_COSTS = HostCosts()
