"""What ranks hold in a step, foreseen from a plan: of one engine, before anything runs.

    engine.foresight.highest(plan)            # (rank, Peak): where memory is tightest, when, and what it is taken by
    engine.foresight.capacity(most=65536)     # tokens of a micro-batch that fit

``hdp.balance.foresee`` does the counting; here are the model's footprint, the engine's ways and the memory of a rank. The
same on every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hdp.attention.auto import Chooser
from hdp.attention.lower import lower
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import AttentionRuntime, LayerKey, RouteShard
from hdp.attention.tasks import Part, tasks_of
from hdp.balance.capacity import at_capacity, find_capacity, kept_block
from hdp.balance.footprint import AttentionShape, Footprint, shape_footprint
from hdp.balance.foresee import Peak, foresee
from hdp.balance.held import EngineMemory, Load
from hdp.balance.plan import MicroBatch, Plan
from hdp.parallel.activations import PLANNED, Activations
from hdp.parallel.arrangement import Arrangement, Work, arrange, works
from hdp.parallel.batch import DUMMY_TOKENS
from hdp.parallel.footprint import NotTraced, trace_footprint
from hdp.parallel.loss import chunk_rows
from hdp.parallel.shapes import see_shape

if TYPE_CHECKING:
    from hdp.parallel.engine import Engine

logger = logging.getLogger("hdp")

LEAST_TELLING = 3
EVERY = 8
"""Ranks up to which each one is foreseen for every plan; of more, as many that look fullest."""


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """See the module."""

    model: Footprint
    engine: EngineMemory
    runtime: AttentionRuntime
    dtype: torch.dtype
    """Computed in."""
    limit: float
    """Bytes that a rank has for what is foreseen."""
    has_closing: bool = True
    """Whether the engine ends on a micro-batch of its own where sharers' last ones differ (``arrange``)."""
    activations: Activations | None = None
    """What becomes of saved activations, where not the plan alone says."""
    chooser: Chooser | None = None
    """Resolves the schedule ``"auto"`` where the runtime has no chooser."""
    is_traced: bool = True
    """Whether the model was traced; otherwise its shape told."""

    def peak(self, plan: Plan, rank: int) -> Peak:
        """The highest moment of ``rank``."""
        first, last = plan.kept_layers
        if self.activations is not None and self.activations.policy != PLANNED:
            first, last = self.activations.keep_first, self.activations.keep_last
        engine = replace(self.engine, keep_first=first, keep_last=last)
        return foresee(self.model, engine, self.loads(plan, rank))

    def highest(self, plan: Plan) -> tuple[int, Peak]:
        """The rank that holds most, and its highest moment."""
        return max(((rank, self.peak(plan, rank)) for rank in self._fullest(plan)), key=lambda found: found[1].bytes)

    def _fullest(self, plan: Plan) -> Sequence[int]:
        if plan.world_size <= EVERY:
            return range(plan.world_size)
        ranks, slots, held = plan.held()
        away = {(rank, slot): ratio for rank, slot, ratio in plan.offload}
        most: dict[int, float] = {}
        for rank, slot, tokens in zip(ranks.tolist(), slots.tolist(), held.tolist(), strict=True):
            stays = tokens * (1.0 - away.get((rank, slot), 0.0))
            most[rank] = max(most.get(rank, 0.0), stays)
        return sorted(most, key=lambda rank: (-most[rank], rank))[:EVERY] or [0]

    def loads(self, plan: Plan, rank: int) -> list[Load]:
        """The micro-batches of ``rank`` that can be the fullest: its first, its last, and the largest between them."""
        every = works(plan, rank, arrange(plan) if self.has_closing else Arrangement(closing=False))
        return [
            Load(tokens=DUMMY_TOKENS, reduces=work.reduces)
            if work.micro_batch is None or not work.micro_batch.tokens
            else self._load(plan, work.micro_batch, work.reduces)
            for work in _telling(every)
        ]

    def _load(self, plan: Plan, batch: MicroBatch, reduces: bool) -> Load:
        arena, kept = 0, []
        for shape in self.kinds if batch.is_shared else ():
            lowered = [self._lowered(plan, batch, shape, backward) for backward in (False, True)]
            arena = max(arena, *(one[0] for one in lowered))
            kept.append(lowered[0][1])
        ratio, again = self._moved(batch)
        return Load(
            tokens=batch.tokens,
            ratio=ratio,
            again=again,
            reduces=reduces,
            arena=arena,
            kept=tuple(kept),
        )

    def _moved(self, batch: MicroBatch) -> tuple[float, int]:
        """The part that leaves, and the layers that run again: as planned, or as the user has set for the whole job."""
        every, policy = len(self.model.layers), PLANNED if self.activations is None else self.activations.policy
        if self.activations is not None and policy in ("offload", "recompute"):
            return self.activations.ratio, every if policy == "recompute" else 0
        if self.activations is not None and policy == "memo":
            return 1.0, round(every * (1.0 - (self.activations.memo_fraction or 0.0)))
        again = every if batch.recompute_layers is None else batch.recompute_layers
        return batch.offload_ratio, again if batch.recompute else 0

    @cached_property
    def kinds(self) -> tuple[AttentionShape, ...]:
        """The attention calls of the model's layers that differ."""
        return tuple(dict.fromkeys(shape for layer in self.model.layers for shape in layer.attention))

    def _lowered(self, plan: Plan, batch: MicroBatch, shape: AttentionShape, backward: bool) -> tuple[int, int]:
        """Bytes of the arena, and of what is kept for backward."""
        runtime, key = self.runtime, self._key(shape)
        parts = []
        for shard in batch.shards:
            route = RouteShard(
                sequence=shard.sequence,
                length=shard.length,
                group=shard.group,
                schedule=shard.schedule,
                schedule_backward=shard.schedule_backward,
                layout=plan.layout,
            )
            parts.append(
                Part(
                    sequence=shard.sequence,
                    length=shard.length,
                    group=shard.group,
                    layout=plan.layout,
                    names=runtime.schedules(route, key, self.chooser),
                )
            )
        backend = runtime.backend(key.dtype)
        geometry = key.geometry(runtime.wire_dtype_for(key.dtype), widens=backend.widens)
        tasks = tasks_of(parts, batch.rank, key.mask, backward)
        lowered = lower(tasks, geometry, backward, runtime.ranks_per_node, packs=backend.packs)
        return lowered.arena_bytes, lowered.kept_bytes

    def _key(self, shape: AttentionShape) -> LayerKey:
        return LayerKey(
            heads=HeadCount(query=shape.heads, key=shape.key_heads),
            head_dim=shape.head_dim,
            dtype=self.dtype,
            mask=Mask(causal=shape.causal, window=shape.window or None),
        )

    def capacity(self, most: int, memory: float | None = None) -> int:
        """Tokens of a micro-batch, at most ``most``, with which a step fits ``memory`` (None: the rank's) and a margin.

        0: not even the smallest fits.
        """
        return find_capacity(self.model, self.engine, self.limit if memory is None else memory, most)

    def kept_per_token(self, capacity: int, memory: float | None = None) -> float | None:
        """Bytes that attention of a layer may keep of each token from forward to backward; None: any.

        The block that a ring keeps, and what is left over where micro-batches of ``capacity`` tokens are full.
        """
        limit = self.limit if memory is None else memory
        layers = sum(bool(layer.attention) for layer in self.model.layers)
        if limit == math.inf or not layers:
            return None
        ring = max(kept_block(shape) for shape in self.kinds)
        return max(ring + (limit - self.at_capacity(capacity).bytes) / (layers * capacity), 0.0)

    def at_capacity(self, capacity: int) -> Peak:
        """What a rank holds with full micro-batches of ``capacity`` tokens."""
        return at_capacity(self.model, self.engine, capacity)


def _telling(every: list[Work]) -> list[Work]:
    """Between the first, before which there are no gradients, and the last, which reduces them, all are alike."""
    if len(every) <= LEAST_TELLING:
        return every

    def size(work: Work) -> float:
        batch = work.micro_batch
        stays = 0.0 if batch is None else 0.5 if batch.recompute else 1.0 - batch.offload_ratio
        return 0.0 if batch is None else batch.tokens * (stays + 0.1)

    return [every[0], max(every[1:-1], key=size), every[-1]]


def foresight_of(engine: Engine) -> Foresight | None:
    """None where nothing is known of the engine's ways, or of the model. Rank 0 says what is estimated."""
    memory = engine.engine_memory()
    if memory is None or "tp" in (engine.world.mesh.mesh_dim_names or ()):
        return None
    traced = _traced(engine)
    model = traced or _estimated(engine, memory)
    if model is None:
        return None
    rows = chunk_rows(model.vocabulary, engine.world.device)
    pooled = engine.world.device.type == "cpu"
    return Foresight(
        model=model,
        engine=replace(memory, loss_rows=rows, pooled=pooled),
        runtime=engine.world.runtime,
        dtype=engine.dtype,
        limit=engine.memory_limit,
        has_closing=memory.kind != "ddp",
        is_traced=traced is not None,
    )


def _traced(engine: Engine) -> Footprint | None:
    if engine.bare is None:
        return None
    try:
        return trace_footprint(*engine.bare, engine.world.runtime)
    except NotTraced as error:
        if engine.world.rank == 0:
            logger.warning("memory is estimated from the model's shape: %s", error)
        return None


def _estimated(engine: Engine, memory: EngineMemory) -> Footprint | None:
    seen = see_shape(engine.model)
    return None if seen is None else shape_footprint(seen.shape, memory.computed)
