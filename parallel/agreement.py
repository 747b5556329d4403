"""Before a batch runs: ranks compare its plan and the documents that they share, and add up its label tokens."""

from __future__ import annotations

import hashlib
import zlib

import torch.distributed as dist

from hdp.balance.plan import Plan
from hdp.parallel.batch import Documents, Fields, PlannedBatch, read_document
from hdp.parallel.errors import PlanMismatch
from hdp.parallel.loss import IGNORE_INDEX
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.world import World


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
