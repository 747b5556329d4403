"""The channel of real ranks: point-to-point transfers over two lanes of torch.distributed.

A lane is one world-wide process group, created and warmed up once; no group is ever made for a sequence. On gloo large
tensors are cut into pieces of about 1 MB, because one large send and one large receive posted together use a link in turn
(0.44 against 0.88 of its rate each way, measured at 1 Gbit/s); on NCCL each round is one grouped call per lane, or several of
at most 256 operations (``hdp.attention.messages.in_calls``).
"""

from __future__ import annotations

import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hdp.attention.calls import RunningCall
from hdp.attention.channel import Parcel
from hdp.attention.lowered import Packet
from hdp.attention.messages import in_calls
from hdp.parallel.errors import PeerError

PIECE_BYTES = 1 << 20
CPU = torch.device("cpu")
LANES = 2


@dataclass
class Ticket:
    """Transfers of one round that are under way."""

    receives: list[tuple[Packet, dist.Work]] = field(default_factory=list)
    sends: list[tuple[Packet, dist.Work]] = field(default_factory=list)
    late: list[tuple[Packet, dist.Work]] = field(default_factory=list)
    """Receives that no step waits for."""
    arrived: threading.Event | None = None
    """Set when the receives are done, or failed; None: nobody has asked yet."""
    failure: tuple[Packet, Exception] | None = None
    """The receive that failed, found by the thread that waited for it."""


class TorchChannel:
    """Sends and receives over ``lanes``; see ``hdp.attention.channel.Channel``.

    ``sent_bytes`` and ``messages`` count what left this rank.
    """

    def __init__(self, rank: int, lanes: Sequence[dist.ProcessGroup], device: torch.device = CPU) -> None:
        self.rank, self.lanes = rank, tuple(lanes)
        self.waited: list[tuple[float, float]] = []
        """(start, stop) of every wait, seconds of ``time.perf_counter``, for the timeline."""
        self.notes_waits = False
        """Whether ``waited`` is added to. Whoever sets it empties the list: an engine, before every step."""
        self.sent_bytes = 0
        self.messages = 0
        self.where = "outside a step"
        """What the rank is doing, for error messages; the engine keeps it up to date."""
        self.call: RunningCall | None = None
        """The attention call in it, kept up to date by the operator; of a failed one, until something else begins."""
        self.is_waiting = False
        """Whether the rank is blocked in a transfer just now."""
        # A group may have a backend for each kind of device: what counts is the one that moves this rank's tensors.
        self._grouped = bool(lanes) and lanes[0]._get_backend(device).name() == "nccl"  # type: ignore[attr-defined]
        self.can_ask = not self._grouped
        self._questions: queue.SimpleQueue[Ticket | None] | None = None

    @property
    def place(self) -> str:
        """``where``, and the attention call that runs there."""
        return self.where if (call := self.call) is None else f"{self.where}, in {call}"

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        for _, tensor in sends:
            self.sent_bytes += tensor.numel() * tensor.element_size()
        self.messages += len(sends)
        return self._post_grouped(sends, receives) if self._grouped else self._post_pieces(sends, receives, tag)

    def _post_pieces(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        ticket = Ticket()
        # Receives first: a send that finds its receive posted needs no second handshake.
        for packet, tensor in receives:
            lane, works = self.lanes[packet.lane], ticket.late if packet.late else ticket.receives
            its = _tag(packet, tensor, tag)
            for piece in _pieces(tensor):
                works.append((packet, self._start(lane.recv, piece, packet, its)))
        for packet, tensor in sends:
            lane, its = self.lanes[packet.lane], _tag(packet, tensor, tag)
            for piece in _pieces(tensor):
                ticket.sends.append((packet, self._start(lane.send, piece, packet, its)))
        return ticket

    def _start(self, operation: Callable[..., dist.Work], piece: Tensor, packet: Packet, tag: int) -> dist.Work:
        try:
            return operation([piece], packet.peer, tag)
        except RuntimeError as error:
            raise self._error("starting a transfer of", packet, error) from error

    def _post_grouped(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        ticket = Ticket()
        for number, lane in enumerate(self.lanes):
            mine = [(p, t, True) for p, t in sends if p.lane == number]
            mine += [(p, t, False) for p, t in receives if p.lane == number]
            for places in in_calls([packet.peer for packet, _, _ in mine], self.rank, lane.size()):
                self._post_call(ticket, lane, [mine[place] for place in places])
        return ticket

    @staticmethod
    def _post_call(ticket: Ticket, lane: dist.ProcessGroup, mine: Sequence[tuple[Packet, Tensor, bool]]) -> None:
        """One grouped call."""
        operations = [
            dist.P2POp(dist.isend if is_send else dist.irecv, tensor, group=lane, group_peer=packet.peer)
            for packet, tensor, is_send in mine
        ]
        works = dist.batch_isend_irecv(operations)
        if len(works) < len(mine):
            _share_work(ticket, mine, works)
            return
        for (packet, _, is_send), work in zip(mine, works, strict=True):  # a backend that does not coalesce
            group = ticket.sends if is_send else ticket.late if packet.late else ticket.receives
            group.append((packet, work))

    def has_received(self, ticket: Ticket) -> bool:
        """Gloo only knows by waiting, so a thread waits for the tickets that were asked about."""
        if ticket.arrived is None:
            if not ticket.receives:
                return True
            ticket.arrived = threading.Event()
            if self._questions is None:
                self._questions = queue.SimpleQueue()
                self._waiter = threading.Thread(
                    target=_await_receives, args=(self._questions,), name="hdp-receives", daemon=True
                )
                self._waiter.start()
            self._questions.put(ticket)
        return ticket.arrived.is_set()

    def close(self) -> None:
        """Ends the thread that waits; before the process groups are gone."""
        if self._questions is not None:
            self._questions.put(None)
            self._waiter.join(timeout=5)
            self._questions = None

    def wait_receives(self, ticket: Ticket) -> None:
        if ticket.arrived is None:
            self._wait(ticket.receives, "receiving")
        elif ticket.receives:
            start = time.perf_counter()
            self.is_waiting = True
            try:
                ticket.arrived.wait()
            finally:
                self.is_waiting = False
            self._note_wait(start)
            if ticket.failure is not None:
                packet, error = ticket.failure
                raise self._error("receiving", packet, error) from error
        ticket.receives.clear()

    def wait_late(self, ticket: Ticket) -> None:
        self._wait(ticket.late, "receiving")
        ticket.late.clear()

    def wait_sends(self, ticket: Ticket) -> None:
        self._wait(ticket.sends, "sending")
        ticket.sends.clear()

    def _wait(self, works: list[tuple[Packet, dist.Work]], verb: str) -> None:
        if not works:
            return
        start = time.perf_counter()
        self.is_waiting = True
        try:
            for packet, work in works:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._error(verb, packet, error) from error
        finally:
            self.is_waiting = False
        self._note_wait(start)

    def _note_wait(self, start: float) -> None:
        if self.notes_waits:
            self.waited.append((start, time.perf_counter()))

    def _error(self, verb: str, packet: Packet, error: Exception) -> PeerError:
        direction, within = "to" if verb == "sending" else "from", "" if self.call is None else f" in {self.call}"
        found = PeerError(
            f"rank {self.rank}, {self.where}: {verb} {packet.what!r} of sequence {packet.sequence}"
            f" {direction} rank {packet.peer}{within} failed: {first_line(error)}"
        )
        found.peer = packet.peer
        return found


def _share_work(ticket: Ticket, mine: Sequence[tuple[Packet, Tensor, bool]], works: Sequence[dist.Work]) -> None:
    """A coalesced call returns one work for all its operations: whoever waits for one of them waits for that."""
    sent = next((packet for packet, _, is_send in mine if is_send), None)
    awaited = [packet for packet, _, is_send in mine if not is_send]
    if awaited:
        group = ticket.late if all(packet.late for packet in awaited) else ticket.receives
        group.extend((awaited[0], work) for work in works)
    if sent is not None and (not awaited or group is ticket.late):
        # Late receives are waited for later than sends, whose buffers are used again.
        ticket.sends.extend((sent, work) for work in works)


def _await_receives(questions: queue.SimpleQueue[Ticket | None]) -> None:
    """Waits for the receives of one ticket after the other, until None. Holds no transfer while it is idle."""
    while (ticket := questions.get()) is not None:
        _await(ticket)
        del ticket


def _await(ticket: Ticket) -> None:
    assert ticket.arrived is not None
    try:
        for packet, work in ticket.receives:
            try:
                work.wait()
            except RuntimeError as error:
                ticket.failure = (packet, error)
                return
    finally:
        ticket.arrived.set()


def _tag(packet: Packet, tensor: Tensor, tag: int) -> int:
    """Tells messages of one round apart by what they carry.

    Ranks whose routes differ (other sequences, groups, layouts, schedules, sizes) then wait for each other until the timeout,
    whose error names the sequence, and do not take one thing for another.
    """
    content = f"{packet.sequence} {packet.what} {packet.terms} {tensor.numel()} {tensor.dtype}"
    return zlib.crc32(content.encode(), tag) & 0x7FFFFFFF


def _pieces(tensor: Tensor) -> list[Tensor]:
    flat = tensor.view(-1)
    count = max(PIECE_BYTES // flat.element_size(), 1)
    return [flat] if flat.numel() <= count else list(flat.split(count))


def first_line(error: BaseException) -> str:
    """What an error says, in one line: without gloo's source path before it and its general advice after it."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return re.sub(r"\[/\S+\.(?:cc|cpp|h):\d+\] ", "", lines[0]).split(". This is typically caused by")[0]
