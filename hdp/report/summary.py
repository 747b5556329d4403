"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, ruled above and below; a row of two empty strings is a rule."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    rule = "-" * (left + right + 3)
    lines = [rule if not name and not value else f"{name:<{left}}   {value}" for name, value in rows]
    return "\n".join([rule, *lines, rule])
