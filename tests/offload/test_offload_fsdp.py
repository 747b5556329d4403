"""With FSDP2 on real ranks: bits of both regimes, uneven micro-batches, and parameters that stay where they are."""

from __future__ import annotations

import pytest

WORLD = 2
COUNTS = (3, 1)
"""Micro-batches of each rank in regime ``step``."""


def sharded(regime: str, mixed: bool):
    import torch
    from offload_helpers import make_zoo
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    if mixed:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        layers = model.model.layers
    else:
        model = make_zoo()
        layers = model.layers
        for layer in layers:
            low = layer.low.float()  # one dtype a module, as FSDP2 wants it
            low.forward = lambda x, low=low: torch.nn.functional.linear(x.float(), low.weight, low.bias)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None, reduce_dtype=torch.float32)
    for module in (*layers, model):
        fully_shard(module, reshard_after_forward=regime == "slot", mp_policy=policy)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def step(model, rank: int, regime: str, context):
    """Gradients of one step: uneven counts of micro-batches of uneven lengths, or one slot after the other."""
    import torch
    from offload_helpers import token_ids

    model.zero_grad(set_to_none=True)
    torch.manual_seed(1 + rank)
    count = COUNTS[rank] if regime == "step" else 2
    losses = []
    for i in range(count):
        tokens = 25 + 16 * i + 10 * rank  # never the size of a weight
        if regime == "step":
            model.set_requires_gradient_sync(i == count - 1)
            model.set_reshard_after_backward(i == count - 1)
        with context(tokens=tokens):
            ids = token_ids(tokens, 10 * rank + i)
            out = model(ids, labels=ids, use_cache=False).loss if hasattr(model, "lm_head") else model(ids)
            out.backward()
        losses.append(out.detach())
    return [*losses, *(p.grad.to_local().clone() for p in model.parameters())]


def watch(engine, taken):
    """Notes the shapes of what leaves from now on."""
    leave = type(engine)._leave

    def noting(record, tensor, *rest):
        taken.append(tuple(tensor.shape))
        leave(engine, record, tensor, *rest)

    engine._leave = noting


def compare(world, regime: str, mixed: bool, folder: str):
    """(bits equal for each setting, bytes that left with r = 1, bytes of parameters)."""
    import contextlib
    import functools

    from offload_helpers import ATTENTION, same_bits

    from hdp.offload import FileTier, HostTier, OffloadEngine

    rank = world.rank
    model = sharded(regime, mixed)
    expected = step(model, rank, regime, lambda **_: contextlib.nullcontext())
    again = step(model, rank, regime, lambda **_: contextlib.nullcontext())
    equal = {"itself": same_bits(again, expected)}
    with OffloadEngine([HostTier(budget=60_000), FileTier(folder)], min_bytes=512) as engine:
        for name, setting in {
            "r=0.5": {"ratio": 0.5},
            "r=1": {"ratio": 1.0, "keep_first": 0, "keep_last": 0},
            "recompute": {"policy": "recompute", "keep_ops": frozenset({ATTENTION})},
        }.items():
            taken: list[tuple[int, ...]] = []
            watch(engine, taken)
            got = step(model, rank, regime, functools.partial(engine.micro_batch, model, **setting))
            equal[name] = same_bits(got, expected)
            engine.settle()
            shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
            turned = {shape[::-1] for shape in shapes}
            equal[f"{name}: no weight left"] = bool(taken) and not (set(taken) & (shapes | turned))
            equal[f"{name}: nothing out"] = engine.meter.device == 0
    return equal


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("regime", ["step", "slot"])
def test_bits_with_fsdp2(ranks, tmp_path, regime, mixed):
    for rank, equal in enumerate(ranks(WORLD).run(compare, regime, mixed, str(tmp_path))):
        assert all(equal.values()), (rank, equal)
