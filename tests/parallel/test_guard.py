"""Ranks that are killed, stop, or fail: the others end with an error that names the culprit, not by hanging."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import IMPATIENCE, IN_VAIN, Outcome, Ranks
from tiny import make_documents, make_model

import hdp
from hdp.parallel import collectives
from hdp.parallel.guard import _is_communication_error

pytestmark = pytest.mark.slow


def fail(how: str) -> None:
    if how == "raises":
        raise KeyError("the data set is on fire")
    if how == "spins":
        time.sleep(3600)
    os.kill(os.getpid(), {"is killed": signal.SIGKILL, "stops": signal.SIGSTOP}[how])


def train(world: hdp.World, victim: int, how: str, where: str, schedule: str | None = None) -> None:
    """Three steps of a planned batch with shared and whole documents; ``victim`` fails in the midst of one of them."""
    world.runtime.schedule = schedule
    engine = hdp.shard(make_model(), world)
    count = 0

    def trip() -> None:
        nonlocal count
        count += 1
        if world.rank == victim and count == 4:
            fail(how)

    post, reduce = world.channel.post, collectives.ReduceScatter.__call__
    if where == "attention":
        world.channel.post = lambda *arguments: (trip(), post(*arguments))[1]  # type: ignore[method-assign]
    elif where == "reduce-scatter":
        collectives.ReduceScatter.__call__ = lambda *a, **k: (trip(), reduce(*a, **k))[1]  # type: ignore[method-assign]
    loader = hdp.Loader(
        make_documents([150, 20, 30, 9, 11, 40]), engine, tokens_per_step=10**5, capacity=64, planner="naive", steps=3
    )
    for batch in loader:
        if where == "between steps" and batch.step == 1 and world.rank == victim:
            fail(how)
        engine.forward_backward(batch)


def survivors(victim: int, how: str, where: str, schedule: str | None = None, **options) -> list[Outcome]:
    ranks = Ranks(3, timeout=IMPATIENCE, **options)
    stuck = () if how in ("is killed", "raises") else (victim,)
    try:
        outcomes = ranks.outcomes(train, victim, how, where, schedule, limit=IN_VAIN, stuck=stuck)
    finally:
        ranks.close()
    if how == "is killed":
        assert outcomes[victim].exit_code == -signal.SIGKILL
    others = [outcome for outcome in outcomes if outcome.rank != victim]
    for outcome in others:
        assert outcome.error is not None and outcome.exit_code == 1, outcome  # it ended, and by itself
        assert outcome.error.startswith("PeerError: "), outcome
        assert f"(noticed by rank {outcome.rank}, " in outcome.error, outcome
    return others


@pytest.mark.parametrize("where", ["attention", "reduce-scatter", "between steps"])
def test_a_killed_rank_is_named(where):
    for outcome in survivors(1, "is killed", where):
        assert re.search(r"PeerError: rank 1 is dead or stopped: no sign of life .* last seen at: ", outcome.error)


@pytest.mark.parametrize("schedule", ["direct", "ulysses_home:2", "token_ring"])
def test_a_killed_rank_is_named_whatever_the_schedule(schedule):
    for outcome in survivors(1, "is killed", "attention", schedule):
        assert re.search(r"PeerError: rank 1 is dead or stopped: no sign of life .* last seen at: ", outcome.error)


def test_the_killed_rank_hosts_the_store():
    for outcome in survivors(0, "is killed", "attention", rank0_hosts_store=True):
        assert "the rank that hosts it (rank 0, or the launcher) is gone" in outcome.error


@pytest.mark.parametrize("where", ["attention", "reduce-scatter"])
def test_a_stopped_rank_is_named_within_the_timeout(where):
    for outcome in survivors(1, "stops", where):
        assert "rank 1 is dead or stopped" in outcome.error


@pytest.mark.parametrize("where", ["attention", "reduce-scatter"])
def test_a_rank_that_raises_is_named_with_its_message(where):
    for outcome in survivors(2, "raises", where):
        assert outcome.error.startswith("PeerError: rank 2 failed: KeyError: 'the data set is on fire' (noticed by")


def test_a_rank_that_lives_but_does_not_go_on_is_named():
    for outcome in survivors(1, "spins", "attention"):
        assert outcome.error.startswith(
            "PeerError: rank 1 lives but has not moved from: step 0, slot 0, forward, in forward of attention call 1 of"
        )


def end_early(world: hdp.World, victim: int) -> None:
    if world.rank == victim:
        world.close()
        os._exit(0)
    with world.guard.watch("a test"):
        dist.barrier(group=world.control)


def test_a_rank_that_left_is_named():
    ranks = Ranks(3, timeout=IMPATIENCE)
    try:
        outcomes = ranks.outcomes(end_early, 1, limit=IN_VAIN)
    finally:
        ranks.close()
    for rank in (0, 2):
        assert outcomes[rank].error.startswith("PeerError: rank 1 has left the job"), outcomes[rank]


def blocked(world: hdp.World, output: Path) -> None:
    """Rank 0 is told to end while it waits for rank 1, which goes on only once it has read where rank 0 stands."""
    world.guard.enter("step 7, slot 2, backward")
    lane, message = world.channel.lanes[0], torch.zeros(1)
    if world.rank == 0:
        lane.send([torch.tensor([os.getpid()])], 1, 0).wait()
        lane.recv([message], 1, 1).wait()
        return
    pid = torch.zeros(1, dtype=torch.int64)
    lane.recv([pid], 0, 0).wait()
    time.sleep(1)  # rank 0 is inside gloo by now
    os.kill(int(pid), signal.SIGTERM)
    while "rank 0: told to end by SIGTERM, at: step 7, slot 2, backward" not in output.read_text():
        time.sleep(0.05)
    lane.send([message], 0, 1).wait()


def test_sigterm_is_answered_while_blocked_in_a_transfer():
    ranks = Ranks(2)
    try:
        first, second = ranks.outcomes(blocked, ranks.output(0))
    finally:
        ranks.close()
    assert second.error is None, second
    assert first.error == f"SystemExit: {128 + signal.SIGTERM}", first
    assert first.output.count("told to end by SIGTERM") == 1


def nested_handler(world: hdp.World) -> tuple[list[int], bool]:
    seen: list[int] = []

    def mine(number: int, _: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    with hdp.init(device="cpu"):
        os.kill(os.getpid(), signal.SIGTERM)
    is_back = signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, before)
    return seen, is_back


def test_a_handler_of_the_user_is_called_and_comes_back():
    with Ranks(1) as ranks:
        assert ranks.run(nested_handler) == [([signal.SIGTERM], True)]
        assert "rank 0: told to end by SIGTERM, at: outside a step" in ranks.output(0).read_text()


SCRIPT = """
import os, time
import torch
import hdp
world = hdp.init(device="cpu")
if world.rank == 2:
    while not (os.path.exists("reached by 0") and os.path.exists("reached by 1")):
        time.sleep(0.1)
    time.sleep(1)  # rank 0 is inside gloo by now, or says the same a moment before
    os._exit(3)
route = hdp.Route(world.runtime, [hdp.RouteShard(
    sequence=0, length=100, group=(0, 1), schedule="ring", schedule_backward="ring"
)])
q = torch.randn(50, 2, 16)
with world.guard.watch("step 4, slot 1, forward"):
    open(f"reached by {world.rank}", "w").close()
    if world.rank == 1:
        time.sleep(3600)  # rank 0 waits for this rank
    hdp.attend(q, q, q, route=route)
"""


def test_under_torchrun_the_survivors_say_where_they_stood(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    for rank in (0, 1):
        assert f"rank {rank}: told to end by SIGTERM, at: step 4, slot 1, forward" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "Application timeout caused pair closure",  # a wait beside another that ran into the timeout, without gloo's name
        "Timed out waiting 20000ms for send operation to complete",
        "Write error [127.0.0.1]:5: Broken pipe",
        "Read error [127.0.0.1]:5: Connection reset by peer",
    ],
)
def test_what_gloo_says_of_a_lost_peer_is_known(text):
    assert _is_communication_error(RuntimeError(text))
    assert not _is_communication_error(ValueError(text))
    assert not _is_communication_error(RuntimeError("expected m1 and m2 to have the same dtype"))
