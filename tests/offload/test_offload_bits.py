"""Gradients and losses keep their bits: every ratio, tier and policy, whatever order the copies run in."""

# ruff: noqa: SIM117 (the order of contexts is what is tested)

from __future__ import annotations

import random

import pytest
import torch
from offload_helpers import (
    ATTENTION,
    PoisoningEngine,
    PoisoningTier,
    Shuffle,
    gradients,
    make_zoo,
    same_bits,
    shuffled_copies,
    token_ids,
)
from transformers import LlamaConfig, LlamaForCausalLM

from hdp.offload import FileTier, HostTier, OffloadEngine
from hdp.offload.streams import Copies, ThreadStream

pytestmark = pytest.mark.slow

TOKENS = 48
SETTINGS = {
    "keep": {"policy": "keep"},
    "r=0": {"ratio": 0.0},
    "r=0.3": {"ratio": 0.3},
    "r=0.5": {"ratio": 0.5},
    "r=1": {"ratio": 1.0},
    "r=1, all layers": {"ratio": 1.0, "keep_first": 0, "keep_last": 0},
    "recompute": {"policy": "recompute"},
    "recompute, inputs stay": {"policy": "recompute", "ratio": 0.0},
    "recompute but attention": {"policy": "recompute", "keep_ops": frozenset({ATTENTION})},
    "recompute one layer, offload the others": {"policy": "recompute", "recompute_layers": 1, "ratio": 0.5},
    "memo": {"policy": "memo", "memo_fraction": 0.5, "keep_ops": frozenset({ATTENTION})},
}


@pytest.fixture(scope="module")
def model():
    return make_zoo(wasteful=True)


@pytest.fixture(scope="module")
def expected(model):
    ids = token_ids(TOKENS)
    return gradients(model, lambda: model(ids))


@pytest.mark.parametrize("tier", ["host", "file", "chain"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tokens", [TOKENS, None])
def test_bits_of_every_setting_and_tier(model, expected, tmp_path, tier, setting, tokens):
    tiers = {
        "host": lambda: [HostTier()],
        "file": lambda: [FileTier(tmp_path)],
        "chain": lambda: [HostTier(budget=50_000), FileTier(tmp_path)],
    }[tier]()
    ids = token_ids(TOKENS)
    with OffloadEngine(tiers, min_bytes=512) as engine:
        for _ in range(2):
            with engine.micro_batch(model, tokens=tokens, **SETTINGS[setting]):
                got = gradients(model, lambda: model(ids))
            assert same_bits(got, expected)
        moved = engine.meter.left
        assert (moved > 0) == (setting not in ("keep", "r=0", "recompute, inputs stay"))
        assert engine.meter.returned <= moved and (engine.meter.returned > 0) == (moved > 0)
        assert engine.meter.device == 0
        assert all(used == 0 for used in engine.chain.bytes_by_tier().values())
        if tier == "chain" and setting == "r=1":
            assert all(t.peak > 0 for t in engine.chain.tiers)


@pytest.mark.parametrize("block", range(5))
def test_bits_under_random_delays_and_reorderings(model, expected, tmp_path, block):
    """Forty draws a block: jobs run in any order that their explicit dependences allow, early or as late as possible."""
    ids = token_ids(TOKENS)
    overtaken = 0
    for draw in range(40):
        rng = random.Random(1000 * block + draw)
        shuffle = Shuffle(rng.random(), rng.choice([0.0, 0.2, 0.6]))
        tiers = [PoisoningTier(budget=rng.choice([None, 0, 60_000]))]
        if tiers[0].budget is not None:
            tiers.append(PoisoningTier(name="second") if draw % 5 else FileTier(tmp_path))
        setting = rng.choice(list(SETTINGS.values()))
        with PoisoningEngine(tiers, min_bytes=512, copies=shuffled_copies(shuffle)) as engine:
            for _ in range(2):
                with engine.micro_batch(model, tokens=rng.choice([TOKENS, None]), **setting):
                    assert same_bits(gradients(model, lambda: model(ids)), expected), (block, draw, setting)
            assert engine.meter.device == 0
        overtaken += shuffle.overtaken
    assert overtaken > 100


def test_bits_with_real_threads_that_sleep_at_random(model, expected, tmp_path):
    ids = token_ids(TOKENS)
    rng = random.Random(0)
    for workers in (1, 3):
        streams = [ThreadStream(name, workers=workers, delay=lambda: rng.random() * 2e-3) for name in ("out", "back")]
        copies = Copies(host_out=streams[0], host_back=streams[1], device_out=streams[0], device_back=streams[1])
        tiers = [PoisoningTier(budget=60_000), FileTier(tmp_path)]
        with PoisoningEngine(tiers, min_bytes=512, copies=copies) as engine:
            for ratio in (0.3, 1.0, 0.5, 1.0):
                with engine.micro_batch(model, tokens=TOKENS, ratio=ratio):
                    assert same_bits(gradients(model, lambda: model(ids)), expected)


def test_a_forgotten_dependence_would_be_seen(model, expected):
    """The poison works: a store that does not wait for the way back gets other bits."""

    class Careless(PoisoningEngine):
        def _arrive(self, record, retain):
            record.read = type("Forgotten", (), {"order": lambda self: None, "ready": lambda self: True,
                                                 "wait": lambda self: None})()  # fmt: skip
            super()._arrive(record, retain)

    ids = token_ids(TOKENS)
    engine = Careless([PoisoningTier()], min_bytes=512, copies=shuffled_copies(Shuffle(0, 0.0)))
    with engine.micro_batch(model, tokens=TOKENS):
        assert not same_bits(gradients(model, lambda: model(ids)), expected)


def test_uneven_micro_batches_share_one_engine(model, tmp_path):
    sizes = [48, 16, 80, 33, 80, 7]
    plain = [gradients(model, lambda n=n: model(token_ids(n, n))) for n in sizes]
    with OffloadEngine([HostTier(budget=100_000), FileTier(tmp_path)], min_bytes=512) as engine:
        for _ in range(2):
            for n, expected in zip(sizes, plain, strict=True):
                with engine.micro_batch(model, tokens=n, ratio=0.7):
                    assert same_bits(gradients(model, lambda n=n: model(token_ids(n, n))), expected)


def test_interleaved_micro_batches(model):
    """Pipelines run the forward of one micro-batch before the backward of another."""
    ids = [token_ids(TOKENS, seed) for seed in range(3)]
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    losses = [model(x) for x in ids]
    for i in (1, 0, 2):
        losses[i].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        losses = []
        for x in ids:
            with engine.micro_batch(model, tokens=TOKENS):
                losses.append(model(x))
        assert engine.chain.bytes_by_tier()["host"] > 0
        for i in (1, 0, 2):
            losses[i].backward()
        assert same_bits([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("setting", ["r=0.5", "r=1", "recompute but attention", "memo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_transformers_model(setting, dtype):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(0, 61, (1, 96))
    expected = gradients(llama, lambda: llama(ids, labels=ids, use_cache=False).loss)
    with OffloadEngine([HostTier()], min_bytes=512) as engine:
        with engine.micro_batch(llama, tokens=96, **SETTINGS[setting]):
            assert same_bits(gradients(llama, lambda: llama(ids, labels=ids, use_cache=False).loss), expected)
        assert engine.meter.left > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_bits_under_the_models_own_checkpointing(model, expected, reentrant):
    """A user's gradient checkpointing runs inside the hooks and runs the layers again during backward."""
    from torch.utils.checkpoint import checkpoint

    originals = [layer.forward for layer in model.layers]
    try:
        for layer, forward in zip(model.layers, originals, strict=True):
            layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=reentrant)
        with OffloadEngine([HostTier()], min_bytes=512) as engine:
            with engine.micro_batch(model, tokens=TOKENS):
                assert same_bits(gradients(model, lambda: model(token_ids(TOKENS))), expected)
    finally:
        for layer in model.layers:
            del layer.forward
