"""One process of ``benchmarks/same_mesh.py``: steps of whole documents through hdp and through plain transformers.

    same_mesh_local.py ROUNDS

World of one rank, nothing shared; plain transformers with an attention function that calls SDPA document by document, on the
same micro-batches, with the same fused loss (``local``), with the model's logits as a user has them (``local_logits``), and
with the fused loss under FSDP2 as ours (``local_fsdp``). Prints ratios of each round, ours over theirs, in wall and in CPU
seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from packed_training import no_mask, reduce_if, shard_once
from same_mesh_worker import LEARNING_RATE, LOSSES_AGREE, VOCABULARY, llama, tail
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import hdp
from hdp.parallel.engine import loss_instead_of_logits
from hdp.parallel.loss import IGNORE_INDEX

CAPACITY = 1024
KINDS = ("local", "local_logits", "local_fsdp")


def sdpa_by_document(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, lengths: list[int], **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    documents = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    grouped = q.shape[1] != k.shape[1]
    outs = [F.scaled_dot_product_attention(*d, is_causal=True, scale=scaling, enable_gqa=grouped) for d in documents]
    return torch.cat(outs, 2).transpose(1, 2), None


class Plain:
    """What a user writes."""

    def __init__(self, heads: tuple[int, int], world: hdp.World, plan: hdp.Plan, kind: str) -> None:
        self.model, self.micro_batches = llama(heads, "by document"), plan.micro_batches(0)
        self.is_fused = kind != "local_logits"
        if kind == "local_fsdp":
            shard_once(self.model, world)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, documents: list[Tensor]) -> float:
        counted, total = sum(len(d) - 1 for d in documents), 0.0
        for micro_batch in self.micro_batches:
            reduce_if(self.model, micro_batch is self.micro_batches[-1])
            loss = self._loss([documents[s.sequence] for s in micro_batch.shards]) / counted
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, documents: list[Tensor]) -> Tensor:
        lengths = [len(d) for d in documents]
        labels = torch.cat([F.pad(d[1:], (0, 1), value=IGNORE_INDEX) for d in documents])
        ids, positions = torch.cat(documents)[None], torch.cat([torch.arange(n) for n in lengths])[None]
        inputs = {"input_ids": ids, "position_ids": positions, "lengths": lengths, "use_cache": False}
        if self.is_fused:
            with loss_instead_of_logits(self.model.lm_head, labels, None):
                return self.model(**inputs).logits
        return F.cross_entropy(self.model(**inputs).logits[0], labels, ignore_index=IGNORE_INDEX, reduction="sum")


class Ours:
    """The same through loader and engine."""

    def __init__(self, heads: tuple[int, int], world: hdp.World, documents: list[Tensor], steps: int) -> None:
        self.engine = hdp.shard(llama(heads, "hdp"), world)
        self.optimizer = torch.optim.AdamW(self.engine.parameters(), lr=LEARNING_RATE)
        tokens = sum(map(len, documents))
        loader = hdp.Loader(
            documents, self.engine, tokens_per_step=tokens, capacity=CAPACITY, machine="assume", seed=None, steps=steps
        )
        self.plan = next(loader.plan_batches())[1]
        self.batches = iter(loader)

    def step(self, _: list[Tensor]) -> float:
        result = self.engine.forward_backward(next(self.batches))
        self.engine.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result.loss


def measured(step: Callable[[list[Tensor]], float], documents: list[Tensor]) -> tuple[float, float, float]:
    """Wall and CPU seconds, and the loss."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(documents)
    return time.perf_counter() - wall, time.process_time() - cpu, loss


def ratios(world: hdp.World, heads: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    lengths = [n for n in tail() if n <= CAPACITY]
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, VOCABULARY, (n,), generator=draw) for n in lengths]
    ours = Ours(heads, world, documents, rounds + 1)
    plain = {kind: Plain(heads, world, ours.plan, kind) for kind in KINDS}
    runs = {"hdp": ours.step, **{name: each.step for name, each in plain.items()}}
    found: dict[str, list[float]] = {f"{name}{end}": [] for name in plain for end in ("", "_cpu")}
    for number in range(rounds + 1):
        order = list(runs) if number % 2 else list(runs)[::-1]
        times = {name: measured(runs[name], documents) for name in order}
        losses = [loss for *_, loss in times.values()]
        if max(losses) - min(losses) > LOSSES_AGREE:
            raise RuntimeError(f"losses differ: {dict(zip(times, losses, strict=True))}")
        for name in plain if number else ():  # the first warms up
            found[name].append(times["hdp"][0] / times[name][0])
            found[f"{name}_cpu"].append(times["hdp"][1] / times[name][1])
    return found


def main() -> None:
    torch.set_num_threads(1)
    AttentionInterface.register("by document", sdpa_by_document)
    AttentionMaskInterface.register("by document", no_mask)
    with hdp.init() as world:
        print(json.dumps(ratios(world, (8, 8), int(sys.argv[1]))))


if __name__ == "__main__":
    main()
