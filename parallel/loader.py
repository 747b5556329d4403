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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from hdp.attention.auto import AUTO as AUTO_SCHEDULE
from hdp.balance import Evaluation, Topology, evaluate, make_plan
from hdp.balance.cost import default_cost
from hdp.balance.foresee import Foreseen
from hdp.balance.machine import Machine
from hdp.balance.plan import DoesNotFit, Plan, PlanError
from hdp.balance.planners import STOPPED_BY_TIME
from hdp.balance.report import describe_price
from hdp.parallel.agreement import agree
from hdp.parallel.batch import REDUCTIONS, Documents, PlannedBatch, read_document
from hdp.parallel.errors import PlanMismatch
from hdp.parallel.fitting import AUTO, Fits, capacity_of, check_memory, whole_number
from hdp.parallel.machine import find_anew, find_machine
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.schedules import check_chooser

if TYPE_CHECKING:
    from hdp.parallel.engine import Engine

Planner = Callable[..., Plan]

logger = logging.getLogger("hdp")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What one loop over a loader plans by, from its beginning to its end."""

    machine: Machine | None
    options: dict[str, Any]
    """Of the planner."""
    fits: Fits
    """What plans have to fit."""
    run: str
    """Hash of what decides which batches are drawn."""
    chooser: str = ""
    """Of the schedule "auto", where the user set one of their own."""

    @property
    def chooses(self) -> bool:
        """Whether shared documents get the schedule that costs least, where neither plan nor user names one: what was measured
        tells which that is."""
        return self.machine is not None and self.machine.source == "measured"

    def predicted(self, plan: Plan) -> Evaluation | None:
        """What the machine says of a plan; None: it is not known."""
        return None if self.machine is None else evaluate(plan, self.machine.planning, self.machine.topology())

    @property
    def machine_number(self) -> int:
        """48 bits that tell what programs are chosen by from others."""
        digest = "" if self.machine is None else self.machine.digest
        text = f"{digest}{self.chooser}{self.fits.kept_per_token}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A plan, and what is known of it before it runs."""

    plan: Plan
    foreseen: Foreseen | None
    predicted: Evaluation | None
    price: str = ""
    """What fits only at a price, and at which."""


class Loader:
    """Yields :class:`PlannedBatch` es of about ``tokens_per_step`` tokens, reshuffled every epoch.

    A loop over it keeps to the machine that it begins with: another one given to the engine meanwhile, or activations opened,
    count for loops that begin later.

    Args:
        engine: that will run the batches; its world, regime, machine and activations are what they are planned for.
        documents: see :class:`Documents`. Without an attribute ``lengths`` every document is read once to measure it.
        tokens_per_step: tokens of a global batch. A document that would exceed it begins the next batch; one that is longer
            alone makes a batch of its own.
        capacity: tokens that one rank holds in one micro-batch. ``"auto"``: as many as fit the memory of a rank, by what the
            engine (made before) foresees of it, with a margin; rank 0 says how many.
        planner: name of a planner (``hdp.balance``), or a function with the signature of ``hdp.balance.make_plan``.
        seed: of the shuffle; None keeps the documents' order.
        steps: batches to yield; None: one epoch.
        reduction: ``"token"``: the loss is the mean over all label tokens. ``"sample"``: over documents, each counting
            alike, whatever its number of label tokens.
        start: batches of the same run to skip, for resuming.
        ahead: batches planned in advance, in the background.
        machine: what to plan for in place of the engine's: a :class:`~hdp.balance.machine.Machine`, a file of one
            (``hdp profile --out``), or ``"assume"``, from model and device.
        memory: bytes that training may take on every rank, equal on all of them; None: what the engine found. A plan that is
            foreseen to take more is made again with smaller micro-batches, which means more ranks for long documents, and
            offload or recomputation where these are allowed; what does not fit so is refused.
        remeasure: where steps take another time than the machine predicts (which rank 0 says, with its likely cause), the loop
            measures it again and plans by what it finds. Batches must then be drawn by the loop that runs them.
        plan_options: handed to the planner: ``offload`` and ``recompute``.

    Raises:
        ValueError: no documents, a stream of them, no positive token count or capacity, an unknown option, no machine of a
            device of which nothing is known.
        hdp.balance.PlanError: a batch that cannot be planned (a document longer than world x capacity, an unknown planner), or
            would not fit memory.
        PlanMismatch: ranks that see different documents or made different plans.
    """

    def __init__(
        self,
        documents: Documents,
        engine: Engine,
        *,
        tokens_per_step: int,
        capacity: int | str = "auto",
        planner: str | Planner = "auto",
        seed: int | None = 0,
        steps: int | None = None,
        reduction: str = "token",
        start: int = 0,
        ahead: int = 2,
        machine: Machine | str | Path | None = None,
        memory: float | None = None,
        remeasure: bool = False,
        **plan_options: Any,
    ) -> None:
        check_engine(engine)
        check_sequence(documents)
        tokens_per_step = whole_number("tokens_per_step", tokens_per_step)
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step is {tokens_per_step}: a step needs at least one token")
        if steps is not None and not 0 <= start < steps:
            raise ValueError(f"steps is {steps} and start is {start}: there must be a step to run, 0 <= start < steps")
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
        self.documents, self.engine, self.world, self.reduction = documents, engine, engine.world, reduction
        self.memory = check_memory(memory)
        self.tokens_per_step, self.planner, self.seed = tokens_per_step, planner, seed
        self.steps, self.start, self.ahead, self.plan_options = steps, start, max(ahead, 1), plan_options
        self.remeasure = remeasure
        self.lengths = document_lengths(documents)
        if int(self.lengths.sum()) == 0:
            raise ValueError(f"all {len(documents)} documents are empty: there is nothing to train on")
        self._is_found = capacity == AUTO
        self.capacity = capacity_of(capacity, engine, max(tokens_per_step, int(self.lengths.max())), memory)
        # Ranks whose first batches agree could still part later, one waiting for a batch that the other never draws.
        run = hashlib.sha256(np.ascontiguousarray(self.lengths, dtype="<i8").tobytes())
        name = planner if isinstance(planner, str) else "a function"
        run.update(repr((tokens_per_step, self.capacity, memory, seed, steps, start, name)).encode())
        self._run = run.hexdigest()
        if isinstance(planner, str):
            check_plan_options(plan_options)
        self.machine = find_machine(engine, machine) if machine is not None else None
        """What it was given to plan for; None: the engine's."""
        known = self._known()
        check_chooser(self.world, known.machine)
        if isinstance(planner, str):
            # An unknown planner, or a document that fits nowhere, ends here and not hours later.
            longest = int(self.lengths.argmax())
            self._make((longest,), make_plan, known, planner=planner)
        self._told = self._has_warned = False

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self._batches(self._begin())

    def _batches(self, known: Known) -> Iterator[PlannedBatch]:
        """All plans by what is ``known``.

        [Note: one value] Planners run ahead, on one rank further than on another, and the engine may be given another machine
        meanwhile, or activations: both are read once, when a loop begins, where all ranks are at one place of their program.
        """
        self._compare_run(known)
        draws = enumerate(self._draw())
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hdp-plan") as pool:

            def planned(indices: tuple[int, ...]) -> Future[Made] | None:
                told = self._planned_by_one and dist.get_rank() != 0
                return None if told else pool.submit(self._plan, indices, known)

            queue: list[tuple[int, tuple[int, ...], Future[Made] | None]] = []
            while True:
                if self.remeasure and self.engine.time_log.is_off:  # alike on all ranks, as results of steps are
                    futures = [plan for _, _, plan in queue if plan is not None and not plan.cancel()]
                    wait(futures)  # which would take time of what is measured
                    known = self._known_anew()
                    queue = [(step, indices, planned(indices)) for step, indices, _ in queue]
                while len(queue) < self.ahead and (drawn := next(draws, None)) is not None:
                    step, indices = drawn
                    if self.steps is not None and step >= self.steps:
                        break
                    if step >= self.start:
                        queue.append((step, indices, planned(indices)))
                if not queue:
                    return
                step, indices, plan = queue.pop(0)
                made = self._from_first(step, plan) if self._planned_by_one else plan.result()  # type: ignore[union-attr]
                yield self._agree(step, indices, made, known)

    def _compare_run(self, known: Known) -> None:
        """Before anything is planned together: ranks with other documents, settings or machines would wait for different
        things."""
        with self.world.guard.watch(f"before step {self.start}"):
            rows = gather_numbers(self.world, int(known.run[:12], 16), known.machine_number)
        mine = rows[self.world.rank].tolist()
        for column, what in enumerate(
            ("planned another batch than this rank", "plan for another machine than this rank")
        ):
            different = (rows[:, column] != mine[column]).nonzero().flatten().tolist()
            if different:
                cure = (
                    "check that all ranks read the same documents, in the same order, with the same settings",
                    "give hdp.Loader(machine=...) alike on all ranks",
                )[column]
                raise PlanMismatch(f"rank {self.world.rank}, step {self.start}: ranks {different} {what}; {cure}")

    @property
    def _planned_by_one(self) -> bool:
        return isinstance(self.planner, str) and self.planner in STOPPED_BY_TIME and dist.get_world_size() > 1

    def _from_first(self, step: int, plan: Future[Made] | None) -> Made:
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

    def _plans(self, known: Known) -> Iterator[tuple[tuple[int, ...], Plan]]:
        for step, indices in enumerate(self._draw()):
            if self.steps is not None and step >= self.steps:
                return
            if step >= self.start:
                yield indices, self._plan(indices, known).plan

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

    def _plan(self, indices: tuple[int, ...], known: Known) -> Made:
        if not isinstance(self.planner, str):
            return self._make(indices, self.planner, known)
        made = self._make(indices, make_plan, known, planner=self.planner)
        return replace(made, price=self._price(indices, made.plan, known.options))

    def _make(self, indices: tuple[int, ...], make: Planner, known: Known, **planner: str) -> Made:
        lengths = self.lengths[list(indices)]

        def made(capacity: int) -> Plan:
            plan = make(lengths, world_size=self.world.world_size, capacity=capacity, **planner, **known.options)
            return plan.with_schedule(AUTO_SCHEDULE) if known.chooses and plan.schedules is None else plan

        try:
            plan, foreseen = known.fits.plan(made, self.capacity)
        except PlanError as error:  # planners count sequences of the batch, users documents
            text = re.sub(r"\bsequence (\d+)\b", lambda found: f"document {indices[int(found[1])]}", str(error))
            if self._is_found and isinstance(error, DoesNotFit) and "would take" not in text:
                text += f"; the capacity, {self.capacity}, is what the memory of a rank was found to hold (memory=...)"
            raise type(error)(text) from error
        if not planner:  # the user's own
            plan.validate()
        return Made(plan=plan, foreseen=foreseen, predicted=known.predicted(plan))

    def _known(self) -> Known:
        """What is known now; see [Note: one value]."""
        machine = self.machine or find_machine(self.engine, None)
        options = {**self.plan_options, "regime": self.engine.regime}
        if machine is not None:
            if self.engine.activations is not None:
                machine = self.engine.activations.known_to(machine)
            options |= {"cost": machine.planning, "topology": machine.topology()}
        chooser = self.world.runtime.chooser
        fits = Fits(self.engine.foresee(machine), self.memory, self.capacity)
        return Known(
            machine=machine, options=options, fits=fits, run=self._run, chooser=repr(chooser) if chooser else ""
        )

    def _begin(self) -> Known:
        """What a loop that begins plans by; where nothing is known of the machine rank 0 says so, once."""
        known = self._known()
        tells = self.world.rank == 0 and not self._has_warned
        if known.machine is None and isinstance(self.planner, str) and tells:
            logger.warning(
                "nothing is known of the model and its ranks: batches are planned as for a 7B model at 400 TFLOP/s, eight ranks"
                " a node, 400 GB/s inside and 50 GB/s across; give hdp.Loader(machine=...)"
            )
            self._has_warned = True
        return known

    def _known_anew(self) -> Known:
        machine = find_anew(self.engine)
        self.machine = machine if self.machine is not None else None
        known = self._begin()
        self._compare_run(known)
        return known

    def _agree(self, step: int, indices: tuple[int, ...], made: Made, known: Known) -> PlannedBatch:
        batch = agree(self.world, step, self.documents, indices, made.plan, self.reduction, known.run)
        if made.price and self.world.rank == 0:
            logger.log(logging.INFO if self._told else logging.WARNING, "step %d: %s", step, made.price)
            self._told = True
        return replace(
            batch,
            foreseen=made.foreseen,
            predicted=made.predicted,
            machine=known.machine,
            kept_per_token=known.fits.kept_per_token,
        )

    def _price(self, indices: tuple[int, ...], plan: Plan, options: dict[str, Any]) -> str:
        """What fits only at a price, and at which: told by rank 0 when the batch is handed out, as a warning the first time."""
        asked = self.plan_options.get("recompute") == "all"
        if self.world.rank != 0 or asked or not (plan.offload or plan.recompute):
            return ""
        cost = options.get("cost") or default_cost()
        topology = options.get("topology") or Topology(world_size=plan.world_size)
        lines = describe_price(plan, evaluate(plan, cost, topology), cost, topology, names=indices)
        return "; ".join(line.strip() for line in lines)


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


def check_engine(engine: Any) -> None:
    """Raises ValueError for what is no engine, such as the world, which loaders took before."""
    if not hasattr(engine, "regime") or not hasattr(engine, "world"):
        raise ValueError(
            f"hdp.Loader takes the engine that will run its batches, not {type(engine).__name__}: make it with hdp.shard, then"
            " hdp.Loader(documents, engine, ...)"
        )


def check_plan_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an option that neither the loader nor a planner knows."""
    own = {"lengths", "world_size", "capacity", "planner", "seed"}  # the loader's to say
    engines = {"regime": "is the engine's", "cost": "is part of the machine", "topology": "is part of the machine"}
    known = [name for name in inspect.signature(make_plan).parameters if name not in own | engines.keys()]
    for name in options:
        if name in engines:
            raise ValueError(
                f"{name!r} {engines[name]}: hdp.Loader takes it from its engine; give machine=dataclasses.replace(...) to plan"
                " for another"
            )
        if name not in known:
            raise ValueError(
                f"unknown option {name!r} of hdp.Loader: plans take {', '.join(known)}; the size of a batch is tokens_per_step"
            )
