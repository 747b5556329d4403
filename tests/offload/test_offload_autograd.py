"""The engine and autograd: changes after saving, retained graphs, higher orders, parameters, autocast, threads."""

# ruff: noqa: SIM117 (the order of contexts is what is tested)

from __future__ import annotations

import threading

import pytest
import torch
from offload_helpers import ATTENTION, Cubed, gradients, make_zoo, same_bits, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hdp.offload import HostTier, OffloadEngine, find_layers
from hdp.offload.parameters import ParameterStorages, derives_from_parameter

MESSAGE = "modified by an inplace operation"


class Meddler(nn.Module):
    """Its middle layers save ``h``; ``meddle`` gets the last but one layer's ``h`` after all are done."""

    def __init__(self, meddle) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.meddle = meddle

    def forward(self, x):
        held = []
        for layer in self.layers:
            h = layer(x)
            held.append(h)
            x = h.sin()
        self.meddle(held)
        return x.sum()


MEDDLING = {
    "the tensor": lambda held: held[2].mul_(2),
    "a view of it": lambda held: held[2].view(-1)[3:4].zero_(),
    "a detached alias": lambda held: held[2].detach().add_(1),
    "a kept one": lambda held: held[0].mul_(2),
}


@pytest.mark.parametrize("what", MEDDLING)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_changes_after_saving_raise_as_in_torch(what, ratio):
    model = Meddler(MEDDLING[what])
    x = torch.randn(64, 32)
    with pytest.raises(RuntimeError, match=MESSAGE):
        model(x).backward()
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with pytest.raises(RuntimeError, match=MESSAGE + r".*\[torch.FloatTensor \[64, 32\]\] is at version 1"):
            with engine.micro_batch(model, tokens=64, ratio=ratio):
                model(x).backward()
        engine.settle()
        assert engine.meter.device == 0


def test_a_change_of_a_parameter_after_saving_raises_as_in_torch():
    def meddle(_):
        with torch.no_grad():
            model.layers[2].weight.mul_(2)

    model = Meddler(meddle)
    x = torch.randn(64, 32)
    with pytest.raises(RuntimeError, match=MESSAGE):
        model(x).backward()
    with OffloadEngine([HostTier()], min_bytes=512) as engine, pytest.raises(RuntimeError, match=MESSAGE):
        with engine.micro_batch(model, tokens=64):
            model(x).backward()


def test_a_tensor_changed_and_saved_again_is_stored_again():
    """Legal: the first save is not used any more."""

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                h = layer(x)
                dead = h.sin()  # saves h, but takes no part in the loss
                with torch.no_grad():
                    h += 1
                x = h.cos() + 0 * dead.detach()
            return x.sum()

    torch.manual_seed(0)
    model, x = Changing(), torch.randn(64, 32)
    expected = gradients(model, lambda: model(x))
    with OffloadEngine([HostTier()], min_bytes=512) as engine, engine.micro_batch(model, tokens=64):
        assert same_bits(gradients(model, lambda: model(x)), expected)


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_retained_graphs_are_walked_again(ratio):
    model, ids = make_zoo(), token_ids(48)

    def thrice():
        """The third walk is that of ``gradients``."""
        loss = model(ids)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        return loss

    expected = gradients(model, thrice)
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with engine.micro_batch(model, tokens=48, ratio=ratio):
            assert same_bits(gradients(model, thrice), expected)
        engine.settle()
        assert engine.meter.device == 0


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_second_order_gradients(ratio):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(5)))
    x = torch.randn(64, 32, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(model(x * 1.0).square().sum(), x, create_graph=True)
        return grad.square().sum()

    expected = gradients(model, penalty)
    with OffloadEngine([HostTier()], min_bytes=512) as engine, engine.micro_batch(model, tokens=64, ratio=ratio):
        assert same_bits(gradients(model, penalty), expected)


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_saved_tensors_may_be_asked_for_twice(ratio):
    class Twice(Cubed):
        @staticmethod
        def backward(ctx, grad):
            ctx.saved_tensors[0].sum()
            return Cubed.backward(ctx, grad)

    class Layer(nn.Linear):
        def forward(self, x):
            return Twice.apply(super().forward(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Layer(32, 32) for _ in range(5))), torch.randn(64, 32)
    expected = gradients(model, lambda: model(x).sum())
    with OffloadEngine([HostTier()], min_bytes=512) as engine, engine.micro_batch(model, tokens=64, ratio=ratio):
        assert same_bits(gradients(model, lambda: model(x).sum()), expected)


def test_backward_in_another_thread():
    """CUDA's backward runs on threads of its own."""
    model, ids = make_zoo(), token_ids(48)
    expected = gradients(model, lambda: model(ids))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with OffloadEngine([HostTier()], min_bytes=512) as engine, engine.micro_batch(model, tokens=48):
        loss = model(ids)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert same_bits([loss.detach(), *(p.grad for p in model.parameters())], expected)


class Wide(nn.Module):
    """Few activations, large weights: a mistake about parameters is seen at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(5))
        self.register_buffer("table", torch.randn(256, 256))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x) @ self.table)
        return x.sum()


@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_buffers_and_autocast_copies_stay(autocast):
    model, x = Wide(), torch.randn(8, 256)
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with engine.micro_batch(model, tokens=8, keep_first=0, keep_last=0):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(x)
            loss.backward()
        activations = engine.meter.left
    # The buffer is not cached by autocast: its cast is a new tensor of every layer, and a real activation. The last
    # one is saved after the last layer, and stays.
    casts = 4 * 256 * 256 * 2 if autocast else 0
    assert casts <= activations < casts + 5 * 8 * 256 * 4 * 4


def test_what_derives_from_a_parameter():
    weight = nn.Parameter(torch.randn(8, 8))
    assert derives_from_parameter(weight) and derives_from_parameter(weight.t()) and derives_from_parameter(weight[1:])
    assert derives_from_parameter(weight.to(torch.bfloat16)) and derives_from_parameter(weight.to(torch.bfloat16).t())
    assert derives_from_parameter(weight.t().to(torch.bfloat16).t())
    assert not derives_from_parameter(weight * 2) and not derives_from_parameter(torch.randn(3))
    frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    assert derives_from_parameter(frozen) and derives_from_parameter(frozen.t())


def test_parameter_storages_are_known_by_identity_not_address():
    layer = nn.Linear(64, 64)
    storages = ParameterStorages()
    storages.refresh(layer)
    with torch.no_grad():
        alias = layer.weight.detach().view(-1)
    assert storages.owns(alias)
    del alias
    layer.weight = None
    # A new tensor may well get the freed address; it must not pass for the parameter.
    assert not any(storages.owns(torch.empty(64, 64)) for _ in range(20))
    storages.forget_dead()
    assert len(storages._known) == 1


class Count(TorchDispatchMode):
    def __init__(self, op) -> None:
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep_ops", "calls"), [(frozenset({ATTENTION}), 5), (frozenset(), 8)])
def test_kept_operators_are_not_run_again(keep_ops, calls):
    model, ids = make_zoo(5), token_ids(48)
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with engine.micro_batch(model, tokens=48, policy="recompute", keep_ops=keep_ops), Count(ATTENTION) as count:
            model(ids).backward()
    assert count.calls == calls


def test_as_many_layers_run_again_as_are_asked_for():
    model, ids = make_zoo(6), token_ids(48)
    for again in range(5):
        with OffloadEngine([HostTier()], min_bytes=512) as engine:
            with (
                engine.micro_batch(model, tokens=48, policy="recompute", recompute_layers=again),
                Count(ATTENTION) as count,
            ):
                model(ids).backward()
        assert count.calls == 6 + again
    with OffloadEngine([HostTier()]) as engine, pytest.raises(ValueError, match="5 layers are to run again but 4 are"):
        engine.micro_batch(model, policy="recompute", recompute_layers=5)


def test_a_kept_output_that_is_changed_raises():
    class Spoils(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x):
            q = self.inner(x).view(1, 48, 4, 8).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            with torch.no_grad():
                out.mul_(2)
            return out.transpose(1, 2).reshape(1, 48, 32)

    model = nn.Sequential(*(Spoils() for _ in range(4)))
    with OffloadEngine([HostTier()], min_bytes=512) as engine, pytest.raises(RuntimeError, match=MESSAGE):
        with engine.micro_batch(model, tokens=48, policy="recompute", keep_ops=frozenset({ATTENTION})):
            model(torch.randn(1, 48, 32)).sum().backward()


def test_layers_are_found_or_asked_for():
    zoo = make_zoo(3)
    assert find_layers(zoo) == tuple(zoo.layers)
    assert find_layers(zoo, [zoo.layers[1]]) == (zoo.layers[1],)
    with pytest.raises(ValueError, match=r"layers\[0\] \(Linear\) is not a module of the model"):
        find_layers(zoo, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of equal layers: pass layers="):
        find_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"policy": "swap"}, "policy 'swap' is not one of keep, offload, recompute, memo"),
        ({"ratio": 1.5}, "ratio is 1.5: give a number from 0 to 1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"keep_first": -1}, "keep_first is -1"),
        ({"policy": "auto"}, r"needs the micro-batch's tokens and a measured bandwidth"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with OffloadEngine([HostTier()]) as engine, pytest.raises(ValueError, match=message):
        engine.micro_batch(make_zoo(3), **setting)


@pytest.mark.parametrize("policy", ["offload", "recompute"])
def test_compiled_layers(policy):
    """Compiled in place they offload, and run again as others do: uncompiled, for of compiled code nothing can be kept."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(4))),
        torch.randn(96, 32),
    )
    setting = {"policy": policy, "tokens": 96, "ratio": 0.5, "layers": list(model)}
    for layer in model:
        layer.compile(backend="aot_eager")
    expected = gradients(model, lambda: model(x).sum())
    saved = []
    for run_again in (policy, "keep"):
        with OffloadEngine([HostTier()], min_bytes=512) as engine:
            batch = engine.micro_batch(model, **{**setting, "policy": run_again})
            with batch:
                assert same_bits(gradients(model, lambda: model(x).sum()), expected)
            saved.append(batch.layer_bytes[1])
    assert saved[0] == (saved[1] if policy == "offload" else x.nbytes) and saved[1] == 3 * x.nbytes
    assert all(layer._compiled_call_impl is not None for layer in model)
    assert same_bits(gradients(model, lambda: model(x).sum()), expected)
    torch._dynamo.reset()


def test_layers_that_the_engine_cannot_see():
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32) for _ in range(4)]
    model, x = nn.Sequential(*layers), torch.randn(96, 32)
    whole = torch.compile(model, backend="aot_eager")
    whole(x).sum().backward()
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with pytest.warns(UserWarning, match="none of the 4 layers was called"):
            with engine.micro_batch(model, tokens=96):
                whole(x).sum().backward()
        wrapped = nn.Sequential(*(torch.compile(layer, backend="aot_eager") for layer in layers))
        with pytest.raises(ValueError, match=r"compile it in place, with layer\.compile\(\)"):
            with engine.micro_batch(wrapped, policy="recompute"):
                pass
        with engine.micro_batch(model, tokens=96):
            model(x).sum().backward()  # no hook is left behind
        assert engine.meter.left > 0
    torch._dynamo.reset()
