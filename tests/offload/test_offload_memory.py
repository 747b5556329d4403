"""Memory: what the engine counts, what really is freed, and what the model says."""

# ruff: noqa: SIM117 (the order of contexts is what is tested)

from __future__ import annotations

import gc

import pytest
import torch
from offload_helpers import ATTENTION, Shuffle, make_zoo, shuffled_copies, token_ids
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hdp.offload import FileTier, HostTier, OffloadEngine, OffloadError, layer_actions
from hdp.offload.file_tier import CHUNK
from hdp.offload.model import LayerBytes, device_bytes, tier_bytes

TOKENS = 64
KB = 1024


@pytest.fixture(scope="module")
def model():
    return make_zoo(10)


def saved_by_a_layer(model, **setting):
    """(bytes that an inner layer saves, bytes that all save), measured."""
    with OffloadEngine([HostTier()], min_bytes=1) as engine:
        batch = engine.micro_batch(model, tokens=TOKENS, ratio=0.0, **setting)
        with batch:
            model(token_ids(TOKENS)).backward()
        return batch.layer_bytes[5], engine.meter.peak_device


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_peak_is_what_the_model_says(model, ratio):
    per_layer, everything = saved_by_a_layer(model)
    layers = len(model.layers)
    outside = everything - layers * per_layer  # embedding and head
    for eagerness in (0.0, 1.0):
        copies = shuffled_copies(Shuffle(0, eagerness))
        with OffloadEngine([HostTier()], min_bytes=512, copies=copies) as engine:
            with engine.micro_batch(model, tokens=TOKENS, ratio=ratio):
                loss = model(token_ids(TOKENS))
                away = engine.chain.bytes_by_tier()["host"]
                loss.backward()
            peak = engine.meter.peak_device
        sizes = [LayerBytes(all=per_layer)] * layers
        actions = layer_actions(layers, policy="offload", ratio=ratio)
        predicted = device_bytes(sizes, actions) + outside
        if eagerness == 0.0:
            assert peak == pytest.approx(predicted, rel=0.1)
        assert peak <= 1.1 * predicted
        # The tier rounds to pages, small storages stay: compare what left, not what it takes.
        assert engine.meter.left == pytest.approx(tier_bytes(sizes, actions), rel=0.1)
        assert away >= engine.meter.left


class Plain(nn.Module):
    """Layers that save five times their input, of which nothing else is held."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("last", [0, 1, 2])
@pytest.mark.parametrize("policy", ["offload", "recompute", "recompute two"])
def test_peak_whatever_layers_are_kept(policy, first, last):
    """What backward has passed is gone when the layer before the next is asked for."""
    model, x = Plain(), torch.randn(1, 256, 32)
    again = {"recompute_layers": 2} if policy == "recompute two" else {}
    for ratio in (0.0, 0.25, 0.75, 1.0):
        setting = {"policy": policy.split()[0], "ratio": ratio, "keep_first": first, "keep_last": last, **again}
        with OffloadEngine([HostTier()], min_bytes=512, copies=shuffled_copies(Shuffle(0, 0.0))) as engine:
            with engine.micro_batch(model, tokens=256, layers=list(model.layers), **setting):
                model(x).backward()
        actions = layer_actions(8, **setting)
        # What a layer recomputes is checkpoint's, not the engine's.
        sizes = [LayerBytes(all=(0 if action.recompute else 5) * x.nbytes, kept=x.nbytes) for action in actions]
        assert engine.meter.peak_device == pytest.approx(device_bytes(sizes, actions), rel=0.1), setting


@pytest.mark.parametrize("keep_ops", [frozenset(), frozenset({ATTENTION})])
def test_peak_with_recomputation(model, keep_ops):
    kept, _ = saved_by_a_layer(model, policy="recompute", keep_ops=keep_ops)
    per_layer, everything = saved_by_a_layer(model)
    outside = everything - len(model.layers) * per_layer
    layers = len(model.layers)
    for ratio in (0.0, 1.0):
        with OffloadEngine([HostTier()], min_bytes=512, copies=shuffled_copies(Shuffle(0, 0.0))) as engine:
            with engine.micro_batch(model, tokens=TOKENS, policy="recompute", ratio=ratio, keep_ops=keep_ops):
                model(token_ids(TOKENS)).backward()
            # What one layer recomputes is checkpoint's, not the engine's: of inner layers the engine sees what they keep.
            sizes = (
                [LayerBytes(all=per_layer)]
                + [LayerBytes(all=0, kept=kept)] * (layers - 2)
                + [LayerBytes(all=per_layer)]
            )
            predicted = device_bytes(sizes, layer_actions(layers, policy="recompute", ratio=ratio)) + outside
            assert engine.meter.peak_device == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("again", [1, 3, 7])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_peak_when_some_layers_run_again(model, again, ratio):
    keep = {"keep_ops": frozenset({ATTENTION})}
    kept, _ = saved_by_a_layer(model, policy="recompute", **keep)
    per_layer, everything = saved_by_a_layer(model)
    layers = len(model.layers)
    outside = everything - layers * per_layer
    setting = {"policy": "recompute", "recompute_layers": again, "ratio": ratio}
    with OffloadEngine([HostTier()], min_bytes=512, copies=shuffled_copies(Shuffle(0, 0.0))) as engine:
        with engine.micro_batch(model, tokens=TOKENS, **setting, **keep):
            model(token_ids(TOKENS)).backward()
    actions = layer_actions(layers, **setting)
    # What a layer recomputes is checkpoint's, not the engine's.
    sizes = [LayerBytes(all=0 if action.recompute else per_layer, kept=kept) for action in actions]
    assert engine.meter.peak_device == pytest.approx(device_bytes(sizes, actions) + outside, rel=0.1)


class Chain(nn.Module):
    """Layers whose large outputs are saved by the next operator and by nothing else."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.storages: list[StorageWeakRef] = []

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
            self.storages.append(StorageWeakRef(x.untyped_storage()))
        return x.sum()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_source_is_really_freed(ratio):
    model = Chain(8)
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with engine.micro_batch(model, tokens=128, ratio=ratio):
            loss = model(torch.randn(128, 16))
            engine.settle()
            alive = sum(not ref.expired() for ref in model.storages)
            loss.backward()
    # Kept: what the first and the last layer save (3), plus at most two layers' copies under way.
    assert alive == 8 if ratio == 0.0 else alive <= 5


def test_nothing_is_kept_in_a_cycle(model):
    gc.collect()
    gc.disable()
    try:
        with OffloadEngine([HostTier()], min_bytes=512) as engine:
            for policy in ("keep", "offload", "recompute"):
                with engine.micro_batch(model, tokens=TOKENS, policy=policy):
                    loss = model(token_ids(TOKENS))
                    del loss  # backward never runs
                engine.settle()
                assert engine.meter.device == 0
                assert engine.chain.bytes_by_tier() == {"host": 0}
    finally:
        gc.enable()


def test_no_growth_after_the_second_step_and_nothing_at_the_end(model, tmp_path):
    host, disk = HostTier(budget=300 * KB), FileTier(tmp_path)
    per_layer, _ = saved_by_a_layer(model)
    owned, counts = [], []
    with OffloadEngine([host, disk], min_bytes=512) as engine:
        for _ in range(6):
            with engine.micro_batch(model, tokens=TOKENS):
                model(token_ids(TOKENS)).backward()
            owned.append((host.owned, disk.owned, disk.peak))
            # These two depend on how copies meet: one staging buffer a direction, and two layers on their way back.
            assert disk.staging <= 2 * CHUNK
            assert engine._returned.peak_owned <= 2.5 * per_layer
            counts.append((host.used, disk.used, engine.meter.device))
        assert counts == [(0, 0, 0)] * 6
        assert all(later <= second for step in owned[2:] for later, second in zip(step, owned[1], strict=True)), owned
        assert 0 < host.owned <= 300 * KB and 0 < host.peak <= host.owned + host.owned // 8 and disk.owned > 0
        engine.trim()
        assert (host.owned, disk.owned, engine._returned.owned) == (0, 0, 0)


def test_budget_that_is_too_small_is_an_error_that_says_so(model):
    with OffloadEngine([HostTier(budget=64 * KB)], min_bytes=512) as engine:
        with pytest.raises(OffloadError, match=r"no tier has room for \d+ more bytes \(host holds .* of 65536"):
            with engine.micro_batch(model, tokens=TOKENS):
                model(token_ids(TOKENS))
        gc.collect()  # an exception and its frames hold one another
        engine.finish(failed=False)
        assert engine.chain.bytes_by_tier() == {"host": 0}
        with engine.micro_batch(model, tokens=TOKENS, policy="keep"):
            model(token_ids(TOKENS)).backward()


def test_an_exception_in_forward_leaves_nothing_behind(model, tmp_path):
    def fail(*_):
        raise KeyError("user's own")

    handle = model.layers[6].register_forward_pre_hook(fail)
    try:
        with OffloadEngine([HostTier(budget=200 * KB), FileTier(tmp_path)], min_bytes=512) as engine:
            with pytest.raises(KeyError, match="user's own"), engine.micro_batch(model, tokens=TOKENS):
                model(token_ids(TOKENS))
            gc.collect()  # an exception and its frames hold one another
            engine.finish(failed=False)  # waits for copies that were still under way
            assert engine.meter.device == 0
            assert engine.chain.bytes_by_tier() == {"host": 0, "disk": 0}
    finally:
        handle.remove()
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in model.layers)


def test_hooks_and_forwards_are_taken_off(model):
    with OffloadEngine([HostTier()]) as engine:
        with engine.micro_batch(model, policy="recompute"):
            assert "forward" in vars(model.layers[1])
        assert all("forward" not in vars(layer) for layer in model.layers)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_close_refuses_while_activations_are_out(model):
    engine = OffloadEngine([HostTier()], min_bytes=512)
    with engine.micro_batch(model, tokens=TOKENS):
        loss = model(token_ids(TOKENS))
    with pytest.raises(OffloadError, match="closed with activations still out"):
        engine.close()
    del loss


def test_tensors_saved_twice_are_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                y = layer(x)
                x = torch.tanh(
                    (y * y).view(2, 64, 16).transpose(1, 2).sin().mul(y.view(2, 64, 16).mT).mT.reshape(128, 16)
                )
            return x.sum()

    model = Twice()
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        batch = engine.micro_batch(model, tokens=128, ratio=1.0)
        with batch:
            model(torch.randn(128, 16)).backward()
        one = 128 * 16 * 4
        # A layer's: y (saved three times, twice as a view), y*y, sin(y*y), tanh: four storages.
        assert batch.layer_bytes[1] == 4 * one


class Noting(HostTier):
    """Notes what is read back, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[int] = []
        self.reads: list[int] = []

    def write(self, slot, flat, split):
        self.written.append(id(slot))
        super().write(slot, flat, split)

    def read(self, slot, flat, split):
        self.reads.append(id(slot))
        super().read(slot, flat, split)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_layers_come_back_in_reverse_order_one_ahead(model, ratio):
    """When backward enters a layer, its own activations and those of the layer before have been asked for, none earlier."""
    tier = Noting()
    asked: dict[int, int] = {}

    def note(n):
        asked[n] = len(tier.reads)

    hooks = [layer.register_full_backward_pre_hook(lambda *_, n=n: note(n)) for n, layer in enumerate(model.layers)]
    try:
        with OffloadEngine([tier], min_bytes=512, copies=shuffled_copies(Shuffle(0, 1.0))) as engine:
            batch = engine.micro_batch(model, tokens=TOKENS, ratio=ratio)
            with batch:
                loss = model(token_ids(TOKENS))
                moved = [len({id(r) for r in batch._visits[n] if r.slot and r.visit == n}) for n in range(10)]
                loss.backward()
            assert engine.meter.late == 0
    finally:
        for hook in hooks:
            hook.remove()
    # Of the last layer only what is saved on the way to it.
    assert moved[0] == 0 and moved[9] == 1 and min(moved[1:9]) > 3
    assert sum(moved) == len(tier.reads) == len(tier.written)
    assert tier.reads == tier.written[::-1]
    # Entering layer n: all above it have been read, and it itself one layer ahead.
    assert [asked[n] for n in range(9, 0, -1)] == [sum(moved[n:]) for n in range(9, 0, -1)]
