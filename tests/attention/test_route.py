"""What a route and the function on it refuse, and ranks whose routes do not agree."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from harness import IMPATIENCE, IN_VAIN, Ranks

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from tiny import make_documents, make_model

import hdp
from hdp.attention.channel import VirtualNetwork
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import AttentionRuntime, LayerKey, Route, RouteShard

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KEY = LayerKey(heads=HeadCount(query=4, key=2), head_dim=8, dtype=torch.float32, mask=Mask())


def runtime(**options) -> AttentionRuntime:
    return AttentionRuntime(0, VirtualNetwork().channel(0), CPU, **options)


def shard(sequence: int = 0, length: int = 10, group: tuple[int, ...] = (0, 1), **fields) -> RouteShard:
    return RouteShard(sequence=sequence, length=length, group=group, **{"schedule": "ring", **fields})


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([shard(5), shard(1)], "sequence 1 is listed after sequence 5: give each sequence once, in ascending order"),
        ([shard(1), shard(1)], "sequence 1 is listed twice"),
        ([shard(group=(0, 0))], r"sequence 0 is shared by ranks \(0, 0\): name every rank once"),
        ([shard(group=(1, 2))], r"sequence 0 is shared by ranks \(1, 2\), and this is rank 0"),
        ([shard(length=-1)], "sequence 0 has length -1"),
    ],
)
def test_shards_that_cannot_be_one_micro_batch(shards, message):
    with pytest.raises(ValueError, match=message):
        Route(runtime(), shards)


@pytest.mark.parametrize("schedule", ["ring", "ulysses:2", "direct"])
def test_backward_follows_forward_unless_it_is_named(schedule):
    route = Route(runtime(), [shard(schedule=schedule)])
    assert route.schedules(route.shards[0], KEY) == (schedule, schedule)
    other = Route(runtime(), [shard(schedule=schedule, schedule_backward="ring_q")])
    assert other.schedules(other.shards[0], KEY) == (schedule, "ring_q")


@pytest.mark.parametrize("schedule", ["hybrid:2", "double_ring:2", "local"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_schedule_that_cannot_serve_a_group_is_named_with_its_sequence(schedule, backward):
    route = Route(runtime(), [shard(5, group=(0, 1, 2), schedule=schedule)])
    with pytest.raises(ValueError, match=rf"sequence 5, shared by ranks \(0, 1, 2\), schedule '{schedule}': .*3"):
        route.program(KEY, backward)


def attend(heads: int = 4, key_heads: int = 2, dim: int = 8, **options) -> torch.Tensor:
    q, k, v = (torch.ones(10, n, dim) for n in (heads, key_heads, key_heads))
    return hdp.attend(q, k, v, **{"route": Route(runtime(), [shard(group=(0,))]), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0: give a whole number of tokens"),
        ({"window": -3}, "window is -3"),
        ({"window": 2.7}, r"window is 2\.7"),
        ({"window": True}, "window is True"),
        ({"softcap": -30.0}, r"softcap is -30\.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": 0.0}, r"'cpu' scales scores by a positive number, not by 0\.0"),
        ({"scale": -0.5}, r"not by -0\.5: give another scale .*or choose backend='reference'"),
        ({"heads": 0}, "0 query heads over 2 key/value heads"),
        ({"key_heads": 0}, "4 query heads over 0 key/value heads"),
        ({"dim": 0}, "of dimension 0"),
        ({"route": None}, "route is a NoneType: give the hdp.Route of this micro-batch"),
    ],
)
def test_attend_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        attend(**options)
    assert attend(window=1).shape == (10, 4, 8)


def documented(world: hdp.World) -> tuple[float, float]:
    """Runs what docs/attention.md shows; the errors of this rank's rows, of the function and of a model's logits."""
    text = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text.partition("## In a model of your own")[2], flags=re.DOTALL)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(5000, n, 8, generator=draw) for n in (4, 2, 2))
    (ids,) = make_documents([5000])
    model = make_model(attention="eager")
    plain = copy.deepcopy(model)
    model.set_attn_implementation("hdp")
    names = {"world": world, "step": 3, "q_all": q, "k_all": k, "v_all": v, "ids": ids, "model": model}
    with torch.no_grad():
        exec("".join(blocks), names)
        whole = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        dense = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)[0].transpose(
            0, 1
        )
        logits = plain(ids.unsqueeze(0)).logits[0]
    mine = [torch.cat([full[a:b] for a, b in names["rows"]]) for full in (dense, logits)]
    found = names["out"], names["logits"][0]
    first, second = (float((f - m).norm() / m.norm()) for f, m in zip(found, mine, strict=True))
    return first, second


def test_the_documented_way_for_a_model_of_ones_own(ranks):
    errors = ranks(2).run(documented)
    assert max(max(pair) for pair in errors) <= 1e-5


def disagree(world: hdp.World, schedule: str, other: dict) -> str:
    """Both ranks share a sequence of 16 tokens; rank 1 describes it in another way."""
    said = {"sequence": 3, "length": 16, "schedule": schedule, **(other if world.rank == 1 else {})}
    causal = said.pop("causal", True)
    route = Route(world.runtime, [shard(**said)])
    try:
        hdp.attend(*(torch.randn(route.tokens, n, 8) for n in (4, 2, 2)), route=route, causal=causal)
    except hdp.PeerError as error:
        return str(error)
    return "computed"


@pytest.mark.parametrize(
    ("schedule", "other"),
    [
        ("ring", {"sequence": 4}),
        ("ring", {"length": 17}),
        ("ring", {"length": 18}),
        ("ring", {"schedule": "ulysses"}),
        # Ulysses sends as much whatever these are.
        ("ulysses", {"layout": "contiguous"}),
        ("ulysses", {"group": (1, 0)}),
        ("ulysses", {"causal": False}),
    ],
    ids=str,
)
def test_ranks_that_describe_a_sequence_in_two_ways_end_in_an_error(schedule, other):
    """Whatever each sends, the other takes it for nothing else."""
    with Ranks(2, timeout=IMPATIENCE) as two:
        for outcome in two.outcomes(disagree, schedule, other, limit=IN_VAIN):
            text = outcome.value or outcome.error
            assert f"rank {outcome.rank}, " in text and ("sequence 3" in text or "sequence 4" in text), outcome
