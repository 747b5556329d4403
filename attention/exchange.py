"""Proves that the grouped calls of all ranks complete under the backend's real semantics.

Pairwise matching is not enough: ranks A, B, C that post (A: B, then C), (B: C, then A), (C: A, then B) match and hang, because
a communicator runs one grouped call after the other. :func:`check_exchange` runs all ranks' calls, whatever they carry;
:func:`program_rounds` makes them from the programs of a slot. Time is linear in the messages.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hdp.attention.checker import ProgramError
from hdp.attention.program import RankProgram, Transfer


@dataclass(frozen=True, kw_only=True)
class Message:
    """One operation of a rank's grouped call: a send to, or a receive from, ``peer``."""

    peer: int
    is_send: bool
    tag: object
    """What both ends agree on (sequence, kind, chunks, heads); compared between the ends."""
    lane: int = 0
    """The communicator."""


Rounds = Sequence[Sequence[Message]]  # one rank's grouped calls, in the order in which it posts them


@dataclass(frozen=True, kw_only=True)
class SharedSequence:
    """One sequence of a slot, for :func:`program_rounds`."""

    number: int
    """Index in the global batch: orders the messages of a round at both ends."""
    group: tuple[int, ...]
    """Ranks of the world, by member."""
    programs: Sequence[RankProgram]
    """One direction, by member."""


def program_rounds(sequences: Iterable[SharedSequence]) -> dict[int, list[list[Message]]]:
    """Per rank its grouped calls: call ``i`` holds step ``i`` of all its sequences, in ascending order of sequences."""
    rounds: dict[int, list[list[Message]]] = defaultdict(list)
    for sequence in sorted(sequences, key=lambda s: s.number):
        for rank, program in zip(sequence.group, sequence.programs, strict=True):
            calls = rounds[rank]
            calls.extend([] for _ in range(len(program.steps) - len(calls)))
            for call, step in zip(calls, program.steps, strict=False):
                call += [_message(sequence, t, is_send=True) for t in step.sends]
                call += [_message(sequence, t, is_send=False) for t in step.receives]
    return dict(rounds)


def _message(sequence: SharedSequence, transfer: Transfer, is_send: bool) -> Message:
    tag = (sequence.number, transfer.kind, transfer.chunks, transfer.heads, transfer.final)
    return Message(peer=sequence.group[transfer.peer], is_send=is_send, tag=tag, lane=transfer.lane)


def check_exchange(rounds: Mapping[int, Rounds]) -> None:
    """Raises :class:`ProgramError` unless all ranks' grouped calls can complete, in the order given.

    NCCL's semantics, the stricter of the two backends: per communicator (lane) a rank runs one grouped call after the
    other, and a call ends only when each of its operations has met its counterpart inside the call that the peer is
    running; operations of one pair of ranks meet in the order in which they were posted. A rank posts the calls of a round
    on both lanes together and begins the next round when both have ended.
    """
    _Exchange(rounds).run()


@dataclass
class _Rank:
    position: int = -1
    """Index of the call that runs."""
    pending: int = 0
    """Its operations that have not met their counterpart."""


class _Exchange:
    def __init__(self, rounds: Mapping[int, Rounds]) -> None:
        self.rounds = rounds
        self.ranks = {rank: _Rank() for rank in rounds}
        # (source, destination, lane): operations of the running calls that wait, of one side only.
        self.waiting: dict[tuple[int, int, int], deque[Message]] = defaultdict(deque)
        self.ready = deque(sorted(rounds))

    def run(self) -> None:
        while self.ready:
            self._begin_next(self.ready.popleft())
        stuck = {rank: state for rank, state in self.ranks.items() if state.pending}
        if stuck:
            self._report(stuck)

    def _begin_next(self, rank: int) -> None:
        state, calls = self.ranks[rank], self.rounds[rank]
        state.position += 1
        while state.position < len(calls) and not calls[state.position]:
            state.position += 1
        if state.position >= len(calls):
            return
        state.pending = len(calls[state.position])
        for message in calls[state.position]:
            self._post(rank, message)

    def _post(self, rank: int, message: Message) -> None:
        ends = (rank, message.peer) if message.is_send else (message.peer, rank)
        queue = self.waiting[(*ends, message.lane)]
        if not queue or queue[0].is_send == message.is_send:
            queue.append(message)
            return
        other = queue.popleft()
        if other.tag != message.tag:
            sent, expected = (message, other) if message.is_send else (other, message)
            raise ProgramError(f"rank {ends[0]} sends {sent.tag} to rank {ends[1]}, which expects {expected.tag}")
        for end in ends:
            state = self.ranks[end]
            state.pending -= 1
            if not state.pending:
                self.ready.append(end)

    def _report(self, stuck: Mapping[int, _Rank]) -> None:
        rank = min(stuck)
        unmet = [
            (message, ends)
            for ends, queue in sorted(self.waiting.items(), key=lambda item: item[0])
            for message in queue
            if (ends[0] if message.is_send else ends[1]) == rank
        ]
        message = unmet[0][0]
        verb = "send to" if message.is_send else "receive from"
        others = ", ".join(f"rank {r} in round {stuck[r].position}" for r in sorted(stuck)[:8])
        raise ProgramError(
            f"deadlock: rank {rank} waits in round {stuck[rank].position} for its {verb} rank {message.peer}"
            f" ({message.tag}); stuck: {others}"
        )
