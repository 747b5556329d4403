"""Runs lowered attention programs: posts, computes while bytes are in flight, merges, goes on.

The executor is a generator that yields whenever it has to wait, so one process can drive many virtual ranks in any order
(:func:`drive_together`); a real rank simply waits on its channel (:func:`drive`).

[Note: fillers] Whole local sequences fill the waits. Where the channel can be asked whether the receives of a round are done,
local calls run one by one until they are; elsewhere (the host runs ahead of the device) each round runs its share.
Which of the two changes nothing in the results: local calls touch nothing that a round reads.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections import deque
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

from hdp.attention.backends import Backend, Scoring
from hdp.attention.bound import Binding, Bound, BoundCall
from hdp.attention.channel import Channel, VirtualNetwork
from hdp.attention.lowered import LAG


class Wait(NamedTuple):
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

    def run(self, program: Bound, tensors: Binding, scoring: Scoring, serial: tuple[int, ...]) -> Run:
        """One direction of one layer.

        Args:
            program: the rank's program. tensors: from its ``bind``; backward with ``program.sends_delta`` needs the tensor
                ``delta`` to hold sum(do * out).
            serial: the same on all sharers and new for every call.
        """
        fillers = _Fillers(self, program, tensors, scoring)
        stem = zlib.crc32(struct.pack(f"<{len(serial) + 1}q", *serial, program.is_backward))
        previous: Any = None
        late: deque[tuple[Any, np.ndarray]] = deque()
        for number, part in enumerate(program.rounds):
            tensors.move(part.gathers)
            ticket: Any = None
            if part.sends or part.receives:
                tag = zlib.crc32(number.to_bytes(4, "little"), stem) & 0x7FFFFFFF
                ticket = self.channel.post(*tensors.parcels(number), tag)
            for call in program.calls[number]:
                self.launch(call, tensors, scoring, 0, call.call.launches)
            if part.receives:
                fillers.run(ticket, part.fillers)
                yield Wait(ticket, "receives")
                self.channel.wait_receives(ticket)
            if previous is not None:  # see [Note: arena]: a sent buffer lives one step longer
                yield Wait(previous, "sends")
                self.channel.wait_sends(previous)
            previous = ticket if part.sends else None
            tensors.move(part.merges)
            late.append((ticket, part.late))
            if len(late) > LAG:
                yield from self._come_home(*late.popleft(), tensors)
        fillers.run_rest()
        while late:
            yield from self._come_home(*late.popleft(), tensors)
        if previous is not None:
            yield Wait(previous, "sends")
            self.channel.wait_sends(previous)
        tensors.move(program.lowered.finals)

    def launch(self, bound: BoundCall, tensors: Binding, scoring: Scoring, first: int, last: int) -> None:
        """Launches [first, last) of a call, and what becomes of their results."""
        inputs = [tensors.rows(slot) for slot in bound.inputs]
        cuts: Any = bound.cuts
        if last - first < bound.call.launches:
            inputs, cuts = [views[first:last] for views in inputs], cuts[first:last]
        results = self.backend.launch(inputs, bound.call.shape, scoring, cuts)
        tensors.move_results(bound, results, first, last)

    def _come_home(self, ticket: Any, merges: np.ndarray, tensors: Binding) -> Run:
        """Partials that nobody waited for. See [Note: late]."""
        if len(merges):
            yield Wait(ticket, "late")
            self.channel.wait_late(ticket)
            tensors.move(merges)


class _Fillers:
    """The local calls of a program, launch by launch. See [Note: fillers]."""

    def __init__(self, executor: Executor, program: Bound, tensors: Binding, scoring: Scoring) -> None:
        self.executor, self.calls, self.tensors, self.scoring = executor, program.fillers, tensors, scoring
        self.call, self.launch = 0, 0

    def run(self, ticket: Any, share: int) -> None:
        """While the receives of a round are under way."""
        channel = self.executor.channel
        if not channel.can_ask:
            self._advance(share)
            return
        while self.call < len(self.calls):
            self._advance(1)
            if channel.has_received(ticket):
                return

    def run_rest(self) -> None:
        while self.call < len(self.calls):
            self._advance(self.calls[self.call].call.launches - self.launch)

    def _advance(self, count: int) -> None:
        while count and self.call < len(self.calls):
            call = self.calls[self.call]
            stop = min(self.launch + count, call.call.launches)
            self.executor.launch(call, self.tensors, self.scoring, self.launch, stop)
            count -= stop - self.launch
            self.launch = stop
            if stop == call.call.launches:
                self.call, self.launch = self.call + 1, 0


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
