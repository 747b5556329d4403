"""``hdp plan`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hdp.balance import CostModel, Link
from hdp.balance.distributions import read_lengths
from hdp.balance.machine import Machine
from hdp.balance.measured import Sample
from hdp.cli import main
from hdp.commands.profile import describe

ARGUMENTS = ["--world-size", "8", "--ranks-per-node", "8", "--capacity", "64"]

HEAD = {"world_size", "capacity", "regime", "planner", "planning_seconds", "predicted_seconds", "lower_bound_seconds"}
HEAD |= {"micro_batches"}


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("100\n0\n20\n64\n7\n")
    return path


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_json_covers_every_token(lengths: Path, regime: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--planner auto --model llama-7b --flops 400e12 --intra-bandwidth 400e9 --inter-bandwidth 50e9 --json -"
    code = main(
        ["plan", "--lengths", str(lengths), *ARGUMENTS, "--regime", regime, *arguments.split(), "--offload", "off"]
    )
    made = json.loads(capsys.readouterr().out)
    assert code == 0
    assert set(made) == HEAD
    assert all(set(mb) == {"rank", "slot", "offload_ratio", "shards"} for mb in made["micro_batches"])
    shards = [shard for mb in made["micro_batches"] for shard in mb["shards"]]
    assert all(set(shard) == {"sequence", "ranges", "group", "schedule"} for shard in shards)
    assert (made["world_size"], made["capacity"], made["regime"], made["planner"]) == (8, 64, regime, "auto")
    assert made["predicted_seconds"] >= made["lower_bound_seconds"] > 0
    assert made["planning_seconds"] > 0
    covered: dict[int, list[list[int]]] = {}
    for mb in made["micro_batches"]:
        for shard in mb["shards"]:
            assert mb["rank"] in shard["group"]
            covered.setdefault(shard["sequence"], []).extend(shard["ranges"])
    for sequence, length in enumerate([100, 0, 20, 64, 7]):
        tokens = [t for start, stop in covered.get(sequence, []) for t in range(start, stop)]
        assert sorted(tokens) == list(range(length))


def test_table_pictures_and_trace(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {kind: tmp_path / f"{kind}.of-a-plan" for kind in ("png", "svg", "trace")}
    options = [part for kind, path in outputs.items() for part in (f"--{kind}", str(path))]
    assert main(["plan", "--lengths", str(lengths), *ARGUMENTS, *options]) == 0
    shown = capsys.readouterr().out
    assert "5 documents, 191 tokens" in shown
    assert "waiting" in shown
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in outputs["svg"].read_text()
    events = json.loads(outputs["trace"].read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} <= set(range(8))
    assert all(e["dur"] > 0 for e in events if e["ph"] == "X")


def test_too_long_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("600\n")
    assert main(["plan", "--lengths", str(path), *ARGUMENTS]) == 3
    assert "offload ratio of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3\nx\n", "{}, line 2: 'x'"),
        ("1\n\n2\n", "{}, line 2: ''"),
        ("1.5\n", "{}, line 1: '1.5'"),
        ("7\n-1\n", "{}, line 2: '-1'"),
        ("1_0\n", "{}, line 1: '1_0'"),
        ("9" * 30 + "\n", "{}, line 1: '999"),
        ("", "lengths file '{}' is empty"),
    ],
)
def test_bad_files_name_the_line(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    assert main(["plan", "--lengths", str(path), *ARGUMENTS]) == 2
    assert said.format(path) in capsys.readouterr().err
    assert main(["plan", "--lengths", str(tmp_path / "missing"), *ARGUMENTS]) == 2


def test_line_ends_of_any_system(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    for text in ("5\r\n 7\r\n", "5\n7", "5\n7\n\n\n", "\ufeff5\n7\n"):
        path.write_bytes(text.encode())
        assert read_lengths(path).tolist() == [5, 7]


@pytest.mark.parametrize(
    "options",
    [
        ["--world-size", "0"],
        ["--capacity", "x"],
        ["--tokens", "nan"],
        ["--tokens", "inf"],
        ["--ranks-per-node", "-1"],
        ["--offload", "nan"],
        ["--regime", "x"],
    ],
    ids=str,
)
def test_bad_arguments_exit_with_2(options: list[str], lengths: Path) -> None:
    with pytest.raises(SystemExit) as error:
        main(["plan", "--lengths", str(lengths), *ARGUMENTS, *options])
    assert error.value.code == 2
    assert main(["plan", "--lengths", str(lengths), *ARGUMENTS, "--flops", "0"]) == 2


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_model_that_is_no_configuration_is_named(text: str, tmp_path: Path, lengths: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["plan", "--lengths", str(lengths), *ARGUMENTS, "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_documents_of_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are tokens unless a tokenizer is named: 40 documents of 30 tokens or so, of which 200 tokens are drawn."""
    monkeypatch.setenv("HDP_CACHE", str(tmp_path / "cache"))
    rows = [json.dumps({"text": "x" * 30}) for _ in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = ["plan", "--dataset", str(tmp_path / "rows.jsonl"), "--tokens", "200", *ARGUMENTS, "--json", "-"]
    assert main(options) == 0
    made = json.loads(capsys.readouterr().out)
    held = sum(b - a for mb in made["micro_batches"] for s in mb["shards"] for a, b in s["ranges"])
    assert 200 <= held < 240
    assert main(["plan", "--dataset", str(tmp_path / "missing"), *ARGUMENTS]) == 2
    assert "--dataset" in capsys.readouterr().err


def test_planning_needs_no_torch(lengths: Path) -> None:
    script = (
        "import sys; from hdp.cli import main; code = main(sys.argv[1:]); assert code == 0; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    command = [sys.executable, "-c", script, "plan", "--lengths", str(lengths), *ARGUMENTS]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds writes on standard error."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "assumed"),
    [
        (
            [],
            "assumes the model llama-7b and the device h100-sxm (445.1 TFLOP/s, 370 GB/s inside a node, 45 GB/s across",
        ),
        (["--model", "llama-70b"], "assumes the device h100-sxm (445.1 TFLOP/s"),
        (["--device", "l4"], "assumes the model llama-7b: give --model, or --machine"),
        (["--model", "llama-13b", "--device", "a100-80g"], ""),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_what_is_assumed_is_said(
    command: str, given: list[str], assumed: str, lengths: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, command, "--lengths", str(lengths), *ARGUMENTS, *given)
    assert text.count("\n") == bool(assumed) and assumed in text
    assert text.startswith(f"hdp {command}: assumes" if assumed else "")


def test_a_profile_leaves_nothing_to_assume(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = Link(bandwidth=1e9)
    cost = CostModel(layers=2, quadratic=1e-9, linear=1e-6)
    made = Machine(
        model="m", device="d", nodes=(8,), flops=1e9, cost=cost, samples=(), intra=link, inter=link, parameters=10
    )  # fmt: skip
    made.write(tmp_path / "profile.json")
    assert (
        said(capsys, "plan", "--lengths", str(lengths), *ARGUMENTS, "--machine", str(tmp_path / "profile.json")) == ""
    )


def test_a_profile_of_a_device_that_nobody_knows_is_compared_with_nothing() -> None:
    cost = CostModel(layers=2, quadratic=1e-9, linear=1e-6)
    sample = Sample(length=128, documents=1, forward=1.0, backward=2.0, fitted=3.0)
    made = Machine(
        model="m", device="Z9", nodes=(1,), flops=1e9, cost=cost, samples=(sample,), intra=None, inter=None,
        parameters=10,
    )  # fmt: skip
    lines = describe(made, None).splitlines()
    assert lines[2].split()[-1] == "-" and lines[4].split()[-1] == "-"
