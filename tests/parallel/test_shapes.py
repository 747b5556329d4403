"""Models without a config, and devices by name: what planners are told of them, and what is said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from harness import Ranks
from stand_in import alone, machine_of, planning
from tiny import make_documents, make_model
from torch import nn

import hdp
from hdp.balance import DoesNotFit
from hdp.parallel.costs import NotKnown, assume
from hdp.parallel.shapes import see_shape

CPU = torch.device("cpu")


class Bare(nn.Module):
    """A model of transformers, without its config at hand."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.lm_head = inner.lm_head


@pytest.mark.parametrize("heads", ["gqa", "mha", "mqa"])
def test_modules_tell_what_the_config_would(heads):
    model = make_model(heads, attention="sdpa")
    told, seen = see_shape(model), see_shape(Bare(model))
    assert told is not None and seen is not None and told.has_config and not seen.has_config and not seen.guesses
    for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocabulary", "layer_weights"):
        assert getattr(seen.shape, name) == getattr(told.shape, name), name
    by_config, by_modules = (assume(m, CPU, 2, torch.float32).cost for m in (model, Bare(model)))
    for name in (
        "layers",
        "quadratic",
        "linear",
        "head",
        "ring_bytes",
        "activation_bytes",
        "recompute_bytes",
        "state_bytes",
    ):
        assert getattr(by_modules, name) == getattr(by_config, name), name


class Fused(nn.Module):
    """A layer as in many scripts: one projection for queries, keys and values, the number of heads in an attribute."""

    def __init__(self, hidden: int, heads: int, kv: int) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn = nn.Linear(hidden, hidden + 2 * kv)
        self.c_proj, self.up, self.down = nn.Linear(hidden, hidden), nn.Linear(hidden, 99), nn.Linear(99, hidden)
        self.norm = nn.LayerNorm(hidden)


class Experts(nn.Module):
    """A layer whose token passes through two of eight experts, in a list or as one tensor."""

    def __init__(self, hidden: int, *, stacked: bool, used: int | None = 2) -> None:
        super().__init__()
        if used:
            self.top_k = used
        self.attention = nn.MultiheadAttention(hidden, 4)
        self.router = nn.Linear(hidden, 8)
        if stacked:
            self.experts = nn.Parameter(torch.zeros(8, hidden, 32))
        else:
            self.experts = nn.ModuleList(nn.Linear(hidden, 32) for _ in range(8))


class Own(nn.Module):
    def __init__(self, *layers: nn.Module, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, hidden)
        self.blocks = nn.ModuleList(layers)
        self.lm_head = nn.Linear(hidden, 50, bias=False)


@pytest.mark.parametrize("kv", [64, 16])
def test_a_fused_projection(kv):
    seen = see_shape(Own(*(Fused(64, 4, kv) for _ in range(3))))
    assert seen is not None and not seen.guesses
    shape = seen.shape
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (3, 4, kv // 16, 16)
    assert shape.layer_weights == pytest.approx(64 * (64 + 2 * kv + 64 + 2 * 99), rel=0.01)
    assert str(seen).startswith("3 layers of ") and "a head of 64 x 50" in str(seen)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_count_as_far_as_a_token_passes_through_them(stacked):
    seen = see_shape(Own(*(Experts(64, stacked=stacked) for _ in range(2))))
    assert seen is not None and not seen.guesses
    assert seen.shape.layer_weights == pytest.approx(64 * (4 * 64 + 8 + 2 * 32), rel=0.02)
    seen = see_shape(Own(*(Experts(64, stacked=stacked, used=None) for _ in range(2))))
    assert seen is not None and "assumed: a token passes through all 8 experts" in str(seen)


def test_what_cannot_be_seen_is_named():
    seen = see_shape(Own(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert seen is not None and "assumed: attention 64 wide, as many heads of keys as of queries" in str(seen)
    assert (
        see_shape(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) is None
    )  # no head: what a token costs is not to be seen


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def bare(world: hdp.World) -> tuple[Any, list[tuple[int, str]], str, str]:
    """What plans assume of a model without a config, what is said, and the advice about documents that do not fit."""
    said, log = Kept(), logging.getLogger("hdp")
    log.addHandler(said)
    try:
        inner = make_model()
        documents, options = make_documents([1000, 3]), {"tokens_per_step": 10**4, "capacity": 64}
        with pytest.raises(DoesNotFit) as before:
            hdp.Loader(documents, planning(world), **options)
        engine = hdp.shard(Bare(inner), world)
        with pytest.raises(DoesNotFit) as after:
            hdp.Loader(documents, engine, **options)
        for _ in hdp.Loader(make_documents([9, 9]), engine, **options):
            pass
    finally:
        log.removeHandler(said)
    return engine.machine.cost, said.lines, str(before.value), str(after.value)


def test_an_engine_plans_by_the_modules_and_says_so():
    with Ranks(2) as two:
        found = two.run(bare)
    expected = assume(make_model(attention="sdpa"), CPU, 2, torch.float32).cost
    for rank, (cost, lines, before, after) in enumerate(found):
        assert cost == expected and cost.layers == 2
        assert len(lines) == (2 if rank == 0 else 0), lines
        assert "32 layers" not in before + after and "of 1000 tokens does not fit 2 ranks" in before
    (level, line), (_, memory) = found[0][1]
    assert "memory is estimated from the model's shape: Bare does not run without data" in memory
    assert level == logging.WARNING and "plans assume of Bare, by its modules, without a config: 2 layers of" in line
    assert "of cpu: " in line and "give hdp.Loader(machine=...)" in line


def test_a_loader_of_which_nothing_is_known_says_by_what_it_plans(caplog):
    options: dict[str, Any] = {"tokens_per_step": 100, "capacity": 50}
    loader = hdp.Loader(make_documents([9, 9]), planning(machine=None), **options)
    for _ in range(2):
        list(loader.plan_batches())
    unseen, record = caplog.records
    assert "Linear has no config that tells its shape" in unseen.getMessage()
    assert "planned as for a 7B model at 400 TFLOP/s, eight ranks a node" in record.getMessage()
    assert "give hdp.Loader(machine=...)" in record.getMessage()
    caplog.clear()
    list(hdp.Loader(make_documents([9, 9]), planning(machine=None), machine=machine_of(2), **options).plan_batches())
    assert not caplog.records


@pytest.mark.parametrize(("name", "entry"), [("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-80GB", "a100-80g")])
def test_a_gpu_is_found_by_its_name(monkeypatch, name, entry):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert assume(make_model(attention="sdpa"), torch.device("cuda"), 2, torch.bfloat16).device == entry


def test_a_gpu_that_nobody_knows_is_not_taken_for_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Z9")
    with pytest.raises(NotKnown, match=r"'NVIDIA Z9' is not in the table, .*measure.*hdp profile .*DEVICES"):
        assume(make_model(attention="sdpa"), torch.device("cuda"), 2, torch.bfloat16)
    options: dict[str, Any] = {"tokens_per_step": 100, "capacity": 50}
    with pytest.raises(ValueError, match="the device 'NVIDIA Z9' is not in the table"):
        hdp.Loader(make_documents([9, 9]), planning(alone(device="cuda"), machine=None), **options)
    known = planning(alone(device="cuda"), machine=machine_of(2))
    assert list(hdp.Loader(make_documents([9, 9]), known, **options).plan_batches())
