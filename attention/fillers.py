"""Local work that fills the waits for bytes: calls of whole sequences, cut so that none delays the next round for long.

A sequence that lives on one rank is one kernel call, which may take longer than a round of the shared sequences. It is cut
by heads: pieces need no merging and cost nothing extra. On a device where the host runs ahead of the kernels nobody can
ask whether bytes have arrived, so the calls are also dealt out over the rounds beforehand, equal work to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hdp.attention.lowered import Call, Round
from hdp.attention.outlined import KernelCall, Region
from hdp.attention.program import HeadCount, Heads

GRAIN = 4
"""A local call is cut until it takes at most 1/GRAIN of an average round's tiles."""


@dataclass(frozen=True)
class Local:
    """One call of whole documents of a bundle."""

    index: int
    """The bundle's."""
    call: KernelCall | Region
    costs: np.ndarray
    """Of each document, query-key pairs times heads."""


def local_calls(
    local: Sequence[Local],
    rounds: Sequence[Round],
    heads: HeadCount,
    make: Callable[..., tuple[list[Call], np.ndarray]],
    *,
    packs: bool,
) -> tuple[list[Round], list[Call]]:
    """The local calls, cut where a round of this program is short against them, and the rounds with their shares of launches.

    ``make(index, call, documents=, heads=, turns=)`` makes the calls of a bundle; ``packs``: a launch takes many documents.
    """
    waits = [i for i, r in enumerate(rounds) if r.receives]
    if not waits:
        return list(rounds), [made for one in local for made in make(one.index, one.call)[0]]
    calls: list[Call] = []
    if packs:
        turns = _turns(np.concatenate([one.costs for one in local] or [np.zeros(0, np.int64)]), len(waits))
        done = 0
        for one in local:
            calls += make(one.index, one.call, turns=turns[done : done + len(one.costs)])[0]
            done += len(one.costs)
    else:
        limit = max(sum(int(c.costs.sum()) for r in rounds for c in r.calls) // (GRAIN * len(waits)), 1)
        for one in local:
            calls += _cut(one, limit, heads, make)
    shares = _turns(np.concatenate([c.costs for c in calls] or [np.zeros(0, np.int64)]), len(waits))
    counts = np.bincount(shares, minlength=len(waits))
    cut = list(rounds)
    for turn, number in enumerate(waits):
        cut[number] = replace(rounds[number], fillers=int(counts[turn]))
    return cut, calls


def _cut(one: Local, limit: int, heads: HeadCount, make: Callable[..., tuple[list[Call], np.ndarray]]) -> list[Call]:
    """Documents of equally many parts together, part by part."""
    if any(ref.heads is not None for ref in one.call.inputs):
        return make(one.index, one.call)[0]
    parts = np.minimum(-(-one.costs // limit), heads.key)
    calls: list[Call] = []
    for count in np.unique(parts):
        for part in range(max(int(count), 1)):
            keys: Heads = (heads.key * part // max(count, 1), heads.key * (part + 1) // max(count, 1))
            queries = int(keys[0]) * heads.group, int(keys[1]) * heads.group
            some = (queries, (int(keys[0]), int(keys[1]))) if count > 1 else None
            calls += make(one.index, one.call, documents=parts == count, heads=some)[0]
    return calls


def _turns(costs: np.ndarray, waits: int) -> np.ndarray:
    """In which of the waits each piece is computed: equal work to each."""
    total = int(costs.sum())
    if not total:
        return np.zeros(len(costs), dtype=np.int64)
    done = np.cumsum(costs) - costs
    return np.minimum(waits * (2 * done + costs) // (2 * total), waits - 1)
