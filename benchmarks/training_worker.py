"""One process of benchmarks/training.py; prints one JSON object on rank 0."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

import hdp
from hdp.balance import CostModel, Link, Machine, Topology
from hdp.balance.distributions import draw_lengths
from hdp.offload import FileTier, OffloadEngine
from hdp.parallel.activations import Activations

VOCABULARY = 2048


def small_llama(attention: str, layers: int = 4, hidden: int = 256) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def peak_bytes() -> int:
    """Largest resident size of this process since the last :func:`reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


# ---------------------------------------------------------------- tax

DOCUMENTS, DOCUMENT_TOKENS, MICRO_BATCHES = 16, 512, 2


class PlainStep:
    """A step as people write it: FSDP2, padded batches, the model's own loss."""

    def __init__(self, world: hdp.World) -> None:
        self.world = world
        self.model = small_llama("sdpa")
        for layer in self.model.model.layers:  # the same settings as hdp.shard's
            fully_shard(layer, mesh=world.mesh["hdp"], reshard_after_forward=False)
        fully_shard(self.model, mesh=world.mesh["hdp"], reshard_after_forward=False)
        assert isinstance(self.model, FSDPModule)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __call__(self, documents: list[Tensor]) -> None:
        mine = documents[self.world.rank :: self.world.world_size]
        size = len(mine) // MICRO_BATCHES
        for i in range(MICRO_BATCHES):
            last = i == MICRO_BATCHES - 1
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last)
            ids = torch.stack(mine[i * size : (i + 1) * size])
            (self.model(input_ids=ids, labels=ids).loss / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class HdpStep:
    """The same step through loader and engine: planning, and comparing plans between ranks, are in its time."""

    def __init__(self, world: hdp.World, steps: int) -> None:
        self.engine = hdp.shard(small_llama("hdp"), world)
        self.optimizer = torch.optim.AdamW(self.engine.parameters(), lr=1e-4)
        capacity = DOCUMENT_TOKENS * DOCUMENTS // MICRO_BATCHES // world.world_size
        documents = [document for step in range(steps) for document in short_documents(step)]
        tokens = DOCUMENTS * DOCUMENT_TOKENS
        self.batches = iter(
            hdp.Loader(
                documents,
                self.engine,
                tokens_per_step=tokens,
                capacity=capacity,
                machine=on_ranks(world, local_cost(), Topology(world_size=world.world_size)),
                seed=None,
            )
        )

    def __call__(self, _: list[Tensor]) -> None:
        batch = next(self.batches)
        assert set(batch.plan.group_sizes()) == {1}, batch.plan.describe_groups()
        self.engine.forward_backward(batch)
        self.engine.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def on_ranks(world: hdp.World, cost: CostModel, topology: Topology) -> Machine:
    """A machine of which all but cost and links is as good as not known."""
    per_node = topology.ranks_per_node
    nodes = (per_node,) * (world.world_size // per_node) or (world.world_size,)
    return Machine(
        model="given", device="given", nodes=nodes, cost=cost, flops=1e11, intra=topology.intra, inter=topology.inter
    )


def local_cost() -> CostModel:
    """A machine on which sharing a short document never pays."""
    return CostModel(
        layers=4, quadratic=1e-9, linear=1e-5, constant=1e-3, ring_bytes=1024.0, ring_bytes_backward=2048.0
    )


def short_documents(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, VOCABULARY, (DOCUMENT_TOKENS,), generator=generator) for _ in range(DOCUMENTS)]


WARM_UP = 2


def tax_time(world: hdp.World, options: argparse.Namespace) -> dict:
    """Wall and CPU seconds of each step, in turn; every second time the other one first. Wall time of the slower rank."""
    steps = options.repeats + WARM_UP
    runs = {"plain": PlainStep(world), "hdp": HdpStep(world, steps)}
    times: dict[str, list[float]] = {f"{name} {kind}": [] for name in runs for kind in ("wall", "cpu")}
    for step in range(steps):
        documents = short_documents(step)
        for name in list(runs) if step % 2 else reversed(list(runs)):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name](documents)
            mine = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
            slowest, total = mine[:1].clone(), mine[1:].clone()
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            dist.all_reduce(total)
            if step >= WARM_UP:
                times[f"{name} wall"].append(float(slowest))
                times[f"{name} cpu"].append(float(total))
    return times


def tax_memory(world: hdp.World, options: argparse.Namespace) -> dict:
    steps = 4
    run = PlainStep(world) if options.kind == "plain" else HdpStep(world, steps)
    base = reset_peak()
    for step in range(steps):
        run(short_documents(step))
    return {"bytes": peak_bytes() - base}


# ---------------------------------------------------------------- loss


def loss_memory(options: argparse.Namespace) -> dict:
    from hdp.parallel.loss import loss_sum

    torch.set_num_threads(1)
    width, vocabulary = 256, 32768
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    loss_sum(torch.randn(64, width, requires_grad=True), weight, None, torch.zeros(64, dtype=torch.int64)).backward()
    weight.grad = None
    hidden = torch.randn(options.tokens, width, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden).fill_(0.0)  # its gradient's room is there beforehand
    labels = torch.randint(0, vocabulary, (options.tokens,))
    base = reset_peak()
    if options.kind == "chunked":
        loss = loss_sum(hidden, weight, None, labels)
    else:
        loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    loss.backward()
    gradient = hidden.numel() * hidden.element_size()  # the one that is added to hidden.grad
    return {"bytes": peak_bytes() - base - gradient}


# ---------------------------------------------------------------- long-tailed batch

CAPACITY = 2048
SCALE = 32
"""GitHub-like lengths of contexts of 256K, divided by this: 187 documents, 22,723 tokens, the longest 4,450."""


def documents_of(batch: str, capacity: int) -> list[Tensor]:
    """``long-tail``, or ``giant``: a document that fills the capacity of four hosts, and short ones with as much work."""
    if batch == "giant":
        lengths = np.array([4 * capacity - 100, *[300] * 24, *[150] * 24])
    else:
        lengths = np.maximum(draw_lengths("github", tokens=20_000 * SCALE, context=262_144, seed=1) // SCALE, 1)
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths.tolist()]


FIT_RUNS = 3
"""Of each length, on every rank, one more to warm up: on one rank alone the quadratic term differed by 1.8 times, enough for
other plans."""


def fit(world: hdp.World, regime: str, folder: str) -> dict:
    """Seconds of a whole local micro-batch, forward and backward, by length: least squares of a s^2 + b s + c.

    Of computation; in regime slot the constant is with what shows of the parameters that each micro-batch gathers.
    """
    engine = hdp.shard(small_llama("hdp"), world, regime=regime)
    lengths = (64, 256, 512, 1024, 2048)
    seconds, shown = [], []
    for length in lengths:
        documents = [torch.zeros(length, dtype=torch.int64)] * world.world_size
        loader = hdp.Loader(
            documents,
            engine,
            tokens_per_step=length * world.world_size,
            capacity=length,
            planner=whole,
        )
        batch = next(iter(loader))
        runs = [engine.forward_backward(batch) for _ in range(1 + FIT_RUNS)]
        seconds.append(float(np.median([run.busy_seconds for run in runs[1:]])))
        shown.append(float(np.median([run.wait_seconds for run in runs[1:]])))
    columns = np.array([[n * n, n, 1.0] for n in lengths]) / np.array(seconds)[:, None]
    gather = statistics.median(shown) if regime == "slot" else 0.0
    a, b, c = np.linalg.lstsq(columns, np.ones(len(lengths)), rcond=None)[0]
    with OffloadEngine([FileTier(folder)]) as store:
        mine = store.measure(nbytes=64 << 20, barrier=dist.barrier)
    copies = torch.tensor(min(mine.out, mine.back))
    dist.all_reduce(copies, dist.ReduceOp.MIN)  # all hosts share a disk here
    return {
        "quadratic": max(float(a), 0.0),
        "linear": max(float(b), 1e-9),
        "constant": max(float(c), 0.0) + gather,
        "copy_bandwidth": float(copies),
    }


def whole(lengths, *, world_size: int, capacity: int, regime: str, **_) -> hdp.Plan:
    groups = [(i % world_size,) for i in range(len(lengths))]
    slots = [i // world_size for i in range(len(lengths))]
    return hdp.Plan.from_groups(
        lengths, groups, slots, world_size=world_size, capacity=capacity, regime=regime, planner="whole"
    )


def cost_model(fitted: dict, layers: int = 4) -> CostModel:
    """Forward shares of the fitted times: attention 1 / 3.5 of its part, all else 1 / 3."""
    kv_bytes = 2 * 4 * 32 * 4  # K and V, 4 heads of 32, fp32
    shape = CostModel.from_shape(small_llama("hdp").config, flops=1e9, bytes_per_element=4)
    return CostModel(
        layers=layers,
        quadratic=fitted["quadratic"] / 3.5 / layers,
        linear=fitted["linear"] / 3 / layers,
        constant=fitted["constant"] / layers,
        ring_bytes=kv_bytes,
        ring_bytes_backward=2 * kv_bytes,
        activation_bytes=shape.activation_bytes,
        copy_bandwidth=fitted.get("copy_bandwidth", 0.0),
    )


def steps(world: hdp.World, options: argparse.Namespace) -> dict:
    engine = hdp.shard(small_llama("hdp"), world, regime=options.regime)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-4)
    plan_options: dict = {}
    if options.offload != "off":
        plan_options["offload"] = options.offload
        engine.activations = Activations(store=OffloadEngine([FileTier(options.folder)]))
    if options.fit:
        link = Link(bandwidth=options.rate, latency=2e-4)
        topology = Topology(world_size=world.world_size, ranks_per_node=1, intra=link, inter=link)
        plan_options["machine"] = on_ranks(world, cost_model(json.loads(options.fit)), topology)
    documents = documents_of(options.batch, options.capacity)
    loader = hdp.Loader(
        documents,
        engine,
        tokens_per_step=sum(map(len, documents)),
        capacity=options.capacity,
        planner=options.planner,
        seed=None,
        steps=options.repeats + 1,
        **plan_options,
    )
    seconds, waiting, sent = [], [], 0
    for batch in loader:
        before = world.channel.sent_bytes
        result = engine.forward_backward(batch)
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if batch.step:
            seconds.append(result.seconds)
            waiting.append(result.waiting_share)
        sent, made = world.channel.sent_bytes - before, batch.plan
    if engine.activations is not None:
        engine.activations.store.close()
    return {
        "seconds": seconds,
        "waiting": statistics.median(waiting),
        "sent_bytes": sent,
        "groups": made.describe_groups(),
        "slots": made.slot_count,
        "offload": max((ratio for _, _, ratio in made.offload), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["tax-time", "tax-memory", "loss-memory", "fit", "steps"])
    parser.add_argument("--kind", default="hdp")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--planner", default="auto")
    parser.add_argument("--regime", default="step")
    parser.add_argument("--fit", default="")
    parser.add_argument("--batch", choices=["long-tail", "giant"], default="long-tail")
    parser.add_argument("--capacity", type=int, default=CAPACITY)
    parser.add_argument("--offload", default="off")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a local disk, for what is offloaded")
    parser.add_argument("--rate", type=float, default=1e9, help="bytes per second of a link, for the planner")
    options = parser.parse_args()
    if options.part == "loss-memory":
        print(json.dumps(loss_memory(options)))
        return
    with hdp.init(timeout=300) as world:
        if options.part == "tax-time":
            result = tax_time(world, options)
        elif options.part == "tax-memory":
            result = tax_memory(world, options)
        elif options.part == "fit":
            result = fit(world, options.regime, options.folder)
        else:
            result = steps(world, options)
        if world.rank == 0:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
