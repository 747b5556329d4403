"""Head ranges that a set of programs never cuts: what holds for one head of a block holds for all of it.

The checker and the counter walk blocks instead of heads, so a ring of 64 heads costs them as much as one of one head.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from hdp.attention.program import HeadCount, Heads, Kind, RankProgram


class HeadBlocks:
    """Blocks of query heads and of key/value heads; each query block lies inside one key/value block."""

    def __init__(self, heads: HeadCount, programs: Iterable[RankProgram]) -> None:
        group = heads.group
        cuts = {0, heads.query}
        for per_key, (start, stop) in {used for program in programs for used in _ranges(program)}:
            cuts |= {start * group, stop * group} if per_key else {start, stop}
        for cut in [c for c in cuts if c % group]:
            cuts |= {cut - cut % group, cut - cut % group + group}
        self.query_cuts = sorted(cuts)
        self.key_cuts = [c // group for c in self.query_cuts if c % group == 0]
        self._query_index = {cut: i for i, cut in enumerate(self.query_cuts)}
        self._key_index = {cut: i for i, cut in enumerate(self.key_cuts)}
        self._group = group

    def of(self, kind: Kind, heads: Heads) -> range:
        """Blocks of the kind's own heads."""
        index = self._key_index if kind.is_per_key else self._query_index
        return range(index[heads[0]], index[heads[1]])

    def queries(self, kind: Kind, heads: Heads) -> range:
        """Blocks of query heads, whatever the kind counts in."""
        group = self._group if kind.is_per_key else 1
        return range(self._query_index[heads[0] * group], self._query_index[heads[1] * group])

    def key_of(self, query_block: int) -> int:
        """The key/value block that a query block reads."""
        return bisect_right(self.key_cuts, self.query_cuts[query_block] // self._group) - 1

    def count(self, kind: Kind, block: int) -> int:
        """Heads of a block."""
        cuts = self.key_cuts if kind.is_per_key else self.query_cuts
        return cuts[block + 1] - cuts[block]

    def first_head(self, query_block: int) -> int:
        return self.query_cuts[query_block]


def _ranges(program: RankProgram) -> Iterator[tuple[bool, Heads]]:
    for step in program.steps:
        for transfer in (*step.sends, *step.receives):
            yield transfer.kind.is_per_key, transfer.heads
        for tile in step.tiles:
            yield False, tile.heads
    for value in program.keep:
        yield value.kind.is_per_key, value.heads
