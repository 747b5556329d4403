"""Runs lowered attention programs: posts, computes while bytes are in flight, merges, goes on.

The executor is a generator that yields whenever it has to wait, so one process can drive many virtual ranks in any order
(:func:`drive_together`); a real rank simply waits on its channel (:func:`drive`).

[Note: fillers] Whole local sequences fill the waits. Where the channel can be asked whether the receives of a round are done,
local calls run one by one until they are; elsewhere (the host runs ahead of the device) each round runs its share.
Which of the two changes nothing in the results: local calls touch nothing that a round reads.
"""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hdp.attention.backends import Backend, Scoring
from hdp.attention.bound import Bound, BoundCall, BoundMerge, BoundRound, Views
from hdp.attention.channel import Channel, Parcel, VirtualNetwork
from hdp.attention.lowered import LAG
from hdp.attention.merge import merge_partial


@dataclass(frozen=True)
class Wait:
    """What the executor waits for when it yields."""

    ticket: Any
    what: str
    """``"sends"``: until they may be overwritten. ``"receives"``: until all but the late ones are there. ``"late"``: until
    those are, too."""


Run = Generator[Wait, None, None]


class Executor:
    """Runs bound programs with one backend over one channel."""

    def __init__(self, backend: Backend, channel: Channel) -> None:
        self.backend, self.channel = backend, channel

    def run(self, program: Bound, views: Views, scoring: Scoring, serial: tuple[int, ...]) -> Run:
        """One direction of one layer.

        Args:
            program: the rank's program. views: from its ``bind``; backward with ``program.sends_delta`` needs the tensor
                ``delta`` to hold sum(do * out).
            serial: the same on all sharers and new for every call.
        """
        one_call = self._backward_call if program.is_backward else self._forward_call
        fillers = iter(program.fillers)
        stem = struct.pack(f"<{len(serial) + 1}q", *serial, program.is_backward)
        previous: Any = None
        late: deque[tuple[Any, tuple[BoundMerge, ...]]] = deque()
        for number, part in enumerate(program.rounds):
            for slot, value in part.fills:
                views[slot].fill_(value)
            ticket = self._post(part, views, zlib.crc32(number.to_bytes(4, "little"), zlib.crc32(stem)))
            for source, target in part.casts:
                views[target].copy_(views[source])
            for call in part.calls:
                one_call(call, views, scoring)
            if ticket is not None and part.receives:
                self._fill(ticket, part.fillers, fillers, one_call, views, scoring)
                yield Wait(ticket, "receives")
                self.channel.wait_receives(ticket)
            if previous is not None:  # see [Note: arena]: a sent buffer lives one step longer
                yield Wait(previous, "sends")
                self.channel.wait_sends(previous)
            previous = ticket if part.sends else None
            for merge in part.merges:
                _merge(merge, views)
            late.append((ticket, part.late))
            if len(late) > LAG:
                yield from self._come_home(*late.popleft(), views)
        for call in fillers:
            one_call(call, views, scoring)
        while late:
            yield from self._come_home(*late.popleft(), views)
        if previous is not None:
            yield Wait(previous, "sends")
            self.channel.wait_sends(previous)
        for slot, value in program.empties:
            views[slot].fill_(value)
        for source, target in program.finals:
            views[target].copy_(views[source])

    def _fill(
        self, ticket: Any, share: int, fillers: Iterator[BoundCall], one_call: Any, views: Views, scoring: Scoring
    ) -> None:
        """Local calls while the receives of a round are under way. See [Note: fillers]."""
        can_ask = self.channel.can_ask
        for call in fillers if can_ask else itertools.islice(fillers, share):
            one_call(call, views, scoring)
            if can_ask and self.channel.has_received(ticket):
                return

    def _come_home(self, ticket: Any, merges: tuple[BoundMerge, ...], views: Views) -> Run:
        """Partials that nobody waited for. See [Note: late]."""
        if merges:
            yield Wait(ticket, "late")
            self.channel.wait_late(ticket)
            for merge in merges:
                _merge(merge, views)

    def _post(self, part: BoundRound, views: Views, tag: int) -> Any:
        if not part.sends and not part.receives:
            return None
        sends: list[Parcel] = []
        for packet, slot, pack in part.sends:
            for source, target in pack:
                views[target].copy_(views[source])
            sends.append((packet, views[slot]))
        return self.channel.post(sends, [(packet, views[slot]) for packet, slot in part.receives], tag & 0x7FFFFFFF)

    def _forward_call(self, call: BoundCall, views: Views, scoring: Scoring) -> None:
        out, lse = call.sums
        q, k, v = self._inputs(call, views)
        partial, partial_lse = self.backend.forward(q, k, v, call.shape, scoring, call.cuts)
        if call.first[0]:
            views[out].copy_(partial)
            views[lse].copy_(partial_lse)
        else:
            merge_partial(views[out], views[lse], partial, partial_lse)

    def _backward_call(self, call: BoundCall, views: Views, scoring: Scoring) -> None:
        q, k, v, do, lse, last = self._inputs(call, views)
        out, delta = (last, None) if call.has_out else (None, last)
        partials = self.backend.backward(do, q, k, v, lse, out, delta, call.shape, scoring, call.cuts)
        for slot, partial, first in zip(call.sums, partials, call.first, strict=True):
            if first:
                views[slot].copy_(partial)
            else:
                views[slot].add_(partial)

    def _inputs(self, call: BoundCall, views: Views) -> list[Tensor]:
        """What a call reads; widened where the backend can compute a partial in the accumulators' dtype."""
        inputs = [views[slot] for slot in call.inputs]
        if self.backend.widens:
            dtype = views[call.sums[0]].dtype
            if dtype != inputs[0].dtype:
                return [t.to(dtype) for t in inputs]
        return inputs


def _merge(merge: BoundMerge, views: Views) -> None:
    if merge.first:
        for to, of in zip(merge.target, merge.source, strict=True):
            views[to].copy_(views[of])
    elif merge.is_partial:
        out, lse = (views[slot] for slot in merge.target)
        merge_partial(out, lse, *(views[slot] for slot in merge.source))
    else:
        for to, of in zip(merge.target, merge.source, strict=True):
            views[to].add_(views[of])


def drive(run: Run) -> None:
    """Runs to the end on a real rank: every wait blocks on the channel."""
    for _ in run:  # the executor itself waits when it is resumed
        continue


def drive_together(runs: dict[int, Run], network: VirtualNetwork, seed: int = 0) -> None:
    """Runs virtual ranks to the end in an order drawn from ``seed``. Raises RuntimeError when all of them wait."""
    draw = random.Random(seed)
    waits: dict[int, Wait | None] = dict.fromkeys(runs)
    while waits:
        ready = [rank for rank, wait in waits.items() if wait is None or _is_over(wait)]
        if ready and (draw.random() < 0.5 or not network.deliver_one()):
            rank = draw.choice(ready)
            try:
                waits[rank] = next(runs[rank])
            except StopIteration:
                del waits[rank]
        elif not ready and not network.deliver_one():
            raise RuntimeError(f"virtual ranks {sorted(waits)} wait for each other")


def _is_over(wait: Wait) -> bool:
    if wait.what == "sends":
        return wait.ticket.sends == 0
    return not any(packet.late == (wait.what == "late") for _, packet, _ in wait.ticket.receives)
