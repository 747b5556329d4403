"""Fits on made-up times, the profile's file, and a real measurement of a tiny model; the commands end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hdp.balance import CostModel, Link, PlanError
from hdp.balance.machine import Machine
from hdp.balance.measured import Sample, fit, predicted
from hdp.cli import main


def made_up(a: float, b: float, c: float, layers: int, head: float) -> list[Sample]:
    samples = []
    for length, documents in ((128, 1), (512, 1), (2048, 1), (512, 4), (128, 16)):
        tokens, squares = length * documents, length * length * documents
        layer = a * squares + b * tokens + c
        forward = layers * layer + tokens * head / 3
        backward = layers * (2.5 * a * squares + 2 * b * tokens + 2 * c) + tokens * head * 2 / 3
        samples.append(Sample(length=length, documents=documents, forward=forward, backward=backward))
    return samples


@pytest.mark.parametrize("terms", [(1e-9, 1e-6, 1e-4), (1e-9, 1e-6, 0.0), (0.0, 1e-6, 1e-4)])
def test_fit_finds_the_terms(terms: tuple[float, float, float]):
    forward, backward = fit(made_up(*terms, layers=3, head=2e-7), layers=3, head=2e-7)
    assert forward == pytest.approx(terms, rel=1e-6, abs=1e-15)
    assert backward == pytest.approx([2.5 * terms[0], 2 * terms[1], 2 * terms[2]], rel=1e-6, abs=1e-15)


def test_fit_has_no_negative_terms():
    samples = [Sample(length=n, documents=1, forward=0.01 * n**0.5, backward=0.01 * n**0.5) for n in (64, 256, 1024)]
    for terms in fit(samples, layers=1, head=0.0):
        assert min(terms) >= 0 and max(terms) > 0


def profile_of(samples: list[Sample], intra: Link | None, inter: Link | None) -> Machine:
    return Machine(
        model="m",
        device="d",
        nodes=(2, 2),
        flops=1e9,
        cost=CostModel(layers=3, quadratic=1e-9, linear=1e-6),
        samples=tuple(samples),
        intra=intra,
        inter=inter,
        parameters=10,
    )


def test_profile_file(tmp_path: Path):
    made = profile_of(made_up(1e-9, 1e-6, 0.0, 3, 0.0), None, Link(bandwidth=1e9, latency=1e-5))
    made.write(tmp_path / "p.json")
    read = Machine.read(tmp_path / "p.json")
    assert read == made
    topology = read.topology(world_size=16)
    assert (topology.world_size, topology.intra, topology.inter) == (16, made.inter, made.inter)
    sample = made.samples[0]
    assert predicted(read.cost, sample.length, sample.documents) == pytest.approx(
        3.5 * 3 * 1e-9 * 128**2 + 3 * 3 * 1e-6 * 128
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"format": 99}', '{"format": 1, "cost": 3}'])
def test_refuses_what_is_no_profile(tmp_path: Path, text: str):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlanError, match="hdp profile"):
        Machine.read(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlap", "x"), ("gather_bandwidth", "fast"), ("root_share", -1), ("parameters", 0), ("nodes", [0])],
)
def test_a_profile_with_a_wrong_number_names_it(tmp_path: Path, name: str, value: object):
    path = tmp_path / "p.json"
    profile_of([], None, None).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(PlanError, match=f"machine: {name} is {value!r}"):
        Machine.read(path)


def test_profile_without_links_says_so():
    with pytest.raises(PlanError, match="no links"):
        profile_of([], None, None).topology()


def test_more_layers_than_measured():
    made = replace(profile_of([], None, None), cost=CostModel(layers=2, quadratic=1.0, linear=1.0, window_layers=1))
    assert (made.with_layers(8).cost.layers, made.with_layers(8).cost.window_layers) == (8, 4)


def test_command_profile_then_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "p.json"
    arguments = ["--model", str(tmp_path), "--lengths", "16,64,128", "--out", str(out)]
    assert main(["profile", *arguments]) == 0
    text = capsys.readouterr().out
    head = ["documents", "tokens", "forward", "s", "backward", "s", "fit", "s", "error", "shape", "s"]
    assert head in [line.split() for line in text.splitlines()] and "from shape" in text
    profile = Machine.read(out)
    assert profile.cost.layers == 2 and profile.cost.ring_bytes == 2 * 2 * 8 * 4
    assert [(s.length, s.documents) for s in profile.samples] == [(16, 1), (64, 1), (128, 1), (32, 4)]
    assert profile.cost.activation_bytes > 32 * 4  # at least a layer's input
    simulated = tmp_path / "s.json"
    arguments = ["--machine", str(out), "--distribution", "github", "--tokens", "20000", "--context", "4096"]
    arguments += ["--world-size", "4", "--ranks-per-node", "2", "--capacity", "2048", "--json", str(simulated)]
    assert main(["simulate", *arguments]) == 2  # one rank measured no links
    assert "the machine has no links" in capsys.readouterr().err
    arguments += ["--inter-bandwidth", "1e9"]
    assert main(["simulate", *arguments, "--planners", "static,auto", "--sharding", "none"]) == 0
    planners = json.loads(simulated.read_text())["planners"]
    assert [p["planner"] for p in planners] == ["static", "auto"]
    assert [p["speed_up"] for p in planners] == [1.0, planners[0]["seconds"] / planners[1]["seconds"]]


def test_command_simulate_draws_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("30000\n500\n500\n1000\n")
    base = ["simulate", "--lengths", str(lengths), "--world-size", "4", "--capacity", "8192"]
    assert main([*base, "--svg", str(tmp_path / "s.svg")]) == 0
    assert "speed-up" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "s.svg").read_text()
    assert main([*base, "--planners", "nothing"]) == 2
    assert "unknown planner 'nothing'" in capsys.readouterr().err
    lengths.write_text("300000\n")
    assert main(base) == 3
    assert "does not fit" in capsys.readouterr().err
    assert main([*base, "--steps", "2"]) == 2
    assert main(["simulate", "--lengths", str(tmp_path / "none"), "--world-size", "4", "--capacity", "1"]) == 2


def test_command_profile_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["profile", "--lengths", "1,x"]) == 2
    assert "--lengths is '1,x'" in capsys.readouterr().err
    assert main(["profile", "--layers", "99"]) == 2
    assert "--layers is 99" in capsys.readouterr().err
    assert main(["profile", "--budget", "-1"]) == 2
    assert "--budget is -1.0" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["profile", "--model", str(tmp_path)]) == 2
    assert f"--model is {str(tmp_path)!r}" in capsys.readouterr().err
    assert main(["profile", "--out", str(tmp_path / "none" / "p.json")]) == 1  # before anything is measured
    assert "there is no folder" in capsys.readouterr().err


def test_command_simulate_of_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HDP_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "x" * 30}) for _ in range(40)))
    assert (
        main(["simulate", "--dataset", str(rows), "--world-size", "4", "--capacity", "1024", "--planners", "auto"]) == 0
    )
    assert "rows.jsonl, 0.00124M tokens a step" in capsys.readouterr().out
