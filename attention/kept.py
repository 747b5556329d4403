"""What one sequence keeps from forward to backward, and where: the same bytes in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from hdp.attention.arena import ALIGNMENT
from hdp.attention.layout import Layout
from hdp.attention.lowered import Geometry
from hdp.attention.messages import arrange, messages
from hdp.attention.program import Heads, Kind, RankProgram, Transfer, Value

Key = tuple[Kind, tuple[int, ...], Heads]


class Kept:
    """Offsets, in the tensor of what is kept, of the values that one program keeps."""

    def __init__(self, program: RankProgram, layout: Layout, geometry: Geometry) -> None:
        self.program, self.layout, self.geometry = program, layout, geometry
        self.offsets: list[int] = []
        """Of each of the program's kept values, in its order."""
        self._at: dict[Key, int] = {}
        self._end: dict[Key, int] = {}
        self._parts: dict[tuple[Kind, int], list[tuple[Value, int]]] = defaultdict(list)

    def place_at(self, start: int) -> int:
        """Lays the kept values out from byte ``start``, one after the other in the program's order; returns the end."""
        for value in self.program.keep:
            rows = sum(map(self.layout.tokens, value.chunks))
            begins, _, size = arrange([(value.kind, rows, value.heads[1] - value.heads[0], False)], self.geometry)
            self._at[_key(value)] = start + begins[0][0]
            self._end[_key(value)] = start = start + size
        self.offsets = [self._at[_key(value)] for value in self.program.keep]
        whole: set[Key] = set()
        for step in self.program.steps:
            for message in messages(step.receives, self.geometry.heads, joins=self.geometry.joins):
                for transfers in [message.transfers] if message.is_one else [(t,) for t in message.transfers]:
                    if self.offset_of(transfers) >= 0:
                        whole.update(map(_key, transfers))
        for value in self.program.keep:
            if _key(value) not in whole:
                for chunk in value.chunks:
                    self._parts[value.kind, chunk].append((value, self._at[_key(value)]))
        return -(-start // ALIGNMENT) * ALIGNMENT

    def offset_of(self, transfers: Sequence[Transfer]) -> int:
        """Where a message that is kept whole is received; -1 if it is not."""
        keys = list(map(_key, transfers))
        together = all(a in self._end and self._end[a] == self._at.get(b) for a, b in pairwise(keys))
        return self._at.get(keys[0], -1) if together else -1

    def parts(self, kind: Kind, chunk: int) -> Iterable[tuple[Value, int]]:
        """Values that this chunk is a part of, to be copied."""
        return self._parts.get((kind, chunk), ())


def _key(value: Value | Transfer) -> Key:
    return value.kind, value.chunks, value.heads
