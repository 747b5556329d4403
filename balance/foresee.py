"""The most that a rank holds in a step, foreseen: a walk over its micro-batches, part by part.

    peak = foresee(footprint, engine, loads)
    peak.bytes, peak.when, peak.parts       # {"saved activations": ..., "gathered parameters": ..., ...}

The walk goes through a step as the engine runs it (``hdp.parallel.fsdp``, ``ddp``, ``deepspeed``; ``hdp.offload.micro_batch``
for what leaves and returns), one layer after the other, and keeps a ledger. What may be under way or over by then, a copy to a
tier or a collective, is taken to be under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hdp.balance.footprint import Footprint, Segment, at, highest
from hdp.balance.held import KEPT, RETURNED, SAVED, EngineMemory, Held, Load

ADAM = 2.0
"""Numbers that Adam keeps of each parameter."""
PARAMETERS, GATHERED, GRADIENTS, OPTIMIZER = "parameters", "gathered parameters", "gradients", "optimizer state"
ARENA = "attention's arena"
WORKING, LOSS, COLLECTIVES = "working memory", "loss", "collectives"


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The highest moment of a step."""

    bytes: int
    when: str
    """In words: the micro-batch and what it does."""
    parts: dict[str, int]
    """Bytes by name, largest first."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.parts.items() if size)


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """The fullest rank of a plan."""

    rank: int
    peak: Peak

    @property
    def bytes(self) -> int:
        return self.peak.bytes


@dataclass
class _Ledger:
    """What is there now, and the highest moment so far."""

    now: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0
    at_peak: dict[str, float] = field(default_factory=dict)
    when: str = ""

    def put(self, name: str, size: float) -> None:
        self.now[name] = self.now.get(name, 0.0) + size

    def look(self, when: str, **passing: float) -> None:
        """Notes the moment, with what is there only now."""
        total = sum(self.now.values()) + sum(passing.values())
        if total > self.peak:
            self.peak, self.when = total, when
            self.at_peak = dict(self.now)
            for name, size in passing.items():
                key = _NAMES[name]
                self.at_peak[key] = self.at_peak.get(key, 0.0) + size

    def result(self) -> Peak:
        parts = sorted(self.at_peak.items(), key=lambda item: -item[1])
        return Peak(bytes=round(self.peak), when=self.when, parts={name: round(size) for name, size in parts})


_NAMES = {"working": WORKING, "loss": LOSS, "collectives": COLLECTIVES, "gradients": GRADIENTS, "gathered": GATHERED}


def foresee(model: Footprint, engine: EngineMemory, loads: Sequence[Load]) -> Peak:
    """The peak of a rank that runs ``loads`` in one step, between two others: the optimizer's state is there."""
    return _Walk(model, engine).step(loads)


class _Walk:
    def __init__(self, model: Footprint, engine: EngineMemory) -> None:
        self.model, self.engine, self.ledger = model, engine, _Ledger()
        self.segments: list[Segment] = [model.before, *model.layers, model.behind]
        self.pending: list[float] = []
        """Gradients under way: the buffers that are read meanwhile."""
        self.has_gradients = False
        self.by_layer = engine.regime == "slot" and (engine.kind == "fsdp" or engine.stage == 3)
        """Whether that is done layer by layer."""
        self.reduces_apart = self.by_layer or engine.kind == "fsdp" or engine.stage >= 2
        """Whether whole gradients become a rank's part; else they are summed where they lie."""
        self.gathers = engine.kind == "fsdp" or engine.stage == 3
        """Whether parameters are divided and have to be gathered."""

    # ------------------------------------------------------------ sizes

    @cached_property
    def shards(self) -> float:
        """1 / ranks among which parameters are divided."""
        return 1.0 / self.engine.sharers

    def full(self, segment: Segment) -> float:
        return segment.parameters * self.engine.computed

    def whole_gradients(self, segment: Segment) -> float:
        """Of one segment between micro-batches."""
        return segment.trained * max(self.engine.reduced, self.engine.computed)

    # ------------------------------------------------------------ the step

    def step(self, loads: Sequence[Load]) -> Peak:
        ledger, engine, model = self.ledger, self.engine, self.model
        divided = self.gathers
        ledger.put(PARAMETERS, model.parameters * engine.stored * (self.shards if divided else 1.0))
        ledger.put(OPTIMIZER, model.trained * engine.optimizer * (self.shards if divided or engine.stage else 1.0))
        ledger.put(ARENA, max((load.arena for load in loads), default=0))
        if engine.kind == "ddp" or (engine.kind == "zero" and engine.stage < 2):
            ledger.put(GRADIENTS, model.trained * engine.reduced)  # in buckets that are there for good
            self.has_gradients = True
        elif not divided:
            ledger.put(GRADIENTS, model.trained * engine.reduced * self.shards)
        if divided and engine.regime == "step":
            ledger.put(COLLECTIVES, sum(map(self.full, self.segments)))
            copied = engine.gather_copies * max(map(self.full, self.segments))
            ledger.look("gathering the parameters", collectives=copied)
        for number, load in enumerate(loads):
            name = f"micro-batch {number + 1} of {len(loads)}"
            self.micro_batch(load, name, first=number == 0)
        return ledger.result()

    def micro_batch(self, load: Load, name: str, *, first: bool) -> None:
        held = Held(self.model, self.engine, load)
        self.forward(load, held, name, first)
        self.backward(load, held, name)

    def forward(self, load: Load, held: Held, name: str, first: bool) -> None:
        ledger = self.ledger
        for i, segment in enumerate(self.segments):
            self.gather_forward(i, first)
            ledger.now |= held.before_forward(i)
            where = f"{name}, forward of {self.called(i)}"
            ledger.look(where, working=highest(segment.forward, load.tokens), **self.gathering_next(i))
            self.release_forward(i)
        ledger.now |= held.after_forward()
        model, engine = self.model, self.engine
        rows = min(engine.loss_rows, load.tokens)
        logits = rows * model.vocabulary * (4 if engine.computed >= 4 else 4 + 2 * engine.computed)
        head = model.vocabulary * model.width * 4.0 * model.trains_head
        narrow = model.vocabulary * model.width * engine.computed if engine.computed < 4 else 0
        ledger.look(f"{name}, loss", loss=logits + head + narrow)
        ledger.now[LOSS] = head

    def backward(self, load: Load, held: Held, name: str) -> None:
        ledger, more = self.ledger, self.has_gradients
        for i in reversed(range(len(self.segments))):
            segment = self.segments[i]
            self.gather_backward(i)
            if i == len(self.segments) - 1 and not more:  # the head's gradient is there since forward
                ledger.put(GRADIENTS, ledger.now[LOSS])
                ledger.now[LOSS] = 0.0
            ledger.now |= held.before_backward(i)
            # Where gradients are summed in another precision those of a micro-batch are new.
            adds = more and self.engine.computed == self.engine.reduced
            lines = segment.backward_more if adds else segment.backward
            working = highest(lines, load.tokens)
            if held.runs_again(i):
                working = max(working, highest(segment.forward, load.tokens) - at(segment.held, load.tokens))
            where = f"{name}, backward of {self.called(i)}"
            ledger.look(where, working=working, **self.gathering_previous(i))
            if i == len(self.segments) - 1:
                ledger.now[LOSS] = 0.0
            self.leave_backward(i, load, f"{name}, gradients of {self.called(i)}", more)
        ledger.now[SAVED] = ledger.now[KEPT] = ledger.now[RETURNED] = 0.0
        self.root_gradients(load, f"{name}, gradients of embeddings and head", more)
        self.has_gradients = self.engine.regime == "step" and not (load.reduces and self.reduces_apart)

    def called(self, i: int) -> str:
        if i == 0:
            return "embeddings"
        return f"layer {i} of {len(self.model.layers)}" if i < len(self.segments) - 1 else "head"

    # ------------------------------------------------------------ parameters

    def gather_forward(self, i: int, first: bool) -> None:
        """Whole parameters of segment ``i`` are there for its forward."""
        ledger, size = self.ledger, self.full(self.segments[i])
        if not self.gathers:
            return
        if self.engine.regime == "step":
            if first and size:
                ledger.look(f"copying gathered parameters of {self.called(i)}", gathered=size)
                ledger.put(COLLECTIVES, -size)
                ledger.put(GATHERED, size)
        elif i == 0:
            ledger.look("gathering embeddings and head", collectives=size, gathered=size)
            ledger.put(GATHERED, size)
        elif i < len(self.segments) - 1:
            ledger.put(GATHERED, size)

    def gathering_next(self, i: int) -> dict[str, float]:
        if not self.by_layer or i + 1 >= len(self.segments) - 1:
            return {}
        return {"collectives": self.full(self.segments[i + 1]) * (1 + self.engine.gather_copies)}

    def release_forward(self, i: int) -> None:
        if self.by_layer and 0 < i < len(self.segments) - 1:
            self.ledger.put(GATHERED, -self.full(self.segments[i]))

    def gather_backward(self, i: int) -> None:
        if self.by_layer and 0 < i < len(self.segments) - 1:
            self.ledger.put(GATHERED, self.full(self.segments[i]))

    def gathering_previous(self, i: int) -> dict[str, float]:
        if not self.by_layer or i < 2:
            return {}
        return {"collectives": self.full(self.segments[i - 1]) * (1 + self.engine.gather_copies)}

    # ------------------------------------------------------------ gradients

    def leave_backward(self, i: int, load: Load, where: str, more: bool) -> None:
        """A layer's gradients are whole: they stay, or are reduced and its parameters released."""
        segment, ledger = self.segments[i], self.ledger
        if not 0 < i < len(self.segments) - 1:
            return
        whole = self.whole_gradients(segment)
        if not more:
            ledger.put(GRADIENTS, whole)
        if self.engine.computed != self.engine.reduced:
            ledger.look(where, gradients=segment.trained * self.engine.computed)
        if load.reduces and self.reduces_apart:
            if self.gathers:
                ledger.put(GATHERED, -self.full(segment))
            self.reduce(segment, whole, where)

    def root_gradients(self, load: Load, where: str, more: bool) -> None:
        segment, ledger = self.segments[0], self.ledger
        whole = self.whole_gradients(segment)
        if not more:
            head = self.model.vocabulary * self.model.width * 4.0 * self.model.trains_head
            ledger.put(GRADIENTS, max(whole - head, 0.0))
        if load.reduces and self.reduces_apart:
            self.reduce(segment, whole, where)
            self.pending.clear()
            ledger.now[COLLECTIVES] = 0.0
            if self.gathers:
                ledger.put(GATHERED, -self.full(segment))

    def reduce(self, segment: Segment, whole: float, where: str) -> None:
        """Copied into one buffer, summed over ranks, this rank's part kept."""
        ledger, engine = self.ledger, self.engine
        buffer = segment.trained * engine.reduced
        part = buffer * self.shards
        ledger.look(where, collectives=buffer + part)
        ledger.put(GRADIENTS, part - whole)
        flight = buffer * (1 + engine.reduce_copies)
        self.pending.append(flight)
        ledger.put(COLLECTIVES, flight)
        ledger.look(where)
        most = 1 if not engine.beside else 2 if engine.regime == "slot" else 1 << 30
        while len(self.pending) > most:
            ledger.put(COLLECTIVES, -self.pending.pop(0))
