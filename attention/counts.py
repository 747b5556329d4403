"""Counts bytes, tiles and buffers of a program by walking it, one member at a time.

The figures that the choice by cost, the planner and the simulator use; ``hdp.attention.costs`` gives them in closed form.

[Note: buffers] What a member holds beyond its own shard and results, step by step:

- an input that it receives: from the step in which it arrives to the last step that computes with it or sends it on; an
  input that forward kept: from the start of backward to its last use;
- a sum for tokens of another member: from its first tile or arrival to the step that sends it;
- a partial that is merged on arrival: the step in which it arrives.

[Note: calls] What arrived together lies together; chunks of a step's tiles that did not are gathered first, in the order of
their tokens. A kernel call reads queries that lie together and keys that lie together, so a tile takes a call for each
rectangle of the mask between such blocks.

Copies are no buffers here: what is gathered for a kernel, packed for sending, or kept until it has been sent. The arena holds
them as well, see ``hdp.attention.footprint``.

What forward keeps for backward is counted apart, and not as a buffer of forward once it is kept: it is in ``kept_bytes``, this
member's own tokens where they are kept with the others' included.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from hdp.attention.blocks import HeadBlocks
from hdp.attention.layout import Layout, Range, Ranges
from hdp.attention.mask import Mask, Shape, decompose
from hdp.attention.messages import messages
from hdp.attention.program import HeadCount, Heads, Kind, RankProgram, Tile, Transfer


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of what travels."""

    head_dim: int
    model_bytes: int
    """Bytes of an element of q, k, v and of complete results."""
    sum_bytes: int = 4
    """Bytes of an element of partial sums, lse and delta."""
    input_bytes: int | None = None
    """Bytes of an element of q, k, v on their way, if they travel in another dtype; None: ``model_bytes``."""

    def per_token(self, kind: Kind, final: bool = False) -> int:
        """Bytes of one token and head (key/value head for KV, DKV) of a message."""
        if kind is Kind.Q or kind is Kind.KV:
            travelling = self.model_bytes if self.input_bytes is None else self.input_bytes
            return self.head_dim * travelling * (1 + kind.is_per_key)
        if kind is Kind.DO:
            return self.head_dim * self.model_bytes + 2 * self.sum_bytes
        result = self.head_dim * (self.model_bytes if final else self.sum_bytes)
        if kind is Kind.OUT:
            return result + self.sum_bytes
        return result * (1 + kind.is_per_key)

    def of(self, transfer: Transfer, layout: Layout) -> int:
        """Bytes of a transfer."""
        tokens = sum(layout.tokens(c) for c in transfer.chunks)
        count = transfer.heads[1] - transfer.heads[0]
        return tokens * count * self.per_token(transfer.kind, transfer.final)


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """One step of one member."""

    area: int
    """Allowed (query, key) pairs times query heads."""
    sent: dict[int, int]
    """Bytes by destination (member)."""
    received: dict[int, int]
    """Bytes by source (member)."""
    messages: int
    """Messages sent and received; sequences of one micro-batch share them."""
    calls: int
    """Kernel calls, where adjacent ones are not fused. See [Note: calls]."""
    squares: tuple[tuple[int, int], ...]
    """(tokens, heads) of calls that see as many queries as keys, causally: part of what such a kernel computes is masked."""
    results: int
    """Bytes that its kernel calls hand over, which are merged or added up."""
    buffer_bytes: int
    """See [Note: buffers]."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """One direction of one member."""

    steps: tuple[StepCount, ...]
    kept_bytes: int
    """Bytes that forward keeps for backward, or backward finds."""

    @property
    def sent_bytes(self) -> int:
        return sum(sum(s.sent.values()) for s in self.steps)

    @property
    def received_bytes(self) -> int:
        return sum(sum(s.received.values()) for s in self.steps)

    @property
    def area(self) -> int:
        """Pairs times query heads that this member computes."""
        return sum(s.area for s in self.steps)

    @property
    def peak_bytes(self) -> int:
        return max((s.buffer_bytes for s in self.steps), default=0)


def count(
    program: RankProgram,
    layout: Layout,
    mask: Mask,
    heads: HeadCount,
    member: int,
    sizes: Sizes,
    backward: bool,
) -> Count:
    """Walks one member's program of one direction."""
    counter = _Counter(layout, heads, member, sizes, program)
    buffers = counter.buffers(program, backward)
    blocks = _Blocks(layout, mask, heads, member, program, backward, sizes)
    steps = []
    for number, step in enumerate(program.steps):
        sent: dict[int, int] = defaultdict(int)
        received: dict[int, int] = defaultdict(int)
        for transfers, by_peer in ((step.sends, sent), (step.receives, received)):
            for t in transfers:
                by_peer[t.peer] += counter.bytes(t.kind, t.chunks, t.heads, t.final)
        calls = blocks.calls(step.tiles)
        steps.append(
            StepCount(
                area=sum(_area(layout, mask, tile) for tile in step.tiles),
                sent=dict(sent),
                received=dict(received),
                messages=len(messages(step.sends)) + len(messages(step.receives)),
                calls=calls.count,
                squares=tuple(sorted(calls.squares.items())),
                results=calls.results,
                buffer_bytes=buffers[number],
            )
        )
        blocks.arrive(step.receives)
    kept = sum(counter.bytes(v.kind, v.chunks, v.heads) for v in program.keep)
    return Count(steps=tuple(steps), kept_bytes=kept)


def _area(layout: Layout, mask: Mask, tile: Tile) -> int:
    pairs = mask.area_of(_joined(layout, tile.queries), _joined(layout, tile.keys))
    return pairs * (tile.heads[1] - tile.heads[0])


@dataclass
class _Calls:
    """Of one step."""

    count: int = 0
    squares: Counter[int] = field(default_factory=Counter)
    """Heads by tokens."""
    results: int = 0


class _Blocks:
    """Which chunks lie together. See [Note: calls]."""

    def __init__(
        self,
        layout: Layout,
        mask: Mask,
        heads: HeadCount,
        member: int,
        program: RankProgram,
        backward: bool,
        sizes: Sizes,
    ) -> None:
        # Of a query and of a key, for each head: what a call hands over.
        self.per_query = sizes.per_token(Kind.DQ if backward else Kind.OUT)
        self.per_key = sizes.per_token(Kind.DKV) if backward else 0
        self.layout, self.mask, self.group, self.own = layout, mask, heads.group, layout.owned(member)
        self.is_plain = all(len(ranges) == 1 for ranges in layout.chunks)
        self.came: dict[tuple[Kind, int], tuple[int, ...]] = {}
        if backward:
            kept: dict[tuple[Kind, Heads, int], list[int]] = defaultdict(list)
            for value in program.keep:
                kept[value.kind, value.heads, value.block] += value.chunks
            for (kind, _, _), chunks in kept.items():
                self._note(kind, chunks)

    def arrive(self, transfers: Iterable[Transfer]) -> None:
        for transfer in transfers:
            self._note(transfer.kind, transfer.chunks)

    def _note(self, kind: Kind, chunks: Iterable[int]) -> None:
        if not kind.is_accumulator:
            chunks = tuple(chunks)
            self.came.update(dict.fromkeys(((kind, c) for c in chunks), chunks))

    def calls(self, tiles: Iterable[Tile]) -> _Calls:
        """Kernel calls of the tiles of one step."""
        tiles = list(tiles)
        for kind, chunks in (
            (Kind.Q, sorted({c for t in tiles for c in t.queries})),
            (Kind.KV, sorted({c for t in tiles for c in t.keys})),
        ):
            if self.is_plain and len({self.came.get((kind, c), ()) for c in chunks}) > 1:
                self._note(kind, chunks)
        calls = _Calls()
        for tile in tiles:
            self._count(tile, calls)
        return calls

    def _count(self, tile: Tile, calls: _Calls) -> None:
        start, stop = tile.heads
        cuts = {start, stop, -(-start // self.group) * self.group, stop // self.group * self.group}
        pieces = sum(start <= cut < stop for cut in cuts)
        queries, keys = self._runs(Kind.Q, tile.queries), self._runs(Kind.KV, tile.keys)
        key_heads = -(-stop // self.group) - start // self.group
        for r in (r for q in queries for k in keys for r in decompose(self.mask, q, k)):
            rows, columns = r.row_stop - r.row_start, r.key_stop - r.key_start
            calls.count += pieces
            calls.results += rows * (stop - start) * self.per_query + columns * key_heads * self.per_key
            if r.shape is Shape.CAUSAL:
                calls.squares[rows] += stop - start

    def _runs(self, kind: Kind, chunks: tuple[int, ...]) -> list[Ranges]:
        """Token ranges of chunks that lie one after the other; this member's own do from the start."""
        is_home = set(self.own).issuperset(chunks)
        runs: list[list[Range]] = []
        end: tuple[tuple[int, ...], int] | None = None
        for chunk in sorted(chunks, key=lambda c: self.layout.chunks[c][0]):
            ranges = [r for r in self.layout.chunks[chunk] if r[0] < r[1]]
            if not ranges:
                continue
            together = self.own if is_home else self.came.get((kind, chunk)) or self._own(chunk)
            place = sorted(together, key=lambda c: self.layout.chunks[c][0]).index(chunk)
            if (together, place) == end and runs[-1][-1][1] <= ranges[0][0]:
                runs[-1] += ranges
            else:
                runs.append(ranges)
            end = together, place + 1
        return [tuple(run) for run in runs]

    def _own(self, chunk: int) -> tuple[int, ...]:
        return self.layout.owned(self.layout.owners[chunk])


def _joined(layout: Layout, chunks: Iterable[int]) -> Ranges:
    """Token ranges of some chunks, ascending, touching ones joined."""
    ranges: list[Range] = []
    for start, stop in sorted(r for c in chunks for r in layout.chunks[c] if r[0] < r[1]):
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return tuple(ranges)


Cell = tuple[Kind, int, int]  # kind, chunk, block of the kind's heads


class _Counter:
    """Lives of the values that do not belong to this member."""

    def __init__(self, layout: Layout, heads: HeadCount, member: int, sizes: Sizes, program: RankProgram) -> None:
        self.layout, self.member, self.sizes = layout, member, sizes
        self.blocks = HeadBlocks(heads, (program,))
        self.lives: list[list[int]] = []  # [first step, last step, bytes]
        self.inputs: dict[Cell, list[int]] = {}
        self.sums: dict[Cell, list[int]] = {}

    def bytes(self, kind: Kind, chunks: Iterable[int], heads: tuple[int, int], final: bool = False) -> int:
        tokens = sum(self.layout.tokens(c) for c in chunks)
        return tokens * (heads[1] - heads[0]) * self.sizes.per_token(kind, final)

    def buffers(self, program: RankProgram, backward: bool) -> list[int]:
        """Bytes held in each step."""
        kept = {cell for v in program.keep for cell in self._cells(v.kind, v.chunks, v.heads)}
        kept = {cell for cell in kept if self.layout.owners[cell[1]] != self.member}
        if backward:
            for cell in sorted(kept, key=lambda c: (c[0].value, c[1], c[2])):
                self.inputs[cell] = self._begin(cell, 0)
        for number, step in enumerate(program.steps):
            for transfer in step.sends:
                for cell in self._cells(transfer.kind, transfer.chunks, transfer.heads):
                    self._use(cell, number, is_last=transfer.kind.is_accumulator)
            for tile in step.tiles:
                self._compute(tile, number, backward)
            for transfer in step.receives:
                for cell in self._cells(transfer.kind, transfer.chunks, transfer.heads):
                    self._arrive(cell, number, transfer.final, is_kept=cell in kept and not backward)
        held = [0] * (len(program.steps) + 1)
        for first, last, size in self.lives:
            held[first] += size
            held[last + 1] -= size
        for number in range(1, len(held)):
            held[number] += held[number - 1]
        return held[:-1]

    def _cells(self, kind: Kind, chunks: Iterable[int], heads: tuple[int, int]) -> list[Cell]:
        blocks = self.blocks.of(kind, heads)
        return [(kind, chunk, block) for chunk in chunks for block in blocks]

    def _begin(self, cell: Cell, step: int, final: bool = False) -> list[int]:
        kind, chunk, block = cell
        size = self.layout.tokens(chunk) * self.blocks.count(kind, block) * self.sizes.per_token(kind, final)
        life = [step, step, size]
        self.lives.append(life)
        return life

    def _use(self, cell: Cell, step: int, is_last: bool = False) -> None:
        values = self.sums if cell[0].is_accumulator else self.inputs
        life = values.get(cell)
        if life is not None:
            life[1] = max(life[1], step)
        if is_last:
            values.pop(cell, None)

    def _compute(self, tile: Tile, step: int, backward: bool) -> None:
        keys = self.blocks.of(Kind.Q, tile.heads)
        key_blocks = range(self.blocks.key_of(keys[0]), self.blocks.key_of(keys[-1]) + 1)
        for q in tile.queries:
            for block in keys:
                self._use((Kind.Q, q, block), step)
                if backward:
                    self._use((Kind.DO, q, block), step)
                self._sum((Kind.DQ if backward else Kind.OUT, q, block), step)
        for k in tile.keys:
            for block in key_blocks:
                self._use((Kind.KV, k, block), step)
                if backward:
                    self._sum((Kind.DKV, k, block), step)

    def _sum(self, cell: Cell, step: int) -> None:
        if self.layout.owners[cell[1]] == self.member:
            return
        if cell not in self.sums:
            self.sums[cell] = self._begin(cell, step)
        self._use(cell, step)

    def _arrive(self, cell: Cell, step: int, final: bool, is_kept: bool) -> None:
        if not cell[0].is_accumulator:
            life = self._begin(cell, step)
            self.inputs[cell] = life
            if is_kept:
                life[2] = 0  # its place is in what is kept
            return
        life = self._begin(cell, step, final)
        if cell not in self.sums and self.layout.owners[cell[1]] != self.member:
            self.sums[cell] = life
