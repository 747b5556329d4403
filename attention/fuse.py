"""Fuses adjacent kernel calls into variable-length ones, for backends that take several rectangles at once.

Calls of one round, or local calls, that follow each other are one call if they have the same shape and flags and begin, in
every tensor that they touch, where the one before ends: whole packed documents, and the same step of several shared
sequences. Nothing is copied, and nothing changes in the results: a rectangle never sees another.

Calls that stay alone say where they begin and end, too: such kernels want it in tensors, which are then made once for a
program and not, with a copy to the device, for every call of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hdp.attention.lowered import Call, Lowered, Ref


def fuse(lowered: Lowered) -> Lowered:
    """The same program with fewer calls."""
    rounds = tuple(replace(r, calls=tuple(_fused(r.calls))) for r in lowered.rounds)
    fillers, shares = [], []
    position = 0
    for part in rounds:  # the share of each round is fused apart, so that the shares stay as they were dealt out
        own = _fused(lowered.fillers[position : position + part.fillers])
        position += part.fillers
        fillers += own
        shares.append(len(own))
    fillers += _fused(lowered.fillers[position:])
    rounds = tuple(replace(r, fillers=n) for r, n in zip(rounds, shares, strict=True))
    return replace(lowered, rounds=rounds, fillers=tuple(fillers))


def _fused(calls: Sequence[Call]) -> list[Call]:
    done: list[Call] = []
    for call in calls:
        if done and _follows(done[-1], call):
            done[-1] = _join(done[-1], call)
        else:
            done.append(replace(call, cuts=(_ends(call.inputs[0]), _ends(call.inputs[1]))))
    return done


def _follows(a: Call, b: Call) -> bool:
    if (a.shape, a.first, a.has_out) != (b.shape, b.first, b.has_out):
        return False
    return all(_adjoins(x, y) for x, y in zip((*a.inputs, *a.sums), (*b.inputs, *b.sums), strict=True))


def _adjoins(a: Ref, b: Ref) -> bool:
    return a.tensor == b.tensor and a.stop == b.start and a.heads == b.heads


def _join(a: Call, b: Call) -> Call:
    def joined(x: Sequence[Ref], y: Sequence[Ref]) -> tuple[Ref, ...]:
        return tuple(Ref(p.tensor, p.start, q.stop, p.heads) for p, q in zip(x, y, strict=True))

    assert a.cuts is not None
    rows, keys = a.cuts
    cuts = ((*rows, rows[-1] + _rows(b.inputs[0])), (*keys, keys[-1] + _rows(b.inputs[1])))
    sums = joined(a.sums, b.sums)
    return replace(a, inputs=joined(a.inputs, b.inputs), sums=sums, cost=a.cost + b.cost, cuts=cuts)


def _rows(ref: Ref) -> int:
    return ref.stop - ref.start


def _ends(ref: Ref) -> tuple[int, int]:
    return 0, ref.stop - ref.start
