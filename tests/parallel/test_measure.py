"""The machine measured on real ranks: alike on all, kept for the next start, leaving nothing behind."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import plan_batch
from tiny import make_documents, make_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import hdp
from hdp.balance import CostModel, Machine
from hdp.balance.machine import Probe, Tile
from hdp.balance.measured import predicted
from hdp.parallel import machine as parallel_machine
from hdp.parallel import machine_cache, measure, measure_layers, measure_links, profile_clock
from hdp.parallel.engine import Engine
from hdp.parallel.measure import what_is_off
from hdp.parallel.measure_layers import Timed, terms_of
from hdp.parallel.skeleton import Kind

pytestmark = pytest.mark.slow


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


class Quickly:
    """Measures for fractions of the usual time, into ``folder``; notes what is said."""

    def __init__(self, folder: str) -> None:
        self.folder, self.said, self.patch = folder, Said(), pytest.MonkeyPatch()

    def __enter__(self) -> list[str]:
        for name in ("TILES_SECONDS", "LAYERS_SECONDS", "HEAD_SECONDS", "PROBE_SECONDS"):
            self.patch.setattr(measure, name, 0.05)
        self.patch.setattr(measure, "HOST_TURNS", 1)
        self.patch.setattr(profile_clock, "SECONDS", 0.1)
        self.patch.setattr(measure_layers, "TILES", (16, 64, 256))
        self.patch.setattr(measure_layers, "LENGTHS", (16, 64, 256))
        self.patch.setattr(measure_links, "LARGE", 1 << 20)
        self.patch.setattr(parallel_machine, "tell", self.said.lines.append)
        self.patch.setenv("HDP_CACHE", self.folder)
        self.logger = logging.getLogger("hdp")
        self.logger.addHandler(self.said)
        return self.said.lines

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        self.logger.removeHandler(self.said)


def started(world: hdp.World, folder: str, change: Any = None, model: Any = make_model) -> Any:
    """The machine that an engine plans for when nobody says anything, and what is said."""
    with Quickly(folder) as lines:
        os.environ.pop("HDP_MACHINE")
        try:
            if change is not None and world.rank == 0:
                change(folder)
            torch.distributed.barrier()
            engine = hdp.shard(model(), world)
            batch = plan_batch(world, engine, make_documents([9, 9]), 50)
            assert batch.machine == engine.machine
            return engine.machine, lines
        finally:
            os.environ["HDP_MACHINE"] = "assume"


def test_measured_once_then_probed(ranks, tmp_path):
    folder = str(tmp_path)
    (first, lines), (other, quiet) = ranks(2).run(started, folder)
    assert first == other and quiet == []
    assert first.source == "measured" and first.nodes == (2,) and len(first.speeds) == 2
    assert first.cost.linear > 0 and first.flops > 0 and first.cost.activation_bytes > 4 * 64
    assert first.intra is not None and first.inter is None and first.intra.bandwidth > 1e6
    assert first.host.piece_seconds + first.host.message_seconds + first.host.round_seconds > 0
    assert [tile.tokens for tile in first.tiles] == [16, 64, 256]
    assert first.whole > 0
    line = next(line for line in lines if "machine, " in line)
    assert "hdp: machine, measured in" in line and "2 ranks on 1 node of 2" in line and "MB/s" in line
    (entry,) = (tmp_path / "machines").iterdir()
    assert Machine.read(entry) == first
    # Its own probe, an hour ago: what it says now is as it was.
    loose = replace(first.probe, compute=(0.0, 0.0), seconds=(0.0, 0.0))
    assert all(machine == replace(first, probe=loose) for machine, _ in ranks(2).run(started, folder, Forgotten()))


WHOLE_TOKENS, WHOLE_BYTES = 64, 1 << 16


def against_the_whole(world: hdp.World, ratio: float, quadratic: float) -> list[tuple[float, float, float]]:
    """Where the whole model takes ``ratio`` times what layers say: its seconds, what the cost says then, and the ratio."""
    engine = hdp.shard(make_model(), world)
    cost = CostModel(layers=2, quadratic=quadratic, linear=1e-6, constant=1e-5, head=1e-6)
    layers, piece, speeds = replace(cost, head=0.0), 1e-6, (1.0, 0.5)
    seconds = ratio * predicted(layers, WHOLE_TOKENS, 1, piece)
    watch, found = measure_layers.Stopwatch(world, time.perf_counter), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time_whole", lambda *_: seconds / speeds[world.rank])
        patch.setattr(measure, "WHOLE_TOKENS", (WHOLE_TOKENS,))
        for limit in (measure.WHOLE_BYTES, WHOLE_BYTES):
            patch.setattr(measure, "WHOLE_BYTES", limit)
            made, whole = measure._against_whole(engine, watch, cost, piece, speeds)
            assert made.head == cost.head and made.quadratic == cost.quadratic
            found.append((seconds, predicted(replace(made, head=0.0), WHOLE_TOKENS, 1, piece), whole))
    return found


@pytest.mark.parametrize("quadratic", [1e-9, 0.0])
@pytest.mark.parametrize("ratio", [1.05, 0.8, 1.4])
def test_a_small_model_runs_whole_as_a_check(ranks, ratio, quadratic):
    for checked, too_large in ranks(2).run(against_the_whole, ratio, quadratic):
        seconds, said, whole = checked
        assert whole == pytest.approx(ratio)
        assert said == pytest.approx(seconds / ratio if abs(ratio - 1) < measure.WHOLE_OFF else seconds)
        seconds, said, whole = too_large
        assert whole == 0 and said == pytest.approx(seconds / ratio)


def whole_and_layers(world: hdp.World) -> tuple[float, float]:
    """By a clock that moves by one where a layer is called, by four in the norm behind them and by none in backward."""
    ticks = [0.0]

    class Norm(nn.Identity):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            ticks[0] += 4.0
            return hidden

    class Mlp(nn.Identity):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            ticks[0] += 1.0
            return hidden * 1.0

    model = make_model()
    model.model.norm = Norm()
    for layer in model.model.layers:
        layer.mlp = Mlp()
    engine = hdp.shard(model, world)
    watch = measure_layers.Stopwatch(world, lambda: ticks[0])
    made = measure.make_whole(engine.model, engine.head, world.device, engine.dtype)
    parameters = {id(p) for p in made.parameters()}
    assert len(parameters) == len(list(model.parameters())) and not parameters & {id(p) for p in model.parameters()}
    return measure.time_whole(watch, made, 64, 0.05), float(len(model.model.layers))


def test_the_whole_is_what_the_model_does_beside_its_layers_too(ranks):
    for seconds, layers in ranks(2).run(whole_and_layers):
        assert seconds == layers + 4.0


class Forgotten:
    """Takes what a probe could be compared with out of the entry, so that no noise has a say."""

    def __call__(self, folder: str) -> None:
        (entry,) = Path(folder, "machines").iterdir()
        machine = Machine.read(entry)
        probe = replace(machine.probe, compute=(0.0,) * machine.world_size, seconds=(0.0,) * machine.world_size)
        replace(machine, probe=probe).write(entry)


class Slower:
    """As if links had been four times as fast, or ranks, when the entry was written."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __call__(self, folder: str) -> None:
        Forgotten()(folder)
        (entry,) = Path(folder, "machines").iterdir()
        fields = json.loads(entry.read_text())
        if self.part == "links":
            fields["probe"]["seconds"] = [1e-9] * 2
            fields["intra"]["bandwidth"] = 1e15
        else:
            fields["probe"]["compute"] = [1e12] * 2
            fields["cost"]["linear"] = 1e3
        entry.write_text(json.dumps(fields))


@pytest.mark.parametrize("part", ["links", "compute"])
def test_what_is_off_is_measured_again_aloud(ranks, tmp_path, part):
    folder = str(tmp_path)
    before = ranks(2).run(started, folder)[0][0]
    (found, lines), (other, _) = ranks(2).run(started, folder, Slower(part))
    assert found == other
    warning = next(line for line in lines if line.startswith("WARNING the machine is not as it was"))
    assert ("is sent" if part == "links" else "computes") in warning and "rank " in warning
    assert any("hdp: machine, measured again in" in line for line in lines)
    if part == "links":
        assert found.cost == before.cost and found.tiles == before.tiles and found.intra.bandwidth < 1e14
    else:
        assert found.intra == before.intra and found.cost.linear < 1.0
    (entry,) = (tmp_path / "machines").iterdir()
    assert Machine.read(entry) == found


class Torn:
    def __call__(self, folder: str) -> None:
        (entry,) = Path(folder, "machines").iterdir()
        entry.write_text(entry.read_text()[:100])


def test_a_broken_entry_is_measured_anew(ranks, tmp_path):
    folder = str(tmp_path)
    ranks(2).run(started, folder)
    (found, lines), _ = ranks(2).run(started, folder, Torn())
    assert any("hdp: machine, measured in" in line for line in lines)
    (entry,) = (tmp_path / "machines").iterdir()
    assert Machine.read(entry) == found


def left_behind(world: hdp.World, folder: str) -> list[str]:
    """What of a process measuring changes: names of it."""
    engine = hdp.shard(make_model(), world)
    batch = plan_batch(world, engine, make_documents([90, 9]), 50, planner="naive")
    engine.forward_backward(batch)  # gradients, an arena, messages
    state = watched(engine)
    before = {name: read() for name, read in state.items()}
    with Quickly(folder):
        measure.measure(engine)
    after = {name: read() for name, read in state.items()}
    return [name for name in state if not equal(before[name], after[name])]


def watched(engine: hdp.Engine) -> dict[str, Any]:
    world, model = engine.world, engine.model
    return {
        "parameters": lambda: [p.to_local().clone() for p in engine.parameters()],
        "gradients": lambda: [p.grad.to_local().clone() for p in engine.parameters()],
        "buffers": lambda: [b.clone() for b in model.buffers()],
        "mode": lambda: [m.training for m in model.modules()],
        "hooks": lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random numbers": torch.random.get_rng_state,
        "peak of attention's buffers": lambda: world.runtime.peak_bytes,
        "sent": lambda: (world.channel.sent_bytes, world.channel.messages),
        "waits": lambda: list(world.channel.waited),
        "notes waits": lambda: world.channel.notes_waits,
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_measuring_leaves_nothing_behind(ranks, tmp_path):
    assert ranks(2).run(left_behind, str(tmp_path)) == [[], []]


def unlike_nodes(world: hdp.World, folder: str) -> Any:
    """Two ranks on a node and one on another: links inside and across."""
    world.nodes = (2, 1)
    try:
        return started(world, folder)[0]
    finally:
        world.nodes = (3,)


def test_nodes_of_unlike_size_measure_and_plan(ranks, tmp_path):
    found = ranks(3).run(unlike_nodes, str(tmp_path))
    assert found[0] == found[1] == found[2]
    assert found[0].nodes == (2, 1) and found[0].intra is not None and found[0].inter is not None
    assert found[0].topology().nodes == 2 and found[0].topology().ranks_per_node == 2


SHAPES = {
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3),
    "8B": (128256, 4096, 14336, 32, 32, 8),
}
"""Vocabulary, width, width of the MLP, layers, heads, heads of keys."""


def absent(world: hdp.World, name: str, folder: str) -> Any:
    """A model of which there is nothing but its shape, measured in full width."""
    vocabulary, hidden, inner, layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="hdp")
    engine = Engine(model, world)
    with Quickly(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_layers, "LENGTHS", (4, 16))
        machine = measure.measure(engine)
    assert all(p.is_meta for p in engine.parameters())
    return machine, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_models_too_large_to_run_whole_are_measured_by_their_layers(ranks, tmp_path, name):
    ((machine, parameters),) = ranks(1).run(absent, name, str(tmp_path))
    layers, heads = SHAPES[name][3:5]
    assert machine.cost.layers == layers and machine.shape.heads == heads and machine.parameters == parameters
    weights = machine.shape.layer_weights
    assert 1e8 < 2 * weights / machine.cost.linear < 1e13  # operations a second
    kept = machine.cost.activation_bytes
    assert 4 * SHAPES[name][1] < kept < 4 * 20 * (SHAPES[name][1] + SHAPES[name][2])


def broken(world: hdp.World, folder: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:

            def fail(*_: object) -> None:
                raise RuntimeError("no such kernel")

            patch.setattr(measure, "call_layers", fail)
        return started(world, folder)


def test_what_cannot_be_measured_is_assumed_aloud_on_all_ranks(ranks, tmp_path):
    (found, lines), (other, _) = ranks(2).run(broken, str(tmp_path))
    assert found == other and found.source == "assumed"
    assert any(
        "WARNING the machine is assumed, not measured: " in line and "failed on rank 1" in line for line in lines
    )
    assert not (tmp_path / "machines").exists()


# ------------------------------------------------------------ without ranks


def test_terms_are_found_in_times_that_they_made():
    a, call, b, c = (1e-9, 2.5e-9), (1e-4, 2e-4), (1e-6, 2e-6), (3e-4, 4e-4)
    window = 100

    def attention(p: int, pairs: float) -> float:
        return a[p] * pairs + call[p]

    sizes = (16, 64, 256, 1024)
    tiles = [Tile(tokens=n, forward=attention(0, n * n), backward=attention(1, n * n)) for n in sizes]

    def layer(times: float, width: int) -> Timed:
        def seconds(n: int, p: int) -> float:
            w = min(n, width) if width else n
            return attention(p, 2 * n * w - w * w) + times * (b[p] * n + c[p])

        return Timed(tokens=sizes, seconds=tuple((seconds(n, 0), seconds(n, 1)) for n in sizes), kept=1.0)

    kinds = [Kind(layer=nn.Identity(), count=3, window=0), Kind(layer=nn.Identity(), count=1, window=window)]
    found = terms_of(tiles, [layer(1.0, 0), layer(2.0, window)], kinds)
    assert found.quadratic == pytest.approx(a) and found.call == pytest.approx(call)
    assert found.linear == pytest.approx([1.25 * x for x in b]) and found.constant == pytest.approx(
        [1.25 * x for x in c]
    )


THEN = Probe(compute=(100.0, 100.0), size=1 << 19, seconds=(0.1, 0.1))


@pytest.mark.parametrize(
    ("compute", "seconds", "off"),
    [
        ((100.0, 100.0), (0.1, 0.1), {}),
        ((81.0, 124.0), (0.12, 0.085), {}),
        ((100.0, 70.0), (0.1, 0.1), {"compute": "rank 1 computes 70% of what it did"}),
        ((100.0, 130.0), (0.1, 0.1), {"compute": "rank 1 computes 130% of what it did"}),
        ((100.0, 100.0), (0.4, 0.1), {"links": "rank 0 is sent 25% of what it was in the same time"}),
        ((100.0, 100.0), (0.1, 0.05), {"links": "rank 1 is sent 200% of what it was in the same time"}),
    ],
)
def test_a_quarter_is_off(compute, seconds, off):
    assert what_is_off(THEN, replace(THEN, compute=compute, seconds=seconds)) == off


@pytest.mark.parametrize("nodes", [(1, 1, 1, 1), (2, 2), (3, 2), (4,), (1, 3, 2)])
def test_every_message_across_nodes_has_its_receiver(nodes):
    world = sum(nodes)
    of = measure_links.node_of_rank(nodes)
    order = measure_links.across(nodes)
    assert sorted(order) == list(range(world))
    for distance in range(1, world):
        for is_inter in (False, True):
            ring = order if is_inter else list(range(world))
            pairs = [
                measure_links._if_between(measure_links.peers_of(ring, r, distance)[0], r, of, is_inter)
                for r in range(world)
            ]
            sends = {(r, to) for r, (to, _) in enumerate(pairs) if to is not None}
            receives = {(source, r) for r, (_, source) in enumerate(pairs) if source is not None}
            assert sends == receives and all((of[a] != of[b]) == is_inter for a, b in sends)
    inside = [measure_links._inside(nodes, r) for r in range(world)]
    assert {(r, to) for r, (to, _) in enumerate(inside) if to is not None} == {
        (source, r) for r, (_, source) in enumerate(inside) if source is not None
    }


def test_quotas_are_part_of_the_key(monkeypatch):
    described = []
    for quota in (["cpu.max max 100000"], ["cpu.max 50000 100000"]):
        monkeypatch.setattr(machine_cache, "cpu_quota", lambda quota=quota: quota)
        world = type("World", (), {"device": torch.device("cpu")})()
        described.append(machine_cache.describe_rank(world))
    assert described[0] != described[1] and described[0]["host"] == described[1]["host"]
