"""Messages of a micro-batch: counted by hand, and as the lowered programs of all ranks have them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from test_host import NOTHING, SHAPE
from test_simulator import LAYERS, near, of, world

from hdp.attention.bundle import Bundle, structure_of
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.balance import Plan
from hdp.balance.host import HostCosts, ring_messages
from hdp.balance.simulator import Cluster, Simulation, simulate

MESSAGE = 1e-3
GEOMETRY = Geometry(
    heads=HeadCount(query=SHAPE.heads, key=SHAPE.kv_heads), head_dim=SHAPE.head_dim, model_bytes=4, sum_bytes=4
)
SCHEDULES = (
    *("ring", "ring_q", "token_ring", "direct", "all_gather", "all_gather:2", "ulysses", "ulysses:2"),
    *("ulysses_home", "hybrid:2", "double_ring:2"),
)
PAIRS = [
    *((name, name) for name in SCHEDULES if name != "ring_q"),
    *(("ring", "ring_q"), ("token_ring", "direct"), ("direct", "token_ring")),
]


def planned(groups: list[tuple[int, ...]], pairs: list[tuple[str, str]], size: int) -> Plan:
    """One micro-batch of all ranks, a document a group."""
    names = ("local", *dict.fromkeys(name for pair in pairs for name in pair))
    codes = np.array([[names.index(name) for name in pair] for pair in pairs], dtype=np.int64)
    lengths = [32 * len(group) + 4 * i for i, group in enumerate(groups)]
    return of(
        *(lengths, groups, [0] * len(groups), size),
        schedule_names=names,
        schedules=codes[:, 0],
        schedules_backward=codes[:, 1],
    )


def simulated(made: Plan) -> tuple[Simulation, list[int]]:
    """And the messages that each rank's host pays for in one layer, sent and received."""
    cluster = Cluster(topology=world(made.world_size), shape=SHAPE, host=HostCosts(message_seconds=MESSAGE))
    charged = simulate(made, NOTHING, cluster)
    free = simulate(made, NOTHING, Cluster(topology=world(made.world_size), shape=SHAPE))
    seconds = (charged.busy - free.busy) * 2.0**-32 / LAYERS
    counts = np.rint(seconds / MESSAGE)
    assert seconds == pytest.approx(counts * MESSAGE, abs=1e-6)
    return charged, counts.astype(int).tolist()


def lowered(made: Plan) -> tuple[int, list[int]]:
    """Messages that all ranks' programs send, and those that each rank sends and receives, both directions."""
    sent, of_rank = 0, []
    for rank in range(made.world_size):
        both = 0
        for backward in (False, True):
            program = lower(tasks(made, rank, backward), GEOMETRY, backward)
            sent += sum(len(r.sends) for r in program.rounds)
            both += sum(len(r.sends) + len(r.receives) for r in program.rounds)
        of_rank.append(both)
    return sent, of_rank


def tasks(made: Plan, rank: int, backward: bool) -> list[Task]:
    """As a route makes them."""
    bundles = defaultdict(list)
    for i, length in enumerate(made.lengths.tolist()):
        group = tuple(made.group_ranks[made.group_offsets[i] : made.group_offsets[i + 1]].tolist())
        if rank in group and len(group) > 1:
            bundles[group, made.schedule(i), structure_of("zigzag", length, len(group), Mask())].append((i, length))
    return [
        Task(Bundle(structure, names[backward], group, group.index(rank), *zip(*some), [0] * len(some)), names)  # noqa: B905
        for (group, names, structure), some in bundles.items()
    ]


def test_two_groups_that_share_a_pair_of_ranks():
    """A ring of two inside a ring of three: what both send to the same rank in one round is one message.

    Forward, round 0: 0 to 1 (both rings'), 1 to 0, 1 to 2, 2 to 0; round 1: three of the larger ring. Backward, round 0: keys
    and values of the larger, 0 to 2, 1 to 0, 2 to 1; round 1: gradients, 0 to 2, 1 to 0 (both), 2 to 1, 0 to 1; round 2: three.
    """
    made = planned([(0, 1), (0, 1, 2)], [("ring", "ring")] * 2, 3)
    simulation, of_rank = simulated(made)
    assert simulation.messages == LAYERS * (4 + 3 + 3 + 4 + 3)
    # Rank 0 forward: 1 sent and 2 received, then 1 and 1; backward 1 and 1, 2 and 1, 1 and 1.
    assert of_rank == [3 + 2 + 2 + 3 + 2, 3 + 2 + 2 + 3 + 2, 2 + 2 + 2 + 2 + 2]
    assert (simulation.messages // LAYERS, of_rank) == lowered(made)
    apart = [simulated(planned([group], [("ring", "ring")], 3))[0].messages for group in ((0, 1), (0, 1, 2))]
    assert sum(apart) == LAYERS * (4 + 15)


@pytest.mark.parametrize("documents", [1, 20])
@pytest.mark.parametrize("names", PAIRS, ids="/".join)
def test_documents_of_a_bundle_travel_together(names: tuple[str, str], documents: int):
    """As many messages for twenty documents as for one, and as many as their programs send."""
    made = planned([(0, 1, 2, 3)] * documents, [names] * documents, 4)
    simulation, of_rank = simulated(made)
    assert (simulation.messages // LAYERS, of_rank) == lowered(made)
    if names == ("ring", "ring"):
        assert of_rank == [ring_messages(4, False) + ring_messages(4, True)] * 4


@st.composite
def micro_batches(draw: st.DrawFn) -> Plan:
    size = draw(st.integers(2, 6))
    groups = draw(st.lists(st.permutations(range(size)).flatmap(cut), min_size=1, max_size=6))
    pairs = [draw(st.sampled_from(PAIRS if len(g) % 2 == 0 else PAIRS[:8])) for g in groups]
    return planned(groups, pairs, size)


def cut(order: list[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.integers(1, len(order)).map(lambda n: tuple(order[:n]))


@examples(60)
@given(micro_batches())
def test_all_groups_of_a_micro_batch_share_their_messages(made: Plan):
    """Any groups, any schedules: messages as in the lowered programs of all ranks."""
    simulation, of_rank = simulated(made)
    assert (simulation.messages // LAYERS, of_rank) == lowered(made)


def test_setup_counts_the_messages_of_a_micro_batch():
    """Once a micro-batch and direction, on every rank that takes part."""
    made = planned([(0, 1), (0, 1, 2)], [("ring", "ring")] * 2, 3)
    cluster = Cluster(topology=world(3), host=HostCosts(message_setup=1e-2, piece_setup=1e-1))
    busy = (simulate(made, NOTHING, cluster).busy - simulate(made, NOTHING, Cluster(topology=world(3))).busy) * 2.0**-32
    messages, pieces = simulated(made)[1], [2 * (2 + 3), 2 * (2 + 3), 2 * 3]
    assert busy.tolist() == [near(m * 1e-2 + p * 1e-1) for m, p in zip(messages, pieces, strict=True)]
