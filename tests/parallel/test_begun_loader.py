"""A loop over a loader plans by what was known when it began, however late a rank's planner is."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Ranks
from stand_in import machine_of
from tiny import make_documents, make_model
from transformers import LlamaForCausalLM

import hdp
from hdp.balance import CostModel
from hdp.parallel import loader as loaders

LENGTHS = [150, 9, 12, 30, 8, 11, 7, 25] * 4
STEPS = 4


def open_activations(engine: hdp.Engine) -> None:
    """Nothing leaves any more, and the layers that keep everything are others."""
    engine.activations = hdp.Activations.open(engine.world, ratio=0.0, keep_first=0, keep_last=2)
    engine.activations.store.close()


def give_another(engine: hdp.Engine) -> None:
    """A machine with a slow rank."""
    assert engine.machine is not None
    engine.machine = replace(engine.machine, speeds=(1.0, 0.25))


def make_deep() -> torch.nn.Module:
    """Six layers, of which four may give activations away."""
    config = make_model().config
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("hdp")
    return model


MEANWHILE = {"machine": give_another, "activations": open_activations}


CAPACITY = {"machine": 200, "activations": 64}


class Slow(hdp.Loader):
    """Its thread plans the second batch once it may."""

    may_go: threading.Event
    planned: threading.Event
    calls = 0

    def _plan(self, *args: Any) -> loaders.Made:
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
        make_documents(LENGTHS), engine, tokens_per_step=sum(LENGTHS) // 4, capacity=CAPACITY[kind], seed=None, steps=STEPS,
        **options,
    )  # fmt: skip
    loader.may_go, loader.planned = threading.Event(), threading.Event()
    if world.rank != late:
        loader.may_go.set()
    digests = []
    for batch in loader:
        if batch.step == 0:
            assert world.rank == late or loader.planned.wait(60)
            MEANWHILE[kind](engine)
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


def handed_on(world: hdp.World) -> list[bool]:
    """Whether planners get the engine's machine, the loader's, and what activations that are opened change of each."""
    engine = hdp.shard(make_model(), world)
    engine.machine = replace(machine_of(world.world_size), nodes=(1, 1))
    other = machine_of(world.world_size, CostModel(layers=2, quadratic=1e-9, linear=1e-6))
    found: list[tuple[Any, Any]] = []
    with pytest.MonkeyPatch.context() as monkey:
        plan = loaders.make_plan

        @functools.wraps(plan)
        def noting(*args: Any, **keywords: Any) -> hdp.Plan:
            found.append((keywords["cost"], keywords["topology"]))
            return plan(*args, **keywords)

        monkey.setattr(loaders, "make_plan", noting)
        for activations in (None, hdp.Activations.open(world, ratio=0.0, keep_first=0, keep_last=1)):
            engine.activations = activations
            for options in ({}, {"machine": other}):
                hdp.Loader(make_documents([9, 9]), engine, tokens_per_step=99, capacity=50, **options)
    expected = [(machine.planning, machine.topology()) for machine in (engine.machine, other)]
    kept = {"keep_first": 0, "keep_last": 1, "in_flight": 2, "copy_bandwidth": 0.0}
    expected += [(replace(cost, **kept), topology) for cost, topology in expected]
    return [(got == wanted) for got, wanted in zip(found, expected, strict=True)]


def test_planners_get_the_machine_and_what_activations_change_of_it():
    with Ranks(2) as two:
        assert two.run(handed_on) == [[True] * 4] * 2
