"""Chooses the schedules of one sequence by cost: the cheapest pair of forward and backward (``hdp.attention.predict``).

Among candidates within 1 % of the cheapest the one that sends least is taken: what is hidden here still uses links that
others need. The same schedules in fewer slices of heads may take 3 % longer: what messages and calls cost is known worst.

Pure and exact: the same arguments give the same answer on every rank. Lengths are rounded down to five significant bits,
results are cached. A new length costs well under a millisecond, a known one microseconds; walking the programs of a group size,
head count or window that has not been met yet, tens of milliseconds for small groups and about a second for 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from hdp.attention.footprint import arena_bytes
from hdp.attention.predict import Case, Prediction, Static, members_of, predict, rounded, static_of
from hdp.attention.schedules import get_pair

FORWARD = (
    *("ring", "direct", "token_ring", "all_gather", "all_gather:2", "all_gather:4"),
    *("ulysses", "ulysses:2", "ulysses_home", "ulysses_home:2"),
)
BACKWARD = ("ring", "ring_q", *FORWARD[1:])
SLICED = ("all_gather", "ulysses")
SIGNIFICANT_BITS = 5
MARGIN = 1.01
FEWER_SLICES = 1.03


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The schedules of one sequence."""

    forward: Prediction
    backward: Prediction

    @property
    def names(self) -> tuple[str, str]:
        return self.forward.name, self.backward.name

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def sent_bytes(self) -> float:
        return self.forward.sent_bytes + self.backward.sent_bytes

    @property
    def messages(self) -> int:
        return self.forward.messages + self.backward.messages


def choose(case: Case) -> Choice:
    """The cheapest pair of schedules; ValueError if none keeps the memory limits."""
    return _choose(replace(case, length=rounded(case.length, SIGNIFICANT_BITS)))


@lru_cache(maxsize=65536)
def _choose(case: Case) -> Choice:
    forward = [predict(name, case, backward=False) for name in candidates(case, backward=False)]
    backward = [predict(name, case, backward=True) for name in candidates(case, backward=True)]
    pairs = [Choice(forward=f, backward=b) for f in forward for b in backward if _fits(case, f, b)]
    while pairs:
        chosen = _cheapest(pairs)
        if case.peak_limit is None or _arena(case, chosen) <= case.peak_limit:
            return chosen
        pairs.remove(chosen)  # lowered only now, for that takes far longer than counting
    least = min((p.peak_bytes for p in forward + backward), default=0)
    raise ValueError(
        f"no schedule for about {case.length} tokens over {case.size} ranks keeps within peak_limit={case.peak_limit} and"
        f" kept_limit={case.kept_limit} bytes: the least buffer is {least:.0f} bytes, without copies; use more ranks"
    )


def _cheapest(pairs: list[Choice]) -> Choice:
    best = min(p.seconds for p in pairs)
    sparing = min((p for p in pairs if p.seconds <= best * MARGIN), key=lambda p: p.sent_bytes)
    close = (p for p in pairs if p.seconds <= best * FEWER_SLICES and _unsliced(p) == _unsliced(sparing))
    return min(close, key=lambda p: (p.messages, p.seconds))


def _unsliced(pair: Choice) -> tuple[str, ...]:
    """Names without the number of slices; other numbers are widths of groups."""
    return tuple(name.partition(":")[0] if name.startswith(SLICED) else name for name in pair.names)


def _fits(case: Case, forward: Prediction, backward: Prediction) -> bool:
    """Whether the two go together and keep within the limits, as far as buffers are counted."""
    if backward.kept_bytes and forward.name != backward.name:
        return False
    if not _is_pair(forward.name, backward.name):
        return False
    if case.kept_limit is not None and backward.kept_bytes > case.kept_limit:
        return False
    return case.peak_limit is None or max(forward.peak_bytes, backward.peak_bytes) <= case.peak_limit


def _arena(case: Case, pair: Choice) -> int:
    """Bytes of the arena that the pair takes, at the longest length that is rounded to this one, in whole chunks."""
    if case.size == 1:
        return 0
    static = static_of(case)
    if not static[2]:
        return 0
    own = pair.forward.name == pair.backward.name
    found = max(_lowered(p.name, d, own, static, case.widens) for d, p in enumerate((pair.forward, pair.backward)))
    longest = case.length + (1 << max(case.length.bit_length() - SIGNIFICANT_BITS, 0)) - 1
    return math.ceil(found * (longest + 2 * case.size) / static[2])


@lru_cache(maxsize=4096)
def _lowered(name: str, backward: int, own: bool, static: Static, widens: bool) -> int:
    """``own``: whether the other direction has the same schedule, and what one keeps the other finds."""
    layout, size, length, heads, sizes, mask = static
    other = name if own else "token_ring" if name == "direct" else "direct"
    return arena_bytes(
        (other, name) if backward else (name, other),
        backward=bool(backward),
        layout=layout,
        length=length,
        size=size,
        members=members_of(size, is_closed=False),
        heads=heads,
        sizes=sizes,
        mask=mask,
        widens=widens,
    )


@lru_cache(maxsize=4096)
def _is_pair(forward: str, backward: str) -> bool:
    try:
        get_pair(forward, backward)
    except ValueError:
        return False
    return True


def candidates(case: Case, backward: bool) -> list[str]:
    """Names that can serve the group, plain ones first; that of the other direction too, if it is fixed: it may keep."""
    if case.size == 1:
        return ["local"]
    fixed, other = (case.backward, case.forward) if backward else (case.forward, case.backward)
    if fixed is not None:
        return [fixed]
    names = _free(case, backward)
    return names if other is None or other in names else [*names, other]


def _free(case: Case, backward: bool) -> list[str]:
    if case.allowed is not None:
        return [name for name in case.allowed if backward or name != "ring_q"]
    names = list(BACKWARD if backward else FORWARD)
    for width in range(2, case.size):
        if case.size % width == 0 and _inside_nodes(case, width):
            names += [f"hybrid:{width}"] if width <= case.heads.query else []
            names += [f"double_ring:{width}"] if case.nodes is not None else []
    return names


def _inside_nodes(case: Case, width: int) -> bool:
    if case.nodes is None:
        return True
    return all(len(set(case.nodes[i : i + width])) == 1 for i in range(0, case.size, width))
