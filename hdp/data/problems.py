"""What can be wrong with data: errors, and the record of what was left out, so that nothing is dropped silently."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

NAMED = 3  # how many of the skipped items a message names


class DataError(ValueError):
    """Data that cannot be used. Names the path and what would help."""


class DataWarning(UserWarning):
    """Data of which a part was left out or changed. Names what, and how much."""


@dataclass
class Skipped:
    """Counts, per reason, what a source left out, and remembers the first few names."""

    counts: dict[str, int] = field(default_factory=dict)
    """Reason ("empty", "not UTF-8 text", ...) to the number of documents left out for it."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Reason to the names of the first few."""

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.names.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(name)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        """``"28 empty (a.py, b.py, c.py, ...), 2 not UTF-8 text (d.py, e.py)"``."""
        parts = []
        for reason in sorted(self.counts, key=lambda r: (-self.counts[r], r)):
            more = ", ..." if self.counts[reason] > len(self.names[reason]) else ""
            parts.append(f"{self.counts[reason]} {reason} ({', '.join(self.names[reason])}{more})")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "names": self.names}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Skipped:
        return cls(counts=dict(state["counts"]), names={k: list(v) for k, v in state["names"].items()})


def warn(message: str) -> None:
    """Warns once for the whole job: from rank 0 (torchrun's ``RANK``; a process on its own is rank 0)."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(message, DataWarning, stacklevel=3)
