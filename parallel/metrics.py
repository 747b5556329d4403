"""What a step reports: loss, time, who was busy and who waited. Equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hdp.balance.evaluate import Evaluation
from hdp.balance.foresee import Foreseen
from hdp.parallel.world import World

KINDS = ("compute", "wait")
TIMELINE_WORLD = 64
"""Largest world whose spans are gathered on every rank by default."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of one rank's time."""

    rank: int
    slot: int
    """Slot of the micro-batch; -1: the closing one, or outside all."""
    kind: str
    """``"compute"``: a micro-batch's forward and backward, waits included. ``"wait"``: blocked on other ranks."""
    start: float
    """Seconds from the beginning of the step on this rank."""
    stop: float
    sequences: tuple[int, ...] = ()
    """Sequences of the plan that the micro-batch holds parts of."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step, as all ranks together saw it."""

    step: int
    """Of the loader, from 0."""
    loss: float
    """Nats: mean over the label tokens of the global batch, by their ``loss_weights`` where documents have them, or over its
    documents (``reduction="sample"``); nan if nothing counts."""
    tokens: int
    """Of the global batch, on all ranks."""
    label_tokens: int
    """Those that have a label."""
    seconds: float
    """Wall time of the slowest rank."""
    busy_seconds: tuple[float, ...]
    """Per rank: time not spent waiting for others."""
    wait_seconds: tuple[float, ...]
    """Per rank: time blocked in transfers and collectives."""
    attention_bytes: int = 0
    """Attention's buffers for what is received, sent on and summed up, reused by all layers: of the rank that needed most."""
    peak_bytes: tuple[int, ...] = ()
    """Per rank: memory that training has taken at most since the engine was made; see ``hdp.parallel.memory``, also for what a
    CPU can tell of it."""
    foreseen: Foreseen | None = None
    """What the plan lets the fullest rank hold; None: not known."""
    predicted: Evaluation | None = None
    """What the plan's machine says of its time (``predicted.seconds``); None: not known."""
    spans: tuple[Span, ...] = ()
    """All ranks' time; empty in worlds larger than the timeline limit."""

    @property
    def memory(self) -> int:
        """Bytes that the fullest rank has taken at most so far; 0: not measured."""
        return max(self.peak_bytes, default=0)

    @property
    def drift(self) -> float | None:
        """By how much the step took longer than predicted: 0.2 is a fifth longer."""
        if self.predicted is None or not self.predicted.makespan:
            return None
        return self.seconds / self.predicted.seconds - 1.0

    @property
    def imbalance(self) -> float:
        """Largest over mean busy time; 1 is perfect."""
        mean = sum(self.busy_seconds) / len(self.busy_seconds)
        return max(self.busy_seconds) / mean if mean > 0 else 1.0

    @property
    def waiting_share(self) -> float:
        """Part of all ranks' time that was spent waiting, 0 to 1."""
        total = sum(self.busy_seconds) + sum(self.wait_seconds)
        return sum(self.wait_seconds) / total if total > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def gather_numbers(world: World, *numbers: float) -> torch.Tensor:
    """float64 [world_size, numbers]: each rank's row, on every rank."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(rows, mine, group=world.control)
    return torch.stack(rows)


def gather_spans(world: World, packed: list[float], longest: int) -> tuple[Span, ...]:
    """All ranks' spans. ``packed``: this rank's, by :func:`pack_spans`; ``longest``: numbers in the longest rank's."""
    rows = gather_numbers(world, *packed, *[0.0] * (longest - len(packed)))
    return tuple(span for rank, row in enumerate(rows.tolist()) for span in _unpack(rank, row))


def pack_spans(spans: list[Span]) -> list[float]:
    """As numbers, which travel in one message: how many, and of each slot, kind, start, stop, and its sequences."""
    packed = [float(len(spans))]
    for span in spans:
        packed += (span.slot, KINDS.index(span.kind), span.start, span.stop, len(span.sequences), *span.sequences)
    return packed


def _unpack(rank: int, row: list[float]) -> Iterator[Span]:
    at = 1
    for _ in range(int(row[0])):
        slot, kind, start, stop, count = row[at : at + 5]
        at += 5 + int(count)
        sequences = tuple(int(n) for n in row[at - int(count) : at])
        yield Span(rank=rank, slot=int(slot), kind=KINDS[int(kind)], start=start, stop=stop, sequences=sequences)
