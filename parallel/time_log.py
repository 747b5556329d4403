"""Says where steps take another time than their plans predict, and what the likely cause is."""

from __future__ import annotations

import logging
from collections import deque

import numpy as np

from hdp.balance.cost import TICK
from hdp.balance.machine import Machine
from hdp.parallel.metrics import StepResult
from hdp.parallel.world import World

logger = logging.getLogger("hdp")

DRIFT = 0.15
"""Of the seconds predicted, beyond which it is said; and beyond what was said last, before it is said again."""
WARM, STEPS = 2, 4
"""Steps that do not count, since everything warms up, and steps after them whose times are added up."""
RANKS = 4
"""Slow ones that are named; of more, how many."""


class TimeLog:
    """Of one engine; rank 0 speaks. What it holds is alike on all ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.restart()

    def restart(self) -> None:
        """Forgets all steps: those that come are of other plans."""
        self._left_out = 0
        self._last: deque[StepResult] = deque(maxlen=STEPS)
        self._said = 0.0
        self.is_off = False
        """Whether the last steps took another time than a measured machine predicted."""

    def note(self, result: StepResult, machine: Machine | None) -> None:
        """One step. Only what was measured can be wrong: what is assumed of a machine is said to be so when it is assumed."""
        if result.drift is None or machine is None or machine.source != "measured":
            return
        if self._left_out < WARM:
            self._left_out += 1
            return
        self._last.append(result)
        if len(self._last) < STEPS:
            return
        measured, predicted = (sum(each) for each in zip(*map(_seconds, self._last), strict=True))
        drift = measured / predicted - 1.0
        self.is_off = abs(drift) > DRIFT
        if self.is_off and abs(drift - self._said) > DRIFT:
            self._said = drift
            if self.world.rank == 0:
                logger.warning(
                    "the last %d steps took %.3g s each where the machine predicts %.3g (%+.0f %%): %s",
                    STEPS,
                    measured / STEPS,
                    predicted / STEPS,
                    100 * drift,
                    likely_cause(list(self._last)),
                )


def _seconds(result: StepResult) -> tuple[float, float]:
    assert result.predicted is not None
    return result.seconds, result.predicted.seconds


def likely_cause(results: list[StepResult]) -> str:
    """Why these steps did not take as long as predicted, from who was busy for how long and who waited.

    A rank that computes longer than the others, by what was predicted of each, is slow; where all do, the machine is not as
    it was when it was measured; where none does, and ranks wait more, it is the links.
    """
    busy = np.sum([result.busy_seconds for result in results], axis=0)
    waits = np.sum([result.wait_seconds for result in results], axis=0)
    each = [result.predicted for result in results if result.predicted is not None]
    said = np.sum([one.busy - one.exposed for one in each], axis=0) * TICK
    works = said > 0
    ratios = busy[works] / said[works]
    if not len(ratios):
        return "nothing was predicted for any rank"
    usual = float(np.median(ratios))
    slow = [int(rank) for rank, ratio in zip(np.flatnonzero(works), ratios, strict=True) if ratio > usual * (1 + DRIFT)]
    if 0 < len(slow) <= len(ratios) // 2:
        named = ", ".join(map(str, slow[:RANKS])) + (f" and {len(slow) - RANKS} more" if len(slow) > RANKS else "")
        return (
            f"rank{'s' if len(slow) > 1 else ''} {named} computed {ratios.max() / usual:.2f} times as long as the others for"
            " what they were given: another load there, heat, or a slower device"
        )
    if usual > 1 + DRIFT:
        return (
            f"all ranks computed {usual:.2f} times as long as predicted: another load on their hosts, or slower clocks"
        )
    if usual < 1 - DRIFT:
        return f"all ranks computed in {usual:.2f} of the time predicted: another load has ended since the machine was measured"
    total = sum(one.seconds for one in each)
    foreseen, waited = 1.0 - said.sum() / (total * len(said)), waits.sum() / (busy.sum() + waits.sum())
    return (
        f"computing took as long as predicted, but ranks waited {waited:.0%} of the time where {foreseen:.0%} is predicted:"
        f" {'slow links, or collectives that nothing hides' if waited > foreseen else 'links are faster than measured'}"
    )
