"""The cluster of ByteScale's ablation (section 6.4 of the paper), fitted to its times per layer and per hop.

The paper names neither its accelerators nor its network. What it shows of a profile in the ablation's setting (a 7B model,
contexts of 2M tokens, 8K tokens a rank) is enough for a cost model; times of whole steps are not used.

- A ring hop of a 312K document on 39 ranks computes for 110 ms / 39 = 2.82 ms: the quadratic term.
- The MLP of 8K tokens takes 9 to 10 ms. Figure 6a has the projections at 0.156 / 0.22 of the MLP: together the linear term.
- A hop of 8K tokens' keys and values that nothing hides takes 1.4 to 1.6 ms: the link.

Not in the paper, and assumed: attention's backward at 2.5 times, all else at twice its forward; gradients of keys and values
travel in fp32, as the public ring attention does; 20 GB/s and 128 GB a rank of host memory; 8 ranks a node; two-way tensor
parallelism, without which 32M tokens on 1,024 GPUs in groups of 256 do not come to the 8 micro-batches that it states; and
that Alg. 1 deals documents to ranks in the order in which they arrive, for it names no other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np

from hdp.balance.cost import CostModel
from hdp.balance.distributions import draw_lengths
from hdp.balance.memory import KEPT_LAYERS, RATIO_STEP, capacity_with
from hdp.balance.models import MODELS
from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners import PLANNERS, make_problem
from hdp.balance.planners.naive import best_fit
from hdp.balance.planners.problem import Problem
from hdp.balance.simulator.cluster import Cluster
from hdp.balance.simulator.simulation import Simulation, simulate
from hdp.balance.topology import Link, Topology

CAPACITY = 8192
CONTEXT = 1 << 21
TOKENS = 1 << 25
CONTEXT_PARALLEL = 256
TENSOR_PARALLEL = 2
RANKS = 1024 // TENSOR_PARALLEL
MODEL = "llama-7b"

HOP_COMPUTE = 110e-3 / 39
MLP = 9.5e-3
HOP = 1.5e-3

REPORTED = {"static mesh": 1.0, "dynamic communication": 1.59, "selective offloading": 2.01, "balance": 3.69}
"""Speed-ups of the ablation, to compare with; nothing is fitted to them."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the paper does not say."""

    ranks: int = RANKS
    """Ranks of the mesh: GPUs over tensor parallelism."""
    hop: float = HOP
    """Seconds of a hop of 8K tokens' keys and values."""
    gradient_bytes: int = 4
    """Bytes of an element of dK and dV on their way."""
    copy_bandwidth: float = 20e9
    """Bytes per second and rank to host memory."""
    mesh_overlap: float = 1.0
    """Part of the shorter of tiles and messages that the static mesh hides; all others hide all of it."""
    host_memory: float = 128e9
    """Bytes of a rank's offloaded activations."""
    dealing: str = "arrival"
    """How Alg. 1 deals documents to ranks: ``"arrival"``, or ``"sorted"``: this library's planner ``naive``."""
    tokens: int = TOKENS
    """Of a global batch."""


def cost_model(assumed: Assumptions | None = None) -> CostModel:
    """One rank of the ablation's cluster."""
    assumed = assumed or Assumptions()
    shape = CostModel.from_shape(
        MODEL,
        flops=1e15,
        gradient_bytes=assumed.gradient_bytes,
        copy_bandwidth=assumed.copy_bandwidth,
        host_memory=assumed.host_memory,
    )
    return replace(shape, quadratic=HOP_COMPUTE / CAPACITY**2, linear=MLP * (1 + 0.156 / 0.22) / CAPACITY, head=0.0)


def cluster(assumed: Assumptions | None = None) -> Cluster:
    """Links and sharding: ZeRO-1, so that gradients are reduced once a step."""
    assumed = assumed or Assumptions()
    shape = MODELS[MODEL]
    block = CAPACITY * 2 * shape.kv_heads * shape.head_dim * 2
    topology = Topology(
        world_size=assumed.ranks,
        ranks_per_node=8,
        intra=Link(bandwidth=8 * block / assumed.hop),
        inter=Link(bandwidth=block / assumed.hop),
    )
    return Cluster.of_model(shape, topology, sharding="replicated", gradient_element=4)


STEPS = {
    "static mesh": ("static-random", "off"),
    "dynamic communication": ("naive", "off"),
    "selective offloading": ("naive", "auto"),
    "balance": ("bytescale", "auto"),
    "auto": ("auto", "off"),
    "auto, offload": ("auto", "auto"),
}
"""Planner and offload of each step of the ablation, and what the planner ``auto`` adds."""


def lengths(seed: int, *, distribution: str = "byted", tokens: int = TOKENS) -> IntArray:
    """A global batch."""
    return draw_lengths(distribution, tokens=tokens, context=CONTEXT, seed=seed)


def largest_ratio(cost: CostModel) -> float:
    """Of the device's activations, as much as host memory takes when micro-batches are as large as the ratio allows."""
    for step in range(RATIO_STEP, 0, -1):
        ratio = step / RATIO_STEP
        tokens = capacity_with(CAPACITY, cost.layers, ratio)
        if ratio * (cost.layers - KEPT_LAYERS) * cost.activation_bytes * tokens <= cost.host_memory:
            return ratio
    return 0.0


def deal_in_turn(problem: Problem) -> Plan:
    """Alg. 1 with nothing sorted: long documents in the order of the batch, then the packs of short ones, to the next ranks."""
    sequences, world = problem.lengths, problem.world_size
    order = np.flatnonzero(sequences > 0)
    is_long = sequences[order] > problem.capacity
    units = [([i], problem.smallest_group(int(sequences[i]))[0]) for i in order[is_long].tolist()]
    packs = best_fit(sequences, order[~is_long], problem.capacity)
    groups: list[tuple[int, ...]] = [(0,)] * len(sequences)
    slots = np.full(len(sequences), -1, dtype=np.int64)
    free = np.zeros(world, dtype=np.int64)
    turn = 0
    for members, size in units + [(pack, 1) for pack in packs]:
        ranks = (turn + np.arange(size)) % world
        turn += size
        slot = int(free[ranks].max())
        free[ranks] = slot + 1
        for i in members:
            groups[i], slots[i] = tuple(sorted(ranks.tolist())), slot
    return problem.plan(groups, slots.tolist(), planner="naive")


def run(step: str, batch: IntArray, assumed: Assumptions | None = None) -> Simulation:
    """Simulates one batch with one step of the ablation."""
    assumed = assumed or Assumptions()
    planner, offload = STEPS[step]
    cost, place = cost_model(assumed), cluster(assumed)
    problem = make_problem(
        batch, place.topology, cost, capacity=CAPACITY, regime="step", planner=planner, offload=offload
    )
    if offload != "off":
        problem = replace(problem, offload=largest_ratio(cost))
    if planner == "naive" and assumed.dealing == "arrival":
        made = deal_in_turn(problem)
    else:
        made = import_module(f"hdp.balance.planners.{PLANNERS[planner]}").make(problem, planner)
    if planner.startswith("static"):
        place = replace(place, overlap=assumed.mesh_overlap)
    return simulate(made, cost, place, rounds=1_000_000)
