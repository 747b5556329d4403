"""Rounds of schedules other than the ring, counted from their programs once per schedule and group size."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from hdp.attention.counts import Sizes, count
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.messages import messages
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_pair, get_schedule, lay_out
from hdp.balance.models import ModelShape
from hdp.balance.plan import PlanError

REFERENCE_CHUNK = 64
"""Tokens a chunk at which programs are counted; bytes then grow with the length, areas with its square."""
LARGEST = 512
"""Members beyond which a program other than the ring is not counted: it takes minutes."""


@lru_cache(maxsize=256)
def table(
    forward: str, backward: str, is_backward: bool, size: int, layout: str, shape: ModelShape, element: int
) -> dict[str, Any]:
    """The arrays of ``simulator::Table``: weights in bytes per token of the whole sequence and layer."""
    if size > LARGEST:
        raise PlanError(
            f"schedule {forward!r} on {size} ranks: the simulator counts programs of at most {LARGEST} ranks"
        )
    length = 2 * size * REFERENCE_CHUNK
    mask = Mask()
    place = lay_out(make_layout(layout, length, size), mask, backward if is_backward else forward)
    heads = HeadCount(query=shape.heads, key=shape.kv_heads)
    sizes = Sizes(head_dim=shape.head_dim, model_bytes=element)
    pair = get_schedule(forward) if forward == backward else get_pair(forward, backward)
    make = pair.backward if is_backward else pair.forward
    programs = [make(place, mask, heads, m) for m in range(size)]
    counts = [count(programs[m], place, mask, heads, m, sizes, is_backward) for m in range(size)]
    rounds = max(len(c.steps) for c in counts)
    total = sum(c.area for c in counts)
    area = np.zeros((size, rounds))
    pieces = np.zeros((size, rounds), dtype=np.int64)
    send_first, sent = [0], []
    for m in range(size):
        steps = counts[m].steps
        for k in range(rounds):
            if k < len(steps):
                area[m, k] = steps[k].area / total
                step = programs[m].steps[k]
                pieces[m, k] = len(step.tiles)
                for mail in messages(step.sends):
                    channel = 2 * mail[0].lane + mail[0].kind.is_accumulator
                    weight = sum(sizes.of(t, place) for t in mail) / length
                    sent.append((k, m, mail[0].peer, channel, weight))
            send_first.append(len(sent))
    by_receiver = sorted(range(len(sent)), key=lambda i: (sent[i][2], sent[i][0], i))
    keys = np.array([sent[i][2] * rounds + sent[i][0] for i in by_receiver], dtype=np.int64)
    return {
        "size": size,
        "rounds": rounds,
        "area": area.ravel(),
        "pieces": pieces.ravel(),
        "send_first": np.array(send_first, dtype=np.int64),
        "from": np.array([m[1] for m in sent], dtype=np.int64),
        "to": np.array([m[2] for m in sent], dtype=np.int64),
        "channel": np.array([m[3] for m in sent], dtype=np.int64),
        "weight": np.array([m[4] for m in sent], dtype=np.float64),
        "receive_first": np.searchsorted(keys, np.arange(size * rounds + 1)).astype(np.int64),
        "received": np.array(by_receiver, dtype=np.int64),
    }
