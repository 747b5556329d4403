"""What the layers of one micro-batch hold from forward to backward, as some of it leaves, returns, or is computed again.

The walk of ``hdp.offload.micro_batch`` as bytes: while a layer runs forward the one before may still be leaving, in backward
the one before is on its way back; of a storage of which a part leaves, the rest lies in a place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from hdp.balance.footprint import Footprint, at

SAVED, KEPT, RETURNED = "saved activations", "attention's kept blocks", "offloaded activations' rests and returns"
POOL_SLACK = 9 / 8
"""What a pool of buffers has at most, over the most that was in use (``hdp.offload.buffers``)."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """How an engine holds a model. Bytes are of an element."""

    kind: str
    """``"fsdp"``, ``"ddp"`` or ``"zero"``."""
    regime: str
    sharers: int
    """Ranks over which parameters are sharded."""
    ranks: int = 1
    """Ranks that share documents."""
    stored: int = 4
    """Of parameters as the optimizer has them."""
    computed: int = 4
    """Of parameters as they are computed with."""
    reduced: int = 4
    """Of gradients as they are reduced."""
    optimizer: float = 8.0
    """Of the optimizer's state: Adam keeps two fp32 numbers."""
    stage: int = 0
    """Of ZeRO."""
    beside: bool = False
    """Whether collectives of FSDP2 run beside computation without streams (``hdp.parallel.collectives``)."""
    gather_copies: int = 0
    """Copies of what is gathered that the transport has while it is under way."""
    reduce_copies: int = 0
    """The same of what is reduced."""
    loss_rows: int = 1 << 62
    """Tokens of one chunk of the loss."""
    least_moved: int = 64 << 10
    """Bytes of the smallest storage that leaves."""
    pooled: bool = False
    """Whether what offload keeps and brings back lies in a pool of its own (``hdp.offload.buffers``), as on CPUs."""
    keep_first: int = 1
    keep_last: int = 1


@dataclass(frozen=True, kw_only=True)
class Load:
    """One micro-batch of one rank."""

    tokens: int
    ratio: float = 0.0
    """What leaves of the layers that do not keep everything."""
    again: int = 0
    """Layers that run again in backward."""
    reduces: bool = False
    """Whether gradients are reduced in its backward pass."""
    arena: int = 0
    """Bytes of attention's arena."""
    kept: tuple[int, ...] = ()
    """Bytes that a layer's attention keeps beside its own shards, by the layer's kind (``Foreseen.kinds``)."""


class Held:
    """Of one micro-batch. Segments: what comes before the layers (0), the layers, what comes behind them."""

    def __init__(self, model: Footprint, engine: EngineMemory, load: Load) -> None:
        self.count, tokens = len(model.layers), load.tokens
        self.pooled, self.most = engine.pooled, 0.0
        self.again = spread(load.again, self.count, engine)
        first, last = engine.keep_first, self.count - engine.keep_last
        kinds = list(dict.fromkeys(a for layer in model.layers for a in layer.attention))
        segments = [model.before, *model.layers, model.behind]
        plain, blocks, away = [], [], []
        for i, segment in enumerate(segments):
            runs_again = self.runs_again(i)
            saves = at(segment.again if runs_again else segment.held, tokens)
            kept = float(sum(load.kept[kinds.index(a)] for a in segment.attention)) if load.kept else 0.0
            sizes: list[float] = []
            if load.ratio > 0 and first < i <= last:
                sizes = [at(segment.again, tokens)] if runs_again else [at(line, tokens) for line in segment.moves]
                if kept >= engine.least_moved:  # it goes with the others
                    sizes.append(kept)
                    saves, kept = saves + kept, 0.0
            plain.append(saves)
            blocks.append(kept)
            away.append(sum(size for size in sizes if size >= engine.least_moved))
        self.plain, self.kept, self.away = (_sums(each) for each in (plain, blocks, away))
        self.rest = _sums([size * (1.0 - load.ratio) for size in away])
        self.extra = [at(s.held, tokens) - at(s.again, tokens) for s in segments]

    def runs_again(self, i: int) -> bool:
        """Whether segment ``i`` is a layer that runs again in backward."""
        return 0 < i <= self.count and self.again[i - 1]

    def before_forward(self, i: int) -> dict[str, float]:
        """Bytes by name before segment ``i`` runs forward: all but the last two layers have left."""
        left = max(min(i, self.count) - 1, 0)
        return self._parts(i, left, self.rest[i], 1.0)

    def after_forward(self) -> dict[str, float]:
        """At the loss."""
        return self.before_forward(len(self.extra))

    def before_backward(self, i: int) -> dict[str, float]:
        """Before segment ``i`` runs backward: it has returned, the one before it is on its way."""
        returned = self.away[i + 1] - self.away[max(i - 1, 0)]
        parts = self._parts(i + 1, i + 1, self.rest[i] + returned, POOL_SLACK)
        parts[SAVED] += self.extra[i] if self.runs_again(i) else 0.0
        return parts

    def _parts(self, there: int, left: int, apart: float, slack: float) -> dict[str, float]:
        """The first ``there`` segments are there, without what of the first ``left`` has gone; ``apart`` lies elsewhere."""
        if (
            self.pooled
        ):  # what the pool has once had it keeps until the micro-batch is over, and more where sizes differ
            self.most = max(self.most, apart)
            apart = self.most * slack
        return {SAVED: self.plain[there] - self.away[left], KEPT: self.kept[there], RETURNED: apart}


def _sums(sizes: Sequence[float]) -> list[float]:
    """Of the first so many."""
    return [0.0, *accumulate(sizes)]


def spread(again: int, layers: int, engine: EngineMemory) -> list[bool]:
    """Which layers run again: ``again`` of those that do not keep everything, as ``hdp.offload.policy`` spreads them."""
    first, last = min(engine.keep_first, layers), max(layers - engine.keep_last, min(engine.keep_first, layers))
    inner = last - first
    again = min(again, inner)
    marks = [(j + 1) * again // inner > j * again // inner for j in reversed(range(inner))] if inner else []
    return [*[False] * first, *marks, *[False] * (layers - last)]
