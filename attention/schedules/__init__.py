"""Schedules by name: each turns (layout, mask, heads, member) into a forward and a backward program.

A schedule is data made by a pure function. It serves any group size, any layout, GQA and MQA; the checker proves each
program that tests draw, and one executor runs them all.
"""

from __future__ import annotations

from typing import Protocol

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, RankProgram
from hdp.attention.schedules import local, ring


class Schedule(Protocol):
    """What a schedule's module offers."""

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        """Program that leaves every OUT at the owner of its queries."""
        ...

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        """Program that leaves every DQ and DKV at the owner of its tokens."""
        ...


SCHEDULES: dict[str, Schedule] = {"local": local, "ring": ring}


def get_schedule(name: str) -> Schedule:
    """The schedule called ``name``; ValueError for an unknown one."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown attention schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
