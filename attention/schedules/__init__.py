"""Schedules by name: each turns (layout, mask, heads, member) into a forward and a backward program.

A schedule is data made by a pure function. It serves any group size, any layout, GQA and MQA; the checker proves each
program that tests draw, and one executor runs them all. Some take a number after a colon::

    local               the whole sequence on one rank
    ring                K/V travel; backward turns round
    ring_q              backward: Q, DO, DQ travel (forward: ring)
    token_ring          Q travels one way, results return the other way
    direct              K/V straight to each reader, one distance a step
    all_gather[:S]      K/V to all readers at once, in S slices of heads
    ulysses[:S]         heads travel, in S slices
    ulysses_home[:S]    the same, but what needs no message is computed at home
    hybrid:H            heads inside nodes of H members, ring across nodes
    double_ring:I       a ring inside nodes of I members, another across nodes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, cast

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, RankProgram
from hdp.attention.refine import refine
from hdp.attention.schedules import direct, local, ring, ring_q, token_ring
from hdp.attention.schedules.all_gather import AllGather
from hdp.attention.schedules.double_ring import DoubleRing
from hdp.attention.schedules.hybrid import Hybrid
from hdp.attention.schedules.ulysses import Ulysses, UlyssesHome


class Schedule(Protocol):
    """What a schedule's module, or object, offers."""

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        """Program that leaves every OUT at the owner of its queries."""
        ...

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        """Program that leaves every DQ and DKV at the owner of its tokens."""
        ...


PLAIN: dict[str, Schedule] = {
    name: cast(Schedule, module)
    for name, module in {
        "local": local,
        "ring": ring,
        "ring_q": ring_q,
        "token_ring": token_ring,
        "direct": direct,
    }.items()
}
# name: (what makes it from its number, the number if none is given; None: it must be given)
NUMBERED: dict[str, tuple[Callable[[int], Schedule], int | None]] = {
    "all_gather": (AllGather, 1),
    "ulysses": (Ulysses, 1),
    "ulysses_home": (UlyssesHome, 1),
    "hybrid": (Hybrid, None),
    "double_ring": (DoubleRing, None),
}
SCHEDULES = (*PLAIN, *NUMBERED)
_WAYS = {
    "ring": ((1, True, 1),),
    "ring_q": ((1, True, 1), (-1, False, 1)),
    "token_ring": ((-1, False, 1),),
}
# Their backward starts from inputs that only their own forward keeps.
_KEEPING = ("ring", "ulysses", "ulysses_home", "hybrid")


@lru_cache(maxsize=256)
def get_schedule(name: str) -> Schedule:
    """The schedule called ``name``, such as ``"ring"`` or ``"hybrid:4"``; ValueError for an unknown one."""
    base, colon, number = name.partition(":")
    if base in PLAIN and not colon:
        return PLAIN[base]
    if base not in NUMBERED:
        raise ValueError(f"unknown attention schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    make, default = NUMBERED[base]
    if not colon and default is not None:
        return make(default)
    if not number.isdecimal():
        raise ValueError(f"attention schedule {name!r} needs a whole number after the colon, such as '{base}:2'")
    return make(int(number))


def cuts_chunks(name: str) -> bool:
    """Whether the schedule called ``name`` sends the ends of chunks by themselves under a window."""
    return type(get_schedule(name)) is not Ulysses


def ways_of(name: str) -> tuple[tuple[int, bool, int], ...]:
    """(direction, is_key, width) of the rings on which a schedule's chunks go the shorter way round (``Sight.ways``)."""
    schedule = get_schedule(name)
    if isinstance(schedule, Hybrid):
        return ((1, True, schedule.degree),)
    return _WAYS.get(name, ())


def lay_out(layout: Layout, mask: Mask, name: str) -> Layout:
    """``layout`` with its chunks cut as the schedule called ``name`` sends them under this mask.

    Programs made on ``layout`` itself are right too, but send whole chunks of which a window needs the end, or hide less.
    Where heads travel all tokens do, whatever the window: cut chunks would only be more to go through.
    """
    if not cuts_chunks(name):
        return layout
    schedule = get_schedule(name)
    return refine(layout, mask, schedule.parts(layout) if isinstance(schedule, DoubleRing) else 1)


@dataclass(frozen=True)
class Pair:
    """One schedule forward and another backward. Forward keeps only what backward finds."""

    first: str
    """Name of the forward schedule."""
    second: str
    """Name of the backward schedule."""

    def __post_init__(self) -> None:
        get_schedule(self.first), get_schedule(self.second)
        if self.second.partition(":")[0] in _KEEPING and self.first != self.second:
            raise ValueError(
                f"backward schedule {self.second!r} starts from what its own forward keeps, but forward is"
                f" {self.first!r}: choose {self.second!r} for both, or go backward with ring_q, token_ring, direct,"
                f" all_gather or double_ring"
            )

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        program = get_schedule(self.first).forward(layout, mask, heads, member)
        return program if self.first == self.second else replace(program, keep=())

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        return get_schedule(self.second).backward(layout, mask, heads, member)


def get_pair(forward: str, backward: str) -> Schedule:
    """Both directions of a sequence. ValueError if ``backward`` would not find what it needs.

    ``ring``, ``ulysses``, ``ulysses_home`` and ``hybrid`` go backward from what their own forward kept; every other backward
    follows any forward, which then keeps nothing.
    """
    return Pair(forward, backward)
