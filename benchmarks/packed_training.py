"""A training step as people write it for a fixed mesh of data x context parallelism, with what :mod:`packed` exchanges.

Model, sharding, loss, clipping and optimizer are those of ``hdp.shard`` with a plan of planner ``static``, and so are the
micro-batches; what differs is who runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from packed import RIVALS, Packed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import hdp
from hdp.parallel.engine import loss_instead_of_logits
from hdp.parallel.loss import IGNORE_INDEX


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packed: Packed,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim] in, [1, tokens, heads, head_dim] out."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return packed(q, k, v, scaling).unsqueeze(0), None


def no_mask(*_: Any, **__: Any) -> None:
    """transformers' mask interface."""
    return None


def shard_once(model: nn.Module, world: hdp.World) -> None:
    """FSDP2, parameters gathered once a step, gradients summed."""
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=world.mesh["hdp"], reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reduce_if(model: nn.Module, is_last: bool) -> None:
    """Before each micro-batch: gradients are reduced, and parameters freed, in the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)


class PackedMesh:
    """Trains ``model`` on the micro-batches of ``plan``, whose groups are the meshes' context-parallel ranks."""

    def __init__(self, model: nn.Module, world: hdp.World, plan: hdp.Plan, lr: float) -> None:
        self.model, self.plan = model, plan
        shard_once(model, world)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.micro_batches = plan.micro_batches(world.rank)
        groups = sorted({plan.group(i) for i in range(len(plan.lengths))})
        made = {ranks: dist.new_group(list(ranks)) for ranks in groups}
        (self.group,) = (group for ranks, group in made.items() if world.rank in ranks)

    def step(self, documents: Sequence[Tensor], schedule: str) -> float:
        """One optimizer step; the loss, a mean over all tokens."""
        counted, total = sum(len(d) - 1 for d in documents), torch.zeros(())
        for micro_batch in self.micro_batches:
            reduce_if(self.model, micro_batch is self.micro_batches[-1])
            loss = self._loss([documents[s.sequence] for s in micro_batch.shards], RIVALS[schedule]) / counted
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(total)
        return float(total)

    def _loss(self, documents: list[Tensor], kind: type[Packed]) -> Tensor:
        unit = kind.unit(self.group.size())
        packed = kind([-(-len(d) // unit) * unit for d in documents], self.group)
        ids, labels = [], []
        for document, length, at in zip(documents, packed.lengths, packed.positions, strict=True):
            padding = (0, length - len(document))
            ids.append(nn.functional.pad(document, padding)[at])
            labels.append(nn.functional.pad(document[1:], (0, padding[1] + 1), value=IGNORE_INDEX)[at])
        with loss_instead_of_logits(self.model.lm_head, torch.cat(labels), None):
            output = self.model(
                input_ids=torch.cat(ids).unsqueeze(0),
                position_ids=torch.cat(packed.positions).unsqueeze(0),
                use_cache=False,
                packed=packed,
            )
        return output.logits
