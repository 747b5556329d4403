"""Where each chunk's values lie while a program is outlined: numbered tensors, nominal rows and heads.

A value of one chunk may lie in pieces, some heads here and some there (Ulysses in slices); each piece is a :class:`Place`.
:class:`Places` finds them, makes room for new ones, and knows which rows of an accumulator hold something already.
Rows are those of the nominal document: see [Note: nominal rows] in ``hdp.attention.bundle``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hdp.attention.arena import Filled
from hdp.attention.layout import Layout
from hdp.attention.lowered import COMPONENTS, Component, Geometry, Width, wire_width
from hdp.attention.program import Heads, Kind

Root = tuple[str | int, ...]
"""Buffers of one root lie one after the other in the arena: what is received together, what will leave together."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Nominal rows and heads of a numbered tensor ([rows, heads, head_dim] or [rows, heads])."""

    tensor: int
    start: int
    stop: int
    heads: Heads | None = None
    """None: all heads of the tensor."""


@dataclass(slots=True)
class Draft:
    """A buffer whose place in the arena is not decided yet."""

    chunks: tuple[int, ...]
    """What its rows are, document after document."""
    heads: int
    has_dim: bool
    width: Width
    born: int
    """Step of its first use."""
    died: int
    """Step of its last use."""
    root: Root


@dataclass(frozen=True, slots=True)
class Place:
    """Some heads of one value: one tensor per component, the same rows and heads in each."""

    tensors: tuple[int, ...]
    row: int
    rows: int
    heads: Heads
    """Heads of the layer that lie here."""
    base: int
    """Head of the layer that is the tensors' first."""
    count: int
    """Heads of the tensors."""

    def narrow(self, heads: Heads) -> Place:
        """The same rows, some of the heads."""
        return self if heads == self.heads else replace(self, heads=heads)

    def columns(self, heads: Heads) -> Heads | None:
        """Heads as the tensors number them; None: all."""
        relative = (heads[0] - self.base, heads[1] - self.base)
        return None if relative == (0, self.count) else relative


class Places:
    """All places of one bundle at one rank, in one direction. ``step`` is the step being outlined."""

    def __init__(self, geometry: Geometry, externals: tuple[str, ...], layout: Layout, member: int) -> None:
        self.geometry, self.externals, self.layout, self.member = geometry, externals, layout, member
        self.drafts: list[Draft] = []
        self.step = 0
        self._held: dict[tuple[Kind, int], list[Place]] = defaultdict(list)
        self._ready: dict[tuple[Kind, int], list[Place]] = defaultdict(list)
        self._sums: dict[int, Filled] = defaultdict(Filled)  # by the tensor of the first component
        self._roots = 0

    # ------------------------------------------------------------ tensors

    def external(self, name: str) -> int:
        return self.externals.index(name)

    def draft(self, tensor: int) -> Draft | None:
        """The buffer that a tensor is; None: one of the caller's."""
        index = tensor - len(self.externals)
        return None if index < 0 else self.drafts[index]

    def new_root(self) -> Root:
        """For buffers that lie with no others."""
        self._roots += 1
        return ("own", self._roots)

    def buffer(self, chunks: tuple[int, ...], heads: int, has_dim: bool, width: Width, root: Root) -> int:
        """A new tensor, alive in this step."""
        self.drafts.append(Draft(chunks, heads, has_dim, width, self.step, self.step, root))
        return len(self.externals) + len(self.drafts) - 1

    def room(
        self,
        kind: Kind,
        chunks: tuple[int, ...],
        heads: Heads,
        root: Root,
        *,
        travels: bool = False,
        final: bool = False,
        components: Sequence[Component] | None = None,
    ) -> tuple[int, ...]:
        """A tensor for each component of a value. ``travels``: in the dtypes of a message."""
        return tuple(
            self.buffer(
                chunks,
                heads[1] - heads[0],
                c.has_dim,
                wire_width(kind, c, final, self.geometry) if travels else c.width,
                root,
            )
            for c in components or COMPONENTS[kind]
        )

    def spread(
        self, tensors: tuple[int, ...], chunks: Iterable[int], heads: Heads, base: int, count: int
    ) -> list[Place]:
        """The places of chunks that lie one after the other in some tensors."""
        places, row = [], 0
        for chunk in chunks:
            tokens = self.layout.tokens(chunk)
            places.append(Place(tensors, row, tokens, heads, base, count))
            row += tokens
        return places

    def touch(self, tensor: int, extra: int = 0) -> None:
        """Keeps a buffer alive to this step, and ``extra`` more."""
        draft = self.draft(tensor)
        if draft is not None:
            draft.died = max(draft.died, self.step + extra)

    def ref(self, place: Place, component: int, start: int, stop: int, heads: Heads, extra: int = 0) -> Ref:
        """Rows [start, stop) of the place's tensor, and the layer's heads ``heads``."""
        tensor = place.tensors[component]
        self.touch(tensor, extra)
        return Ref(tensor, start, stop, place.columns(heads))

    def rows_of(self, place: Place, component: int, extra: int = 0) -> Ref:
        """All of the place."""
        return self.ref(place, component, place.row, place.row + place.rows, place.heads, extra)

    # ------------------------------------------------------------ where is what

    def hold(self, kind: Kind, chunk: int, place: Place) -> None:
        """What is here, as it travels."""
        self._held[kind, chunk].append(place)

    def make_ready(self, kind: Kind, chunk: int, place: Place) -> None:
        """What is here, as kernels read it (``READY``)."""
        self._ready[kind, chunk] = [*_without(self._ready[kind, chunk], place.heads), place]

    def replace(self, kind: Kind, chunk: int, place: Place) -> None:
        """Another place for what is held."""
        self._held[kind, chunk] = [*_without(self._held[kind, chunk], place.heads), place]

    def pieces(self, kind: Kind, chunk: int, heads: Heads, *, ready: bool = False) -> list[Place]:
        """What is here of these heads, ascending; may have gaps."""
        found = []
        for place in (self._ready if ready else self._held)[kind, chunk]:
            low, high = max(place.heads[0], heads[0]), min(place.heads[1], heads[1])
            if low < high:
                found.append(place.narrow((low, high)))
        return found if len(found) < 2 else sorted(found, key=lambda p: p.heads)

    def gaps(self, kind: Kind, chunk: int, heads: Heads) -> list[Heads]:
        """Which of these heads are not here."""
        gaps, position = [], heads[0]
        for place in self.pieces(kind, chunk, heads):
            if place.heads[0] > position:
                gaps.append((position, place.heads[0]))
            position = place.heads[1]
        return [*gaps, (position, heads[1])] if position < heads[1] else gaps

    def whole(self, kind: Kind, chunk: int, heads: Heads) -> list[Place]:
        """Where these heads lie, ascending. Raises ValueError unless all of them are here."""
        gaps = self.gaps(kind, chunk, heads)
        if gaps:
            raise self.missing(kind, chunk, gaps[0])
        return self.pieces(kind, chunk, heads)

    def missing(self, kind: Kind, chunk: int, heads: Heads) -> ValueError:
        """What the checker finds first in any program that it has seen."""
        return ValueError(
            f"step {self.step}: member {self.member} has no {kind.name} of chunk {chunk},"
            f" heads {heads[0]}..{heads[1] - 1}; the checker would have refused this program"
        )

    def in_order(self, chunks: Iterable[int]) -> tuple[int, ...]:
        """Chunks in the order of their tokens, each once."""
        return tuple(sorted(set(chunks), key=lambda c: self.layout.chunks[c][0]))

    def take(self, kind: Kind, chunk: int, heads: Heads) -> None:
        """Forgets these heads: an accumulator that was sent is no longer here."""
        self._held[kind, chunk] = _without(self._held[kind, chunk], heads)

    # ------------------------------------------------------------ accumulators

    def claim(
        self, place: Place, start: int, stop: int, heads: Heads, fills: list[Ref], fill_all: bool = False
    ) -> bool:
        """Marks rows of an accumulator as written. True: all were untouched. Untouched rows among others are emptied."""
        sums = self._sums[place.tensors[0]]
        missing = sums.missing(start, stop, heads)
        first = missing == [(start, stop, heads)] and not fill_all
        for a, b, some in missing if not first else ():
            fills += [self.ref(place, c, a, b, some) for c in range(len(place.tensors))]
        if missing:
            sums.add(start, stop, heads)
        return first

    def filled(self, place: Place) -> None:
        """What arrived here is complete."""
        self._sums[place.tensors[0]].add(place.row, place.row + place.rows, place.heads)

    def unfilled(self, kind: Kind, chunk: int) -> list[Ref]:
        """Rows of an accumulator that nothing was added to."""
        refs = []
        for place in self._held[kind, chunk]:
            stop = place.row + place.rows
            for a, b, heads in self._sums[place.tensors[0]].missing(place.row, stop, place.heads):
                refs += [self.ref(place, c, a, b, heads) for c in range(len(place.tensors))]
        return refs


def _without(places: Iterable[Place], heads: Heads) -> list[Place]:
    rest: list[Place] = []
    for place in places:
        start, stop = place.heads
        parts = (start, min(stop, heads[0])), (max(start, heads[1]), stop)
        rest += [place.narrow(part) for part in parts if part[0] < part[1]]
    return rest
