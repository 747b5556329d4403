"""Which transfers of a step travel as one message, and how values lie in it.

A message costs a host as much as some hundred kilobytes do, and Ulysses would send Q, K and V, then out and lse, then DO and
two vectors to everyone, slice by slice. What goes the same way in the same step is one message if

- it is inputs of some heads (Ulysses, hybrids): those are copied out of tensors of all heads in any case;
- it is OUT, whose lse is small and often lies behind it where it is summed up.

All else is sent as it lies, a message for each tensor: a copy would cost more, in time and in memory, than a message does.
Both ends decide by the transfers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hdp.attention.lowered import COMPONENTS, Geometry, wire_width
from hdp.attention.program import HeadCount, Heads, Kind, Transfer


@dataclass(frozen=True, slots=True)
class Message:
    """Transfers that go the same way in one step."""

    transfers: tuple[Transfer, ...]
    is_one: bool
    """One tensor of several components; else a tensor for each."""

    @property
    def tensors(self) -> int:
        """How many are sent."""
        return 1 if self.is_one else sum(len(COMPONENTS[t.kind]) for t in self.transfers)

    @property
    def name(self) -> str:
        """Of all that it carries, for error messages."""
        return "+".join(c.name for t in self.transfers for c in COMPONENTS[t.kind])


def messages(transfers: Iterable[Transfer], heads: HeadCount, *, joins: bool = True) -> list[Message]:
    """The messages of one member's sends, or receives, of one step, in the order of their first transfers.

    ``joins``: whether components fit behind each other (``Geometry.joins``).
    """
    groups: dict[tuple[int, int, bool], list[Transfer]] = {}
    for transfer in transfers:
        groups.setdefault((transfer.peer, transfer.lane, transfer.kind.is_accumulator), []).append(transfer)
    return [Message(tuple(group), joins and _is_one(group, heads)) for group in groups.values()]


def _is_one(group: Sequence[Transfer], heads: HeadCount) -> bool:
    several = sum(len(COMPONENTS[t.kind]) for t in group) > 1
    return several and any(goes_joined(t.kind, t.heads, heads) for t in group)


def goes_joined(kind: Kind, some: Heads, heads: HeadCount) -> bool:
    """Whether a transfer makes its step's message one tensor."""
    return kind is Kind.OUT or (some != heads.of(kind) and not kind.is_accumulator)


Part = tuple[Kind, int, int, bool]  # kind, rows, heads, complete


def arrange(
    parts: Sequence[Part], geometry: Geometry, *, travels: bool = True
) -> tuple[list[tuple[int, ...]], list[tuple[int, int]], int]:
    """Where the components of some values lie in one run of bytes.

    Returns per part the bytes at which its components begin; the order (part, component) in which they lie; all bytes.
    Tensors of rows x heads x head_dim come first, wide elements before narrow ones. Each begins at a multiple of its
    element's size, which leaves no gaps where components fit behind each other.
    ``travels``: in the dtypes of a message.
    """
    sizes: dict[tuple[int, int], tuple[int, int]] = {}  # (part, component): bytes, bytes of an element
    for p, (kind, rows, heads, final) in enumerate(parts):
        for c, component in enumerate(COMPONENTS[kind]):
            width = wire_width(kind, component, final, geometry) if travels else component.width
            element = geometry.bytes_of(width)
            sizes[p, c] = rows * heads * (geometry.head_dim if component.has_dim else 1) * element, element
    order = sorted(sizes, key=lambda pc: (not COMPONENTS[parts[pc[0]][0]][pc[1]].has_dim, -sizes[pc][1]))
    begin: dict[tuple[int, int], int] = {}
    position = 0
    for pc in order:
        size, element = sizes[pc]
        begin[pc] = -(-position // element) * element
        position = begin[pc] + size
    starts = [tuple(begin[p, c] for c in range(len(COMPONENTS[part[0]]))) for p, part in enumerate(parts)]
    return starts, order, position
