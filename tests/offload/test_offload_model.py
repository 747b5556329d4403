"""The pure half: Eq. 3 and its bounds, the memory model, policies and ``auto``, all without torch."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from math import ceil

import pytest
from fuzz import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hdp.balance.cost import CostModel
from hdp.balance.machine import LayerWork
from hdp.balance.memory import (
    RATIO_STEP,
    eq3,
    hidden_ratio,
    kept_fraction,
    moved_bytes,
    ranks_with,
    recomputed_capacity,
)
from hdp.offload import LayerAction, choose, layer_actions
from hdp.offload.auto import hiding_ratio, memo_fraction, scaled_profile
from hdp.offload.model import LayerBytes, device_bytes, tier_bytes

K = 1024
GB = 1e9

# ---------------------------------------------------------------- Eq. 3


@pytest.mark.parametrize(
    ("tokens", "ranks"),
    [
        (1024 * K, {0.0: 128, 0.25: 98, 0.5: 68, 0.75: 38, 1.0: 8}),
        (256 * K, {0.0: 32, 0.25: 25, 0.5: 17, 0.75: 10, 1.0: 2}),
        (2048 * K, {0.0: 256, 1.0: 16}),
    ],
)
def test_worked_examples(tokens, ranks):
    """ByteScale 4.3 with l = 32, C = 8K."""
    assert {ratio: ranks_with(tokens, 8 * K, 32, ratio) for ratio in ranks} == ranks


def cost(layers=32, bandwidth=20 * GB, host=0.0, quadratic=1e-11, linear=4e-7, activation=1e5):
    return CostModel(
        layers=layers, quadratic=quadratic, linear=linear, activation_bytes=activation, copy_bandwidth=bandwidth,
        host_memory=host,
    )  # fmt: skip


@examples(150)
@given(
    st.integers(1, 3_000_000), st.integers(1000, 20_000), st.integers(1, 90), st.floats(1e8, 1e12), st.floats(0, 1e12)
)
def test_eq3_against_brute_force(length, capacity, layers, bandwidth, host):
    """Every condition written out as in the paper, over every ratio k / 64."""
    model = cost(layers, bandwidth, host)
    seconds = model.quadratic * length * length + model.linear * length
    best = (max(1, ceil(Fraction(length, capacity))), 0.0)
    for step in range(1, 65):
        r = step / 64
        if layers <= 2 or length <= capacity:
            break
        if Fraction(step, 64) < min(Fraction(1), Fraction(layers * capacity, (layers - 2) * length)):
            continue
        slack = seconds - r * model.activation_bytes * length / bandwidth
        assume(abs(slack) > 1e-9 * seconds)
        if slack < 0:
            continue
        ranks = ceil((2 + (1 - Fraction(step, 64)) * (layers - 2)) * length / (layers * capacity))
        if host and r * (layers - 2) * model.activation_bytes * length / ranks > host:
            continue
        best = min(best, (max(1, ranks), r))
    assert eq3(length, capacity, model) == (best[1], best[0])


def test_eq3_falls_back_where_copies_do_not_hide_or_find_no_room():
    long = 1024 * K
    assert eq3(long, 8 * K, cost()) == (1.0, 8)
    assert eq3(long, 8 * K, cost(bandwidth=1e6)) == (0.0, 128)
    assert eq3(long, 8 * K, cost(host=1e6)) == (0.0, 128)
    # Just above the capacity only r = 1 would free a rank's worth, and it does not hide.
    slow = cost(bandwidth=1e11)
    assert 0 < hidden_ratio(8 * K + 1, cost(bandwidth=1.5e11)) < 1
    assert eq3(8 * K + 1, 8 * K, cost(bandwidth=1.5e11)) == (0.0, 2)
    assert eq3(8 * K, 8 * K, slow) == (0.0, 1)


def test_eq3_host_bound_takes_the_ratio_that_fits():
    ratio, ranks = eq3(1024 * K, 8 * K, cost(host=60 * GB))
    assert 0 < ratio < 1 and 8 < ranks < 128
    assert moved_bytes(1024 * K, ranks, cost(), ratio) <= 60 * GB
    assert moved_bytes(1024 * K, ranks_with(1024 * K, 8 * K, 32, ratio + 1 / 64), cost(), ratio + 1 / 64) > 60 * GB


# ---------------------------------------------------------------- policies and memory


def test_actions_of_each_policy():
    keep, out = LayerAction(), LayerAction(ratio=0.5)
    assert layer_actions(4, policy="offload", ratio=0.5) == (keep, out, out, keep)
    assert layer_actions(4, policy="keep", ratio=0.5) == (keep,) * 4
    assert layer_actions(3, policy="offload", ratio=0.5, keep_first=0, keep_last=2) == (out, keep, keep)
    assert layer_actions(2, policy="offload", keep_first=5, keep_last=5) == (keep, keep)
    again = LayerAction(ratio=0.5, recompute=True)
    assert layer_actions(3, policy="recompute", ratio=0.5) == (keep, again, keep)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 4), st.integers(0, 4))
def test_layers_that_run_again_are_spread_evenly(layers, again, first, last):
    """Of any stretch of layers as many as its part, and the last one only where all do."""
    inner = max(layers - first - last, 0)
    options = {"policy": "recompute", "ratio": 0.5, "recompute_layers": again, "keep_first": first, "keep_last": last}
    if again > inner:
        with pytest.raises(ValueError, match=f"{again} layers are to run again but {inner} are between"):
            layer_actions(layers, **options)
        return
    actions = layer_actions(layers, **options)
    middle = actions[first : first + inner] if inner else ()
    marks = [action.recompute for action in middle]
    assert sum(marks) == sum(action.recompute for action in actions) == again
    assert all(action.ratio == 0.5 for action in middle)
    assert not marks or not marks[-1] or again == inner
    for start in range(inner):
        for stop in range(start + 1, inner + 1):
            assert abs(sum(marks[start:stop]) - again / inner * (stop - start)) < 1


@given(st.integers(3, 40), st.integers(0, 10), st.integers(0, 3), st.integers(0, 3), st.sampled_from([100, 300, 999]))
def test_the_planners_capacity_is_that_of_the_layers(layers, again, first, last, kept):
    """What planners count for layers that run again is the peak of the walk over layers, without offload exactly."""
    assume(first + last + again <= layers)
    model = CostModel(
        layers=layers, quadratic=1.0, linear=1.0, activation_bytes=1000, recompute_bytes=kept, keep_first=first,
        keep_last=last, recomputed=again,
    )  # fmt: skip
    actions = layer_actions(
        layers, policy="recompute", ratio=0.0, recompute_layers=again, keep_first=first, keep_last=last
    )
    peak = device_bytes([LayerBytes(all=1000, kept=kept)] * layers, actions)
    tokens = 10**9
    assert recomputed_capacity(tokens, model) == pytest.approx(tokens * layers * 1000 / peak, rel=1e-6)


@example(layers=34, again=0, first=0, last=0, kept=100, step=63)
@given(
    st.integers(3, 40), st.integers(0, 10), st.integers(0, 3), st.integers(0, 3), st.sampled_from([100, 300, 450]),
    st.integers(0, 64),
)  # fmt: skip
def test_capacity_with_layers_under_way_is_that_of_the_engine(layers, again, first, last, kept, step):
    """``in_flight=2``: what leaves is on the device for a while. Equal to the walk where nothing runs again."""
    assume(first + last < layers and first + last + again <= layers)
    # Whole bytes at every ratio: the walk rounds those of each layer, which is no difference between it and the planners.
    whole, kept = 1000 * RATIO_STEP, kept * RATIO_STEP
    model = CostModel(
        layers=layers, quadratic=1.0, linear=1.0, activation_bytes=whole, recompute_bytes=kept, keep_first=first,
        keep_last=last, recomputed=again, in_flight=2,
    )  # fmt: skip
    actions = layer_actions(
        layers, policy="recompute", ratio=step / RATIO_STEP, recompute_layers=again, keep_first=first, keep_last=last
    )
    peak = device_bytes([LayerBytes(all=whole, kept=kept)] * layers, actions)
    fraction = float(kept_fraction(model, step / RATIO_STEP))
    said = fraction * layers * whole * 10**9 / recomputed_capacity(10**9, model)
    assert said >= peak * (1 - 1e-9)
    if not again and last:
        assert said == pytest.approx(peak, rel=1e-9)


@given(st.integers(0, 40), st.floats(0, 1))
def test_memo_spreads_its_fraction_evenly(layers, fraction):
    actions = layer_actions(layers, policy="memo", memo_fraction=fraction, keep_first=0, keep_last=0)
    marks = [not action.recompute for action in actions]
    assert all(action.ratio == 1.0 for action in actions)
    for start in range(layers):
        for stop in range(start + 1, layers + 1):
            assert abs(sum(marks[start:stop]) - fraction * (stop - start)) <= 1 + 1e-6


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_device_bytes_of_equal_layers(ratio):
    """First and last layer, and one more on its way, beside what stays of the others."""
    layers = [LayerBytes(all=1000)] * 20
    actions = layer_actions(20, policy="offload", ratio=ratio)
    expected = 2000 + 18 * (1 - ratio) * 1000 + (1000 if ratio else 0)
    assert device_bytes(layers, actions) == pytest.approx(expected)
    assert tier_bytes(layers, actions) == 18 * ratio * 1000


def test_device_bytes_with_recomputation():
    layers = [LayerBytes(all=1000, kept=100)] * 20
    stays = device_bytes(layers, layer_actions(20, policy="recompute", ratio=0.0))
    leaves = device_bytes(layers, layer_actions(20, policy="recompute", ratio=1.0))
    assert stays == 1000 + 17 * 100 + 100 + 1000  # the second layer's recomputation ends with only the first below
    assert leaves < stays and leaves >= 2000
    with pytest.raises(ValueError, match="20 layers but 1 actions"):
        device_bytes(layers, [LayerAction()])


# ---------------------------------------------------------------- auto


def profile(seconds=1.0, whole=1000, kept=100, attention=0.0):
    return LayerWork(forward_seconds=seconds, bytes_all=whole, bytes_kept=kept, attention_seconds=attention)


def test_auto_takes_what_is_free():
    free = choose(profile(), layers=20, bandwidth=5000.0)
    assert (free.policy, free.ratio, free.extra_seconds) == ("offload", 1.0, 0.0)
    half = choose(profile(), layers=20, bandwidth=500.0)
    assert (half.policy, half.ratio) == ("offload", 0.5) and free.device_bytes < half.device_bytes
    none = choose(profile(), layers=20, bandwidth=0.0)
    assert (none.policy, none.ratio) == ("keep", 0.0)
    room = choose(profile(), layers=20, bandwidth=5000.0, room=9000)
    assert (room.policy, room.ratio, room.tier_bytes) == ("offload", 0.5, 9000)


def test_auto_pays_only_when_it_must_and_says_what():
    slow = {"layers": 20, "bandwidth": 500.0}
    tight = choose(profile(attention=0.9), device_budget=4000, **slow)
    assert tight.policy == "memo" and tight.memo_fraction == pytest.approx(400 / 900)
    assert tight.extra_seconds == pytest.approx((1 - 400 / 900) * 18 * 0.1) and tight.device_bytes <= 4000
    assert "recomputes the rest" in tight.reason
    # Without attention's output kept recomputation is dear: copies that do not hide cost less.
    late = choose(profile(), device_budget=4000, layers=20, bandwidth=900.0)
    assert late.policy == "offload" and late.ratio == 61 / 64  # (3 + 18 x 3/64) layers are the first below four
    assert late.extra_seconds == pytest.approx(18 * (61 / 64 * 1000 / 900 - 1)) and late.device_bytes <= 4000
    with pytest.raises(ValueError, match=r"saved activations need at least .* the budget is 1500"):
        choose(profile(), device_budget=1500, **slow)
    with pytest.raises(ValueError, match="measure them first"):
        choose(profile(seconds=0.0), layers=20, bandwidth=1.0)


@examples(200)
@given(
    st.floats(1e-3, 10), st.integers(10, 10_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e5),
    st.integers(3, 60), st.one_of(st.none(), st.integers(0, 10**6)), st.floats(0, 1.2),
)  # fmt: skip
def test_auto_keeps_every_bound(seconds, whole, kept, attention, bandwidth, layers, room, share):
    shape = profile(seconds, whole, round(whole * kept), seconds * attention)
    budget = round(share * layers * whole)
    try:
        decision = choose(shape, layers=layers, bandwidth=bandwidth, room=room, device_budget=budget)
    except ValueError:
        return
    assert decision.device_bytes <= budget
    assert room is None or decision.tier_bytes <= room + layers
    if decision.extra_seconds == 0.0 and decision.policy == "offload":
        assert decision.ratio <= hiding_ratio(shape, bandwidth) + 1e-9


def test_memo_fraction_meets_both_bounds():
    shape = profile(1.0, 1000, 100)
    assert memo_fraction(shape, bandwidth=550.0, movable_layers=10, room=None) == 0.5
    assert memo_fraction(shape, bandwidth=5500.0, movable_layers=10, room=None) == 1.0
    assert memo_fraction(shape, bandwidth=5500.0, movable_layers=10, room=3250) == 0.25
    assert memo_fraction(shape, bandwidth=50.0, movable_layers=10, room=None) is None


def test_profiles_are_scaled_without_overstating_time():
    profiles = {1000: profile(1.0, 1000, 100), 4000: profile(9.0, 4000, 400)}
    assert scaled_profile(profiles, 2000) == profile(2.0, 2000, 200)  # the nearest is 1000
    assert scaled_profile(profiles, 3000) == profile(9.0 * 0.75**2, 3000, 300)


def test_the_pure_half_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = None
import hdp.offload as o
from hdp.balance.machine import LayerWork
assert o.choose(LayerWork(forward_seconds=1.0, bytes_all=10, bytes_kept=1), layers=4, bandwidth=99.0).ratio == 1.0
assert len(o.layer_actions(4, policy="offload")) == 4 and "OffloadEngine" in dir(o)
try:
    o.OffloadEngine
except ImportError:
    print("lazy")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "lazy"
