"""Proves attention programs right before they run: coverage, availability, matching, deadlock freedom, buffers.

:func:`check_sequence` walks the programs of all members of one group in both directions. :func:`check_exchange` walks the
transfers of a whole slot, in which ranks belong to several groups at once, under the backend's real semantics.

What is proved of one sequence:

- every (query, key) pair that the mask allows is computed exactly once for every head, in forward and in backward, and
  its contribution ends at the owner of the query (OUT, DQ) and of the key (DKV);
- a member sends, reads and merges only what it has at that moment;
- every send has its receive, in the same step, with the same chunks, heads and lane.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Transfer

Cell = tuple[Kind, int, int]  # kind, chunk, head (key/value head for KV and DKV)
Pair = tuple[int, int, int]  # query chunk, key chunk, query head


class ProgramError(ValueError):
    """A program that would compute something wrong or hang. Names member, step and value."""


@dataclass
class _Member:
    inputs: Counter[Cell] = field(default_factory=Counter)
    sums: dict[Cell, Counter[Pair]] = field(default_factory=lambda: defaultdict(Counter))
    peak_tokens: int = 0


def check_sequence(
    layout: Layout, mask: Mask, heads: HeadCount, forward: Sequence[RankProgram], backward: Sequence[RankProgram]
) -> None:
    """Raises :class:`ProgramError` unless both directions are right. One program a member, in order of members."""
    for programs in (forward, backward):
        if len(programs) != layout.size:
            raise ProgramError(f"{len(programs)} programs for a group of {layout.size}")
    kept = [_expand_kept(program) for program in forward]
    for member, program in enumerate(backward):
        missing = _expand_kept(program) - kept[member]
        if missing:
            raise ProgramError(f"backward of member {member} expects {_name(missing)}, which forward does not keep")
    _Direction(layout, mask, heads, forward, backward=False).check()
    _Direction(layout, mask, heads, backward, backward=True).check()


def _expand_kept(program: RankProgram) -> set[Cell]:
    return {(v.kind, c, h) for v in program.keep for c in v.chunks for h in range(*v.heads)}


def _name(cells: set[Cell]) -> str:
    kind, chunk, head = min(cells, key=lambda cell: (cell[0].value, cell[1:]))
    return f"{kind.name} of chunk {chunk}, head {head}"


class _Direction:
    """Symbolic execution of one direction, all members in lockstep."""

    def __init__(
        self, layout: Layout, mask: Mask, heads: HeadCount, programs: Sequence[RankProgram], backward: bool
    ) -> None:
        self.layout, self.mask, self.heads, self.programs, self.backward = layout, mask, heads, programs, backward
        self.name = "backward" if backward else "forward"
        self.members = [self._start(m, program) for m, program in enumerate(programs)]

    def _start(self, member: int, program: RankProgram) -> _Member:
        state = _Member()
        for kind in (Kind.Q, Kind.KV, *((Kind.DO,) if self.backward else ())):
            for chunk in self.layout.owned(member):
                for head in range(*self.heads.of(kind)):
                    state.inputs[kind, chunk, head] += 1
        if self.backward:
            state.inputs.update(_expand_kept(program))
        return state

    def check(self) -> None:
        steps = max((len(p.steps) for p in self.programs), default=0)
        for step in range(steps):
            self._match(step)
            outgoing = {m: self._send(m, step) for m in range(self.layout.size)}
            for m in range(self.layout.size):
                self._compute(m, step)
            for m in range(self.layout.size):
                self._receive(m, step, outgoing)
        self._check_kept()
        self._check_results()

    def _step_transfers(self, member: int, step: int, receives: bool) -> tuple[Transfer, ...]:
        steps = self.programs[member].steps
        if step >= len(steps):
            return ()
        return steps[step].receives if receives else steps[step].sends

    def _match(self, step: int) -> None:
        """Pairwise, in order: the k-th send from a to b on a lane meets the k-th receive of b from a."""
        sent: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
        awaited: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
        for m in range(self.layout.size):
            for t in self._step_transfers(m, step, receives=False):
                self._check_transfer(m, step, t)
                sent[m, t.peer, t.lane].append(t)
            for t in self._step_transfers(m, step, receives=True):
                self._check_transfer(m, step, t)
                awaited[t.peer, m, t.lane].append(t)
        for key in sorted({*sent, *awaited}):
            a, b, lane = key
            left, right = sent[key], awaited[key]
            where = f"{self.name} step {step}, member {a} to {b}, lane {lane}"
            if len(left) != len(right):
                raise ProgramError(f"{where}: {len(left)} sends but {len(right)} receives")
            for s, r in zip(left, right, strict=True):
                if (s.kind, s.chunks, s.heads, s.final) != (r.kind, r.chunks, r.heads, r.final):
                    raise ProgramError(f"{where}: sends {s} but the receiver expects {r}")

    def _check_transfer(self, member: int, step: int, transfer: Transfer) -> None:
        where = f"{self.name} step {step}, member {member}"
        if not 0 <= transfer.peer < self.layout.size or transfer.peer == member:
            raise ProgramError(f"{where}: peer {transfer.peer} is not another member of a group of {self.layout.size}")
        if transfer.lane not in (0, 1):
            raise ProgramError(f"{where}: lane {transfer.lane} is neither 0 nor 1")
        if not transfer.chunks or sum(map(self.layout.tokens, transfer.chunks)) == 0:
            raise ProgramError(f"{where}: an empty transfer ({transfer})")

    def _cells(self, transfer: Transfer) -> list[Cell]:
        heads = range(*transfer.heads)
        return [(transfer.kind, chunk, head) for chunk in transfer.chunks for head in heads]

    def _send(self, member: int, step: int) -> list[tuple[Transfer, dict[Cell, Counter[Pair]]]]:
        state, parcels = self.members[member], []
        for transfer in self._step_transfers(member, step, receives=False):
            parcel: dict[Cell, Counter[Pair]] = {}
            for cell in self._cells(transfer):
                if transfer.kind.is_accumulator:
                    if cell not in state.sums:
                        raise ProgramError(f"{self.name} step {step}: member {member} sends {_name({cell})}, has none")
                    parcel[cell] = state.sums.pop(cell)
                elif state.inputs[cell] < 1:
                    raise ProgramError(f"{self.name} step {step}: member {member} sends {_name({cell})}, has none")
            parcels.append((transfer, parcel))
        return parcels

    def _compute(self, member: int, step: int) -> None:
        steps, state = self.programs[member].steps, self.members[member]
        for tile in steps[step].tiles if step < len(steps) else ():
            for q in tile.queries:
                for k in tile.keys:
                    for head in range(*tile.heads):
                        self._compute_pair(member, step, state, q, k, head)

    def _compute_pair(self, member: int, step: int, state: _Member, q: int, k: int, head: int) -> None:
        key_head = head // self.heads.group
        needs = [(Kind.Q, q, head), (Kind.KV, k, key_head)] + ([(Kind.DO, q, head)] if self.backward else [])
        for cell in needs:
            if state.inputs[cell] < 1:
                raise ProgramError(f"{self.name} step {step}: member {member} computes with {_name({cell})}, has none")
        if self.backward:
            state.sums[Kind.DQ, q, head][q, k, head] += 1
            state.sums[Kind.DKV, k, key_head][q, k, head] += 1
        else:
            state.sums[Kind.OUT, q, head][q, k, head] += 1

    def _receive(self, member: int, step: int, outgoing: Mapping[int, list]) -> None:
        state = self.members[member]
        for source, parcels in outgoing.items():
            for transfer, parcel in parcels:
                if transfer.peer != member:
                    continue
                for cell in self._cells(transfer):
                    if transfer.kind.is_accumulator:
                        state.sums[cell].update(parcel[cell])
                    elif state.inputs[cell] > 0:
                        raise ProgramError(
                            f"{self.name} step {step}: member {source} sends {_name({cell})} to {member}, which has it"
                        )
                    else:
                        state.inputs[cell] += 1

    def _check_kept(self) -> None:
        for member, program in enumerate(self.programs):
            missing = {cell for cell in _expand_kept(program) if self.members[member].inputs[cell] < 1}
            if missing:
                raise ProgramError(f"{self.name}: member {member} keeps {_name(missing)}, which it never has")

    def _check_results(self) -> None:
        expected = self._expected()
        for member, state in enumerate(self.members):
            for cell, pairs in state.sums.items():
                owner = self.layout.owners[cell[1]]
                if pairs and owner != member:
                    raise ProgramError(f"{self.name}: a partial {_name({cell})} is left at {member}, owner is {owner}")
        for cell, pairs in expected.items():
            found = self.members[self.layout.owners[cell[1]]].sums.get(cell, Counter())
            for pair in pairs:
                if found[pair] != 1:
                    q, k, head = pair
                    times = f"{found[pair]} times"
                    raise ProgramError(
                        f"{self.name}: queries of chunk {q} with keys of chunk {k}, head {head}, reach {_name({cell})}"
                        f" {times}, not once"
                    )

    def _expected(self) -> dict[Cell, set[Pair]]:
        """Per accumulator the chunk pairs that the mask allows; other pairs hold nothing and may or may not be named."""
        expected: dict[Cell, set[Pair]] = defaultdict(set)
        count = len(self.layout.chunks)
        for q in range(count):
            for k in range(count):
                if not self._sees(q, k):
                    continue
                for head in range(self.heads.query):
                    if self.backward:
                        expected[Kind.DQ, q, head].add((q, k, head))
                        expected[Kind.DKV, k, head // self.heads.group].add((q, k, head))
                    else:
                        expected[Kind.OUT, q, head].add((q, k, head))
        return expected

    def _sees(self, q: int, k: int) -> bool:
        chunks = self.layout.chunks
        return any(self.mask.sees_any(queries, keys) for queries in chunks[q] for keys in chunks[k])


# ---------------------------------------------------------------- exchange of a whole slot


@dataclass(frozen=True, kw_only=True)
class Message:
    """One operation of a rank's grouped call: a send to, or a receive from, ``peer``."""

    peer: int
    is_send: bool
    tag: object
    """What both ends agree on (sequence, kind, chunks, heads); compared between the ends."""
    lane: int = 0


Rounds = Sequence[Sequence[Message]]  # one rank's grouped calls, in the order in which it posts them


def check_exchange(rounds: Mapping[int, Rounds]) -> None:
    """Raises :class:`ProgramError` unless all ranks' grouped calls can complete, in the order given.

    NCCL's semantics, the stricter of the two backends: per communicator (lane) a rank runs one grouped call after the
    other, and a call ends only when each of its operations has met its counterpart inside the call that the peer is
    running; operations of one pair of ranks meet in the order in which they were posted. A rank posts the calls of a round
    on both lanes together and begins the next round when both have ended.
    """
    position = dict.fromkeys(rounds, 0)
    waiting = {rank: _pending(calls, 0) for rank, calls in rounds.items()}
    progress = True
    while progress:
        progress = False
        for rank in sorted(rounds):
            for message in list(waiting[rank]):
                if message.is_send and _meet(rank, message, waiting):
                    progress = True
        for rank in sorted(rounds):
            while not waiting[rank] and position[rank] < len(rounds[rank]):
                position[rank] += 1
                waiting[rank] = _pending(rounds[rank], position[rank])
                progress = True
    stuck = {rank: waiting[rank][0] for rank in rounds if waiting[rank]}
    if stuck:
        rank = min(stuck)
        message = stuck[rank]
        verb = "send to" if message.is_send else "receive from"
        others = ", ".join(f"rank {r} in round {position[r]}" for r in sorted(stuck)[:8])
        raise ProgramError(
            f"deadlock: rank {rank} waits in round {position[rank]} for its {verb} rank {message.peer}"
            f" ({message.tag}); stuck: {others}"
        )


def _pending(calls: Rounds, position: int) -> list[Message]:
    return list(calls[position]) if position < len(calls) else []


def _meet(rank: int, send: Message, waiting: dict[int, list[Message]]) -> bool:
    """Completes ``send`` if the peer's running call holds its counterpart."""
    first = next(m for m in waiting[rank] if m.is_send and m.peer == send.peer and m.lane == send.lane)
    if first is not send:
        return False
    for other in waiting.get(send.peer, ()):
        if not other.is_send and other.peer == rank and other.lane == send.lane:
            if other.tag != send.tag:
                raise ProgramError(f"rank {rank} sends {send.tag} to rank {send.peer}, which expects {other.tag}")
            waiting[rank].remove(send)
            waiting[send.peer].remove(other)
            return True
    return False
