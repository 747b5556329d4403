"""Hosts with a CPU quota, and what collectives take from computing: found, timed, and simulated as computed by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Ranks
from test_host import HOST, tiny
from test_simulator import COST, LAYERS, SLOW, near, of, world

from hdp.balance import PlanError
from hdp.balance.host import HostCosts
from hdp.balance.simulator import Cluster, simulate
from hdp.parallel import profile_clock
from hdp.parallel.profile_clock import NO_QUOTA, Quota, Watched, host_clock, judge, measure_quota, watch

QUARTER = HostCosts(quota_period=2.0, quota_share=0.25)
"""Half a second of each two."""


def alone(seconds: float, host: HostCosts) -> float:
    """When one rank is done that computes for so long."""
    tokens = round(seconds * 1000)
    made = of([tokens], [(0,)], [0], 1)
    linear = replace(COST, quadratic=0.0, linear=1e-3 / LAYERS / 3, backward_linear=2.0)
    return simulate(made, linear, Cluster(topology=world(1), host=host)).seconds


@pytest.mark.parametrize(("seconds", "done"), [(1.0, 0.25), (2.0, 0.5), (2.4, 2.1), (4.0, 2.5), (16.0, 14.5)])
def test_a_host_computes_at_full_speed_until_its_quota_is_used_up(seconds: float, done: float):
    assert alone(seconds, QUARTER) == pytest.approx(done, abs=1e-6)
    assert alone(seconds, replace(QUARTER, quota_share=1.0)) == near(seconds)


def test_a_rank_that_never_waits_saves_no_quota():
    """Rank 0 computes for 12 s, then both share 6 s: 4.5 s of CPU, half a second in each period, the ninth of which ends it."""
    made = of([1000, 1000], [(0,), (0, 1)], [0, 1], 2)
    busy = replace(COST, quadratic=0.0, linear=1e-3, ring_bytes=0.0, ring_bytes_backward=0.0)
    assert simulate(made, busy, Cluster(topology=world(2))).seconds == near(18.0)
    assert simulate(made, busy, Cluster(topology=world(2), host=QUARTER)).seconds == near(16.5)


@pytest.mark.parametrize("quadratic", [1e-7, 2e-5, 1e-4])
def test_waits_save_quota(quadratic: float):
    """Messages of 200 s, and whole sequences that fill the waits, on a quota of short and of endless periods."""
    made = of([2000, 1000, 1000], [(0, 1), (0,), (1,)], [0, 0, 0], 2)

    def seconds(quadratic: float, host: HostCosts) -> float:
        cost = replace(COST, linear=1e-18, quadratic=quadratic)
        return simulate(made, cost, Cluster(topology=world(2, SLOW), host=host)).seconds

    short = HostCosts(quota_period=1e-4, quota_share=0.25)
    assert seconds(quadratic, short) == pytest.approx(seconds(quadratic, HostCosts()), rel=1e-5)
    endless = HostCosts(quota_period=1e6, quota_share=0.5)  # never used up: twice as fast
    assert seconds(quadratic, endless) == near(seconds(quadratic / 2, HostCosts()))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_whole_sequences_fill_waits_that_slow_them_down(overlap: float):
    """What they hide behind messages takes (1 - overlap) more; nothing is lost beside computing it afterwards."""
    made = of([2000, 1000, 1000], [(0, 1), (0,), (1,)], [0, 0, 0], 2)
    cost = replace(COST, linear=1e-18, quadratic=2e-5)
    cluster = Cluster(topology=world(2, SLOW))
    hidden = simulate(made, cost, cluster).seconds  # longer messages hide all that is computed meanwhile
    computed = LAYERS * 3 * (2000**2 / 2 + 1000**2) * 2e-5
    shown = computed - (hidden - 1200.0)
    assert simulate(made, cost, replace(cluster, overlap=overlap)).seconds == near(hidden + (1.0 - overlap) * shown)


def test_collectives_take_from_computing():
    made = of([100, 100], [(0,), (1,)], [0, 0], 2)
    cluster = Cluster(topology=world(2, SLOW), sharding="sharded", parameter_bytes=80.0, gradient_bytes=160.0)
    host = HostCosts(gather_byte=1e-3, reduce_byte=1e-2)
    without, with_host = (simulate(made, COST, replace(cluster, host=h)).seconds for h in (HostCosts(), host))
    assert with_host - without == near(80 * 1e-3 + 160 * 1e-2)
    alone = replace(cluster, sharding="none", host=host)
    assert simulate(made, COST, alone).seconds == near(3 * LAYERS * (100 * 1e-3 + 100**2 * 1e-6))


def test_what_belongs_to_no_layer_is_gathered_first_and_reduced_last():
    made = of([100, 100], [(0,), (1,)], [0, 0], 2)
    cluster = Cluster(topology=world(2, SLOW), sharding="sharded", parameter_bytes=80.0, gradient_bytes=160.0)
    gather, reduce, compute = 0.04, 0.08, 3 * LAYERS * (100 * 1e-3 + 100**2 * 1e-6)
    for share in (0.0, 0.3, 1.0):
        shown = (share + (1 - share) / LAYERS) * (gather + reduce)
        assert simulate(made, COST, replace(cluster, root_share=share)).seconds == near(compute + shown)
    slots = replace(made, regime="slot")
    less, more = (simulate(slots, COST, replace(cluster, root_share=s)).seconds for s in (0.0, 0.9))
    assert more > less


def test_a_quota_does_not_change_how_long_computing_takes_in_the_long_run():
    fine = replace(HOST, quota_period=1e-5, quota_share=0.3)
    assert tiny(64, 4, host=fine).seconds == pytest.approx(tiny(64, 4, host=HOST).seconds, rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_refuses(share: float):
    with pytest.raises(PlanError, match="quota_share is"):
        HostCosts(quota_share=share)


# ---------------------------------------------------------------- found and timed


def throttled(monkeypatch: pytest.MonkeyPatch, quota: float, period: float) -> None:
    """A clock on which each look at it computes for 0.1 ms, and which stands for the rest of a period without quota."""
    wall, cpu, used = 0.0, 0.0, {}

    def look() -> float:
        nonlocal wall, cpu
        wall, cpu = wall + 1e-4, cpu + 1e-4
        number = int(wall / period)
        used[number] = used.get(number, 0.0) + 1e-4
        if used[number] > quota:
            wall = (number + 1) * period
        return wall

    times: Any = SimpleNamespace(perf_counter=look, process_time=lambda: cpu)
    monkeypatch.setattr(profile_clock, "time", times)


@pytest.mark.parametrize(("quota", "period"), [(0.006, 0.02), (0.03, 0.1), (0.05, 0.1)])
def test_finds_quotas(monkeypatch: pytest.MonkeyPatch, quota: float, period: float):
    throttled(monkeypatch, quota, period)
    seen = watch(1)
    assert seen.cores == pytest.approx(quota / period, rel=0.03)
    found = judge(seen, Watched(cores=seen.cores, pauses=()), 1)
    assert found.period == pytest.approx(period, rel=0.02)
    assert found.share(1) == pytest.approx(quota / period, rel=0.03)
    assert found.share(2) == pytest.approx(quota / period / 2, rel=0.03)


def test_busy_cores_are_no_quota(monkeypatch: pytest.MonkeyPatch):
    throttled(monkeypatch, 1.0, 0.1)
    assert judge(watch(1), watch(1), 1) == NO_QUOTA  # never throttled
    regular = tuple(0.02 * k for k in range(9))
    half = Watched(cores=0.5, pauses=regular)
    assert judge(half, Watched(cores=0.9, pauses=regular), 1) == NO_QUOTA  # more threads get more
    assert judge(half, Watched(cores=0.51, pauses=regular), 1).cores == 0.5
    assert judge(Watched(cores=0.5, pauses=regular[:3]), half, 1) == NO_QUOTA


def agreed(world: Any, found: list[Quota]) -> Quota:
    """What ranks make of what each of them has found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_clock, "watch", lambda _: None)
        patch.setattr(profile_clock, "judge", lambda *_: found[world.rank])
        return measure_quota(world, 1)


def test_all_ranks_agree_on_the_quota():
    found = [Quota(period=0.1, cores=0.25), Quota(period=0.3, cores=0.75)]
    with Ranks(2) as ranks:
        assert ranks.run(agreed, found) == [Quota(period=0.2, cores=0.5)] * 2
        assert ranks.run(agreed, [found[0], NO_QUOTA]) == [NO_QUOTA] * 2  # not all have one


def test_clock_counts_all_threads_where_they_share_a_quota(monkeypatch: pytest.MonkeyPatch):
    times: Any = SimpleNamespace(process_time=lambda: 6.0, thread_time=lambda: 4.0)
    monkeypatch.setattr(profile_clock, "time", times)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    device = torch.device("cpu")
    assert host_clock(device, NO_QUOTA)() == 4.0
    assert host_clock(device, Quota(period=0.1, cores=2.0))() == 4.0  # more than its one thread can use
    assert host_clock(device, Quota(period=0.1, cores=0.5))() == 12.0
