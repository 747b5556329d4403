"""The plan: who runs which part of which sequence, and when.

A plan is one answer for one global batch. It is stored as a few flat arrays, one entry a sequence (slot, group,
schedule), because a batch may hold 100,000 sequences on 12,288 ranks; the frozen dataclasses that the rest of the library works
with (:class:`MicroBatch`, :class:`Shard`) are made for one rank at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp.attention.layout import Ranges, make_layout, parse_layout

IntArray = NDArray[np.int64]
REGIMES = ("step", "slot")


class PlanError(ValueError):
    """A batch that cannot be planned, or a plan that breaks a rule. Names the sequence or rank and what would help."""


class DoesNotFit(PlanError):
    """A batch that these ranks cannot hold with what is allowed. Names what would make it fit."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one sequence that one rank owns."""

    sequence: int
    """Index in the global batch."""
    length: int
    """Tokens of the whole sequence."""
    ranges: Ranges
    """Token ranges [start, stop) of the sequence, in the order of the rank's packed tokens."""
    group: tuple[int, ...]
    """Ranks that share the sequence, in ring order; one rank when it is whole."""
    schedule: str
    """Attention schedule of the forward pass; ``"local"`` when the sequence is whole."""
    schedule_backward: str
    """Attention schedule of the backward pass."""

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank runs one forward and backward on. Without shards it is a dummy: the rank only takes part."""

    rank: int
    slot: int
    """Sharers of a sequence run it in the same slot. A rank's slots ascend; in regime ``step`` some may be missing."""
    shards: tuple[Shard, ...]
    offload_ratio: float = 0.0
    """Fraction of the activations that leaves device memory, 0 to 1."""
    recompute: bool = False
    """Activations are recomputed in backward; equal for all sharers of a sequence."""
    recompute_layers: int | None = None
    """How many layers do so, of those that do not keep everything; None: all. ``offload_ratio`` then is of what these keep."""
    kept_layers: tuple[int, int] = (1, 1)
    """First and last layers that the plan's memory model lets keep everything, whatever the others do."""

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def is_shared(self) -> bool:
        return any(len(shard.group) > 1 for shard in self.shards)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One global batch, planned. Arrays are indexed by sequence unless they say otherwise; treat them as read-only."""

    lengths: IntArray
    """Tokens of each sequence."""
    world_size: int
    capacity: int
    """Tokens one rank holds in one micro-batch without offloading."""
    regime: str
    """``"step"``: ranks meet at the end of the step. ``"slot"``: every slot is a barrier."""
    planner: str
    slots: IntArray
    """Slot of each sequence; -1 for a sequence of 0 tokens, which is not run."""
    group_offsets: IntArray
    """[sequences + 1]: where each sequence's group begins in ``group_ranks``."""
    group_ranks: IntArray
    """Ranks of all groups, one after the other, each in ring order."""
    layout: str = "zigzag"
    """How shared sequences are laid over their group (see ``hdp.attention.layout``)."""
    schedule_names: tuple[str, ...] = ("local", "ring")
    """Names that ``schedules`` and ``schedules_backward`` index."""
    schedules: IntArray | None = None
    """Per sequence; None: ``local`` for whole sequences, ``ring`` for shared ones."""
    schedules_backward: IntArray | None = None
    """Per sequence; None: as in forward."""
    offload: tuple[tuple[int, int, float], ...] = ()
    """(rank, slot, ratio) of each micro-batch that offloads, ascending."""
    recompute: tuple[int, ...] = ()
    """Slots whose micro-batches recompute their activations."""
    recompute_layers: tuple[int, ...] = ()
    """For each of those slots, how many layers do; (): all that do not keep everything."""
    kept_layers: tuple[int, int] = (1, 1)
    """First and last layers that keep everything where a micro-batch offloads or recomputes: the planner's ``keep_first``
    and ``keep_last``."""
    slot_count: int = field(default=-1)
    """Slots of the step; -1: one more than the largest slot in use."""

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise PlanError(f"unknown regime {self.regime!r}: choose one of {', '.join(REGIMES)}")
        try:
            parse_layout(self.layout)
        except ValueError as error:
            raise PlanError(str(error)) from error
        if self.recompute_layers and len(self.recompute_layers) != len(self.recompute):
            raise PlanError(
                f"recompute_layers has {len(self.recompute_layers)} numbers for {len(self.recompute)} slots: one each, or none"
            )
        if self.slot_count < 0:
            used = int(self.slots.max(initial=-1)) + 1
            object.__setattr__(self, "slot_count", used)

    @classmethod
    def from_groups(
        cls, lengths: Sequence[int] | IntArray, groups: Iterable[Sequence[int]], slots: Iterable[int], **fields: Any
    ) -> Plan:
        """A plan from one group (ranks in ring order) and one slot a sequence; ``fields`` are the other fields."""
        group_list = [tuple(int(r) for r in group) for group in groups]
        return cls(
            lengths=np.asarray(lengths, dtype=np.int64),
            slots=np.fromiter(slots, dtype=np.int64, count=len(group_list)),
            group_offsets=np.concatenate([[0], np.cumsum([len(g) for g in group_list])]).astype(np.int64),
            group_ranks=np.array([r for g in group_list for r in g], dtype=np.int64),
            **fields,
        )

    # ---------------------------------------------------------------- one sequence

    def group(self, sequence: int) -> tuple[int, ...]:
        start, stop = self.group_offsets[sequence], self.group_offsets[sequence + 1]
        return tuple(self.group_ranks[start:stop].tolist())

    def with_schedule(self, name: str) -> Plan:
        """The same plan with schedule ``name`` for all shared sequences, both ways."""
        fields = {field: getattr(self, field) for field in self.__dataclass_fields__}
        return Plan(**{**fields, "schedule_names": ("local", name), "schedules": None, "schedules_backward": None})

    def schedule(self, sequence: int) -> tuple[str, str]:
        """Names of the forward and backward schedules of a sequence."""
        shared = self.group_offsets[sequence + 1] - self.group_offsets[sequence] > 1
        codes = [int(shared) if self.schedules is None else int(self.schedules[sequence])]
        codes.append(codes[0] if self.schedules_backward is None else int(self.schedules_backward[sequence]))
        return self.schedule_names[codes[0]], self.schedule_names[codes[1]]

    def shard(self, sequence: int, member: int) -> Shard:
        group = self.group(sequence)
        length = int(self.lengths[sequence])
        forward, backward = self.schedule(sequence)
        return Shard(
            sequence=sequence,
            length=length,
            ranges=make_layout(self.layout, length, len(group)).shard_ranges(member),
            group=group,
            schedule=forward,
            schedule_backward=backward,
        )

    # ---------------------------------------------------------------- one rank

    @cached_property
    def _by_rank(self) -> tuple[IntArray, IntArray, IntArray]:
        """Shares sorted by (rank, slot, sequence): offsets per rank, then per share its sequence and member."""
        sizes = np.diff(self.group_offsets)
        sequences = np.repeat(np.arange(len(self.lengths)), sizes)
        members = np.arange(len(self.group_ranks)) - np.repeat(self.group_offsets[:-1], sizes)
        order = np.lexsort((sequences, self.slots[sequences], self.group_ranks))
        order = order[self.slots[sequences[order]] >= 0]
        offsets = np.searchsorted(self.group_ranks[order], np.arange(self.world_size + 1))
        return offsets.astype(np.int64), sequences[order], members[order]

    @cached_property
    def _offload_ratios(self) -> dict[tuple[int, int], float]:
        return {(rank, slot): ratio for rank, slot, ratio in self.offload}

    @cached_property
    def layers_again(self) -> dict[int, int | None]:
        """Slots that recompute, and how many of their layers do; None: all that do not keep everything."""
        layers = self.recompute_layers or [None] * len(self.recompute)
        return dict(zip(self.recompute, layers, strict=True))

    def micro_batches(self, rank: int) -> tuple[MicroBatch, ...]:
        """What ``rank`` runs, in order. Regime ``slot``: one for every slot, dummies included."""
        offsets, sequences, members = self._by_rank
        by_slot: dict[int, list[Shard]] = {}
        if self.regime == "slot":
            by_slot = {slot: [] for slot in range(self.slot_count)}
        for i in range(offsets[rank], offsets[rank + 1]):
            sequence = int(sequences[i])
            by_slot.setdefault(int(self.slots[sequence]), []).append(self.shard(sequence, int(members[i])))
        return tuple(
            MicroBatch(
                rank=rank,
                slot=slot,
                shards=tuple(shards),
                offload_ratio=self._offload_ratios.get((rank, slot), 0.0),
                recompute=slot in self.layers_again,
                recompute_layers=self.layers_again.get(slot),
                kept_layers=self.kept_layers,
            )
            for slot, shards in sorted(by_slot.items())
        )

    def sequences_of(self, rank: int) -> IntArray:
        """Sequences of which ``rank`` owns a shard, in the order in which it runs them."""
        offsets, sequences, _ = self._by_rank
        return sequences[offsets[rank] : offsets[rank + 1]]

    # ---------------------------------------------------------------- the whole

    def shares(self) -> tuple[IntArray, IntArray, IntArray]:
        """Rank, slot and tokens of every share that runs, by sequence and member."""
        sizes = np.diff(self.group_offsets)
        sequences = np.repeat(np.arange(len(sizes)), sizes)
        members = np.arange(len(self.group_ranks)) - np.repeat(self.group_offsets[:-1], sizes)
        lengths = self.lengths[sequences]
        tokens = lengths // sizes[sequences] + (members < lengths % sizes[sequences])
        running = self.slots[sequences] >= 0
        return self.group_ranks[running], self.slots[sequences][running], tokens[running]

    def held(self, *, shared: bool = False) -> tuple[IntArray, IntArray, IntArray]:
        """Rank, slot and tokens of every micro-batch that holds any, ascending. ``shared``: only tokens of shared sequences."""
        ranks, slots, tokens = self.shares()
        if shared:
            sizes = np.diff(self.group_offsets)
            tokens = tokens * (sizes > 1).repeat(sizes)[(self.slots >= 0).repeat(sizes)]
        width = max(self.slot_count, 1)
        keys, inverse = np.unique(ranks * width + slots, return_inverse=True)
        held = np.bincount(inverse, weights=tokens, minlength=len(keys)).astype(np.int64)
        return keys // width, keys % width, held

    def group_sizes(self) -> Counter[int]:
        """How many sequences run on groups of each size."""
        sizes = np.diff(self.group_offsets)[self.slots >= 0]
        return Counter(sizes.tolist())

    def describe_groups(self) -> str:
        """The groups in use, largest first: ``"1x2 + 14x1"`` is one sequence on 2 ranks and 14 on one."""
        counts = self.group_sizes()
        return " + ".join(f"{counts[size]}x{size}" for size in sorted(counts, reverse=True)) or "none"

    @cached_property
    def digest(self) -> str:
        """Hash of all that decides what ranks do; equal on all ranks before a step begins."""
        state = hashlib.sha256()
        head = (self.world_size, self.capacity, self.regime, self.planner, self.layout, self.schedule_names)
        moves = (self.offload, self.recompute, self.recompute_layers, self.kept_layers)
        state.update(repr((*head, *moves, self.slot_count)).encode())
        arrays = (self.lengths, self.slots, self.group_offsets, self.group_ranks)
        for array in (*arrays, self.schedules, self.schedules_backward):
            state.update(b"-" if array is None else np.ascontiguousarray(array, dtype="<i8").tobytes())
        return state.hexdigest()

    def validate(self) -> None:
        """Raises :class:`PlanError` unless the plan keeps every rule.

        Each sequence has one group of distinct ranks of the world and, unless it is empty, one slot; no micro-batch that
        keeps all its activations holds more tokens than the capacity. (How many one may hold that offloads or recomputes
        is for the memory model to say.) Tokens are covered exactly once and sharers meet in one slot by construction.
        """
        count = len(self.lengths)
        if len(self.slots) != count or len(self.group_offsets) != count + 1:
            raise PlanError(f"plan of {count} sequences has {len(self.slots)} slots")
        sizes = np.diff(self.group_offsets)
        ranks = self.group_ranks
        if count and (sizes.min() < 1 or ranks.min() < 0 or ranks.max() >= self.world_size):
            raise PlanError(f"a group is empty or names a rank outside 0..{self.world_size - 1}")
        sequences = np.repeat(np.arange(count), sizes)
        keys = np.sort(sequences * self.world_size + ranks)
        if np.any(keys[1:] == keys[:-1]):
            bad = int(keys[1:][keys[1:] == keys[:-1]][0] // self.world_size)
            raise PlanError(f"the group of sequence {bad} names a rank twice: {self.group(bad)}")
        if np.any((self.slots < 0) & (self.lengths > 0)):
            bad = int(np.flatnonzero((self.slots < 0) & (self.lengths > 0))[0])
            raise PlanError(f"sequence {bad} of {self.lengths[bad]} tokens has no slot")
        self._validate_capacity()

    def _validate_capacity(self) -> None:
        ranks, slots, held = self.held()
        for i in np.flatnonzero(held > self.capacity).tolist():
            rank, slot = int(ranks[i]), int(slots[i])
            if self._offload_ratios.get((rank, slot), 0.0) > 0 or slot in self.recompute:
                continue
            raise PlanError(
                f"rank {rank} holds {int(held[i])} tokens in slot {slot}: more than the capacity, {self.capacity}"
            )

    def to_json(self, **extra: Any) -> str:
        """The plan as one JSON object; ``extra`` adds fields (planning seconds, predicted seconds, lower bound).

        Micro-batches of a plan that recomputes have ``recompute`` and ``recompute_layers`` as well: how many do; null: none,
        or, where ``recompute`` is true, all that do not keep everything.
        """
        micro_batches = [
            {
                "rank": mb.rank,
                "slot": mb.slot,
                "offload_ratio": mb.offload_ratio,
                **({"recompute": mb.recompute, "recompute_layers": mb.recompute_layers} if self.recompute else {}),
                "shards": [
                    {"sequence": s.sequence, "ranges": s.ranges, "group": s.group, "schedule": s.schedule}
                    for s in mb.shards
                ],
            }
            for rank in range(self.world_size)
            for mb in self.micro_batches(rank)
        ]
        head = {
            "world_size": self.world_size,
            "capacity": self.capacity,
            "regime": self.regime,
            "planner": self.planner,
        }
        return json.dumps({**head, **extra, "micro_batches": micro_batches})
