"""Which transfers of a step travel as one message, and which messages of a round are posted in one grouped call.

All that go the same way on one lane and are of one sort are one message.

A message costs a host as much as some hundred kilobytes do, so inputs (Q, KV, DO) for one member are one message and sums
(OUT, DQ, DKV) for it another, whatever the number of tensors, and of sequences, in it. Both ends decide by the transfers
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hdp.attention.program import Transfer


def messages(transfers: Iterable[Transfer]) -> list[list[Transfer]]:
    """The messages of one member's sends, or receives, of one step, in the order of their first transfers."""
    groups: dict[tuple[int, int, bool], list[Transfer]] = {}
    for transfer in transfers:
        groups.setdefault((transfer.peer, transfer.lane, transfer.kind.is_accumulator), []).append(transfer)
    return list(groups.values())


MOST_OPERATIONS = 256
"""Of one grouped call; NCCL is reported to hang on larger ones (pytorch/pytorch #174942)."""
_OF_ONE_DISTANCE = 8
"""Operations of a round and lane with the two ranks that are equally far away: inputs and sums, each sent and received."""


def in_calls(peers: Sequence[int], rank: int, world_size: int) -> list[list[int]]:
    """Which operations of a round and lane are one grouped call, by their places in ``peers``, in the order of the calls.

    A round of more than ``MOST_OPERATIONS`` is several calls. Which call an operation is in follows from how far its two ends
    are apart, counted round the world the shorter way, so both ends have it in the same one, and all ranks run calls from
    near to far: one global order, as ``hdp.attention.exchange.check_exchange`` wants it. Ranks that are near each other need
    one call in any world.
    """
    width = MOST_OPERATIONS // _OF_ONE_DISTANCE
    calls: dict[int, list[int]] = {}
    for place, peer in enumerate(peers):
        apart = (peer - rank) % world_size
        calls.setdefault((min(apart, world_size - apart) - 1) // width, []).append(place)
    return [calls[far] for far in sorted(calls)]
