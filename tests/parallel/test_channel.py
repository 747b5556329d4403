"""Transfers between real ranks: large ones in pieces, both lanes, no order in waiting, errors that say what was moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import IMPATIENCE, IN_VAIN, Ranks

import hdp
from hdp.attention.lowered import Packet
from hdp.parallel.channel import PIECE_BYTES, Ticket, TorchChannel, _tag, first_line


def packet(peer: int, lane: int, what: str = "k", late: bool = False) -> Packet:
    return Packet(peer=peer, lane=lane, sequence=5, what=what, late=late)


def content(sender: int, lane: int, elements: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * sender + lane)
    return torch.randn(elements, generator=generator)


def exchange(world: hdp.World, elements: int) -> tuple[bool, int, int]:
    """Everyone sends to everyone over both lanes at once; receives are waited for in the reverse order of rounds."""
    channel = world.channel
    before = channel.sent_bytes, channel.messages
    tickets, received = [], []
    for round_ in range(2):
        sends, receives = [], []
        for lane in (0, 1):
            for peer in range(world.world_size):
                if peer != world.rank:
                    sends.append((packet(peer, lane), content(world.rank, lane, elements) + round_))
                    space = torch.empty(elements)
                    receives.append((packet(peer, lane), space))
                    received.append((space, content(peer, lane, elements) + round_))
        tickets.append((channel.post(sends, receives, tag=100 + round_), sends))
    for ticket, _ in reversed(tickets):
        channel.wait_receives(ticket)
    for ticket, _ in tickets:
        channel.wait_sends(ticket)
    same = all(torch.equal(space, expected) for space, expected in received)
    return same, channel.sent_bytes - before[0], channel.messages - before[1]


@pytest.mark.parametrize("elements", [1, 1000, PIECE_BYTES // 4, PIECE_BYTES // 4 + 1, 3 * PIECE_BYTES // 4 + 77])
def test_all_to_all_over_both_lanes(ranks, elements):
    for same, sent, messages in ranks(3).run(exchange, elements):
        assert same
        assert messages == 2 * 2 * 2 and sent == messages * elements * 4


def test_what_is_not_the_same_has_another_tag():
    """Sequence, what it is, size, dtype, round: a rank that expects something else takes this message for nothing."""
    mine = packet(1, 0)
    tags = [
        _tag(mine, torch.empty(6), 7),
        _tag(replace(mine, sequence=6), torch.empty(6), 7),
        _tag(replace(mine, what="v"), torch.empty(6), 7),
        _tag(replace(mine, terms=1), torch.empty(6), 7),
        _tag(mine, torch.empty(5), 7),
        _tag(mine, torch.empty(6, dtype=torch.int32), 7),
        _tag(mine, torch.empty(6), 8),
    ]
    assert len(set(tags)) == len(tags) and all(0 <= tag < 1 << 31 for tag in tags)
    assert _tag(packet(0, 0, late=True), torch.empty(2, 3), 7) == tags[0]  # as its receiver calls it


class Coalescing:
    """A lane that runs grouped calls as NCCL does: one work for all operations of a call."""

    def _get_backend(self, device: torch.device) -> Coalescing:
        return self

    def name(self) -> str:
        return "nccl"

    def size(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("late", "sends", "waits_for"),
    [
        ((False,), True, {"receives": ["r0"], "sends": []}),
        ((True, False), True, {"receives": ["r0"], "sends": []}),
        ((True, True), True, {"late": ["r0"], "sends": ["s"]}),
        ((True,), False, {"late": ["r0"], "sends": []}),
        ((), True, {"sends": ["s"]}),
    ],
)
def test_one_grouped_call_a_round_and_lane(monkeypatch, late, sends, waits_for):
    """Whoever waits for an operation waits for its call; what only comes home late holds no receive up."""
    calls = []
    monkeypatch.setattr("torch.distributed.P2POp", lambda op, tensor, group, group_peer: (op.__name__, group_peer))
    monkeypatch.setattr("torch.distributed.batch_isend_irecv", lambda operations: calls.append(operations) or ["work"])
    channel = TorchChannel(0, [Coalescing(), Coalescing()])  # type: ignore[list-item]
    assert not channel.can_ask
    some = torch.zeros(1)
    out = [(packet(1, lane, "s"), some) for lane in (0, 1) for _ in range(2 * sends)]
    back = [(packet(2, 1, f"r{i}", is_late), some) for i, is_late in enumerate(late)]
    ticket: Ticket = channel.post(out, back, tag=1)
    assert len(calls) == (2 if sends else 1)
    assert calls[-1] == [("isend", 1)] * 2 * sends + [("irecv", 2)] * len(late)  # one order at both ends: sends first
    found = {name: [p.what for p, _ in getattr(ticket, name) if p.lane == 1] for name in ("receives", "late", "sends")}
    assert found == {"receives": [], "late": [], **waits_for}


def waits(world: hdp.World, noted: bool) -> tuple[int, bool]:
    world.channel.waited.clear()
    world.channel.notes_waits = noted
    message = torch.zeros(1)
    peer = 1 - world.rank
    ticket = world.channel.post([(packet(peer, 0), message)], [(packet(peer, 0), torch.zeros(1))], tag=3)
    world.channel.wait_receives(ticket)
    world.channel.wait_receives(ticket)  # nothing is left to wait for
    world.channel.wait_sends(ticket)
    return len(world.channel.waited), all(start <= stop for start, stop in world.channel.waited)


def test_waits_are_noted_once(ranks):
    assert ranks(2).run(waits, True) == [(2, True)] * 2


def test_without_an_engine_waits_are_not_collected(ranks):
    """Nobody would empty the list: it would grow by some megabytes a minute."""
    assert not TorchChannel(0, []).notes_waits
    assert ranks(2).run(waits, False) == [(0, True)] * 2


def never_sent(world: hdp.World) -> None:
    world.channel.where = "step 3, slot 1, forward"
    if world.rank == 0:
        ticket = world.channel.post([], [(packet(1, 1, "dk"), torch.zeros(4))], tag=9)
        world.channel.wait_receives(ticket)


def test_an_error_names_rank_place_tensor_sequence_and_peer():
    ranks = Ranks(2, timeout=IMPATIENCE)
    try:
        first, second = ranks.outcomes(never_sent, limit=IN_VAIN)
    finally:
        ranks.close()
    assert second.error is None
    text = "PeerError: rank 0, step 3, slot 1, forward: receiving 'dk' of sequence 5 from rank 1 failed: Timed out"
    assert first.error.startswith(text), first


def test_the_advice_of_gloo_is_left_out_of_messages():
    text = (
        "[/__w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5. This is typically caused by a crash."
    )
    assert first_line(RuntimeError(text)) == "Connection closed by peer [::1]:5"
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(RuntimeError("")) == "RuntimeError"
