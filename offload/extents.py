"""Which bytes of a scratch file are free: best fit, neighbours joined, exact to the block."""

from __future__ import annotations

from bisect import bisect_left, insort


class ExtentMap:
    """Extents [offset, offset + size) of a file that grows at its end. Not thread-safe: the owner locks."""

    def __init__(self, *, block: int, budget: int | None = None) -> None:
        """``block``: bytes that offsets and sizes are multiples of. ``budget``: bytes the file may grow to."""
        self._block = block
        self._budget = budget
        self._by_offset: list[tuple[int, int]] = []
        self.end = 0
        """Bytes up to which extents have been handed out and not all given back."""
        self.used = 0
        self.peak = 0
        """Most bytes ever in use."""

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """(offset, size) of at least ``nbytes``; None when the budget does not allow it."""
        size = -(-max(nbytes, 1) // self._block) * self._block
        fits = [extent for extent in self._by_offset if extent[1] >= size]
        if fits:
            offset, length = min(fits, key=lambda extent: (extent[1], extent[0]))
            self._by_offset.remove((offset, length))
            if length > size:
                insort(self._by_offset, (offset + size, length - size))
        elif self._budget is not None and self.end + size > self._budget:
            return None
        else:
            offset = self.end
            self.end += size
        self.used += size
        self.peak = max(self.peak, self.used)
        return offset, size

    def give(self, offset: int, size: int) -> None:
        """Gives an extent back; joins it with its free neighbours, and shortens the file's used part at its end."""
        self.used -= size
        i = bisect_left(self._by_offset, (offset, size))
        if i < len(self._by_offset) and self._by_offset[i][0] == offset + size:
            size += self._by_offset.pop(i)[1]
        if i > 0 and sum(self._by_offset[i - 1]) == offset:
            before = self._by_offset.pop(i - 1)
            offset, size = before[0], before[1] + size
        if offset + size == self.end:
            self.end = offset
        else:
            insort(self._by_offset, (offset, size))
