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
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import Route
from hdp.attention.schedules import get_schedule
from hdp.balance import CostModel, ModelShape, PlanError
from hdp.balance.host import HostCosts, ring_messages
from hdp.balance.measured import Profile, fit, predicted
from hdp.balance.simulator import Cluster, Simulation, simulate
from hdp.balance.simulator.tables import table
from hdp.parallel import profile_clock, profile_host
from hdp.parallel.profile_host import host_costs

HOST = HostCosts(piece_seconds=3e-4, message_seconds=1e-4, piece_setup=2e-3, message_setup=5e-4)
NOTHING = replace(COST, quadratic=1e-18, linear=1e-18, ring_bytes=0.0, ring_bytes_backward=0.0)
SHAPE = ModelShape(name="m", layers=LAYERS, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=64, vocabulary=64)


def tiny(documents: int, size: int, cost: CostModel = NOTHING, rounds: int = 1 << 30, **fields: Any) -> Simulation:
    """Tiny documents on all ranks in one micro-batch."""
    made = of([8] * documents, [tuple(range(size))] * documents, [0] * documents, size)
    return simulate(made, cost, Cluster(topology=world(size), **fields), rounds=rounds)


@pytest.mark.parametrize(("size", "messages"), [(2, 2 + 2), (3, 4 + 6), (4, 6 + 10), (6, 10 + 18)])
def test_many_tiny_shared_documents(size: int, messages: int):
    """64 documents on one ring cost 64 times their tiles and messages, in each layer and once a micro-batch."""
    each = LAYERS * (2 * size * 3e-4 + messages * 1e-4) + 2 * size * 2e-3 + messages * 5e-4
    assert tiny(64, size, host=HOST).seconds == near(64 * each)
    with_work = tiny(64, size, cost=COST, host=HOST)
    assert with_work.seconds - tiny(64, size, cost=COST).seconds == near(64 * each)
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
    one = tiny(1, 2, host=replace(HOST, piece_seconds=0.0, message_seconds=0.0)).seconds
    two = tiny(1, 2, stages=2, host=replace(HOST, piece_seconds=0.0, message_seconds=0.0)).seconds
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
    host = replace(HOST, piece_setup=0.0, message_setup=0.0)
    without, with_host = (
        simulate(made, COST, Cluster(topology=world(4), shape=SHAPE, host=h)) for h in (HostCosts(), host)
    )
    tables = [table(name, name, b, 4, "zigzag", SHAPE, 2) for b in (False, True)]
    pieces, messages = (sum(int(t[kind].sum()) for t in tables) for kind in ("pieces", "messages"))
    assert pieces >= 8 and messages >= 8
    extra = LAYERS * (pieces * 3e-4 + messages * 1e-4)
    assert int((with_host.busy - without.busy).sum()) * 2.0**-32 == near(extra)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_refuses(value: float):
    with pytest.raises(PlanError, match="message_seconds is"):
        HostCosts(message_seconds=value)


# ---------------------------------------------------------------- measured


def test_profile_file(tmp_path: Path):
    made = replace(profile_of([], None, None), host=HOST)
    made.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == made
    fields = json.loads((tmp_path / "p.json").read_text())
    assert fields.pop("host")["message_seconds"] == 1e-4
    (tmp_path / "p.json").write_text(json.dumps(fields))  # written before there were any
    assert Profile.read(tmp_path / "p.json").host == HostCosts()


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


TILE, MESSAGE, PREPARE = 2e-3, 1e-3, 1.5e-3


def measured(world: Any) -> HostCosts:
    """By a clock that only moves where a tile, a message or the programs of a sequence are seen to."""
    clock = [0.0]
    backend = world.runtime.backend(torch.float32)

    def charged(call: Any, seconds: Any) -> Any:
        def run(*arguments: Any) -> Any:
            clock[0] += seconds(*arguments)
            return call(*arguments)

        return run

    backend.launch = charged(backend.launch, lambda inputs, *_: TILE * len(inputs[0]))
    messages = lambda sends, receives, tag: MESSAGE * (len(sends) + len(receives))  # noqa: E731
    world.channel.post = charged(world.channel.post, messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "lowered", charged(Route.lowered, lambda route, *_: PREPARE * len(route.shards)))
        patch.setattr(profile_host, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        patch.setattr(profile_clock, "time", SimpleNamespace(thread_time=lambda: clock[0]))
        return host_costs(world, SHAPE, torch.float32)


def test_profile_finds_what_tiles_and_messages_cost():
    """Costs of known size in the executor, the channel and the lowering come out of the measurement."""
    with Ranks(2) as ranks:
        found = ranks.run(measured)
    # One pass of a whole sequence is one tile; a ring of two lowers as often, and one more sequence takes no more messages.
    expected = HostCosts(piece_seconds=TILE, message_seconds=0.0, piece_setup=PREPARE, message_setup=0.0)
    for costs in found:
        assert asdict(costs) == pytest.approx(asdict(expected))


def test_profile_of_one_rank_has_no_messages():
    with Ranks(1) as ranks:
        found = ranks.run(measured)[0]
    assert asdict(found) == pytest.approx(asdict(HostCosts(piece_seconds=TILE, piece_setup=PREPARE)))
