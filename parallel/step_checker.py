"""Proof that a whole step cannot hang: attention programs and the engine's collectives together, over all micro-batches.

:func:`check_step` lays out what every rank of a plan does, in order: it launches collectives, waits for them, and exchanges
with the sharers of its sequences, grouped call by grouped call, as the programs of their schedules say. It then runs all
ranks against each other, under the strictest reading of both backends:

- a rank does one thing after the other, and its grouped calls end only when each message has met its counterpart in the call
  that the peer is running (NCCL);
- a collective is complete when all ranks of its group have launched it, and the ranks of a group launch their collectives in
  one order (otherwise a size or an operation would meet another);
- reductions that FSDP2 casts, adds to afterwards, copies to host memory or repeats over replicas are waited for at once.

``hdp.parallel.arrangement`` decides the order and has a coarser proof that is quick enough for every plan of a test.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hdp.attention.auto import Chooser, parse_schedule, resolve
from hdp.attention.exchange import Message, SharedSequence, program_rounds
from hdp.attention.layout import make_layout
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_pair, lay_out
from hdp.balance.plan import Plan
from hdp.parallel.arrangement import Arrangement, ArrangementError, Work, arrange, works

ROOT = -1
"""The root module (embedding and output head) among the layers."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What beside the plan decides which programs run: the model's layers, and what ``hdp.init`` was told."""

    masks: tuple[Mask, ...] = (Mask(),)
    """By layer; the last stands for all that follow."""
    heads: HeadCount = field(default_factory=lambda: HeadCount(query=4, key=2))
    head_dim: int = 64
    dtype_bytes: int = 4
    """Of an element of q, k, v."""
    wire_bytes: int | None = None
    """Of an element of q, k, v on their way, if ``hdp.init`` was told a ``wire_dtype``."""
    schedule: str | None = None
    """``world.runtime.schedule``."""
    chooser: Chooser | None = None
    """``world.runtime.chooser``: resolves ``"auto"``."""

    def mask(self, layer: int) -> Mask:
        return self.masks[min(layer, len(self.masks) - 1)]

    def names(
        self, names: tuple[str, str], length: int, group: tuple[int, ...], layout: str, mask: Mask
    ) -> tuple[str, str]:
        """The schedules that a sequence runs whose plan says ``names``."""
        if self.schedule is not None:
            names = parse_schedule(self.schedule)
        size = self.dtype_bytes
        geometry = Geometry(
            heads=self.heads,
            head_dim=self.head_dim,
            model_bytes=size,
            sum_bytes=max(size, 4),
            wire_bytes=self.wire_bytes,
        )
        return resolve(names, self.chooser, length=length, group=group, layout=layout, geometry=geometry, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """What an engine issues besides attention."""

    engine: str = "fsdp"
    """``"fsdp"``, or ``"ddp"``: one reduction beside the last backward, waited for at its end."""
    shards: tuple[tuple[int, ...], ...] = ()
    """Groups of ranks that share parameters; none: all ranks."""
    deferred: bool = True
    """Reductions are waited for at the end of the step. False: at once, as with mixed precision whose reductions are cast,
    with parameters in host memory, with HSDP."""
    recomputes: bool = False
    """Checkpointing that does not keep attention's outputs (torch's wrapper): backward of a layer sends its forward messages
    again."""
    layers: int = 2

    @property
    def is_replicated(self) -> bool:
        """HSDP: what is reduced over shards is reduced over replicas, too."""
        return len(self.shards) > 1

    def shard_group(self, rank: int, world_size: int) -> tuple[int, ...]:
        return next((g for g in self.shards if rank in g), tuple(range(world_size)))

    def replicas(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same shard."""
        place = next(g.index(rank) for g in self.shards if rank in g)
        return tuple(sorted(g[place] for g in self.shards))


@dataclass(frozen=True)
class Launch:
    """Begins a collective."""

    name: str
    group: tuple[int, ...]


@dataclass(frozen=True)
class Await:
    """Waits until the collective launched as number ``number`` (of this rank) is complete."""

    number: int


@dataclass(frozen=True)
class Exchange:
    """One grouped call of attention."""

    messages: tuple[Message, ...]


Action = Launch | Await | Exchange
Calls = Mapping[
    tuple[int, int, bool, Mask], Sequence[Sequence[Message]]
]  # (rank, slot, backward, mask): grouped calls of one layer


def check_step(
    plan: Plan,
    collectives: Collectives,
    arrangement: Arrangement | None = None,
    attention: Attention = Attention(),
) -> None:
    """Raises :class:`ArrangementError`, with the ranks and where they stand, unless one step of ``plan`` runs through.

    Raises ValueError for ``"auto"``, in the plan or in ``attention``, without a chooser.
    """
    run_together(step_actions(plan, collectives, arrangement, attention))


def step_actions(
    plan: Plan,
    collectives: Collectives,
    arrangement: Arrangement | None = None,
    attention: Attention = Attention(),
) -> dict[int, list[Action]]:
    """By rank what it does in one step, in order."""
    if arrangement is None:
        arrangement = arrange(plan) if collectives.engine == "fsdp" else Arrangement(closing=False)
    masks = {attention.mask(layer) for layer in range(collectives.layers)}
    calls = {key: rounds for mask in masks for key, rounds in _calls(plan, attention, mask).items()}
    return {
        rank: _RankStep(plan, rank, works(plan, rank, arrangement), collectives, attention, calls).lay_out()
        for rank in range(plan.world_size)
    }


def _calls(plan: Plan, attention: Attention, mask: Mask) -> Calls:
    found: dict[tuple[int, int, bool, Mask], Sequence[Sequence[Message]]] = {}
    slots: dict[int, dict[int, tuple[int, tuple[int, ...], tuple[str, str]]]] = defaultdict(dict)
    for rank in range(plan.world_size):
        for micro_batch in plan.micro_batches(rank):
            for s in micro_batch.shards:
                slots[micro_batch.slot][s.sequence] = (s.length, s.group, (s.schedule, s.schedule_backward))
    for slot, sequences in slots.items():
        for backward in (False, True):
            shared = []
            for number, (length, group, names) in sequences.items():
                if len(group) == 1:
                    continue
                chosen = attention.names(names, length, group, plan.layout, mask)
                layout = lay_out(make_layout(plan.layout, length, len(group)), mask, chosen[backward])
                pair = get_pair(*chosen)
                make = pair.backward if backward else pair.forward
                programs = [make(layout, mask, attention.heads, member) for member in range(len(group))]
                shared.append(SharedSequence(number=number, group=group, programs=programs))
            for rank, rounds in program_rounds(shared).items():
                found[rank, slot, backward, mask] = [call for call in rounds if call]
    return found


@dataclass
class _RankStep:
    plan: Plan
    rank: int
    works: Sequence[Work]
    collectives: Collectives
    attention: Attention
    calls: Calls
    actions: list[Action] = field(default_factory=list)
    launched: int = 0
    gathers: dict[int, int] = field(default_factory=dict)
    """Module: number of its gather under way."""
    reductions: list[int] = field(default_factory=list)

    def lay_out(self) -> list[Action]:
        fsdp, modules = self.collectives.engine == "fsdp", range(ROOT, self.collectives.layers)
        if fsdp and self.plan.regime == "step":
            for module in modules:
                self._gather(module)
        for work in self.works:
            self._forward(work, fsdp)
            self._backward(work, fsdp)
        self._await_reductions()
        return self.actions

    def _forward(self, work: Work, fsdp: bool) -> None:
        for module in range(ROOT, self.collectives.layers):
            if fsdp and work.gathers:
                self._gather(module)
                if module + 1 < self.collectives.layers:  # the next one, while this one computes
                    self._gather(module + 1)
            self._use(module)
            if module != ROOT:
                self._attend(work, module, backward=False)

    def _backward(self, work: Work, fsdp: bool) -> None:
        for module in reversed(range(self.collectives.layers)):
            if fsdp and work.gathers:  # the root stays gathered from forward on
                self._gather(module)
                self._use(module)
                if module > 0:
                    self._gather(module - 1)
            if self.collectives.recomputes:
                self._attend(work, module, backward=False)
            self._attend(work, module, backward=True)
            if fsdp and work.reduces:
                self._reduce(module)
        if work.reduces:
            self._reduce(ROOT)
            if not fsdp:
                self._await_reductions()

    def _launch(self, name: str, group: tuple[int, ...]) -> int:
        self.actions.append(Launch(name, group))
        self.launched += 1
        return self.launched - 1

    def _gather(self, module: int) -> None:
        if module not in self.gathers:
            group = self.collectives.shard_group(self.rank, self.plan.world_size)
            self.gathers[module] = self._launch(f"all-gather of {_name(module)}", group)

    def _use(self, module: int) -> None:
        if (number := self.gathers.pop(module, None)) is not None:
            self.actions.append(Await(number))

    def _reduce(self, module: int) -> None:
        group = self.collectives.shard_group(self.rank, self.plan.world_size)
        self.reductions.append(self._launch(f"reduction of {_name(module)}", group))
        if self.collectives.is_replicated:
            self._await_reductions()
            group = self.collectives.replicas(self.rank)
            self.reductions.append(self._launch(f"reduction of {_name(module)} over replicas", group))
        if not self.collectives.deferred:
            self._await_reductions()

    def _await_reductions(self) -> None:
        self.actions += [Await(number) for number in self.reductions]
        self.reductions.clear()

    def _attend(self, work: Work, layer: int, backward: bool) -> None:
        if work.micro_batch is not None:
            key = (self.rank, work.micro_batch.slot, backward, self.attention.mask(layer))
            for call in self.calls.get(key, ()):
                self.actions.append(Exchange(tuple(call)))


def _name(module: int) -> str:
    return "the root" if module == ROOT else f"layer {module}"


# ------------------------------------------------------------ running


def run_together(actions: Mapping[int, Sequence[Action]]) -> None:
    """Runs all ranks' actions against each other. Raises :class:`ArrangementError` if some rank would wait for ever."""
    _Together(actions).run()


class _Together:
    def __init__(self, actions: Mapping[int, Sequence[Action]]) -> None:
        self.actions = actions
        self.position = dict.fromkeys(actions, 0)
        self.pending: dict[int, int] = {}
        """By rank the messages of its grouped call that have not met their counterpart."""
        self.waiting: dict[tuple[int, int, int], deque[Message]] = defaultdict(deque)
        self.orders: dict[tuple[int, ...], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        """By group and rank the collectives that were launched."""
        self.mine: dict[int, list[tuple[tuple[int, ...], int]]] = {rank: [] for rank in actions}
        """By rank its launches: group, and place in the group's order."""

    def run(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank in self.actions:
                while self._advance(rank):
                    moved = True
        stuck = {r: self._where(r) for r, todo in self.actions.items() if self.position[r] < len(todo)}
        if stuck:
            text = "; ".join(f"rank {rank} in {where}" for rank, where in list(stuck.items())[:8])
            raise ArrangementError(f"this step would hang: {text}")
        for group, orders in self.orders.items():
            if len({tuple(orders[rank]) for rank in group}) > 1:
                raise ArrangementError(f"ranks {group} do not launch the same collectives")

    def _advance(self, rank: int) -> bool:
        """Whether the rank got past its action, or began it."""
        if self.position[rank] == len(self.actions[rank]):
            return False
        action = self.actions[rank][self.position[rank]]
        if isinstance(action, Exchange):
            if rank not in self.pending:
                self._post(rank, action.messages)
            if self.pending[rank]:
                return False
            del self.pending[rank]
        elif isinstance(action, Launch):
            self._launch(rank, action)
        elif not self._is_complete(*self.mine[rank][action.number]):
            return False
        self.position[rank] += 1
        return True

    def _launch(self, rank: int, action: Launch) -> None:
        order, place = self.orders[action.group][rank], len(self.orders[action.group][rank])
        for peer in action.group:
            other = self.orders[action.group][peer]
            if len(other) > place and other[place] != action.name:
                raise ArrangementError(
                    f"rank {rank} launches the {action.name} where rank {peer} launches the {other[place]}"
                )
        order.append(action.name)
        self.mine[rank].append((action.group, place))

    def _is_complete(self, group: tuple[int, ...], place: int) -> bool:
        return all(len(self.orders[group][peer]) > place for peer in group)

    def _post(self, rank: int, messages: Sequence[Message]) -> None:
        self.pending[rank] = len(messages)
        for message in messages:
            ends = (rank, message.peer) if message.is_send else (message.peer, rank)
            queue = self.waiting[(*ends, message.lane)]
            if not queue or queue[0].is_send == message.is_send:
                queue.append(message)
                continue
            other = queue.popleft()
            if other.tag != message.tag:
                raise ArrangementError(f"rank {ends[0]} and rank {ends[1]} exchange {other.tag} against {message.tag}")
            for end in ends:
                self.pending[end] -= 1

    def _where(self, rank: int) -> str:
        action = self.actions[rank][self.position[rank]]
        if isinstance(action, Exchange):
            return f"attention with ranks {sorted({m.peer for m in action.messages})}"
        assert isinstance(action, Await)
        launches: Iterator[Launch] = (a for a in self.actions[rank] if isinstance(a, Launch))
        return next(a.name for i, a in enumerate(launches) if i == action.number)
