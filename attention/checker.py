"""Proves attention programs right before they run: coverage, availability, matching.

:func:`check_sequence` walks the programs of all members of one group in both directions, symbolically. What is proved:

- every (query, key) pair that the mask allows is computed exactly once for every head, in forward and in backward, and
  its contribution ends at the owner of the query (OUT, DQ) and of the key (DKV);
- a member sends, reads and merges only what it has at that moment, and receives no input twice;
- every send has its receive, in the same step, with the same chunks, heads and lane;
- an accumulator marked ``final`` is complete when it is sent;
- backward finds kept only what forward keeps, and forward keeps whole messages, as they arrived.

Deadlock freedom of a whole slot is :mod:`hdp.attention.exchange`'s part, bytes and buffers :mod:`hdp.attention.counts`'.

[Note: pairs as bits] The contributions in an accumulator are one integer: bit ``k`` of OUT or DQ of query chunk ``q`` stands
for key chunk ``k``, bit ``q`` of DKV of key chunk ``k`` for query chunk ``q``. Only pairs that the mask allows have bits.
Adding two integers that share a bit is a pair computed twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hdp.attention.blocks import HeadBlocks
from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step, Tile, Transfer, Value
from hdp.attention.schedules.sight import Sight, sight_of

Cell = tuple[Kind, int, int]  # kind, chunk, block of heads (inputs: of the kind's heads; sums: of query heads)


class ProgramError(ValueError):
    """A program that would compute something wrong or hang. Names member, step and value."""


def check_sequence(
    layout: Layout, mask: Mask, heads: HeadCount, forward: Sequence[RankProgram], backward: Sequence[RankProgram]
) -> None:
    """Raises :class:`ProgramError` unless both directions are right. One program a member, in order of members."""
    for name, programs in (("forward", forward), ("backward", backward)):
        if len(programs) != layout.size:
            raise ProgramError(f"{name}: {len(programs)} programs for a group of {layout.size}")
        _check_ranges(layout, heads, name, programs)
    blocks = HeadBlocks(heads, (*forward, *backward))
    for member, (kept, expected) in enumerate(zip(forward, backward, strict=True)):
        missing = _cells(blocks, expected.keep) - _cells(blocks, kept.keep)
        if missing:
            raise ProgramError(
                f"backward of member {member} expects {_name(min(missing, key=_order))}, which forward does not keep"
            )
    sight = sight_of(layout, mask)
    _Direction(sight, heads, blocks, forward, is_backward=False).check()
    _Direction(sight, heads, blocks, backward, is_backward=True).check()


def _check_ranges(layout: Layout, heads: HeadCount, name: str, programs: Sequence[RankProgram]) -> None:
    """Chunks, heads, peers and lanes exist; nothing is empty or named twice."""
    for member, program in enumerate(programs):
        for number, step in enumerate(program.steps):
            where = f"{name} step {number}, member {member}"
            for transfer in (*step.sends, *step.receives):
                _check_value(layout, heads, where, transfer.kind, transfer.chunks, transfer.heads)
                if not 0 <= transfer.peer < layout.size or transfer.peer == member:
                    raise ProgramError(
                        f"{where}: peer {transfer.peer} is not another member of a group of {layout.size}"
                    )
                if transfer.lane not in (0, 1):
                    raise ProgramError(f"{where}: lane {transfer.lane} is neither 0 nor 1")
                if not sum(map(layout.tokens, transfer.chunks)):
                    raise ProgramError(f"{where}: an empty transfer ({transfer})")
            for tile in step.tiles:
                for chunks in (tile.queries, tile.keys):
                    _check_value(layout, heads, where, Kind.Q, chunks, tile.heads)
        for value in program.keep:
            _check_value(layout, heads, f"{name} keep, member {member}", value.kind, value.chunks, value.heads)


def _check_value(
    layout: Layout, heads: HeadCount, where: str, kind: Kind, chunks: tuple[int, ...], used: tuple[int, int]
) -> None:
    if not 0 <= used[0] < used[1] <= heads.of(kind)[1]:
        raise ProgramError(f"{where}: heads {used} of {kind.name} are not in 0..{heads.of(kind)[1]}")
    if len(set(chunks)) != len(chunks) or not all(0 <= c < len(layout.chunks) for c in chunks):
        raise ProgramError(f"{where}: chunks {chunks} are not distinct chunks of 0..{len(layout.chunks) - 1}")


def _cells(blocks: HeadBlocks, values: Iterable[Value | Transfer]) -> set[Cell]:
    return {(v.kind, chunk, block) for v in values for chunk in v.chunks for block in blocks.of(v.kind, v.heads)}


def _order(cell: Cell) -> tuple[str, int, int]:
    return cell[0].value, cell[1], cell[2]


def _name(cell: Cell) -> str:
    return f"{cell[0].name} of chunk {cell[1]}, head block {cell[2]}"


Parcel = tuple[Transfer, dict[Cell, int]]


@dataclass
class _Member:
    inputs: set[Cell] = field(default_factory=set)
    sums: dict[Cell, int] = field(default_factory=dict)


class _Direction:
    """Symbolic execution of one direction, all members in lockstep."""

    def __init__(
        self, sight: Sight, heads: HeadCount, blocks: HeadBlocks, programs: Sequence[RankProgram], is_backward: bool
    ) -> None:
        self.layout, self.heads, self.blocks, self.programs = sight.layout, heads, blocks, programs
        self.is_backward, self.name = is_backward, "backward" if is_backward else "forward"
        count = range(len(self.layout.chunks))
        self.seen_by_query = [sum(1 << k for k in count if sight.sees(q, k)) for q in count]
        self.seen_by_key = [sum(1 << q for q in count if self.seen_by_query[q] >> k & 1) for k in count]
        self.members = [self._start(m, program) for m, program in enumerate(programs)]

    def _start(self, member: int, program: RankProgram) -> _Member:
        owned = self.layout.owned(member)
        kinds = (Kind.Q, Kind.KV, Kind.DO) if self.is_backward else (Kind.Q, Kind.KV)
        own = [Value(kind=kind, chunks=owned, heads=self.heads.of(kind)) for kind in kinds]
        return _Member(inputs=_cells(self.blocks, (*own, *(program.keep if self.is_backward else ()))))

    def check(self) -> None:
        for number in range(max((len(p.steps) for p in self.programs), default=0)):
            steps = [p.steps[number] if number < len(p.steps) else Step() for p in self.programs]
            where = f"{self.name} step {number}"
            self._match(where, steps)
            parcels = [self._send(where, m, step) for m, step in enumerate(steps)]
            for m, step in enumerate(steps):
                for tile in step.tiles:
                    self._compute(f"{where}, member {m}", self.members[m], tile)
            for source, sent in enumerate(parcels):
                for transfer, sums in sent:
                    self._receive(where, source, transfer, sums)
        self._check_kept()
        self._check_results()

    def _match(self, where: str, steps: Sequence[Step]) -> None:
        """Pairwise, in order: the k-th send from a to b on a lane meets the k-th receive of b from a."""
        sent: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
        awaited: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
        for m, step in enumerate(steps):
            for t in step.sends:
                sent[m, t.peer, t.lane].append(t)
            for t in step.receives:
                awaited[t.peer, m, t.lane].append(t)
        for key in sorted(sent.keys() | awaited.keys()):
            left, right = sent[key], awaited[key]
            names = f"{where}, member {key[0]} to {key[1]}, lane {key[2]}"
            if len(left) != len(right):
                raise ProgramError(f"{names}: {len(left)} sends but {len(right)} receives")
            for s, r in zip(left, right, strict=True):
                if (s.kind, s.chunks, s.heads, s.final) != (r.kind, r.chunks, r.heads, r.final):
                    raise ProgramError(f"{names}: sends {s} but the receiver expects {r}")

    def _send(self, where: str, member: int, step: Step) -> list[Parcel]:
        state, parcels = self.members[member], []
        for transfer in step.sends:
            parcel: dict[Cell, int] = {}
            for cell in sorted(_cells(self.blocks, (transfer,)), key=_order):
                if transfer.kind.is_accumulator:
                    parcel.update(self._give(where, member, cell, transfer.final))
                elif cell not in state.inputs:
                    raise ProgramError(f"{where}: member {member} sends {_name(cell)}, has none")
            parcels.append((transfer, parcel))
        return parcels

    def _give(self, where: str, member: int, cell: Cell, final: bool) -> dict[Cell, int]:
        """Takes a sum away, one cell a block of query heads; a DKV may hold only some of its key head's query heads."""
        kind, chunk, block = cell
        cuts = self.blocks.key_cuts if kind.is_per_key else self.blocks.query_cuts
        cells = [(kind, chunk, b) for b in self.blocks.queries(kind, (cuts[block], cuts[block + 1]))]
        sums = self.members[member].sums
        if not any(c in sums for c in cells):
            raise ProgramError(f"{where}: member {member} sends {_name(cell)}, has none")
        if self.layout.owners[chunk] == member:
            raise ProgramError(f"{where}: member {member} sends away its own {_name(cell)}")
        if final and any(sums.get(c, 0) != self._all_pairs(c) for c in cells):
            raise ProgramError(f"{where}: member {member} sends {_name(cell)} as final, but it is not complete")
        return {c: sums.pop(c) for c in cells if c in sums}

    def _compute(self, where: str, state: _Member, tile: Tile) -> None:
        blocks = self.blocks.of(Kind.Q, tile.heads)
        key_blocks = sorted({self.blocks.key_of(b) for b in blocks})
        kinds = (Kind.Q, Kind.DO) if self.is_backward else (Kind.Q,)
        needs = [(kind, q, b) for kind in kinds for q in tile.queries for b in blocks]
        needs += [(Kind.KV, k, b) for k in tile.keys for b in key_blocks]
        for cell in needs:
            if cell not in state.inputs:
                raise ProgramError(f"{where} computes with {_name(cell)}, has none")
        queries, keys = sum(1 << q for q in tile.queries), sum(1 << k for k in tile.keys)
        for b in blocks:
            for q in tile.queries:
                kind = Kind.DQ if self.is_backward else Kind.OUT
                self._add(where, state, (kind, q, b), self.seen_by_query[q] & keys)
            if self.is_backward:
                for k in tile.keys:
                    self._add(where, state, (Kind.DKV, k, b), self.seen_by_key[k] & queries)

    def _add(self, where: str, state: _Member, cell: Cell, pairs: int) -> None:
        there = state.sums.get(cell, 0)
        if there & pairs:
            other = (there & pairs).bit_length() - 1
            raise ProgramError(f"{where}: {_name(cell)} with chunk {other} is computed twice")
        state.sums[cell] = there | pairs

    def _receive(self, where: str, source: int, transfer: Transfer, sums: dict[Cell, int]) -> None:
        state = self.members[transfer.peer]
        for cell, pairs in sums.items():
            self._add(f"{where}, member {transfer.peer}, from {source}", state, cell, pairs)
        if not transfer.kind.is_accumulator:
            cells = _cells(self.blocks, (transfer,))
            if not state.inputs.isdisjoint(cells):
                cell = min(state.inputs & cells, key=_order)
                raise ProgramError(f"{where}: member {source} sends {_name(cell)} to {transfer.peer}, which has it")
            state.inputs |= cells

    def _check_kept(self) -> None:
        for member, program in enumerate(self.programs):
            missing = _cells(self.blocks, program.keep) - self.members[member].inputs
            if missing:
                raise ProgramError(
                    f"{self.name}: member {member} keeps {_name(min(missing, key=_order))}, which it never has"
                )
            if not self.is_backward:
                received = {(t.kind, t.chunks, t.heads) for step in program.steps for t in step.receives}
                own = set(self.layout.owned(member))
                for value in program.keep:
                    if (value.kind, value.chunks, value.heads) not in received and not own.issuperset(value.chunks):
                        raise ProgramError(f"{self.name}: member {member} keeps {value}, which is not a whole message")

    def _all_pairs(self, cell: Cell) -> int:
        return (self.seen_by_key if cell[0].is_per_key else self.seen_by_query)[cell[1]]

    def _check_results(self) -> None:
        owners = self.layout.owners
        for member, state in enumerate(self.members):
            for cell, pairs in state.sums.items():
                if pairs and owners[cell[1]] != member:
                    raise ProgramError(
                        f"{self.name}: a partial {_name(cell)} is left at {member}, owner is {owners[cell[1]]}"
                    )
        kinds = (Kind.DQ, Kind.DKV) if self.is_backward else (Kind.OUT,)
        for kind in kinds:
            for chunk, owner in enumerate(owners):
                for block in self.blocks.of(Kind.Q, (0, self.heads.query)):
                    self._check_result(owner, (kind, chunk, block))

    def _check_result(self, owner: int, cell: Cell) -> None:
        missing = self._all_pairs(cell) & ~self.members[owner].sums.get(cell, 0)
        if missing:
            raise ProgramError(
                f"{self.name}: {_name(cell)} (first query head {self.blocks.first_head(cell[2])}) never meets chunk"
                f" {missing.bit_length() - 1}: a pair that the mask allows is not computed, or its result is lost"
            )
