"""Where each chunk's values lie while a program is lowered: numbered tensors, rows and heads.

A value of one chunk may lie in pieces, some heads here and some there (Ulysses in slices); each piece is a :class:`Place`.
:class:`Places` finds them, makes room for new ones, and knows which rows of an accumulator hold something already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hdp.attention.arena import Draft, Filled
from hdp.attention.lowered import COMPONENTS, Geometry, Ref, Width, wire_width
from hdp.attention.messages import arrange, goes_joined
from hdp.attention.program import Heads, Kind


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
    is_wire: bool = False
    """Inputs in the dtype in which they travel; calls need them widened."""

    def narrow(self, heads: Heads) -> Place:
        """The same rows, some of the heads."""
        return self if heads == self.heads else replace(self, heads=heads)

    def columns(self, heads: Heads) -> Heads | None:
        """Heads as the tensors number them; None: all."""
        relative = (heads[0] - self.base, heads[1] - self.base)
        return None if relative == (0, self.count) else relative


class Places:
    """All places of one rank's micro-batch in one direction. ``step`` is the step being lowered."""

    def __init__(self, geometry: Geometry, externals: tuple[str, ...]) -> None:
        self.geometry, self.externals = geometry, externals
        self.drafts: list[Draft] = []
        self.step = 0
        self._places: dict[tuple[int, Kind, int], list[Place]] = defaultdict(list)  # task, kind, chunk
        self._sums: dict[int, Filled] = defaultdict(Filled)  # by the tensor of the first component

    # ------------------------------------------------------------ tensors

    def external(self, name: str) -> int:
        return self.externals.index(name)

    def buffer(self, rows: int, heads: int, has_dim: bool, width: Width, kept_offset: int = -1, extra: int = 0) -> int:
        """A new tensor, alive in this step and ``extra`` more."""
        self.drafts.append(Draft(rows, heads, has_dim, width, self.step, self.step + extra, kept_offset))
        return len(self.externals) + len(self.drafts) - 1

    def part(self, root: int, offset: int, rows: int, heads: int, has_dim: bool, width: Width) -> int:
        """A tensor in the bytes of another one, ``offset`` bytes behind its start; lives as long as that."""
        index = root - len(self.externals)
        whole = self.drafts[index]
        kept = whole.kept_offset + offset if whole.kept else -1
        self.drafts.append(Draft(rows, heads, has_dim, width, whole.born, whole.died, kept, index, offset))
        return len(self.externals) + len(self.drafts) - 1

    def joint(
        self,
        parts: Sequence[tuple[Kind, int, Heads, bool]],
        *,
        kept_offset: int = -1,
        travels: bool = True,
        extra: int = 0,
        apart: bool = False,
    ) -> tuple[int, list[Place]]:
        """Room for some values (kind, rows, heads, complete) one after the other: the tensor of all bytes, the places.

        ``apart``: a buffer for each component instead, unless they lie in what is kept; the tensor is that of the last.
        """
        starts, _, size = arrange(
            [(k, rows, h[1] - h[0], f) for k, rows, h, f in parts], self.geometry, travels=travels
        )
        together = not apart and sum(map(len, starts)) > 1
        root = self.buffer(size, 1, False, "byte", kept_offset, extra) if together else -1
        places = []
        for (kind, rows, heads, final), begins in zip(parts, starts, strict=True):
            count, tensors = heads[1] - heads[0], []
            for component, begin in zip(COMPONENTS[kind], begins, strict=True):
                width = wire_width(kind, component, final, self.geometry) if travels else component.width
                if together:
                    tensors.append(self.part(root, begin, rows, count, component.has_dim, width))
                    continue
                own = kept_offset + begin if kept_offset >= 0 else -1
                root = self.buffer(rows, count, component.has_dim, width, own, extra)
                tensors.append(root)
            is_wire = travels and kind in (Kind.Q, Kind.KV) and self.geometry.casts_inputs
            places.append(Place(tuple(tensors), 0, rows, heads, heads[0], count, is_wire))
        return root, places

    def new(
        self, kind: Kind, rows: int, heads: Heads, *, kept_offset: int = -1, travels: bool = False, final: bool = False
    ) -> Place:
        """Room for a value. ``travels``: in the dtypes of a message."""
        apart = not goes_joined(kind, heads, self.geometry.heads)
        return self.joint([(kind, rows, heads, final)], kept_offset=kept_offset, travels=travels, apart=apart)[1][0]

    def touch(self, tensor: int, extra: int = 0) -> None:
        """Keeps a buffer alive to this step, and ``extra`` more."""
        index = tensor - len(self.externals)
        if index < 0:
            return
        root = self.drafts[index].root
        draft = self.drafts[root if root >= 0 else index]
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

    def put(self, task: int, kind: Kind, chunk: int, place: Place) -> None:
        self._places[task, kind, chunk].append(place)

    def spread(self, task: int, kind: Kind, chunks: Iterable[tuple[int, int]], place: Place) -> None:
        """Chunks (number, tokens) that lie one after the other in one place."""
        row = place.row
        for chunk, tokens in chunks:
            self.put(task, kind, chunk, replace(place, row=row, rows=tokens))
            row += tokens

    def pieces(self, task: int, kind: Kind, chunk: int, heads: Heads) -> list[Place]:
        """What is here of these heads, ascending; may have gaps."""
        found = []
        for place in self._places[task, kind, chunk]:
            low, high = max(place.heads[0], heads[0]), min(place.heads[1], heads[1])
            if low < high:
                found.append(place.narrow((low, high)))
        return found if len(found) < 2 else sorted(found, key=lambda p: p.heads)

    def gaps(self, task: int, kind: Kind, chunk: int, heads: Heads) -> list[Heads]:
        """Which of these heads are not here."""
        gaps, position = [], heads[0]
        for place in self.pieces(task, kind, chunk, heads):
            if place.heads[0] > position:
                gaps.append((position, place.heads[0]))
            position = place.heads[1]
        return [*gaps, (position, heads[1])] if position < heads[1] else gaps

    def take(self, task: int, kind: Kind, chunk: int, heads: Heads) -> None:
        """Forgets these heads: an accumulator that was sent is no longer here."""
        rest: list[Place] = []
        for place in self._places[task, kind, chunk]:
            start, stop = place.heads
            rest += [
                place.narrow(part)
                for part in ((start, min(stop, heads[0])), (max(start, heads[1]), stop))
                if part[0] < part[1]
            ]
        self._places[task, kind, chunk] = rest

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

    def unfilled(self, task: int, kind: Kind, chunk: int) -> list[Ref]:
        """Rows of an accumulator that nothing was added to."""
        refs = []
        for place in self._places[task, kind, chunk]:
            stop = place.row + place.rows
            for a, b, heads in self._sums[place.tensors[0]].missing(place.row, stop, place.heads):
                refs += [self.ref(place, c, a, b, heads) for c in range(len(place.tensors))]
        return refs
