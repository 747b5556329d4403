"""Planned batches, one after the other: documents in, plans out, planned ahead in the background.

Every rank draws the same documents and makes the same plan by itself (a planner that stops by time plans on rank 0 for all);
before a batch is handed out the ranks compare a hash of it and of the documents that they share, and add up its label tokens,
in one small message.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch.distributed as dist

from hdp.balance import Topology, evaluate, make_plan
from hdp.balance.cost import default_cost
from hdp.balance.plan import Plan, PlanError
from hdp.balance.planners import STOPPED_BY_TIME
from hdp.balance.report import describe_price
from hdp.parallel.batch import REDUCTIONS, Documents, Fields, PlannedBatch, read_document
from hdp.parallel.costs import device_name
from hdp.parallel.errors import PlanMismatch
from hdp.parallel.loss import IGNORE_INDEX
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.world import World

Planner = Callable[..., Plan]

logger = logging.getLogger("hdp")


class Loader:
    """Yields :class:`PlannedBatch` es of about ``tokens_per_step`` tokens, reshuffled every epoch.

    A loop over it keeps to the cost model and the topology that it begins with: an engine made meanwhile, or activations
    opened, count for loops that begin later.

    Args:
        documents: see :class:`Documents`. Without an attribute ``lengths`` every document is read once to measure it.
        tokens_per_step: tokens of a global batch. A document that would exceed it begins the next batch; one that is longer
            alone makes a batch of its own.
        capacity: tokens that one rank holds in one micro-batch.
        planner: name of a planner (``hdp.balance``), or a function with the signature of ``hdp.balance.make_plan``.
        seed: of the shuffle; None keeps the documents' order.
        steps: batches to yield; None: one epoch.
        reduction: ``"token"``: the loss is the mean over all label tokens. ``"sample"``: over documents, each counting
            alike, whatever its number of label tokens.
        start: batches of the same run to skip, for resuming.
        ahead: batches planned in advance, in the background.
        plan_options: handed to the planner: ``regime``, ``offload``, ``recompute``, and ``cost`` and ``topology``, each
            of which otherwise is what the engine assumed from its model and device (``world.assumptions``).

    Raises:
        ValueError: no documents, a stream of them, no positive token count or capacity, an unknown option, no ``cost`` or
            ``topology`` for a device of which nothing is known.
        hdp.balance.PlanError: a batch that cannot be planned (a document longer than world x capacity, an unknown planner).
        PlanMismatch: ranks that see different documents or made different plans.
    """

    def __init__(
        self,
        documents: Documents,
        world: World,
        *,
        tokens_per_step: int,
        capacity: int,
        planner: str | Planner = "auto",
        seed: int | None = 0,
        steps: int | None = None,
        reduction: str = "token",
        start: int = 0,
        ahead: int = 2,
        **plan_options: Any,
    ) -> None:
        check_sequence(documents)
        capacity = whole_number("capacity", capacity)
        tokens_per_step = whole_number("tokens_per_step", tokens_per_step)
        if capacity < 1:
            raise PlanError(f"capacity is {capacity}: a rank must hold at least one token of a micro-batch")
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step is {tokens_per_step}: a step needs at least one token")
        if steps is not None and not 0 <= start < steps:
            raise ValueError(f"steps is {steps} and start is {start}: there must be a step to run, 0 <= start < steps")
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
        self.documents, self.world, self.reduction = documents, world, reduction
        self.tokens_per_step, self.capacity, self.planner, self.seed = tokens_per_step, capacity, planner, seed
        self.steps, self.start, self.ahead, self.plan_options = steps, start, max(ahead, 1), plan_options
        self.lengths = document_lengths(documents)
        if int(self.lengths.sum()) == 0:
            raise ValueError(f"all {len(documents)} documents are empty: there is nothing to train on")
        if isinstance(planner, str):
            check_plan_options(plan_options)
            # An unknown planner, or a document that fits nowhere, ends here and not hours later.
            longest = int(self.lengths.argmax())
            self._make((longest,), make_plan, self._options(), planner=planner)
        # Ranks whose first batches agree could still part later, one waiting for a batch that the other never draws.
        run = hashlib.sha256(np.ascontiguousarray(self.lengths, dtype="<i8").tobytes())
        name = planner if isinstance(planner, str) else "a function"
        run.update(repr((tokens_per_step, capacity, seed, steps, start, name)).encode())
        self._run = run.hexdigest()
        self._told = self._has_warned = False
        self._prices: dict[tuple[int, ...], list[str]] = {}

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self._batches(self._begin())

    def _batches(self, options: dict[str, Any]) -> Iterator[PlannedBatch]:
        """All plans by ``options``.

        [Note: one value] Planners run ahead, on one rank further than on another, and what is assumed may change meanwhile (a
        second engine, activations opened): it is read once, when a loop begins, where all ranks are at one place of their
        program.
        """
        self._compare_run()
        draws = enumerate(self._draw())
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hdp-plan") as pool:
            queue: list[tuple[int, tuple[int, ...], Future[Plan] | None]] = []
            while True:
                while len(queue) < self.ahead and (drawn := next(draws, None)) is not None:
                    step, indices = drawn
                    if self.steps is not None and step >= self.steps:
                        break
                    if step >= self.start:
                        told = self._planned_by_one and dist.get_rank() != 0
                        queue.append((step, indices, None if told else pool.submit(self._plan, indices, options)))
                if not queue:
                    return
                step, indices, plan = queue.pop(0)
                made = self._from_first(step, plan) if self._planned_by_one else plan.result()  # type: ignore[union-attr]
                yield self._agree(step, indices, made)

    def _compare_run(self) -> None:
        """Before anything is planned together: ranks with other documents or settings would wait for different things."""
        with self.world.guard.watch(f"before step {self.start}"):
            mine = int(self._run[:12], 16)
            different = (gather_numbers(self.world, mine)[:, 0] != mine).nonzero().flatten().tolist()
        if different:
            raise PlanMismatch(
                f"rank {self.world.rank}, step {self.start}: ranks {different} planned another batch than this rank;"
                " check that all ranks read the same documents, in the same order, with the same settings"
            )

    @property
    def _planned_by_one(self) -> bool:
        return isinstance(self.planner, str) and self.planner in STOPPED_BY_TIME and dist.get_world_size() > 1

    def _from_first(self, step: int, plan: Future[Plan] | None) -> Plan:
        """Rank 0's plan on every rank, or its error."""
        told: list[Any] = [None]
        with self.world.guard.watch(f"planning of step {step}"):
            if plan is not None:
                try:
                    told = [plan.result()]
                except PlanError as error:  # anything else is this rank's failure, and the others are told so
                    told = [error]
            dist.broadcast_object_list(told, src=0, device=self.world.device)
        if isinstance(told[0], PlanError):
            raise told[0]
        return told[0]

    def plan_batches(self) -> Iterator[tuple[tuple[int, ...], Plan]]:
        """The same batches without any communication: documents' indices and plan."""
        return self._plans(self._begin())

    def _plans(self, options: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], Plan]]:
        for step, indices in enumerate(self._draw()):
            if self.steps is not None and step >= self.steps:
                return
            if step >= self.start:
                plan = self._plan(indices, options)
                self._prices.pop(indices, None)
                yield indices, plan

    def _draw(self) -> Iterator[tuple[int, ...]]:
        epoch = 0
        while True:
            order = np.arange(len(self.lengths))
            if self.seed is not None:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            batch: list[int] = []
            held = 0
            for index in order.tolist():
                length = int(self.lengths[index])
                if batch and held + length > self.tokens_per_step:
                    yield tuple(batch)
                    batch, held = [], 0
                batch.append(index)
                held += length
            if held:
                yield tuple(batch)
            if self.steps is None:
                return
            epoch += 1

    def _plan(self, indices: tuple[int, ...], options: dict[str, Any]) -> Plan:
        if not isinstance(self.planner, str):
            return self._make(indices, self.planner, self.plan_options)
        plan = self._make(indices, make_plan, options, planner=self.planner)
        self._note_price(indices, plan, options)
        return plan

    def _make(self, indices: tuple[int, ...], make: Planner, options: dict[str, Any], **planner: str) -> Plan:
        lengths = self.lengths[list(indices)]
        try:
            plan = make(lengths, world_size=self.world.world_size, capacity=self.capacity, **planner, **options)
        except PlanError as error:  # planners count sequences of the batch, users documents
            text = re.sub(r"\bsequence (\d+)\b", lambda found: f"document {indices[int(found[1])]}", str(error))
            raise type(error)(text) from error
        if not planner:  # the user's own
            plan.validate()
        return plan

    def _options(self) -> dict[str, Any]:
        """The user's, and for what the user left out what is assumed now; see [Note: one value]."""
        options, known = dict(self.plan_options), self.world.assumptions
        missing = [name for name in ("cost", "topology") if options.get(name) is None]
        if not missing or not isinstance(self.planner, str):
            return options
        if known is None:
            device_name(self.world.device)  # for one that nobody knows there are no defaults
        else:
            options |= {name: getattr(known, name) for name in missing}
        return options

    def _begin(self) -> dict[str, Any]:
        """The options of a loop that begins; what nobody has said is said by rank 0, once."""
        options = self._options()
        defaults = {
            "cost": "a 7B model at 400 TFLOP/s",
            "topology": "eight ranks a node, 400 GB/s inside and 50 GB/s across",
        }
        missing = [name for name in defaults if options.get(name) is None]
        if missing and isinstance(self.planner, str) and self.world.rank == 0 and not self._has_warned:
            logger.warning(
                "nothing is known of the model and its ranks: batches are planned as for %s; make the engine before the loop"
                " over the loader begins, or give %s",
                ", ".join(defaults[name] for name in missing),
                " and ".join(f"{name}=" for name in missing),
            )
            self._has_warned = True
        return options

    def _agree(self, step: int, indices: tuple[int, ...], plan: Plan) -> PlannedBatch:
        batch = agree(self.world, step, self.documents, indices, plan, self.reduction, self._run)
        if lines := self._prices.pop(indices, None):
            level = logging.INFO if self._told else logging.WARNING
            logger.log(level, "step %d: %s", step, "; ".join(line.strip() for line in lines))
            self._told = True
        return batch

    def _note_price(self, indices: tuple[int, ...], plan: Plan, options: dict[str, Any]) -> None:
        """What fits only at a price, and at which: told by rank 0 when the batch is handed out, as a warning the first time."""
        asked = self.plan_options.get("recompute") == "all"
        if self.world.rank != 0 or asked or not (plan.offload or plan.recompute):
            return
        cost = options.get("cost") or default_cost()
        topology = options.get("topology") or Topology(world_size=plan.world_size)
        self._prices[indices] = describe_price(plan, evaluate(plan, cost, topology), cost, topology, names=indices)


def agree(
    world: World,
    step: int,
    documents: Documents,
    indices: tuple[int, ...],
    plan: Plan,
    reduction: str = "token",
    run: str = "",
) -> PlannedBatch:
    """Compares plan and shared documents between ranks, and counts labels: each rank those of the documents that it leads.

    Args:
        run: whatever else must be equal on all ranks, hashed.

    Raises:
        PlanMismatch: names the ranks whose plan or documents differ from this rank's.
        PeerError: a rank failed meanwhile; named.
    """
    with world.guard.watch(f"before step {step}"):
        labels, weight, prints = 0, 0.0, dict[int, int]()
        for sequence in plan.sequences_of(world.rank).tolist():
            group = plan.group(sequence)
            if group[0] == world.rank or len(group) > 1:
                fields = read_document(documents, indices[sequence], reduction)
                if len(group) > 1:
                    prints[sequence] = _fingerprint(fields)
                if group[0] == world.rank:
                    labels += int((fields.labels != IGNORE_INDEX).sum())
                    weight += _loss_weight(fields, reduction)
        digest = hashlib.sha256(f"{step}:{indices}:{plan.digest}:{reduction}:{run}".encode()).digest()
        mine = [int.from_bytes(digest[:6], "little"), _balance(prints, plan, world.rank), labels, weight]
        table = gather_numbers(world, *mine)
        different = (table[:, 0] != mine[0]).nonzero().flatten().tolist()
        if different:
            raise PlanMismatch(
                f"rank {world.rank}, step {step}: ranks {different} planned another batch than this rank;"
                " check that all ranks read the same documents, in the same order, with the same settings"
            )
        if sum(int(share) for share in table[:, 1].tolist()) % _MODULUS:
            raise PlanMismatch(_name_different(world, step, indices, plan, prints))
    return PlannedBatch(
        step=step,
        plan=plan,
        documents=documents,
        indices=indices,
        label_tokens=int(table[:, 2].sum()),
        loss_weight=float(table[:, 3].sum()),
        reduction=reduction,
    )


_MODULUS = 1 << 48  # sums of ranks' shares stay exact in float64


def _fingerprint(fields: Fields) -> int:
    """32 bits that tell a document's tokens, labels and weights from others."""
    tensors = (fields.input_ids, fields.labels, *(() if fields.weights is None else (fields.weights,)))
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy().tobytes(), value)
    return value


def _balance(prints: dict[int, int], plan: Plan, rank: int) -> int:
    """This rank's share of a sum that is 0 if all sharers of every sequence hold the same document.

    A sequence's leader puts in its fingerprint once for each other sharer, who each take theirs out again, so one number a
    rank compares any number of documents.
    """
    share = 0
    for sequence, value in prints.items():
        group = plan.group(sequence)
        factor = len(group) - 1 if group[0] == rank else -1
        share += factor * zlib.crc32(value.to_bytes(4, "little"), sequence & 0xFFFFFFFF)
    return share % _MODULUS


def _name_different(world: World, step: int, indices: tuple[int, ...], plan: Plan, prints: dict[int, int]) -> str:
    """Which ranks hold another document than its leader; a collective."""
    rows: list[dict[int, int]] = [{} for _ in range(world.world_size)]
    dist.all_gather_object(rows, prints, group=world.control)
    found = [
        f"document {indices[sequence]} on rank {rank} differs from rank {plan.group(sequence)[0]}'s"
        for rank, row in enumerate(rows)
        for sequence, value in row.items()
        if value != rows[plan.group(sequence)[0]][sequence]
    ]
    shown = "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f"rank {world.rank}, step {step}: {shown}; check that all ranks read the same documents"


def _loss_weight(fields: Fields, reduction: str) -> float:
    """What one document adds to the divisor of the loss."""
    valid = fields.labels != IGNORE_INDEX
    if fields.weights is None:
        return float(valid.sum())
    weight = float((fields.weights * valid).sum())
    return float(weight > 0) if reduction == "sample" else weight


def document_lengths(documents: Documents) -> np.ndarray:
    """Tokens of each document, int64."""
    lengths = getattr(documents, "lengths", None)
    if lengths is None:
        lengths = [len(read_document(documents, i).input_ids) for i in range(len(documents))]
    array = np.asarray(lengths)
    if array.shape != (len(documents),) or array.dtype.kind not in "iu":
        raise ValueError(
            f"lengths of the documents are {array.dtype} of shape {array.shape}: there are {len(documents)} documents, give one"
            " whole number each"
        )
    if array.min() < 0:
        raise ValueError(f"document {int(array.argmin())} has a length of {int(array.min())}: lengths are at least 0")
    return array.astype(np.int64)


class Measured:
    """Documents whose lengths are known, each read when it is asked for."""

    def __init__(self, documents: Documents, lengths: np.ndarray) -> None:
        self.documents, self.lengths = documents, lengths

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Any:
        return self.documents[index]


def measured(documents: Documents) -> Measured:
    """Reads all documents once, unless they say how long they are."""
    return Measured(documents, document_lengths(documents))


def check_sequence(documents: Documents) -> None:
    """Raises ValueError for what cannot be planned up front."""
    if not hasattr(documents, "__len__") or not hasattr(documents, "__getitem__"):
        raise ValueError(
            f"documents are a {type(documents).__name__} without len() or [index]: plans need all lengths up front; give a list"
            " or an indexed dataset, not a stream"
        )
    if len(documents) == 0:
        raise ValueError("no documents: the loader needs at least one")


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int; raises ValueError where it is none, such as text of a configuration file."""
    if isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError(f"{name} is {value!r}: give a whole number of tokens")


def check_plan_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an option that neither the loader nor a planner knows."""
    own = {"lengths", "world_size", "capacity", "planner", "seed"}  # the loader's to say
    known = [name for name in inspect.signature(make_plan).parameters if name not in own]
    for name in options:
        if name not in known:
            raise ValueError(
                f"unknown option {name!r} of hdp.Loader: plans take {', '.join(known)}; the size of a batch is tokens_per_step"
            )
