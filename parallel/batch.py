"""Planned batches: a plan and its documents, and the tensors of one micro-batch of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hdp.attention.route import AttentionRuntime, Route, RouteShard
from hdp.balance.evaluate import Evaluation
from hdp.balance.foresee import Foreseen
from hdp.balance.machine import Machine
from hdp.balance.plan import MicroBatch, Plan
from hdp.parallel.loss import IGNORE_INDEX
from hdp.parallel.schedules import chooser_of

Document = Tensor | np.ndarray | list | Mapping[str, Any]


class Documents(Protocol):
    """A sequence of documents: token ids, or a mapping with ``input_ids`` and perhaps ``labels`` and ``loss_weights``.

    Each [tokens]: ids and labels integers, labels not shifted and -100 where none counts, weights floats.

    An attribute ``lengths`` (int64, one a document) lets batches be planned without reading them.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """One global batch. Equal on all ranks; a rank reads only the documents that it has a part of."""

    step: int
    """Of the loader, from 0."""
    plan: Plan
    """Who computes which part of which sequence, and when."""
    documents: Documents
    """All that the loader has."""
    indices: tuple[int, ...]
    """Document of each sequence of the plan."""
    label_tokens: int
    """Tokens of the whole global batch that have a label."""
    loss_weight: float
    """What the summed loss is divided by: label tokens or their summed weights; documents, if each counts alike."""
    reduction: str = "token"
    """``"token"``: every label token counts alike. ``"sample"``: every document does, however long it is."""
    machine: Machine | None = None
    """What it was planned for, by which the schedule ``"auto"`` is chosen; None: not known."""
    kept_per_token: float | None = None
    """Bytes that attention of a layer may keep of each token, by the memory there is: where schedules are chosen, not where
    they are named; None: not known."""
    foreseen: Foreseen | None = None
    """The rank that is to hold most, and what; None: not known."""
    predicted: Evaluation | None = None
    """When its ranks are to be done, by the machine; None: that is not known."""

    @property
    def tokens(self) -> int:
        """Of the whole global batch."""
        return int(self.plan.lengths.sum())


@dataclass(frozen=True, kw_only=True)
class Fields:
    """One document's tensors, each [tokens]."""

    input_ids: Tensor
    labels: Tensor
    """Shifted: the label of a position is the next token; IGNORE_INDEX where there is none."""
    weights: Tensor | None


REDUCTIONS = ("token", "sample")
DUMMY_TOKENS = 2
"""What a rank without work runs: torch.compile takes sizes 0 and 1 for constants, and would make a graph for them alone."""
UNUSED_MASKS = ("completion_mask", "assistant_masks")
"""Of rows that say in another way than by labels which tokens are learnt."""


def read_document(documents: Documents, index: int, reduction: str = "token") -> Fields:
    """Reads one document and shifts its labels, before anything is sharded.

    With ``reduction="sample"`` the weights of its label tokens are scaled to add up to 1.

    Raises:
        ValueError: token ids that are not one-dimensional integers, labels of another length, padding, positions that do not
            count from 0, masks of what is learnt without labels.
    """
    document = documents[index]
    fields = document if isinstance(document, Mapping) else {"input_ids": document}
    if "input_ids" not in fields:
        raise ValueError(f"document {index} has no 'input_ids' (it has {sorted(fields)}): tokenise it first")
    ids = _tensor(fields["input_ids"], f"document {index}: token ids")
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"document {index}: token ids must be one row of integers, not {ids.dtype} {tuple(ids.shape)}")
    ids = ids.to(torch.int64)
    _check_other_fields(fields, len(ids), index)
    labels = _tensor(fields.get("labels", ids), f"document {index}: labels")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"document {index}: labels must be integers ({IGNORE_INDEX} does not count), not {labels.dtype}"
        )
    labels = labels.to(torch.int64)
    weights = fields.get("loss_weights")
    weights = None if weights is None else _tensor(weights, f"document {index}: loss_weights").to(torch.float32)
    for name, tensor in (("labels", labels), ("loss_weights", weights)):
        if tensor is not None and tensor.shape != ids.shape:
            raise ValueError(f"document {index}: {name} has shape {tuple(tensor.shape)}, its tokens {tuple(ids.shape)}")
    labels = _shift(labels, IGNORE_INDEX)
    weights = None if weights is None else _shift(weights, 0.0)
    if reduction == "sample":
        weights = _per_sample(labels, weights)
    return Fields(input_ids=ids, labels=labels, weights=weights)


def _tensor(values: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise ValueError(
            f"{what} are of type {kind}, not numbers ({error}): give integers, or text to hdp.data.open_documents"
        ) from error


def _check_other_fields(fields: Mapping[str, Any], tokens: int, index: int) -> None:
    """Fields that would change what is learnt, if they were not left out, are refused where they say something."""
    mask = fields.get("attention_mask")
    if mask is not None and not bool(_tensor(mask, f"document {index}: attention_mask").all()):
        raise ValueError(
            f"document {index}: its attention_mask has zeros, but a planned batch has no padding: cut the padding off, and give"
            " labels of -100 where nothing is to be learnt"
        )
    positions = fields.get("position_ids")
    if positions is not None:
        given = _tensor(positions, f"document {index}: position_ids")
        if not torch.equal(given.cpu(), torch.arange(tokens).to(given.dtype)):
            raise ValueError(
                f"document {index}: its position_ids are not 0 to {tokens - 1}: every document counts from 0 here; leave them"
                " out, and give packed documents one by one"
            )
    for name in UNUSED_MASKS:
        if fields.get(name) is not None and fields.get("labels") is None:
            raise ValueError(
                f"document {index} has {name!r} but no 'labels', so that every token would be trained on: give labels, -100"
                " where the mask is 0"
            )


def _per_sample(labels: Tensor, weights: Tensor | None) -> Tensor:
    counted = (labels != IGNORE_INDEX).to(torch.float64)
    if weights is not None:
        counted = counted * weights
    return (counted / counted.sum().clamp_min(torch.finfo(torch.float64).tiny)).to(torch.float32)


def _shift(tensor: Tensor, fill: float) -> Tensor:
    shifted = torch.full_like(tensor, fill)
    shifted[:-1] = tensor[1:]
    return shifted


@dataclass(frozen=True, kw_only=True)
class MicroBatchInputs:
    """What the model is run on. Token tensors are [tokens]; never empty."""

    input_ids: Tensor
    position_ids: Tensor
    """Position of each token in its own document."""
    labels: Tensor
    weights: Tensor | None
    route: Route
    sequences: tuple[int, ...]
    """Sequences of the plan, for the timeline."""
    documents: tuple[int, ...]
    """Document of each sequence, for messages."""
    counts: tuple[int, ...]
    """Tokens of each sequence here."""

    @property
    def lengths(self) -> Tensor:
        """[tokens] How long the whole document of each token is."""
        shards = torch.tensor([shard.length for shard in self.route.shards])
        return torch.repeat_interleave(shards, torch.tensor(self.counts)).to(self.input_ids.device)

    def document_with(self, tensor: Tensor, value: int) -> int:
        """The document in which one of the token tensors first has ``value``."""
        place = int((tensor == value).nonzero()[0])
        return self.documents[int(np.searchsorted(np.cumsum(self.counts), place, side="right"))]


def build_inputs(
    batch: PlannedBatch,
    micro_batch: MicroBatch | None,
    runtime: AttentionRuntime,
    device: torch.device,
    cache: dict[int, Fields],
) -> MicroBatchInputs:
    """Cuts this rank's part out of its documents. ``None``, or a share of no tokens, becomes two tokens without labels
    (``DUMMY_TOKENS``).

    ``cache`` keeps documents of the batch that were read already.
    """
    shards = [] if micro_batch is None else list(micro_batch.shards)
    slot = -1 if micro_batch is None else micro_batch.slot
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    routes = []
    for shard in shards:
        if shard.sequence not in cache:
            cache[shard.sequence] = read_document(batch.documents, batch.indices[shard.sequence], batch.reduction)
        fields = cache[shard.sequence]
        if len(fields.input_ids) != shard.length:
            raise ValueError(
                f"document {batch.indices[shard.sequence]} has {len(fields.input_ids)} tokens but was planned with"
                f" {shard.length}: the documents' lengths are out of date"
            )
        for start, stop in shard.ranges:
            weights = None if fields.weights is None else fields.weights[start:stop]
            positions = torch.arange(start, stop)
            parts.append((fields.input_ids[start:stop], positions, fields.labels[start:stop], weights))
        routes.append(
            RouteShard(
                sequence=shard.sequence,
                length=shard.length,
                group=shard.group,
                schedule=shard.schedule,
                schedule_backward=shard.schedule_backward,
                layout=batch.plan.layout,
            )
        )
    if not parts:  # models fail on zero tokens
        zeros, positions = torch.zeros(DUMMY_TOKENS, dtype=torch.int64), torch.arange(DUMMY_TOKENS)
        parts.append((zeros, positions, torch.full_like(zeros, IGNORE_INDEX), None))
        routes.append(RouteShard(sequence=len(batch.indices), length=DUMMY_TOKENS, group=(runtime.rank,)))
    chooser = None if batch.machine is None else chooser_of(batch.machine, batch.kept_per_token)
    has_weights = any(p[3] is not None for p in parts)
    token_weights = [torch.ones(len(p[0])) if p[3] is None else p[3] for p in parts] if has_weights else []
    return MicroBatchInputs(
        input_ids=torch.cat([p[0] for p in parts]).to(device),
        position_ids=torch.cat([p[1] for p in parts]).to(device),
        labels=torch.cat([p[2] for p in parts]).to(device),
        weights=torch.cat(token_weights).to(device) if token_weights else None,
        route=Route(runtime, routes, (batch.step, slot), chooser),
        sequences=tuple(shard.sequence for shard in shards),
        documents=tuple(batch.indices[shard.sequence] for shard in shards),
        counts=tuple(sum(stop - start for start, stop in shard.ranges) for shard in shards),
    )
