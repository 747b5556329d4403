"""Says, once in a run, how much memory was foreseen for the fullest rank and how much it took."""

from __future__ import annotations

import logging

from hdp.parallel.metrics import StepResult
from hdp.parallel.world import World

logger = logging.getLogger("hdp")

DRIFT = 0.15
"""Between the two, beyond which it is a warning, on devices whose allocator counts."""
STEPS = 2
"""After so many, for the first is without the optimizer's state."""


class MemoryLog:
    """Of one engine; rank 0 speaks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._steps = self._most = 0

    def note(self, result: StepResult) -> None:
        """One step."""
        if result.foreseen is None or self.world.rank != 0 or self._steps >= STEPS:
            return
        self._steps += 1
        self._most = max(self._most, result.foreseen.bytes)
        if self._steps < STEPS:
            return
        counts = self.world.device.type == "cuda"
        drift = self._most / max(result.memory, 1) - 1.0
        logger.log(
            logging.WARNING if counts and abs(drift) > DRIFT else logging.INFO,
            "memory of the fullest rank: foreseen %.1f MB (rank %d, %s: %s), taken so far %.1f MB by %s",
            self._most / 1e6,
            result.foreseen.rank,
            result.foreseen.peak.when,
            result.foreseen.peak,
            result.memory / 1e6,
            "the allocator" if counts else "the process's resident size, which holds more than tensors",
        )
