"""Local work that fills the waits for bytes: calls of whole sequences, cut so that none delays the next round for long.

A sequence that lives on one rank is one kernel call, which may take longer than a round of the shared sequences. It is cut
by heads: pieces need no merging and cost nothing extra. On a device where the host runs ahead of the kernels nobody can
ask whether bytes have arrived, so the calls are also dealt out over the rounds beforehand, equal work to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hdp.attention.lowered import Call, Ref, Round
from hdp.attention.program import HeadCount, Heads

GRAIN = 4
"""A local call is cut until it takes at most 1/GRAIN of an average round's tiles."""


def local_calls(calls: Sequence[Call], rounds: Sequence[Round], heads: HeadCount) -> list[Call]:
    """The local calls, cut by heads where a round of this program is short against them."""
    waits = [r for r in rounds if r.receives]
    if not waits:
        return list(calls)
    limit = max(sum(c.cost for r in rounds for c in r.calls) // (GRAIN * len(waits)), 1)
    return [piece for call in calls for piece in _cut(call, min(-(-call.cost // limit), heads.key), heads)]


def _cut(call: Call, parts: int, heads: HeadCount) -> list[Call]:
    if parts < 2 or any(ref.heads is not None for ref in call.inputs):
        return [call]
    pieces = []
    for i in range(parts):
        keys = (heads.key * i // parts, heads.key * (i + 1) // parts)
        queries = (keys[0] * heads.group, keys[1] * heads.group)
        is_forward = len(call.sums) == 2
        inputs = _pick(call.inputs, (queries, keys, keys, queries, queries, queries))
        sums = _pick(call.sums, (queries, queries) if is_forward else (queries, keys, keys))
        cost = call.cost * (keys[1] - keys[0]) // heads.key
        pieces.append(replace(call, inputs=inputs, sums=sums, cost=cost))
    return pieces


def _pick(refs: Sequence[Ref], heads: Sequence[Heads]) -> tuple[Ref, ...]:
    return tuple(replace(ref, heads=some) for ref, some in zip(refs, heads, strict=False))


def spread(rounds: Sequence[Round], fillers: Sequence[Call]) -> list[Round]:
    """Says how many local calls each round that waits for bytes runs, equal work to each; the rest comes last."""
    waits = [i for i, r in enumerate(rounds) if r.receives]
    if not waits or not fillers:
        return list(rounds)
    total = sum(call.cost for call in fillers)
    counts, done = dict.fromkeys(waits, 0), 0
    for call in fillers:
        turn = min(len(waits) * (2 * done + call.cost) // (2 * total), len(waits) - 1) if total else 0
        counts[waits[turn]] += 1
        done += call.cost
    return [replace(r, fillers=counts[i]) if i in counts else r for i, r in enumerate(rounds)]
