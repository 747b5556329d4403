"""Memory foreseen beside memory measured, capacity found from it, and plans that would take more than there is."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import machine_of
from tiny import make_documents
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hdp
from hdp.attention.bound import Workspace
from hdp.attention.route import Route
from hdp.balance import Link, Topology
from hdp.parallel.ddp import replicate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
VOCABULARY = 512


def make_model(layers: int = 5, key_heads: int = 4) -> nn.Module:
    """Large enough that tensors, not numbers, are what memory is taken by."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=key_heads,
        max_position_embeddings=65536,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="hdp")


def make_engine(world: hdp.World, kind: str) -> hdp.Engine:
    return replicate(make_model(), world) if kind == "ddp" else hdp.shard(make_model(), world, regime=kind)


def make_batch(world: hdp.World, regime: str, schedule: str, **how: Any) -> hdp.PlannedBatch:
    """One document of all ranks with whole ones beside it, then whole ones."""
    ranks = world.world_size
    whole = [(rank,) for rank in range(ranks)]
    lengths = [300 * ranks, *[100] * ranks, *[350] * ranks]
    slots = [0, *[0] * ranks, *[1] * ranks]
    names = {"world_size": ranks, "capacity": 1000, "regime": regime, "planner": "test"}
    plan = hdp.Plan.from_groups(
        lengths, [tuple(range(ranks)), *whole, *whole], slots, **names, schedule_names=("local", schedule), **how
    )
    documents = [ids % VOCABULARY for ids in make_documents(lengths)]
    count = sum(lengths) - len(lengths)
    indices = tuple(range(len(lengths)))
    return hdp.PlannedBatch(
        step=0, plan=plan, documents=documents, indices=indices, label_tokens=count, loss_weight=float(count)
    )


def foreseen_and_measured(world: hdp.World, kind: str, cases: list[dict[str, Any]], folder: str) -> list[Any]:
    """Of this rank, in each case: bytes foreseen and bytes that torch's allocator had handed out at most."""
    import allocations

    torch.set_num_threads(1)
    allocations.start()
    gc.collect()
    base = allocations.allocated()
    engine = make_engine(world, kind)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-4)
    found = []
    with hdp.Activations.open(world, folder=folder) as activations:
        for case in cases:
            batch = make_batch(world, engine.regime, **case)
            world.runtime.workspace = Workspace(world.device)
            needs = bool(batch.plan.offload or batch.plan.recompute)
            engine.activations = activations if needs else None

            def step(batch: hdp.PlannedBatch = batch) -> None:
                engine.forward_backward(batch)
                optimizer.step()
                optimizer.zero_grad()

            for _ in range(2):
                step()
            gc.collect()
            with allocations.Peak(activations.store if needs else None) as peak:
                step()
            assert engine.foresight is not None
            found.append((case, engine.foresight.peak(batch.plan, world.rank).bytes, peak.bytes - base))
        engine.activations = None
    return found


def everywhere(ratio: float, ranks: int = 2) -> tuple[tuple[int, int, float], ...]:
    return tuple((rank, slot, ratio) for rank in range(ranks) for slot in (0, 1))


CASES: list[dict[str, Any]] = [
    {"schedule": "ring"},
    {"schedule": "ulysses"},
    {"schedule": "all_gather", "offload": everywhere(1.0)},
    {"schedule": "ring", "offload": everywhere(0.5)},
    {"schedule": "ring", "recompute": (0, 1)},
    {"schedule": "ring", "recompute": (0, 1), "recompute_layers": (2, 2)},
]


@pytest.mark.parametrize("kind", ["step", "slot", "ddp"])
def test_foreseen_is_what_is_measured(ranks: Callable[[int], Any], kind: str, tmp_path: Path) -> None:
    for found in ranks(2).run(foreseen_and_measured, kind, CASES, str(tmp_path)):
        errors = [(case, foreseen / measured - 1.0) for case, foreseen, measured in found]
        assert all(abs(error) < 0.1 for _, error in errors), errors


class Said(logging.Handler):
    """What hdp logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Any:
    said, logger = Said(), logging.getLogger("hdp")
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        yield said.lines
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)


LENGTHS = [900, 40, 120, 60, 300, 80, 33, 150]


def train(world: hdp.World, memory: float | None, **options: Any) -> dict[str, Any]:
    """Two steps with a capacity that is found, and what was said and taken."""
    import allocations

    allocations.start()
    gc.collect()
    base = allocations.allocated()
    with listening() as lines:
        engine = hdp.shard(make_model(), world)
        documents = [ids % VOCABULARY for ids in make_documents(LENGTHS)]
        loader = hdp.Loader(documents, engine, tokens_per_step=4096, steps=3, memory=memory, **options)
        optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-4)
        batches, results, taken = [], [], []
        for batch in loader:
            with allocations.Peak() as peak:
                results.append(engine.forward_backward(batch))
                optimizer.step()
                optimizer.zero_grad()
            batches.append(batch)
            taken.append(peak.bytes - base)
    world.runtime.workspace = Workspace(world.device)
    return {
        "capacity": loader.capacity,
        "lines": lines,
        "foreseen": [batch.foreseen for batch in batches],
        "peaks": [result.peak_bytes for result in results],
        "groups": [batch.plan.describe_groups() for batch in batches],
        "taken": max(taken[1:]),
        "limit": engine.memory_limit,
    }


def test_capacity_is_found_and_said(ranks: Callable[[int], Any]) -> None:
    first, second = ranks(2).run(train, None)
    assert first["capacity"] == second["capacity"] == 4096  # there is more than enough: the whole step
    assert first["limit"] == second["limit"] > 1e8
    (line,) = [text for text in first["lines"] if text.startswith('capacity="auto": 4096 tokens')]
    assert "optimizer state" in line and "saved activations" in line
    assert not [text for text in second["lines"] if "capacity" in text]
    (line,) = [text for text in first["lines"] if text.startswith("memory of the fullest rank: foreseen")]
    assert "resident size" in line
    assert first["foreseen"] == second["foreseen"] and first["foreseen"][0].peak.parts["saved activations"] > 0
    assert all(len(peaks) == 2 and min(peaks) > 0 for peaks in first["peaks"])


@pytest.mark.parametrize("memory", [45e6, 60e6])
def test_a_low_limit_is_kept(ranks: Callable[[int], Any], memory: float) -> None:
    first, second = ranks(2).run(train, memory)
    assert first["capacity"] == second["capacity"] < 4096
    assert max(one.bytes for one in first["foreseen"]) <= memory
    assert max(first["taken"], second["taken"]) <= memory


def train_with(world: hdp.World, memory: float, capacity: int) -> dict[str, Any]:
    return train(world, memory, capacity=capacity, planner="naive")


def test_a_plan_that_takes_more_is_made_again(ranks: Callable[[int], Any]) -> None:
    """A capacity that the user gives, of which the memory holds less: the long document, whole otherwise, is shared."""
    roomy, tight = (ranks(2).run(train_with, memory, 4096) for memory in (1e9, 45e6))
    assert "x2" not in roomy[0]["groups"][0] and roomy[0]["foreseen"][0].bytes > 45e6
    assert "x2" in tight[0]["groups"][0] and max(one.bytes for one in tight[0]["foreseen"]) <= 45e6
    assert max(found["taken"] for found in tight) <= 45e6


def chosen(world: hdp.World, share: float) -> tuple[float, set[tuple[str, str]], list[float], float]:
    """What may be kept, the schedules chosen on slow links, what was foreseen, and the memory: for full micro-batches in a ring
    and ``share`` of what Ulysses keeps beyond."""
    engine, capacity = hdp.shard(make_model(key_heads=8), world), 500
    foresight = engine.foresight
    assert foresight is not None
    (shape,) = foresight.kinds
    beyond = (shape.heads + shape.key_heads * 2) * shape.head_dim * shape.element  # q, k and v of all that travels
    memory = foresight.at_capacity(capacity).bytes + share * beyond * 5 * capacity
    link = Link(bandwidth=1e6, latency=0.0)
    slow = machine_of(world.world_size, topology=Topology(world_size=4, ranks_per_node=4, intra=link, inter=link))
    documents = [ids % VOCABULARY for ids in make_documents([1900, 40])]
    world.runtime.schedule = "auto"
    names, foreseen = set(), []
    resolved = Route.schedules

    def noting(route: Route, *arguments: Any) -> tuple[str, str]:
        found = resolved(route, *arguments)
        if found[0] != "local":
            names.add(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "schedules", noting)
        loader = hdp.Loader(
            documents, engine, tokens_per_step=2000, capacity=capacity, memory=memory, machine=slow, planner="naive"
        )
        for batch in loader:
            engine.forward_backward(batch)
            foreseen.append(batch.foreseen.bytes)
            kept = batch.kept_per_token
    world.runtime.schedule = None
    assert kept is not None
    return kept, names, foreseen, memory


def test_what_is_chosen_keeps_to_the_memory_there_is(ranks: Callable[[int], Any]) -> None:
    for share in (0.1, 2.0):
        first, *others = ranks(4).run(chosen, share)
        assert others == [first] * 3
        kept, names, foreseen, memory = first
        assert kept > 0 and max(foreseen) <= memory
        assert all(backward.startswith("ulysses") == (share == 2.0) for _, backward in names) and names, names


def refusals(world: hdp.World) -> list[str]:
    engine = hdp.shard(make_model(), world)
    documents = [ids % VOCABULARY for ids in make_documents([50, 6000, 70])]
    found = []
    for options in ({"capacity": 8192, "memory": 20e6}, {"memory": 1e6}, {"memory": -5.0}, {"capacity": "much"}):
        with pytest.raises(ValueError) as error:
            hdp.Loader(documents, engine, tokens_per_step=8192, **options)  # type: ignore[arg-type]
        found.append(f"{type(error.value).__name__}: {error.value}")
    engine.__dict__["foresight"] = None  # as of a model of which nothing is known
    with pytest.raises(ValueError) as error:
        hdp.Loader(documents, engine, tokens_per_step=8192)
    found.append(f"{type(error.value).__name__}: {error.value}")
    assert engine.regime == "step"
    return found


def test_what_does_not_fit_is_refused_by_name(ranks: Callable[[int], Any]) -> None:
    for long, model, memory, text, missing in ranks(2).run(refusals):
        assert long.startswith("DoesNotFit: document 1 of 6000 tokens: rank ") and "would take" in long
        for word in ("20.0 MB", "saved activations", "optimizer state", 'recompute="auto"', "more ranks", "memory="):
            assert word in long
        assert model.startswith("PlanError: not even 16 tokens") and "optimizer state" in model
        assert "memory is -5.0: give the bytes" in memory
        assert "capacity is 'much': give a whole number of tokens, or \"auto\"" in text
        assert "which is not known of this one" in missing
