"""The cluster that a profile stands for, the same in the command and in its comparison with real steps; how FSDP2 is timed."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import Ranks
from torch import nn

import hdp
from hdp.balance import CostModel, Link, ModelShape, PlanError, Topology
from hdp.balance.host import HostCosts
from hdp.balance.machine import Machine
from hdp.balance.simulator import Cluster
from hdp.cli import main
from hdp.parallel.engine import Engine
from hdp.parallel.profile import profile
from hdp.parallel.profile_sharding import root_share, sharding_seconds, spread

SHAPE = ModelShape(name="m", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=64)
LAN = Link(bandwidth=20e6, latency=1e-4)
MEASURED = Machine(
    model="m",
    device="d",
    nodes=(1, 1, 1, 1),
    flops=1e9,
    cost=CostModel(layers=2, quadratic=2e-8, linear=3e-5, constant=1e-4, ring_bytes=256.0, ring_bytes_backward=512.0),
    samples=(),
    intra=None,
    inter=LAN,
    parameters=1_000_000,
    overlap=0.8,
    gather_bandwidth=15e6,
    reduce_bandwidth=12e6,
    host=HostCosts(
        piece_seconds=3e-4,
        message_seconds=1e-4,
        piece_setup=1e-4,
        message_setup=1e-4,
        gather_byte=8e-9,
        reduce_byte=7e-9,
        quota_period=0.02,
        quota_share=0.3,
    ),
    element_bytes=4,
    root_share=0.4,
    shape=SHAPE,
)
OTHER: dict[str, Any] = {
    "inter": Link(bandwidth=5e6),
    "parameters": 3_000_000,
    "overlap": 0.1,
    "gather_bandwidth": 5e6,
    "reduce_bandwidth": 4e6,
    "element_bytes": 2,
    "root_share": 0.0,
    "host": HostCosts(gather_byte=1e-7, reduce_byte=1e-7),
}
"""What a simulation must not ignore."""
LENGTHS = [3000, 400, 300, 200, 100, 90, 80, 60, 50, 40, 30, 20]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """``benchmarks/simulator_reality.py``."""
    path = Path(__file__).parents[2] / "benchmarks" / "simulator_reality.py"
    spec = importlib.util.spec_from_file_location("simulator_reality", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commanded(tmp_path: Path, measured: Machine, planners: str, capacity: int) -> dict[str, float]:
    """Seconds of a step by planner, as ``hdp simulate --machine`` has them."""
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, LENGTHS)))
    measured.write(tmp_path / "p.json")
    arguments = [
        "--machine",
        str(tmp_path / "p.json"),
        "--lengths",
        str(tmp_path / "lengths.txt"),
        "--capacity",
        str(capacity),
    ]
    arguments += [
        "--world-size",
        "4",
        "--ranks-per-node",
        "1",
        "--planners",
        planners,
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert main(["simulate", *arguments]) == 0
    return {p["planner"]: p["seconds"] for p in json.loads((tmp_path / "s.json").read_text())["planners"]}


def test_the_command_says_what_is_compared_with_real_steps(tmp_path: Path, benchmark: ModuleType):
    """To the bit, and both follow whatever was measured."""
    planners = ["static", "naive", "auto"]
    variants = [MEASURED, *(replace(MEASURED, **{name: value}) for name, value in OTHER.items())]
    seen = []
    for measured in variants:
        said = commanded(tmp_path, measured, ",".join(planners), benchmark.CAPACITY)
        compared = {planner: benchmark.predict(measured, LENGTHS, planner)[1].seconds for planner in planners}
        assert said == compared
        seen.append(said)
    assert all(variant != seen[0] for variant in seen[1:])


def test_a_profile_as_a_cluster():
    made = Cluster.of_machine(MEASURED)
    assert made.topology == MEASURED.topology()
    assert (made.parameter_bytes, made.gradient_bytes) == (4e6, 4e6)
    assert (made.gather_seconds(2), made.reduce_seconds(2)) == pytest.approx((4e6 / 15e6, 4e6 / 12e6))
    assert (made.root_share, made.overlap, made.host, made.shape) == (0.4, 0.8, MEASURED.host, SHAPE)
    half = Cluster.of_machine(replace(MEASURED, element_bytes=2), stages=2, sharding="replicated")
    assert (half.parameter_bytes, half.gradient_bytes, half.stage_token_bytes) == (1e6, 2e6, 128.0)
    with pytest.raises(PlanError, match="stages is 0"):
        Cluster.of_machine(MEASURED, stages=0)


def test_collectives_elsewhere_are_scaled_as_the_links_say():
    """An all-gather moves (n - 1) / n of its result over each link: 3/4 on the four ranks that measured."""
    for ranks, link, times in ((8, LAN, 7 / 6), (4, Link(bandwidth=40e6), 1 / 2), (1024, LAN, 1023 / 1024 * 4 / 3)):
        topology = Topology(world_size=ranks, ranks_per_node=1, inter=link)
        made = Cluster.of_machine(MEASURED, topology)
        assert made.gather_seconds(2) == pytest.approx(times * 4e6 / 15e6)
        assert made.reduce_seconds(2) == pytest.approx(times * 4e6 / 12e6)
    assert Cluster.of_machine(MEASURED, Topology(world_size=1)).gather_seconds(2) == 0.0
    unmeasured = Cluster.of_machine(replace(MEASURED, gather_bandwidth=0.0, reduce_bandwidth=0.0))
    assert unmeasured.gather_seconds(2) == pytest.approx(4e6 * 3 / 4 / 20e6 + 2 * 2 * 1e-4)


def test_the_command_says_where_a_profile_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    commanded(tmp_path, MEASURED, "auto", 1024)
    assert "measured on" not in capsys.readouterr().out
    commanded(tmp_path, replace(MEASURED, nodes=(2,)), "auto", 1024)
    assert "measured on 2 ranks, 2 a node, not 4, 1 a node" in capsys.readouterr().out


def test_older_files_are_refused(tmp_path: Path):
    """What they say of messages was each document's."""
    MEASURED.write(tmp_path / "p.json")
    fields = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**fields, "format": 1}))
    with pytest.raises(PlanError, match=r"p\.json' is of another version, .* run hdp profile again"):
        Machine.read(tmp_path / "p.json")


def test_more_layers_have_more_parameters():
    """Two layers of 300,000 and a rest of 400,000."""
    deep = MEASURED.with_layers(10)
    assert (deep.parameters, deep.root_share) == (3_400_000, pytest.approx(4 / 34))
    assert deep.shape is not None and deep.shape.layers == 10
    assert deep.sharding_seconds == pytest.approx(3.4 * MEASURED.sharding_seconds)


# ---------------------------------------------------------------- measured


def tiny_model(dtype: torch.dtype = torch.float32, attention: str = "hdp") -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def test_what_belongs_to_no_layer():
    model = tiny_model(attention="eager")
    rest = 2 * 32 * 32 + 32  # embeddings, head, last norm
    assert root_share(model) == pytest.approx(rest / sum(p.numel() for p in model.parameters()))


def test_host_seconds_are_spread_as_bytes_take_them():
    host = HostCosts(piece_seconds=1.0, gather_byte=1.0, reduce_byte=3.0)
    made = spread(host, 10.0, parameter_bytes=20.0, gradient_bytes=20.0)
    assert asdict(made) == pytest.approx({**asdict(host), "gather_byte": 2.5 / 20, "reduce_byte": 7.5 / 20})
    made = spread(host, 10.0, parameter_bytes=10.0, gradient_bytes=20.0)  # bf16: 10 s of 70 s
    assert (made.gather_byte, made.reduce_byte) == pytest.approx((1 / 7, 3 / 7))
    made = spread(HostCosts(), 10.0, parameter_bytes=10.0, gradient_bytes=20.0)
    assert (made.gather_byte, made.reduce_byte) == pytest.approx((0.5, 0.25))


STEP, SHARDED = 0.5, 0.125


def timed(world: Any) -> tuple[float, bool]:
    """By a clock on which each step takes half a second, and more under FSDP2; whether the model stays as it was."""
    clock = [0.0]
    usual = Engine.forward_backward

    def charged(engine: Engine, batch: Any) -> Any:
        assert batch.tokens == 2 * world.world_size
        clock[0] += STEP + SHARDED * (1 + world.rank) * isinstance(engine, hdp.parallel.fsdp.FSDPEngine)
        return usual(engine, batch)

    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forward_backward", charged)
        found = sharding_seconds(model, world, lambda: clock[0])
    same = all(type(p) is nn.Parameter and torch.equal(p, before[name]) for name, p in model.named_parameters())
    return found, same and all(p.grad is None for p in model.parameters())


def test_what_sharding_takes_the_host():
    """The mean over ranks; the model is neither wrapped nor changed."""
    with Ranks(2) as ranks:
        assert ranks.run(timed) == [(pytest.approx(1.5 * SHARDED), True)] * 2


def profiled(world: Any, dtype: torch.dtype) -> tuple[Machine, float]:
    model = tiny_model(dtype)
    with pytest.MonkeyPatch.context() as patch:  # measured all the same
        patch.setattr(hdp.parallel.profile, "sharding_seconds", lambda *given: 0.25 + 0.0 * sharding_seconds(*given))
        made = profile(model, world, lengths=(16, 32, 64))
    engine = hdp.shard(model, world)  # as after any profile
    return made, float(sum(p.numel() for p in engine.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_profile_measures_all_that_a_cluster_needs(dtype: torch.dtype, tmp_path: Path):
    with Ranks(2) as ranks:
        (made, parameters), (other, _) = ranks.run(profiled, dtype)
    assert made == other
    assert (made.element_bytes, made.parameters) == (dtype.itemsize, parameters)
    assert made.root_share == pytest.approx(root_share(tiny_model(attention="eager")))
    assert made.shape is not None and (made.shape.hidden, made.shape.layers) == (32, 2)
    assert min(made.gather_bandwidth, made.reduce_bandwidth) > 0
    assert made.sharding_seconds == pytest.approx(0.25)
    made.write(tmp_path / "p.json")
    assert Machine.read(tmp_path / "p.json") == made
