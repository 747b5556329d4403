"""What tiles and messages cost the host: simulated as the formula says, counted as the programs do, measured as it is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import Ranks
from test_profile import made_up, profile_of
from test_simulator import COST, FAST, LAYERS, SLOW, near, of, world

from hdp.attention.counts import Sizes, count
from hdp.attention.executor import Executor
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey, Route
from hdp.attention.schedules import get_schedule
from hdp.balance import CostModel, ModelShape, PlanError
from hdp.balance.host import HostCosts, ring_messages
from hdp.balance.machine import Machine
from hdp.balance.measured import fit, predicted
from hdp.balance.simulator import Cluster, Simulation, simulate
from hdp.balance.simulator.tables import table
from hdp.parallel import profile_clock, profile_host
from hdp.parallel.profile_host import host_costs

HOST = HostCosts(piece_seconds=3e-4, message_seconds=1e-4, round_seconds=2e-4, piece_setup=2e-3, message_setup=5e-4)
NOTHING = replace(COST, quadratic=1e-18, linear=1e-18, ring_bytes=0.0, ring_bytes_backward=0.0)
SHAPE = ModelShape(name="m", layers=LAYERS, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=64, vocabulary=64)


def tiny(documents: int, size: int, cost: CostModel = NOTHING, rounds: int = 1 << 30, **fields: Any) -> Simulation:
    """Tiny documents on all ranks in one micro-batch."""
    made = of([8] * documents, [tuple(range(size))] * documents, [0] * documents, size)
    return simulate(made, cost, Cluster(topology=world(size), **fields), rounds=rounds)


@pytest.mark.parametrize(("size", "messages"), [(2, 2 + 2), (3, 4 + 6), (4, 6 + 10), (6, 10 + 18)])
def test_many_tiny_shared_documents(size: int, messages: int):
    """64 documents on one ring cost 64 times their tiles, and its messages and rounds once, in each layer and micro-batch."""
    pieces, rounds = 64 * 2 * size, 2 * size
    costs = LAYERS * (pieces * 3e-4 + messages * 1e-4 + rounds * 2e-4) + pieces * 2e-3 + messages * 5e-4
    assert tiny(64, size, host=HOST).seconds == near(costs)
    with_work = tiny(64, size, cost=COST, host=HOST)
    assert with_work.seconds - tiny(64, size, cost=COST).seconds == near(costs)
    passes = [(HOST.layer_seconds(64, size, b), HOST.setup_seconds(64, size, b)) for b in (False, True)]
    assert sum(LAYERS * layer + setup for layer, setup in passes) == pytest.approx(costs)
    assert with_work.waiting == pytest.approx(0.0, abs=1e-6)  # the host computes nothing else meanwhile


@pytest.mark.parametrize("size", [2, 3])
def test_messages_leave_once_the_host_has_posted_them(size: int):
    """On a slow link the host's time for messages comes before theirs, in every round, not beside it."""
    slow = replace(COST, quadratic=1e-18, linear=1e-18)
    made = of([600], [tuple(range(size))], [0], size)
    host = HostCosts(message_seconds=1e-2)
    without, with_host = (
        simulate(made, slow, Cluster(topology=world(size, SLOW), host=h)) for h in (HostCosts(), host)
    )
    messages = ring_messages(size, backward=False) + ring_messages(size, backward=True)
    assert without.seconds > 10 * LAYERS * messages * 1e-2
    assert with_host.seconds - without.seconds == near(LAYERS * messages * 1e-2)


def test_whole_documents_have_tiles_but_no_messages():
    made = of([8] * 10, [(0,)] * 10, [0] * 10, 1)
    assert simulate(made, NOTHING, Cluster(topology=world(1), host=HOST)).seconds == near(
        10 * 2 * (LAYERS * 3e-4 + 2e-3)
    )


def test_thick_rounds_cost_the_same():
    """Long rings and layers that are simulated in fewer pieces have all their tiles and messages."""
    exact, thick = tiny(3, 100, host=HOST), tiny(3, 100, host=HOST, rounds=1)
    assert (exact.pieces, exact.most_rounds, thick.pieces, thick.most_rounds) == (LAYERS, 100, 1, 64)
    assert thick.seconds == near(exact.seconds)


def test_stages_share_layers_but_make_their_programs():
    one = tiny(1, 2, host=replace(HOST, piece_seconds=0.0, message_seconds=0.0, round_seconds=0.0)).seconds
    two = tiny(1, 2, stages=2, host=replace(HOST, piece_seconds=0.0, message_seconds=0.0, round_seconds=0.0)).seconds
    assert two == near(2 * one + 2 * FAST.latency)
    layers = replace(HOST, piece_setup=0.0, message_setup=0.0)
    assert tiny(1, 2, stages=2, host=layers).seconds == near(tiny(1, 2, host=layers).seconds + 2 * FAST.latency)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_rings_are_counted_as_their_programs(size: int, backward: bool):
    heads, sizes = HeadCount(query=4, key=4), Sizes(head_dim=16, model_bytes=2)
    layout, schedule = make_layout("zigzag", 2 * size * 8, size), get_schedule("ring")
    make = schedule.backward if backward else schedule.forward
    for m in range(size):
        program = make(layout, Mask(), heads, m)
        steps = count(program, layout, Mask(), heads, m, sizes, backward).steps
        assert sum(s.messages for s in steps) == ring_messages(size, backward)
        assert sum(len(s.tiles) for s in program.steps) == size


@pytest.mark.parametrize("name", ["direct", "all_gather:2", "ulysses"])
def test_other_schedules_are_counted_from_their_programs(name: str):
    made = of([2048], [(0, 1, 2, 3)], [0], 4, schedule_names=(name,), schedules=np.zeros(1, dtype=np.int64))
    host = replace(HOST, piece_setup=0.0, message_setup=0.0, round_seconds=0.0)
    without, with_host = (
        simulate(made, COST, Cluster(topology=world(4), shape=SHAPE, host=h)) for h in (HostCosts(), host)
    )
    tables = [table(name, name, b, 4, "zigzag", SHAPE, 2) for b in (False, True)]
    pieces, messages = sum(int(t["pieces"].sum()) for t in tables), 2 * sum(len(t["from"]) for t in tables)
    assert pieces >= 8 and messages >= 8
    extra = LAYERS * (pieces * 3e-4 + messages * 1e-4)
    assert int((with_host.busy - without.busy).sum()) * 2.0**-32 == near(extra)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["message_seconds", "round_seconds"])
def test_refuses(name: str, value: float):
    with pytest.raises(PlanError, match=f"{name} is"):
        HostCosts(**{name: value})


# ---------------------------------------------------------------- measured


def test_profile_file(tmp_path: Path):
    made = replace(profile_of([], None, None), host=HOST)
    made.write(tmp_path / "p.json")
    assert Machine.read(tmp_path / "p.json") == made
    assert json.loads((tmp_path / "p.json").read_text())["host"]["message_seconds"] == 1e-4


def test_fit_leaves_tiles_out():
    terms, piece = (1e-9, 1e-6, 1e-4), 5e-4
    samples = [
        replace(s, forward=s.forward + 3 * s.documents * piece, backward=s.backward + 3 * s.documents * piece)
        for s in made_up(*terms, layers=3, head=0.0)
    ]
    forward, backward = fit(samples, layers=3, head=0.0, piece=piece)
    assert forward == pytest.approx(terms, rel=1e-6)
    assert backward == pytest.approx([2.5e-9, 2e-6, 2e-4], rel=1e-6)
    cost = CostModel(layers=3, quadratic=1e-9, linear=1e-6, constant=3e-4)
    assert [predicted(cost, s.length, s.documents, piece) for s in samples] == pytest.approx(
        [s.seconds for s in samples]
    )


TILE, MESSAGE, ROUND, PREPARE = 2e-3, 1e-3, 4e-3, 1.5e-3


def measured(world: Any) -> HostCosts:
    """By a clock that only moves where a launch, a message, a round or the programs of a micro-batch are seen to."""
    clock = [0.0]
    backend = world.runtime.backend(torch.float32)

    def charged(call: Any, seconds: Any) -> Any:
        def run(*arguments: Any) -> Any:
            clock[0] += seconds(*arguments)
            return call(*arguments)

        return run

    def making(route: Route, key: LayerKey, backward: bool) -> float:
        program = lowered(route, key, backward)
        return 1e-2 + PREPARE * sum(len(r.sends) + len(r.receives) for r in program.rounds)

    lowered = Route.lowered
    backend.launch = charged(backend.launch, lambda inputs, *_: TILE * len(inputs[0]))
    posting = lambda sends, receives, tag: MESSAGE * (len(sends) + len(receives))  # noqa: E731
    world.channel.post = charged(world.channel.post, posting)
    running = lambda executor, program, *_: ROUND * sum(map(bool, program.calls))  # noqa: E731  of shared documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "run", charged(Executor.run, running))
        patch.setattr(Route, "lowered", charged(Route.lowered, making))
        patch.setattr(profile_host, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        patch.setattr(profile_clock, "time", SimpleNamespace(thread_time=lambda: clock[0]))
        return host_costs(world, SHAPE, torch.float32)


@pytest.mark.parametrize("size", [3, 4])
def test_profile_tells_tiles_messages_and_rounds_apart(size: int):
    """Costs of known size in the executor, the channel and the lowering come out of the measurement."""
    with Ranks(size) as ranks:
        found = ranks.run(measured)
    expected = HostCosts(
        piece_seconds=TILE, message_seconds=MESSAGE, round_seconds=ROUND, piece_setup=0.0, message_setup=PREPARE
    )
    for costs in found:
        assert asdict(costs) == pytest.approx(asdict(expected), abs=1e-9)


def test_profile_of_two_ranks_gives_rounds_and_messages_the_sum_of_both():
    """A ring of two has as many rounds as messages, both ways round."""
    with Ranks(2) as ranks:
        found = ranks.run(measured)
    for costs in found:
        assert costs.piece_seconds == pytest.approx(TILE)
        assert 4 * (costs.message_seconds + costs.round_seconds) == pytest.approx(4 * (MESSAGE + ROUND))
        assert costs.message_setup == pytest.approx(PREPARE)


def test_profile_of_one_rank_has_no_messages():
    with Ranks(1) as ranks:
        found = ranks.run(measured)[0]
    assert asdict(found) == pytest.approx(asdict(HostCosts(piece_seconds=TILE)), abs=1e-9)
