"""What ranks hold, foreseen: lines, the walk over a step, and the capacity that memory allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.balance.capacity import MARGIN, at_capacity, find_capacity, rounded
from hdp.balance.footprint import highest, shape_footprint, upper_lines
from hdp.balance.foresee import foresee
from hdp.balance.held import EngineMemory, Load
from hdp.balance.models import MODELS, ModelShape

SHAPE = ModelShape(
    name="small", layers=6, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=160, vocabulary=512
)
MODEL = shape_footprint(SHAPE, 4)
ENGINES = {
    "fsdp step": EngineMemory(kind="fsdp", regime="step", sharers=4, ranks=4),
    "fsdp slot": EngineMemory(kind="fsdp", regime="slot", sharers=4, ranks=4),
    "fsdp on a CPU": EngineMemory(
        kind="fsdp", regime="slot", sharers=4, ranks=4, beside=True, pooled=True, reduce_copies=1
    ),
    "fsdp in bf16": EngineMemory(kind="fsdp", regime="step", sharers=4, ranks=4, computed=2),
    "ddp": EngineMemory(kind="ddp", regime="step", sharers=1, ranks=4),
    "zero 1": EngineMemory(kind="zero", regime="step", sharers=4, ranks=4, stage=1),
    "zero 3": EngineMemory(kind="zero", regime="slot", sharers=4, ranks=4, stage=3),
}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@given(
    st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-50, 50)), min_size=1, max_size=30), st.integers(0, 500)
)
def test_upper_lines_are_as_high_as_all(lines, tokens):
    found = upper_lines(lines)
    assert max(base + slope * tokens for base, slope in lines) == max(b + s * tokens for b, s in found)
    assert highest(found, tokens) == max(b + s * tokens for b, s in found)


def test_a_shape_has_its_parameters():
    norms = SHAPE.hidden * (2 * SHAPE.layers + 1)
    assert MODEL.parameters == SHAPE.parameters + norms == MODEL.trained


def loads(tokens, *, ratio=0.0, again=0, slot=False):
    """Two micro-batches; in regime ``slot`` both reduce."""
    return [Load(tokens=tokens, ratio=ratio, again=again, reduces=slot or n == 1) for n in range(2)]


def slots(engine, tokens, **how):
    return loads(tokens, slot=engine.regime == "slot", **how)


@engines
@given(st.integers(1, 4000), st.integers(1, 500), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4))
def test_more_tokens_take_no_less(engine, tokens, more, ratio, again):
    # Down to the smallest storages that leave: what is too small for that would leave all at once with a token more.
    engine = replace(engine, least_moved=0)
    few, many = (foresee(MODEL, engine, slots(engine, n, ratio=ratio, again=again)) for n in (tokens, tokens + more))
    assert few.bytes <= many.bytes
    assert sum(few.parts.values()) == pytest.approx(few.bytes, abs=len(few.parts))


@engines
def test_offload_and_recomputation_take_less(engine):
    plain = foresee(MODEL, engine, slots(engine, 4096)).bytes
    half, all_ = (foresee(MODEL, engine, slots(engine, 4096, ratio=r)).bytes for r in (0.5, 1.0))
    again = [foresee(MODEL, engine, slots(engine, 4096, again=n)).bytes for n in range(5)]
    assert all_ < half < plain
    assert again[0] == plain and again[4] < again[2] < plain


@engines
def test_sharded_parts_shrink_with_the_ranks(engine):
    if engine.sharers == 1:
        return
    few, many = (foresee(MODEL, replace(engine, sharers=n), slots(engine, 8)) for n in (4, 64))
    assert many.parts["optimizer state"] == pytest.approx(few.parts["optimizer state"] / 16, rel=1e-3)
    assert many.bytes < few.bytes


def test_regimes_hold_what_they_gather():
    step, slot = (foresee(MODEL, ENGINES[f"fsdp {r}"], loads(512, slot=r == "slot")) for r in ("step", "slot"))
    whole = 4 * MODEL.parameters
    assert step.parts["gathered parameters"] == pytest.approx(whole, rel=0.2)
    layer = 4 * MODEL.layers[0].parameters
    assert slot.parts["gathered parameters"] <= 4 * MODEL.before.parameters + 2 * layer


@engines
@pytest.mark.parametrize("memory", [5e6, 20e6, 1e9])
def test_capacity_fits_and_is_the_largest(engine, memory):
    found, room = find_capacity(MODEL, engine, memory, 1 << 20), memory * (1 - MARGIN)
    if found == 0:
        assert at_capacity(MODEL, engine, 16).bytes > room
        return
    assert at_capacity(MODEL, engine, found).bytes <= room
    assert at_capacity(MODEL, engine, found + found // 7 + 1).bytes > room


def test_capacity_is_no_more_than_is_asked_for():
    assert find_capacity(MODEL, ENGINES["fsdp step"], 1e12, 5000) == 5000


@given(st.integers(1, 1 << 30))
def test_rounding_loses_at_most_an_eighth(capacity):
    assert capacity * 7 // 8 <= rounded(capacity) <= capacity


@pytest.mark.parametrize("name", list(MODELS))
def test_capacity_of_shipped_models_on_a_node_of_h200(name):
    engine = EngineMemory(kind="fsdp", regime="slot", sharers=64, ranks=64, computed=2, loss_rows=1 << 9)
    assert 1000 < find_capacity(shape_footprint(MODELS[name]), engine, 141e9, 1 << 24) < 1 << 17
