"""Plans that fit the memory of their ranks: the capacity that is found from it, and what becomes of a plan that takes more."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hdp.balance.capacity import LEAST_CAPACITY, MARGIN
from hdp.balance.foresee import Foreseen
from hdp.balance.plan import DoesNotFit, Plan, PlanError
from hdp.parallel.foresight import Foresight

if TYPE_CHECKING:
    from hdp.parallel.engine import Engine

AUTO = "auto"
SMALLER = 7 / 8
"""A plan that takes too much is made again with at most so many of its tokens a micro-batch."""
TRIES = 24

logger = logging.getLogger("hdp")


class Fits:
    """What plans have to fit.

    Args:
        foresight: None: nothing is foreseen, and every plan fits.
        memory: bytes of every rank; None: as the engine found.
        capacity: tokens of a micro-batch.
    """

    def __init__(self, foresight: Foresight | None, memory: float | None, capacity: int) -> None:
        self.foresight = None if memory == math.inf else foresight
        self.memory = memory
        self.kept_per_token: float | None = None
        """What ``"auto"`` may let attention of a layer keep, for the plans that fit and the ranks that run them."""
        if self.foresight is not None:
            self.kept_per_token = kept = self.foresight.kept_per_token(capacity, memory)
            if self.foresight.chooser is not None:
                self.foresight = replace(self.foresight, chooser=replace(self.foresight.chooser, kept_per_token=kept))

    def plan(self, make: Callable[[int], Plan], capacity: int) -> tuple[Plan, Foreseen | None]:
        """The plan of ``make(capacity)``; where it would take more memory than there is, one of smaller micro-batches.

        Raises:
            DoesNotFit: no smaller ones fit either. Names the sequence, the rank, the bytes by part and what would help.
        """
        made = make(capacity)
        if self.foresight is None:
            return made, None
        limit = self.foresight.limit if self.memory is None else self.memory
        first = found = self._highest(made)
        smaller = capacity
        for _ in range(TRIES):
            if found.bytes <= limit:
                return made, found
            smaller = min(int(smaller * SMALLER), int(_held(made, found.rank) * SMALLER))
            if smaller < LEAST_CAPACITY:
                break
            try:
                made = make(smaller)
            except DoesNotFit as error:
                raise DoesNotFit(
                    f"{self._refusal(made, first, limit)}; with fewer tokens a micro-batch: {error}"
                ) from error
            found = self._highest(made)
        raise DoesNotFit(self._refusal(made, found, limit))

    def _highest(self, made: Plan) -> Foreseen:
        assert self.foresight is not None
        rank, peak = self.foresight.highest(made)
        return Foreseen(rank=rank, peak=peak)

    def _refusal(self, made: Plan, found: Foreseen, limit: float) -> str:
        own = made.sequences_of(found.rank)
        longest = int(own[np.argmax(made.lengths[own])]) if len(own) else int(np.argmax(made.lengths))
        assert self.foresight is not None
        cures = ["more ranks", 'recompute="auto"', 'offload="auto"', "shorter documents (max_length)"]
        if self.foresight.engine.kind == "fsdp" and self.foresight.engine.regime == "step":
            cures.insert(0, 'hdp.shard(..., regime="slot")')
        return (
            f"sequence {longest} of {int(made.lengths[longest])} tokens: rank {found.rank} would take {_size(found.bytes)} of"
            f" {_size(limit)} ({found.peak.when}: {found.peak}); use {', '.join(cures[:-1])} or {cures[-1]}, or give"
            " hdp.Loader(memory=...) where a rank has more"
        )


def _held(made: Plan, rank: int) -> int:
    """Tokens of the fullest micro-batch of a rank."""
    ranks, _, held = made.held()
    return int(held[ranks == rank].max(initial=made.capacity if not len(held) else 1))


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def capacity_of(capacity: int | str, engine: Engine, tokens_per_step: int, memory: float | None) -> int:
    """Tokens of a micro-batch: the number given, or found from memory, which rank 0 says.

    Raises:
        PlanError: a capacity below 1, one to be found where nothing is known to find it from, or where not even the model fits.
    """
    if capacity != AUTO:
        found = whole_number("capacity", capacity)
        if found < 1:
            raise PlanError(f"capacity is {found}: a rank must hold at least one token of a micro-batch")
        return found
    foresight = engine.foresee()
    if foresight is None:
        raise PlanError(
            'capacity="auto" is found from what the engine and its model take, which is not known of this one (tensor'
            " parallelism, a model of unknown shape): give the tokens that a rank holds in one micro-batch (capacity=8192)"
        )
    limit = foresight.limit if memory is None else memory
    if limit == math.inf:
        return tokens_per_step
    found = foresight.capacity(tokens_per_step, memory)
    if found < 1:
        least = foresight.at_capacity(LEAST_CAPACITY)
        raise PlanError(
            f"not even {LEAST_CAPACITY} tokens a micro-batch fit: a rank would take {_size(least.bytes)} of {_size(limit)}"
            f' less a margin of {MARGIN:.0%} ({least}): use more ranks, regime="slot", or a smaller model'
        )
    if engine.world.rank == 0:
        peak = foresight.at_capacity(found)
        logger.info(
            'capacity="auto": %d tokens a micro-batch; a rank has %s and is foreseen to take up to %s (%s)%s',
            found,
            _size(limit),
            _size(peak.bytes),
            peak,
            "" if foresight.is_traced else ", estimated from the model's shape",
        )
    return found


def check_memory(memory: float | None) -> float | None:
    """Raises ValueError for what is no number of bytes."""
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or not memory > 0):
        raise ValueError(f"memory is {memory!r}: give the bytes that training may take on every rank, such as 70e9")
    return memory


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int; raises ValueError where it is none, such as text of a configuration file."""
    if isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    or_auto = ', or "auto"' if name == "capacity" else ""
    raise ValueError(f"{name} is {value!r}: give a whole number of tokens{or_auto}")
