"""A loop over a loader plans by what was known when it began, however late a rank's planner is."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Ranks
from tiny import make_documents, make_model
from transformers import LlamaForCausalLM

import hdp
from hdp.balance import CostModel, Topology
from hdp.parallel import loader as loaders

LENGTHS = [150, 9, 12, 30, 8, 11, 7, 25] * 4
STEPS = 4


def open_activations(world: hdp.World) -> None:
    """Nothing leaves any more, and the layers that keep everything are others."""
    hdp.Activations.open(world, ratio=0.0, keep_first=0, keep_last=2).store.close()


def make_another(world: hdp.World) -> None:
    """An engine of a model that shares fewer documents."""
    hdp.shard(make_model("mha"), world)


def make_deep() -> torch.nn.Module:
    """Six layers, of which four may give activations away."""
    config = make_model().config
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("hdp")
    return model


MEANWHILE = {"engine": make_another, "activations": open_activations}


CAPACITY = {"engine": 200, "activations": 64}


class Slow(hdp.Loader):
    """Its thread plans the second batch once it may."""

    may_go: threading.Event
    planned: threading.Event
    calls = 0

    def _plan(self, *args: Any) -> hdp.Plan:
        self.calls += 1
        is_second = self.calls == 2
        if is_second:
            assert self.may_go.wait(60)
        made = super()._plan(*args)
        if is_second:
            self.planned.set()
        return made


def with_a_late_planner(world: hdp.World, kind: str, late: int) -> list[str]:
    """The plans of a loop in which something is made while rank ``late`` has yet to plan what others have planned."""
    engine = hdp.shard(make_deep(), world)
    options: dict[str, Any] = {"offload": 1.0} if kind == "activations" else {}
    loader = Slow(
        make_documents(LENGTHS), world, tokens_per_step=sum(LENGTHS) // 4, capacity=CAPACITY[kind], seed=None, steps=STEPS,
        regime=engine.regime, **options,
    )  # fmt: skip
    loader.may_go, loader.planned = threading.Event(), threading.Event()
    if world.rank != late:
        loader.may_go.set()
    digests = []
    for batch in loader:
        if batch.step == 0:
            assert world.rank == late or loader.planned.wait(60)
            MEANWHILE[kind](world)
            loader.may_go.set()
        digests.append(batch.plan.digest)
    later = [plan.digest for _, plan in loader.plan_batches()]
    assert len(digests) == len(later) == STEPS and digests != later  # a loop that begins now knows better
    return digests


@pytest.mark.parametrize("kind", MEANWHILE)
@pytest.mark.parametrize("late", [0, 1])
def test_what_is_made_meanwhile_is_for_later_loops(kind, late):
    with Ranks(2) as two:
        found = two.run(with_a_late_planner, kind, late)
    assert found[0] == found[1] and len(set(found[0])) == 1  # four times the same lengths


def handed_on(world: hdp.World) -> list[tuple[Any, Any]]:
    """Cost and topology that planners get where the user gives both, either, or neither."""
    hdp.shard(make_model(), world)
    known = world.assumptions
    assert known is not None
    world.tell(known := replace(known, topology=replace(known.topology, ranks_per_node=1)))
    cost, topology = CostModel(layers=2, quadratic=1e-9, linear=1e-6), Topology(world_size=world.world_size)
    found: list[tuple[Any, Any]] = []
    with pytest.MonkeyPatch.context() as monkey:
        plan = loaders.make_plan

        @functools.wraps(plan)
        def noting(*args: Any, **keywords: Any) -> hdp.Plan:
            found.append((keywords["cost"], keywords["topology"]))
            return plan(*args, **keywords)

        monkey.setattr(loaders, "make_plan", noting)
        for options in ({}, {"cost": cost}, {"topology": topology}, {"cost": cost, "topology": topology}):
            hdp.Loader(make_documents([9, 9]), world, tokens_per_step=99, capacity=50, **options)
    expected = [(known.cost, known.topology), (cost, known.topology), (known.cost, topology), (cost, topology)]
    return [(got == wanted) for got, wanted in zip(found, expected, strict=True)]


def test_what_the_user_leaves_out_stays_as_assumed():
    with Ranks(2) as two:
        assert two.run(handed_on) == [[True] * 4] * 2
