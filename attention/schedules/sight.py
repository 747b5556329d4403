"""Which chunks see each other, and how far along a ring a chunk is looked at.

Schedules ask only this of a mask. A *block* is what one member owns, or, with ``width`` > 1, what ``width`` neighbouring
members (a node) own together; a ring of blocks has ``size // width`` places.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import pairwise
from operator import mul

from hdp.attention.layout import Layout, Range, Ranges, make_layout
from hdp.attention.mask import Mask
from hdp.attention.pieces import Pieces
from hdp.attention.program import Heads, Kind, Tile, Transfer
from hdp.attention.stripes import Stripes

Hops = tuple[int, int]  # first and last place after its owner's that looks at a chunk; (0, 0) if none does


class Sight:
    """The mask between the chunks of one layout, and a ring of its blocks. Schedules get theirs from :func:`sight_of`.

    Hops are counted in ``direction`` (+1 or -1) from the block of a chunk's owner, 1 .. places - 1.
    """

    def __init__(self, layout: Layout, mask: Mask, width: int = 1) -> None:
        if layout.size % width:
            raise ValueError(
                f"a group of {layout.size} ranks does not divide into nodes of {width}: choose a divisor of {layout.size}"
            )
        self.layout, self.mask, self.width = layout, mask, width
        self.places = layout.size // width
        # Where owners change: chunks that lie one after the other, none empty, however they are cut. What a chunk sees is
        # then an interval of these.
        self._starts = _borders(layout)
        self._has_intervals = bool(self._starts)
        self._is_plain = all(len(ranges) == 1 for ranges in layout.chunks)
        self._owned = [layout.owned(m) for m in range(layout.size)]
        self._chunks: dict[int, tuple[int, ...]] = {}
        self._hops: dict[tuple[int, int, bool], Hops] = {}
        self._ways: dict[tuple[int, bool], list[tuple[Hops, Hops]]] = {}
        self._longest: dict[tuple[int, bool], int] = {}
        self._meeting: dict[tuple[int, bool], tuple[int, ...]] = {}

    def chunks(self, block: int) -> tuple[int, ...]:
        """Chunks of a block that hold tokens, ascending."""
        if block not in self._chunks:
            members = range(block * self.width, (block + 1) * self.width)
            owned = (c for m in members for c in self._owned[m])
            self._chunks[block] = tuple(sorted(c for c in owned if self.layout.tokens(c)))
        return self._chunks[block]

    def sees(self, query: int, key: int) -> bool:
        """Whether some token of chunk ``query`` sees some token of chunk ``key``."""
        return sees_ranges(self.mask, self.layout.chunks[query], self.layout.chunks[key])

    def seen(self, queries: Iterable[int], keys: Iterable[int]) -> tuple[int, ...]:
        """Those of ``keys`` that some of ``queries`` sees."""
        return self._in_view(keys, queries, is_key=True)

    def seeing(self, queries: Iterable[int], keys: Iterable[int]) -> tuple[int, ...]:
        """Those of ``queries`` that see some of ``keys``."""
        return self._in_view(queries, keys, is_key=False)

    def meeting(self, block: int, is_key: bool) -> tuple[int, ...]:
        """Chunks of a block that meet chunks of others: as keys, or as queries."""
        if (block, is_key) not in self._meeting:
            others = [c for b in range(self.places) if b != block for c in self.chunks(b)]
            self._meeting[block, is_key] = self._in_view(self.chunks(block), others, is_key)
        return self._meeting[block, is_key]

    def _in_view(self, chunks: Iterable[int], others: Iterable[int], is_key: bool) -> tuple[int, ...]:
        others = tuple(others)
        if not self._is_plain:
            return tuple(c for c in chunks if any(self.sees(o, c) if is_key else self.sees(c, o) for o in others))
        ranges = [self.layout.chunks[o][0] for o in sorted(others)]
        ranges = [r for r in ranges if r[0] < r[1]]
        starts, found = [start for start, _ in ranges], []
        for c in chunks:
            span = self.layout.chunks[c][0]
            if span[0] >= span[1]:
                continue
            low, high = _view(self.mask, span, is_key)
            last = bisect_left(starts, high) - 1  # the last range that begins before the view ends
            if last >= 0 and ranges[last][1] > low:
                found.append(c)
        return tuple(found)

    def tiles(self, queries: tuple[int, ...], keys: tuple[int, ...], heads: Heads) -> tuple[Tile, ...]:
        """One tile of the chunks that matter, or none."""
        rows = self.seeing(queries, keys)
        if not rows or heads[0] >= heads[1]:
            return ()
        return (Tile(queries=rows, keys=self.seen(rows, keys), heads=heads),)

    def hops(self, chunk: int, direction: int, is_key: bool) -> Hops:
        """First and last hop at which a block looks at ``chunk``: its queries (``is_key``) or its keys."""
        key = (chunk, direction, is_key)
        if key not in self._hops:
            self._hops[key] = self._find_hops(chunk, direction, is_key)
        return self._hops[key]

    def ways(self, chunk: int, direction: int, is_key: bool) -> tuple[Hops, Hops]:
        """Hops of a chunk that travels in ``direction``, and of its copy that travels the other way.

        Without a window all hops are in the first. Under a window those who look at a chunk are few and near it, on either
        side (zigzag: what follows a back chunk belongs to the member before), so it goes to each the shorter way, if that
        halves what travels: the widest gap between two of them is where neither copy passes. Less than half is not worth
        the room and the kernel calls of chunks that come from two sides at a time.
        """
        key = (direction, is_key)
        if key not in self._ways:
            shortest = self.shortest_ways(*key) if self.mask.window is not None else []
            self._ways[key] = shortest if shortest and self._halves(shortest, *key) else []
        found = self._ways[key]
        return found[chunk] if found else (self.hops(chunk, direction, is_key), (0, 0))

    def shortest_ways(self, direction: int, is_key: bool) -> list[tuple[Hops, Hops]]:
        """Of each chunk, hops ahead and back."""
        return [self._shortest(self.looking(c, direction, is_key)) for c in range(len(self.layout.chunks))]

    def _halves(self, shortest: list[tuple[Hops, Hops]], direction: int, is_key: bool) -> bool:
        """Whether the shorter ways halve what travels."""
        far, near = self.distances_of(shortest, direction, is_key)
        tokens = [self.layout.tokens(c) for c in range(len(far))]
        return 2 * sum(map(mul, near, tokens)) <= sum(map(mul, far, tokens))

    def distances_of(
        self, shortest: list[tuple[Hops, Hops]], direction: int, is_key: bool
    ) -> tuple[list[int], list[int]]:
        """Hops that each chunk travels one way round, and by its shortest ways."""
        far = [self.hops(c, direction, is_key)[1] for c in range(len(shortest))]
        return far, [ahead[1] + back[1] for ahead, back in shortest]

    def _shortest(self, looking: list[int]) -> tuple[Hops, Hops]:
        stops = [0, *looking, self.places]
        # The last of the widest gaps: where all are equally wide nothing travels the other way.
        _, gap = max((stops[i + 1] - stops[i], i) for i in range(len(stops) - 1))
        return _ends(looking[:gap]), _ends([self.places - hop for hop in reversed(looking[gap:])])

    def longest_way(self, direction: int, is_key: bool) -> int:
        """Hops of the chunk that goes farthest; see :meth:`ways`."""
        key = (direction, is_key)
        if key not in self._longest:
            chunks = range(len(self.layout.chunks))
            self._longest[key] = max((w[1] for c in chunks for w in self.ways(c, direction, is_key)), default=0)
        return self._longest[key]

    def looking(self, chunk: int, direction: int, is_key: bool) -> list[int]:
        """All hops at which a block looks at ``chunk``, ascending."""
        if not self.layout.tokens(chunk):
            return []
        origin = self.layout.owners[chunk] // self.width
        if self._has_intervals:
            found = {p for a, b in self._views(chunk, is_key) for p in range(a, b + 1)}
            return sorted({direction * (p - origin) % self.places for p in found} - {0})
        return [hop for hop in range(1, self.places) if self._looks(chunk, origin, direction * hop, is_key)]

    @cached_property
    def distances(self) -> list[int]:
        """All hops (+1) at which some block looks at the keys of another, ascending."""
        if self.mask.window is None:
            return list(range(1, self.places))
        return sorted({hop for c in range(len(self.layout.chunks)) for hop in self.looking(c, 1, is_key=True)})

    def _find_hops(self, chunk: int, direction: int, is_key: bool) -> Hops:
        origin = self.layout.owners[chunk] // self.width
        if not self.layout.tokens(chunk):
            return 0, 0
        if self._has_intervals:
            candidates = self._interval_hops(chunk, origin, direction, is_key)
        else:
            candidates = self._scan_hops(chunk, origin, direction, is_key)
        return (min(candidates), max(candidates)) if candidates else (0, 0)

    def _views(self, chunk: int, is_key: bool) -> list[tuple[int, int]]:
        """Intervals of places, first and last, that hold something in view."""
        first, last = self._wholes_in_view(chunk, is_key)
        size = self.layout.size
        # Front chunks 0 .. size - 1 belong to members in order, back chunks in reverse order (zigzag only).
        both = (first, min(last, size - 1)), (2 * size - 1 - last, 2 * size - 1 - max(first, size))
        return [(a // self.width, b // self.width) for a, b in both if a <= b]

    def _wholes_in_view(self, chunk: int, is_key: bool) -> tuple[int, int]:
        """The first and the last chunk in view, as they were before they were cut."""
        low, high = _view(self.mask, self.layout.chunks[chunk][0], is_key)
        return max(bisect_right(self._starts, low) - 1, 0), bisect_left(self._starts, high) - 1

    def _interval_hops(self, chunk: int, origin: int, direction: int, is_key: bool) -> list[int]:
        """Ends of the intervals of places that hold the chunks in view: constant time."""
        places = self.places
        found = set()
        for a, b in self._views(chunk, is_key):
            ends = {a, b, *(p % places for p in (origin - 1, origin + 1) if a <= p % places <= b)}
            found |= {direction * (p - origin) % places for p in ends}
        return sorted(found - {0})

    def _scan_hops(self, chunk: int, origin: int, direction: int, is_key: bool) -> list[int]:
        hops = range(1, self.places)
        last = next((h for h in reversed(hops) if self._looks(chunk, origin, direction * h, is_key)), 0)
        if not last:
            return []
        first = next((h for h in hops[: last - 1] if self._looks(chunk, origin, direction * h, is_key)), last)
        return [first, last]

    def _looks(self, chunk: int, origin: int, offset: int, is_key: bool) -> bool:
        others = self.chunks((origin + offset) % self.places)
        return bool(self._in_view((chunk,), others, is_key))


class PieceSight(Sight):
    """Between the pieces of a nominal document: who looks at a piece is in its name (``hdp.attention.pieces``).

    Whether two pieces of two chunks that look at each other do so themselves depends on the document: they are said to.
    """

    layout: Pieces

    def __init__(self, layout: Pieces, mask: Mask, width: int = 1) -> None:
        super().__init__(layout, mask, width)
        self._has_intervals = True

    def _wholes_in_view(self, chunk: int, is_key: bool) -> tuple[int, int]:
        whole, both = self.layout.wholes[chunk], not self.mask.causal
        behind = self.layout.behind[chunk] if both or not is_key else 0
        return whole - behind, whole + (self.layout.ahead[chunk] if both or is_key else 0)

    def _in_view(self, chunks: Iterable[int], others: Iterable[int], is_key: bool) -> tuple[int, ...]:
        seen: dict[int, tuple[int, int]] = {}  # by chunk: the first and the last that some of its pieces look at
        for other in others:
            first, last = self._wholes_in_view(other, not is_key)
            before = seen.get(self.layout.wholes[other], (first, last))
            seen[self.layout.wholes[other]] = min(first, before[0]), max(last, before[1])
        found = []
        for chunk in chunks:
            whole, (first, last) = self.layout.wholes[chunk], self._wholes_in_view(chunk, is_key)
            if any(first <= one <= last and low <= whole <= high for one, (low, high) in seen.items()):
                found.append(chunk)
        return tuple(found)

    def sees(self, query: int, key: int) -> bool:
        return bool(self._in_view((key,), (query,), is_key=True))

    def _halves(self, shortest: list[tuple[Hops, Hops]], direction: int, is_key: bool) -> bool:
        return (direction, is_key) in self.layout.both_ways


class StripeSight(Sight):
    """Between the chunks of a nominal striped document, which say whom they see (``hdp.attention.stripes``)."""

    layout: Stripes

    def sees(self, query: int, key: int) -> bool:
        return bool(self.layout.seen[query] >> key & 1)

    def _halves(self, shortest: list[tuple[Hops, Hops]], direction: int, is_key: bool) -> bool:
        return (direction, is_key) in self.layout.both_ways


@lru_cache(maxsize=64)
def sight_of(layout: Layout, mask: Mask, width: int = 1) -> Sight:
    """The sight of a layout; all members' programs, and both directions, share what it has found."""
    if isinstance(layout, Pieces):
        return PieceSight(layout, mask, width)
    return StripeSight(layout, mask, width) if isinstance(layout, Stripes) else Sight(layout, mask, width)


def _ends(hops: list[int]) -> Hops:
    return (hops[0], hops[-1]) if hops else (0, 0)


def _borders(layout: Layout) -> list[int]:
    """First tokens of a zigzag or contiguous layout's chunks as they were before they were cut; none if one is empty."""
    if layout.name not in ("zigzag", "contiguous"):
        return []
    spans = [ranges[0] for ranges in make_layout(layout.name, layout.length, layout.size).chunks]
    return [start for start, _ in spans] if all(start < stop for start, stop in spans) else []


def _view(mask: Mask, tokens: Range, is_key: bool) -> Range:
    """Queries that see some key of ``tokens``, or keys that some query of ``tokens`` sees: [start, stop)."""
    if not is_key:
        return mask.visible(tokens[0])[0], mask.visible(tokens[1] - 1)[1]
    reach = mask.window if mask.window is not None else 1 << 60
    return tokens[0] if mask.causal else tokens[0] - reach + 1, tokens[1] - 1 + reach


def sees_ranges(mask: Mask, queries: Ranges, keys: Ranges) -> bool:
    """Whether some query sees some key; both lists ascend. Linear in the ranges, constant without a window."""
    if len(queries) == 1 and len(keys) == 1:
        return mask.sees_any(queries[0], keys[0])
    queries = tuple(r for r in queries if r[0] < r[1])
    keys = tuple(r for r in keys if r[0] < r[1])
    if not queries or not keys:
        return False
    if mask.window is None:
        return mask.sees_any((queries[0][0], queries[-1][1]), (keys[0][0], keys[-1][1]))
    starts = [start for start, _ in keys]
    for q in queries:
        low, high = mask.visible(q[0])[0], mask.visible(q[1] - 1)[1]
        last = bisect_left(starts, high) - 1  # the last range that begins before the view ends
        if last >= 0 and keys[last][1] > low:
            return True
    return False


def send(
    kind: Kind, chunks: tuple[int, ...], heads: Heads, peer: int, lane: int = 0, final: bool = False
) -> tuple[Transfer, ...]:
    """One transfer, or none where nothing is to be sent."""
    if not chunks or heads[0] >= heads[1]:
        return ()
    return (Transfer(kind=kind, chunks=chunks, heads=heads, peer=peer, lane=lane, final=final),)


def split(start: int, stop: int, parts: int) -> list[Heads]:
    """[start, stop) in ``parts`` ranges whose sizes differ by at most one; some are empty if there are too few."""
    count = stop - start
    return [(start + count * i // parts, start + count * (i + 1) // parts) for i in range(parts)]


def whole_groups(queries: Heads, group: int) -> list[Heads]:
    """Query heads cut into pieces that each read whole key/value heads, or lie inside one of them."""
    start, stop = queries
    up, down = -(-start // group) * group, stop // group * group
    cuts = sorted({start, stop, *(c for c in (up, down) if start < c < stop)})
    return list(pairwise(cuts))
