"""The engine's ``auto`` and ``memo``: what they measure, what they choose, and what they do when room is short."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from offload_helpers import ATTENTION, gradients, make_zoo, same_bits, token_ids

from hdp.balance.machine import CopyRates
from hdp.offload import FileTier, HostTier, OffloadEngine, OffloadError
from hdp.offload.scratch import ScratchFile

TOKENS = 384  # storages of many pages, so that rounding to pages does not matter
FAST, SLOW = (CopyRates(out=rate, back=rate) for rate in (1e15, 1.0))


@pytest.fixture(scope="module")
def model():
    return make_zoo()


@pytest.fixture(scope="module")
def expected(model):
    return gradients(model, lambda: model(token_ids(TOKENS)))


def run(engine, model, **setting):
    """Loss and gradients of one micro-batch, its context, and the bytes that left."""
    engine.meter.reset_peaks()
    batch = engine.micro_batch(model, tokens=TOKENS, **setting)
    with batch:
        found = gradients(model, lambda: model(token_ids(TOKENS)))
    return found, batch, engine.meter.left


def test_the_engines_auto_measures_and_decides(model, expected, tmp_path):
    ids = token_ids(TOKENS)
    with OffloadEngine([FileTier(tmp_path)], min_bytes=512) as engine:
        engine.measure(nbytes=1 << 20)
        for bandwidth, moves in ((1e15, True), (1.0, False)):
            engine.profiles.clear()
            with engine.micro_batch(model, tokens=TOKENS, policy="auto"):
                assert same_bits(gradients(model, lambda: model(ids)), expected)
            seen = engine.profiles[TOKENS]
            assert seen.forward_seconds > 0 and seen.bytes_all > 20 * seen.bytes_kept / 4 > 0
            assert engine.bandwidth is not None
            engine.bandwidth = type(engine.bandwidth)(out=bandwidth, back=bandwidth)
            engine.meter.reset_peaks()
            with engine.micro_batch(model, tokens=TOKENS, policy="auto"):
                assert same_bits(gradients(model, lambda: model(ids)), expected)
            assert (engine.meter.left > 0) == moves


@pytest.mark.parametrize("policy", ["auto", "memo"])
def test_room_bounds_what_leaves(model, expected, policy):
    """Half of the room that everything needs: the first micro-batch fills it, the others take an even share."""
    with OffloadEngine([HostTier()], min_bytes=512) as free:
        whole = run(free, model)[2]
    with OffloadEngine([HostTier(budget=whole // 2)], min_bytes=512) as engine:
        engine.bandwidth = FAST
        with pytest.raises(OffloadError, match="no tier has room"):
            run(engine, model)
        engine.finish(failed=True)
        found, _, left = run(engine, model, policy=policy)
        assert same_bits(found, expected) and 0 < left <= whole // 2 and engine.meter.stayed > 0
        for _ in range(2):
            found, _, left = run(engine, model, policy=policy, keep_ops=frozenset({ATTENTION}))
            assert same_bits(found, expected)
            assert whole // 4 < left <= whole // 2 and engine.meter.stayed < left / 20


def test_auto_pays_only_for_a_budget_and_says_what(model, expected):
    """Copies that never hide: nothing moves, until the device is too small; then whatever costs least."""
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        engine.bandwidth = FAST
        _, batch, whole = run(engine, model, policy="auto")
        layer = batch.layer_bytes[2]
        engine.bandwidth = SLOW
        found, _, left = run(engine, model, policy="auto")
        assert left == 0 and same_bits(found, expected)
        assert engine.decision is not None and engine.decision.policy == "keep" and engine.decision.extra_seconds == 0
        found, batch, left = run(engine, model, policy="auto", device_budget=round(4.6 * layer))
        assert same_bits(found, expected)
        assert engine.decision.policy == "recompute" and engine.decision.extra_seconds > 0
        assert engine.decision.device_bytes <= 4.6 * layer and "recomputes 3 layers" in engine.decision.reason
        assert left == 0 and sum(batch.layer_bytes[n] for n in (1, 2, 3)) < whole / 2
        with pytest.raises(ValueError, match="saved activations need at least"):
            engine.micro_batch(model, tokens=TOKENS, policy="auto", device_budget=layer)


def test_memo_solves_for_its_fraction(model, expected):
    """Bandwidth for the layers' inputs, attention's output and half of the rest: every other layer is recomputed."""
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        engine.bandwidth = FAST
        run(engine, model, policy="memo")
        seen = engine.profiles[TOKENS]
        limit = seen.bytes_kept + (seen.bytes_all - seen.bytes_kept) * 0.7
        engine.profiles[TOKENS] = replace(seen, forward_seconds=1.0)
        engine.bandwidth = CopyRates(out=limit, back=limit)
        batch = engine.micro_batch(model, tokens=TOKENS, policy="memo")
        assert [action.recompute for action in batch._actions] == [False, True, False, False, False]
        assert [action.ratio for action in batch._actions] == [0.0, 1.0, 1.0, 1.0, 0.0]
        with batch:
            assert same_bits(gradients(model, lambda: model(token_ids(TOKENS))), expected)
        engine.bandwidth = SLOW  # not even the inputs hide
        batch = engine.micro_batch(model, tokens=TOKENS, policy="memo")
        assert [(action.recompute, action.ratio) for action in batch._actions[1:4]] == [(True, 0.0)] * 3
        with pytest.raises(ValueError, match="policy 'memo' needs the micro-batch's tokens and a measured bandwidth"):
            engine.micro_batch(model, policy="memo")


def test_a_chain_is_measured_by_what_its_tiers_hold(tmp_path):
    small = HostTier(budget=2 << 20)
    with OffloadEngine([small, FileTier(tmp_path)]) as engine:
        assert engine.measure(nbytes=4 << 20).least > 0
        assert small.peak == 2 << 20
    with OffloadEngine([HostTier(budget=1000)]) as engine, pytest.raises(OffloadError, match="no tier has a budget of"):
        engine.measure()


def test_the_room_of_a_disk_is_what_it_has_free(tmp_path, monkeypatch):
    tier = FileTier(tmp_path)
    assert tier.room > 0 and 0 < tier.file.free < shutil.disk_usage(tmp_path).total
    free = 1 << 30  # of a disk that nobody else writes to meanwhile
    monkeypatch.setattr(ScratchFile, "free", property(lambda file: free - file.allocated))
    assert tier.room == free
    slot = tier.reserve(1 << 20)
    assert slot is not None and tier.room == free - (1 << 20)
    tier.release(slot)
    tier.close()
    bounded = FileTier(tmp_path, budget=10_000)
    assert bounded.room == 10_000
    bounded.close()
    fourth = FileTier(tmp_path, sharers=4)
    assert fourth.room == free // 4
    fourth.close()
    with pytest.raises(ValueError, match="sharers is 0: give the number of processes"):
        FileTier(tmp_path, sharers=0)
