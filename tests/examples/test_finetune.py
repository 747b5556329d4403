"""The fine-tuning script, end to end: what it leaves behind, and one clear error for every mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import Server

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
PATIENT = """
import runpy
import sys
from hdp.report import failures
failures.PATIENCE = 3600  # however much later rank 0 is started
sys.argv[:2] = sys.argv[1:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = ["--max-length", "256", "--capacity", "128", "--tokens-per-step", "640", "--steps", "4", "--lr", "5e-3"]
SMALL += ["--held-out", "0.2", "--held-out-tokens", "600", "--timeout", "300"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number:02}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * (1 + number % 9))
    return folder


@pytest.fixture
def start(server, tmp_path, corpus):
    def start(*arguments: object, ranks: int = 2, data: Path | None = corpus, script: Path = SCRIPT):
        chosen = () if data is None else ("--data", data)
        return server.run(
            script, *chosen, *SMALL, *arguments, ranks=ranks, folder=tmp_path, HDP_CACHE=str(tmp_path / "cache")
        )

    return start


def metrics(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_a_run_learns_and_leaves_its_folder(start, tmp_path):
    outcome = start().check()
    run = tmp_path / "runs" / "finetune"
    assert {p.name for p in run.iterdir()} == {
        "loss.png", "machine.json", "metrics.jsonl", "settings.json", "step.json", "step.png", "summary.txt", "tensorboard"
    }  # fmt: skip
    before, after = (line["loss"] for line in metrics(run, "held_out"))
    assert after < before - 0.2
    steps = metrics(run, "train")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert any("x2" in step["groups"] for step in steps)  # some document needed both ranks
    assert all(len(step["busy_seconds"]) == 2 and step["imbalance"] >= 1 for step in steps)
    assert (run / "summary.txt").read_text() in outcome.outputs[0]
    assert outcome.lines(1) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_settings_give_the_same_losses_bit_for_bit(start, tmp_path, ranks):
    for _ in range(2):
        start("--capacity", 256 // ranks, ranks=ranks).check()
    first, second = (
        [step["loss"] for step in metrics(tmp_path / "runs" / name, "train")] for name in ("finetune", "finetune-2")
    )
    assert first == second and len(first) == 4


def test_planners_train_on_the_same_batches(start, tmp_path):
    for planner in ("static", "naive"):
        start("--planner", planner, "--name", planner).check()
    static, naive = (metrics(tmp_path / "runs" / name, "train") for name in ("static", "naive"))
    assert [step["tokens"] for step in static] == [step["tokens"] for step in naive]
    assert static[0]["loss"] == pytest.approx(naive[0]["loss"], rel=1e-5)
    assert {step["planner"] for step in static} == {"static"}


def test_activations_change_no_bit(start, tmp_path):
    runs = {}
    for policy in ("keep", "offload", "recompute", "auto", "plan"):
        start("--activations", policy, "--scratch", tmp_path, "--steps", 2, "--name", policy).check()
        runs[policy] = [step["loss"] for step in metrics(tmp_path / "runs" / policy, "train")]
    planned = runs.pop("plan")  # may have other groups, so that sums round differently
    assert all(losses == runs["keep"] for losses in runs.values()) and len(runs["keep"]) == 2
    assert planned == pytest.approx(runs["keep"], rel=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("hdp-offload-")]


def test_a_model_and_a_tokenizer_from_disk(start, tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "def", "return", "x", "+", "(", ")", ":"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(
        tmp_path / "model"
    )
    config = transformers.Qwen2Config(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    start("--model", tmp_path / "model", "--tokenizer", tmp_path / "model", "--steps", 2).check()
    assert json.loads((tmp_path / "runs/finetune/settings.json").read_text())["model"]["model_type"] == "qwen2"
    outcome = start("--model", tmp_path / "model")
    assert "error: the tokenizer has 257 ids, the model 16" in outcome.outputs[0]


def empty_file(folder: Path) -> Path:
    (folder / "bad").mkdir()
    (folder / "bad" / "empty.txt").write_bytes(b"")
    return folder / "bad"


def undecodable(folder: Path) -> Path:
    (folder / "bad").mkdir()
    (folder / "bad" / "latin.txt").write_bytes(b"\xe9t\xe9")
    return folder / "bad"


MISTAKES = {
    "no data": (lambda folder: folder / "nowhere", (), ["no data at"]),
    "an empty file": (empty_file, (), ["holds no document", "1 empty (empty.txt)"]),
    "undecodable bytes": (undecodable, (), ["holds no document", "1 not UTF-8 text (latin.txt)"]),
    "capacity 0": (None, ("--capacity", 0), ["capacity is 0:"]),
    "unknown planner": (None, ("--planner", "best"), ["unknown planner 'best': choose one of", "naive"]),
    "document too long": (None, ("--capacity", 100), ["does not fit 2 ranks x 100 tokens"]),
    "clip 0": (None, ("--clip", 0), ["max_norm is 0.0"]),
    "no model": (None, ("--model", "nowhere"), ["no model at"]),
    "no tokenizer": (None, ("--tokenizer", "nowhere"), ["no tokenizer at"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_from_rank_0(start, tmp_path, mistake):
    make, arguments, parts = MISTAKES[mistake]
    outcome = start(*arguments, **({} if make is None else {"data": make(tmp_path)}))
    assert not outcome.timed_out and all(code != 0 for code in outcome.codes)
    errors = [line for line in outcome.outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.outputs[0]
    for part in parts:
        assert part in errors[0]
    for output in outcome.outputs:
        assert "Traceback (most recent call last)" not in output
    # A rank that was ended before it met the error itself may say where it stood, in one line.
    told = outcome.lines(1)
    assert len(told) <= 1 and all(line.startswith("rank 1: told to end by SIGTERM, at: ") for line in told), told


def test_arguments_that_do_not_exist_are_told_by_rank_0(start):
    outcome = start("--stpes", 3)
    # Rank 1 is ended before it has read its arguments, if it is that late.
    assert not outcome.timed_out and outcome.codes[0] == 2 and outcome.codes[1] in (2, -signal.SIGTERM)
    assert outcome.outputs[0].splitlines()[-1].endswith("error: unrecognized arguments: --stpes 3")
    assert outcome.lines(1) == []


def test_what_is_skipped_is_said_once_and_training_goes_on(start, corpus):
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "latin.txt").write_bytes(b"\xe9t\xe9")
    outcome = start("--steps", 1).check()
    assert "left out 1 empty (empty.txt), 1 not UTF-8 text (latin.txt)" in outcome.outputs[0]
    assert outcome.lines(1) == []


def test_torchrun_closes_with_the_same_error(tmp_path, corpus):
    script = tmp_path / "patient.py"
    script.write_text(PATIENT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(SCRIPT), "--data", str(corpus), *SMALL, "--capacity", "0"],
        cwd=tmp_path,
        env={**os.environ, "HDP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert f"traceback : {told[0]}" in done.stderr  # torchrun's closing table
    assert "[rank 1]" not in done.stderr
