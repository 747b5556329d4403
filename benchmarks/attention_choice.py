"""What ``schedule="auto"`` takes on these hosts, from a machine measured as at the start of any job."""

from __future__ import annotations

import tempfile
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hdp
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey
from hdp.parallel.machine import find_machine
from hdp.parallel.schedules import chooser_of

DIM = 64  # of a head


def pairs(world: hdp.World, heads: tuple[int, int], lengths: list[int]) -> dict[str, Any]:
    """Of each length, in text, the forward and backward schedule over all ranks; ``"host"``: what was measured beside rates."""
    config = LlamaConfig(
        hidden_size=heads[0] * DIM,
        intermediate_size=heads[0] * DIM * 2,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=512,
        max_position_embeddings=1 << 20,
        use_cache=False,
    )
    torch.manual_seed(0)
    engine = hdp.shard(LlamaForCausalLM._from_config(config, attn_implementation="hdp"), world)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ", HDP_CACHE=cache):
        machine = find_machine(engine, "measure")
    assert machine is not None
    chooser = chooser_of(machine)
    key = LayerKey(heads=HeadCount(query=heads[0], key=heads[1]), head_dim=DIM, dtype=torch.float32, mask=Mask())
    group = tuple(range(world.world_size))
    found: dict[str, Any] = {
        str(n): "/".join(chooser.names(n, group, "zigzag", key.geometry(), Mask())) for n in lengths
    }
    return {**found, "host": repr(chooser)}
