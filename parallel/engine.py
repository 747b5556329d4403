"""The engine: runs a planned batch forward and backward and leaves exact gradients behind.

What is common to all ways of sharding a model: the loss and its normalisation, the order of micro-batches, evaluation,
metrics and errors. How parameters are gathered and gradients reduced is for the subclasses (``hdp.parallel.fsdp``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hdp.attention.checkpoint import keep_attention_in
from hdp.balance.held import EngineMemory
from hdp.balance.machine import Machine
from hdp.balance.plan import Plan
from hdp.parallel.activations import Activations, needs_store, processes_per_node
from hdp.parallel.arrangement import Arrangement, Work, arrange, works
from hdp.parallel.batch import Documents, Fields, MicroBatchInputs, PlannedBatch, build_inputs
from hdp.parallel.fitting import AUTO, capacity_of, whole_number
from hdp.parallel.foresight import Foresight, foresight_of
from hdp.parallel.gradients import global_norm
from hdp.parallel.loader import Loader, check_sequence, measured
from hdp.parallel.loss import loss_sum
from hdp.parallel.memory import RankMemory
from hdp.parallel.memory_log import MemoryLog
from hdp.parallel.metrics import TIMELINE_WORLD, Span, StepResult, gather_numbers, gather_spans, pack_spans
from hdp.parallel.models import (
    NO_SCALER,
    check_attention,
    check_router,
    compute_dtype,
    learnt_positions,
    output_head,
    trained_positions,
)
from hdp.parallel.order import CallOrder
from hdp.parallel.rotations import find_long_rotations, rotated_by_document
from hdp.parallel.schedules import chooser_of
from hdp.parallel.time_log import TimeLog
from hdp.parallel.world import World

logger = logging.getLogger("hdp")


class Engine:
    """Base of the engines. Use ``hdp.shard`` to make one.

    Args:
        model: a causal language model of transformers with ``attn_implementation="hdp"``, or any module with the same call.
        world: from ``hdp.init``.
    """

    regime = "step"
    """``"step"``: ranks run different numbers of micro-batches. ``"slot"``: all run the same number."""

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype | None = None) -> None:
        """``dtype``: computed in, where mixed precision makes it another than the parameters'."""
        check_attention(model)
        check_router(model)
        self.model, self.world = model, world
        self.head = output_head(model)
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
        self.vocabulary: int | None = getattr(embeddings, "num_embeddings", None)
        """Token ids that the model knows; None: not checked."""
        self.positions = learnt_positions(model)
        """Tokens of the longest document that the model has positions for; None: it has no such limit."""
        self.rotations = find_long_rotations(model)
        """Modules whose rotations depend on how long a document is."""
        self.warns_of_positions = world.rank == 0 and self.positions is None
        """Whether documents beyond what the model computes positions for are still to be warned of."""
        self.activations: Activations | None = None
        """What becomes of saved activations; None keeps them all."""
        self.dtype = dtype or compute_dtype(model)
        """What it computes in."""
        self.machine: Machine | None = None
        """What its loaders plan for, where they are given no machine of their own; None: found when a loader needs it."""
        self.is_assumed = False
        """Whether it has been said what is assumed of the model."""
        self.bare: tuple[nn.Module, list[nn.Module]] | None = None
        """The model as it was before it was wrapped, without data, and its layers; None: not known."""
        self.memory = RankMemory(world.device, [*model.parameters(), *model.buffers()], processes_per_node(world))
        self.memory_limit = float(gather_numbers(world, self.memory.limit).min())
        """Bytes that every rank has for training: of the one that has least."""
        self.memory_log = MemoryLog(world)
        self.time_log = TimeLog(world)
        world.channel.notes_waits = True
        self.waits: list[tuple[float, float]] = world.channel.waited
        """(start, stop) of every wait, ``time.perf_counter`` seconds; collectives add theirs."""

    # ------------------------------------------------------------ what users call

    @cached_property
    def foresight(self) -> Foresight | None:
        """What ranks hold in a step of a plan, before it runs; None where nothing is known of the model or the engine."""
        return foresight_of(self)

    def foresee(self, machine: Machine | None = None) -> Foresight | None:
        """:attr:`foresight` with what the user has set by now to become of activations; ``machine``: what plans are for."""
        if self.foresight is None:
            return None
        chooser = None if machine is None else chooser_of(machine)
        return replace(self.foresight, activations=self.activations, chooser=chooser)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's (sharded) parameters, for the optimizer."""
        return self.model.parameters()

    def forward_backward(self, batch: PlannedBatch) -> StepResult:
        """Runs the whole global batch; afterwards every gradient is that of its loss (``StepResult.loss``). A collective.

        A batch without any label has no gradient: it is skipped on all ranks, with a warning.

        Raises:
            HdpError: a rank failed, died or fell silent; the message names it.
            ValueError: what is no batch of a loader, or one that was planned for another regime or world; token ids, labels or
                positions that the model does not know; autocast to fp16; a plan that offloads where ``activations`` is None.
        """
        self._check_batch(batch)
        self._check_autocast()
        self._warn_of_positions(batch)
        if batch.loss_weight == 0:
            if self.world.rank == 0:
                why = "label tokens that all weigh 0" if batch.label_tokens else "no label token"
                logger.warning("step %d has %s: skipped on all ranks", batch.step, why)
            zeros = (0.0,) * self.world.world_size
            return StepResult(
                step=batch.step,
                loss=math.nan,
                tokens=batch.tokens,
                label_tokens=batch.label_tokens,
                seconds=0.0,
                busy_seconds=zeros,
                wait_seconds=zeros,
            )
        with self.world.guard.watch(f"step {batch.step}"):
            try:
                return self._step(batch)
            except BaseException:
                self._abandon()
                raise

    @torch.no_grad()
    def evaluate(
        self, documents: Documents, *, capacity: int | str = AUTO, planner: str = "auto", tokens_per_step: int = 0
    ) -> float:
        """Mean loss over the label tokens of ``documents``, spread over all ranks; nan if they have none. A collective.

        Args:
            documents: as of :class:`~hdp.parallel.loader.Loader`, the same on all ranks.
            capacity: tokens that one rank holds in one micro-batch (``"auto"``: as in training); more where a document is
                longer than all ranks' together.
            tokens_per_step: of a batch over all ranks; 0: four times their capacity.

        Raises as :class:`~hdp.parallel.loader.Loader` does.
        """
        # Nothing is saved for backward: what trains only with offload or recomputation is evaluated without.
        check_sequence(documents)
        documents = measured(documents)
        most = max(tokens_per_step, int(documents.lengths.sum()), 1)
        capacity = capacity_of(AUTO, self, most, None) if capacity == AUTO else whole_number("capacity", capacity)
        if capacity > 0:  # what is not is for the loader to refuse
            capacity = max(capacity, -(-int(documents.lengths.max()) // self.world.world_size))
        tokens_per_step = tokens_per_step or 4 * capacity * self.world.world_size
        loader = Loader(
            documents,
            self,
            tokens_per_step=tokens_per_step,
            capacity=capacity,
            planner=planner,
            seed=None,
            memory=math.inf,  # nothing is kept for backward
        )
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        total, weight = 0.0, 0.0
        try:
            with self.world.guard.watch("evaluation"):
                for batch in loader:
                    total += self._evaluate_batch(batch)
                    weight += batch.loss_weight
        except BaseException:
            self._abandon()
            raise
        finally:
            self.model.train(modes[0][1])
            for module, mode in modes:
                module.training = mode
        return total / weight if weight else math.nan

    def gathered(self) -> AbstractContextManager[None]:
        """Within it the user's own forward passes (``model.generate``) share one gather of the parameters, which must not
        change meanwhile; otherwise each gathers anew. For all ranks, as the passes are."""
        return contextlib.nullcontext()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips gradients by their global norm, over all ranks' shards; returns the norm before clipping. A collective.

        Raises:
            ValueError: a ``max_norm`` that is not positive.
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}: gradients are clipped to a positive norm")
        with self.world.guard.watch("clipping gradients"):
            norm = global_norm(grads).to(self.world.device)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(factor.to(local.device, local.dtype))
        return norm

    # ------------------------------------------------------------ for subclasses

    def engine_memory(self) -> EngineMemory | None:
        """How parameters and gradients are held; None: not known."""
        return None

    def _works(self, plan: Plan) -> list[Work]:
        """This rank's micro-batches of one step, in order."""
        return works(plan, self.world.rank, arrange(plan))

    def _begin(self) -> None:
        """Before the first micro-batch of a step."""

    def _before(self, work: Work) -> None:
        """Before each micro-batch."""

    def _end(self) -> None:
        """After the last micro-batch of a step."""

    def _accept(self) -> None:
        """After a step of which all ranks know that it went well."""

    def _end_evaluation(self) -> None:
        """After evaluation."""

    def _abandon(self) -> None:
        """After a step or an evaluation that failed."""

    # ------------------------------------------------------------ a step

    def _step(self, batch: PlannedBatch) -> StepResult:
        world, cache = self.world, dict[int, Fields]()
        self.waits.clear()
        if self.activations is None and world.world_size > 1:
            keep_attention_in(self.model)
        begin = time.perf_counter()
        spans: list[Span] = []
        order = CallOrder(world.rank)
        self._begin()
        total = 0.0
        for work in self._works(batch.plan):
            slot = -1 if work.micro_batch is None else work.micro_batch.slot
            inputs = build_inputs(batch, work.micro_batch, world.runtime, world.device, cache)
            order.add(inputs.route)
            start = time.perf_counter()
            self._before(work)
            with self._activations_of(work, len(inputs.labels), batch.machine):
                world.guard.enter(f"step {batch.step}, slot {slot}, forward")
                loss = self._loss(inputs)
                world.guard.enter(f"step {batch.step}, slot {slot}, backward")
                with full_precision(world.device):
                    self._backward(loss / batch.loss_weight)
            total += float(loss.detach())
            stop = time.perf_counter()
            spans.append(self._span(slot, "compute", start - begin, stop - begin, inputs.sequences))
        self._end()
        seconds = time.perf_counter() - begin
        spans += [self._span(-1, "wait", a - begin, b - begin) for a, b in self.waits]
        world.guard.enter(f"after step {batch.step}")
        result = self._result(batch, total, seconds, spans, order)
        self.memory_log.note(result)
        self.time_log.note(result, batch.machine)
        self._accept()
        return result

    def _activations_of(self, work: Work, tokens: int, machine: Machine | None) -> AbstractContextManager[object]:
        if self.activations is not None:
            return self.activations.around(self.model, work.micro_batch, tokens, machine)
        if needs_store(work.micro_batch):
            raise ValueError(
                "the plan offloads or recomputes activations but the engine does not know where to: set"
                ' engine.activations = Activations(store=...), or plan with offload="off" and recompute="off"'
            )
        return contextlib.nullcontext()

    def _span(self, slot: int, kind: str, start: float, stop: float, sequences: tuple[int, ...] = ()) -> Span:
        return Span(rank=self.world.rank, slot=slot, kind=kind, start=start, stop=stop, sequences=sequences)

    def _result(
        self, batch: PlannedBatch, total: float, seconds: float, spans: list[Span], order: CallOrder
    ) -> StepResult:
        waited = sum(b - a for a, b in self.waits)
        packed = pack_spans(spans)
        peak = self.world.runtime.peak_bytes
        taken = self.memory.peak
        table = gather_numbers(self.world, total, seconds, waited, len(packed), peak, order.number(), taken)
        order.check(self.world, table[:, 5], f"step {batch.step}")
        longest = int(table[:, 3].max())
        gathered = gather_spans(self.world, packed, longest) if self.world.world_size <= TIMELINE_WORLD else ()
        return StepResult(
            step=batch.step,
            loss=float(table[:, 0].sum()) / batch.loss_weight,
            tokens=batch.tokens,
            label_tokens=batch.label_tokens,
            seconds=float(table[:, 1].max()),
            busy_seconds=tuple((table[:, 1] - table[:, 2]).tolist()),
            wait_seconds=tuple(table[:, 2].tolist()),
            attention_bytes=int(table[:, 4].max()),
            peak_bytes=tuple(int(n) for n in table[:, 6].tolist()),
            foreseen=batch.foreseen,
            predicted=batch.predicted,
            spans=gathered,
        )

    def _evaluate_batch(self, batch: PlannedBatch) -> float:
        cache: dict[int, Fields] = {}
        self.waits.clear()
        order = CallOrder(self.world.rank)
        self._begin()
        total = 0.0
        for work in works(batch.plan, self.world.rank, Arrangement(closing=False)):
            inputs = build_inputs(batch, work.micro_batch, self.world.runtime, self.world.device, cache)
            order.add(inputs.route)
            total += float(self._loss(inputs))
            clear_casts(self.world.device)
        self._end_evaluation()
        table = gather_numbers(self.world, total, order.number())
        order.check(self.world, table[:, 1], f"evaluation, batch {batch.step}")
        return float(table[:, 0].sum())

    def _loss(self, inputs: MicroBatchInputs) -> Tensor:
        """Summed loss of this rank's part of the micro-batch."""
        from hdp.attention.huggingface import planned_mask

        self._check_ids(inputs)
        rotated = rotated_by_document(self.rotations, inputs.lengths) if self.rotations else contextlib.nullcontext()
        with loss_instead_of_logits(self.head, inputs.labels, inputs.weights), rotated:
            output = self._module()(
                input_ids=inputs.input_ids.unsqueeze(0),
                position_ids=inputs.position_ids.unsqueeze(0),
                attention_mask=planned_mask(self.world.device),
                use_cache=False,
                hdp_route=inputs.route,
            )
        return output.logits if hasattr(output, "logits") else output[0]

    def _check_ids(self, inputs: MicroBatchInputs) -> None:
        if self.vocabulary is not None:
            low, high = (int(n) for n in inputs.input_ids.aminmax())
            if low < 0 or high >= self.vocabulary:
                bad = low if low < 0 else high
                raise ValueError(
                    f"token id {bad} in document {inputs.document_with(inputs.input_ids, bad)} is outside the model's"
                    f" vocabulary of {self.vocabulary}: the documents were made with another tokenizer"
                )
        if self.positions is not None and (last := int(inputs.position_ids.max())) >= self.positions:
            raise ValueError(
                f"document {inputs.document_with(inputs.position_ids, last)} has more than {last} tokens, the model positions"
                f" for {self.positions}: cut documents to {self.positions} tokens (max_length of hdp.data.open_documents)"
            )

    def _module(self) -> nn.Module:
        """What is called: the model, or the wrapper whose forward it must go through."""
        return self.model

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    # ------------------------------------------------------------ errors

    def _check_autocast(self) -> None:
        device = self.world.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError(f"torch.autocast computes in float16: {NO_SCALER}")

    def _warn_of_positions(self, batch: PlannedBatch) -> None:
        most, longest = trained_positions(self.model), int(batch.plan.lengths.max(initial=0))
        if self.warns_of_positions and most is not None and longest > most:
            logger.warning(
                "step %d has a document of %d tokens, the model's positions are meant for %d (config.max_position_embeddings):"
                " make it with scaled ones (config.rope_parameters: linear, yarn, llama3), that field raised, or cut documents",
                batch.step,
                longest,
                most,
            )
            self.warns_of_positions = False

    def _check_batch(self, batch: PlannedBatch) -> None:
        if not isinstance(batch, PlannedBatch):
            raise ValueError(
                f"forward_backward takes a batch of hdp.Loader, not {type(batch).__name__}: iterate over"
                " hdp.Loader(documents, engine, ...) in place of a DataLoader"
            )
        if batch.plan.world_size != self.world.world_size:
            raise ValueError(
                f"the batch was planned for {batch.plan.world_size} ranks, the world has {self.world.world_size}: make the"
                " loader with this engine"
            )
        if batch.plan.regime != self.regime:
            raise ValueError(
                f"the batch was planned for regime {batch.plan.regime!r}; this engine runs {self.regime!r}: make"
                " the loader with this engine"
            )


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Backward of a micro-batch that a user runs under ``torch.autocast``: its operations follow the forward pass's.

    Casts that autocast remembers are forgotten: in regime ``slot`` they would keep every layer's gathered weights.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    clear_casts(device)
    with torch.autocast(device.type, enabled=False):
        yield


def clear_casts(device: torch.device) -> None:
    """Forgets autocast's copies of weights, which may be other weights by the next micro-batch."""
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


@contextlib.contextmanager
def loss_instead_of_logits(head: nn.Linear, labels: Tensor, weights: Tensor | None) -> Iterator[None]:
    """Inside, the head returns the summed loss in place of logits, which are then never whole in memory.

    It happens inside the head's own forward, so that whatever gathers its weight (FSDP, ZeRO-3) has done so.
    """

    def forward(hidden: Tensor) -> Tensor:
        return loss_sum(hidden.flatten(0, -2), head.weight, head.bias, labels, weights)

    before = head.__dict__.get("forward")  # a hook of somebody else's may sit on the instance
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]
