"""The bundles of one rank's part of a micro-batch, ready to be lowered. Pure: it serves routes, and whoever foresees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hdp.attention.bundle import Structure, bundles_of, structure_of
from hdp.attention.lower import Task
from hdp.attention.mask import Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One rank's part of one sequence."""

    sequence: int
    length: int
    """Tokens of the whole sequence."""
    group: tuple[int, ...]
    """Ranks that share it, in ring order."""
    layout: str
    names: tuple[str, str]
    """Forward and backward schedule."""

    def tokens(self, rank: int) -> int:
        """Of one sharer."""
        size = len(self.group)
        return self.length // size + (self.group.index(rank) < self.length % size)


def tasks_of(parts: Iterable[Part], rank: int, mask: Mask, backward: bool) -> list[Task]:
    """Of one direction; ``parts`` in the order of the rank's packed tokens, those alike together."""
    bundles: dict[tuple[tuple[int, ...], tuple[str, str], Structure], list[tuple[int, int, int]]] = {}
    row = 0
    for part in parts:
        structure = structure_of(part.layout, part.length, len(part.group), mask)
        bundles.setdefault((part.group, part.names, structure), []).append((part.sequence, part.length, row))
        row += part.tokens(rank)
    tasks: list[Task] = []
    for (group, names, structure), members in bundles.items():
        numbers, lengths, rows = zip(*members, strict=True)
        made = bundles_of(structure, names[backward], group, group.index(rank), numbers, lengths, rows)
        tasks += [Task(bundle, names) for bundle in made]
    return tasks
