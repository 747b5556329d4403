"""What the executor needs of communication, and a channel that joins virtual ranks inside one process.

The real channel, on torch.distributed, is ``hdp.parallel.channel``.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from hdp.attention.calls import RunningCall
from hdp.attention.lowered import Packet

Parcel = tuple[Packet, Tensor]  # what it is, and the dense tensor to be sent or filled


class Channel(Protocol):
    """Moves tensors between ranks. Tickets are opaque."""

    can_ask: bool
    """Whether :meth:`has_received` knows; False where the host runs ahead of the device (NCCL)."""
    call: RunningCall | None
    """The attention call that posts and waits just now, or that failed; for messages."""

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Any:
        """Starts the transfers of one round; returns a ticket. ``tag`` is equal at both ends, in [0, 2^31)."""
        ...

    def has_received(self, ticket: Any) -> bool:
        """Whether all receives of the ticket but the late ones are done; never waits."""
        ...

    def wait_receives(self, ticket: Any) -> None:
        """Returns when all receives of the ticket but the late ones are done."""
        ...

    def wait_late(self, ticket: Any) -> None:
        """Returns when the late receives of the ticket are done (``Packet.late``)."""
        ...

    def wait_sends(self, ticket: Any) -> None:
        """Returns when all sent tensors of the ticket may be overwritten."""
        ...


@dataclass
class VirtualTicket:
    """Transfers of one round of one virtual rank."""

    rank: int
    receives: list[tuple[int, Packet, Tensor]] = field(default_factory=list)
    """(source rank, packet, tensor) not delivered yet."""
    sends: int = 0
    """Sends not delivered yet."""


@dataclass
class VirtualNetwork:
    """Joins virtual ranks in one process; what arrives when is drawn from ``seed``.

    A message is copied only when it is delivered, as late as the draw likes, so a sender that overwrites a buffer too early
    or a receiver that reads too early gives a wrong result.
    """

    seed: int = 0
    sent_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    messages: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._flying: dict[tuple[int, int, int, int], deque[tuple[VirtualTicket, Packet, Tensor]]] = defaultdict(deque)
        self._awaited: dict[tuple[int, int, int, int], deque[tuple[VirtualTicket, Packet, Tensor]]] = defaultdict(deque)

    def channel(self, rank: int, can_ask: bool = True) -> VirtualChannel:
        return VirtualChannel(self, rank, can_ask)

    def post(self, rank: int, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> VirtualTicket:
        ticket = VirtualTicket(rank, sends=len(sends))
        for packet, tensor in receives:
            ticket.receives.append((packet.peer, packet, tensor))
            self._awaited[packet.peer, rank, packet.lane, tag].append((ticket, packet, tensor))
        for packet, tensor in sends:
            self._flying[rank, packet.peer, packet.lane, tag].append((ticket, packet, tensor))
        return ticket

    def deliver_one(self) -> bool:
        """Delivers one message whose two ends are posted, chosen at random; False if there is none."""
        ready = [key for key, queue in self._flying.items() if queue and self._awaited[key]]
        if not ready:
            return False
        key = self._random.choice(ready)
        sender, sent, source = self._flying[key].popleft()
        receiver, awaited, target = self._awaited[key].popleft()
        if (sent.sequence, sent.what, sent.terms, source.shape, source.dtype) != (
            awaited.sequence,
            awaited.what,
            awaited.terms,
            target.shape,
            target.dtype,
        ):
            raise RuntimeError(
                f"rank {key[0]} sent {sent} {source.shape}, rank {key[1]} expected {awaited} {target.shape}"
            )
        target.copy_(source)
        self.sent_bytes[key[0]] += source.numel() * source.element_size()
        self.messages += 1
        sender.sends -= 1
        receiver.receives = [r for r in receiver.receives if r[2] is not target]
        return True


class VirtualChannel:
    """One virtual rank's end of a :class:`VirtualNetwork`. Waiting is the driver's part (``executor.drive_together``)."""

    def __init__(self, network: VirtualNetwork, rank: int, can_ask: bool = True) -> None:
        self.can_ask = can_ask
        self.network, self.rank = network, rank
        self.call: RunningCall | None = None

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> VirtualTicket:
        return self.network.post(self.rank, sends, receives, tag)

    def has_received(self, ticket: VirtualTicket) -> bool:
        return all(packet.late for _, packet, _ in ticket.receives)

    def wait_receives(self, ticket: VirtualTicket) -> None:
        if not self.has_received(ticket):
            raise RuntimeError(f"virtual rank {self.rank} went on before {len(ticket.receives)} receives were done")

    def wait_late(self, ticket: VirtualTicket) -> None:
        if ticket.receives:
            raise RuntimeError(f"virtual rank {self.rank} added {len(ticket.receives)} partials before they were there")

    def wait_sends(self, ticket: VirtualTicket) -> None:
        if ticket.sends:
            raise RuntimeError(f"virtual rank {self.rank} went on before {ticket.sends} sends were done")
