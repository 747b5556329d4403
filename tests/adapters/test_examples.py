"""Every example over two ranks: the losses of its first ten steps are those of plain training in one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

STEPS = ("--steps", 10, "--tokens-per-step", SETTINGS["tokens_per_step"], "--capacity", 128)
TOLERANCE = 1e-5


def agree(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) > 0
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < TOLERANCE
    assert (
        expected[0] - expected[-1] > 0.5 or len(expected) == 1
    )  # it learns: later steps depend on the earlier gradients


def printed(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", output)]


def logged(folder: Path, name: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_plain_loop(run, reference, base):
    run("finetune.py", *STEPS, "--held-out", 0.2, "--held-out-tokens", 600)
    lines = [json.loads(line) for line in (base / "runs/finetune/metrics.jsonl").read_text().splitlines()]
    agree([line["loss"] for line in lines if line["kind"] == "train"], reference["finetune"])


def test_accelerate(run, reference, base):
    outcome = run("accelerate_script.py", *STEPS)
    agree(printed(outcome.outputs[0]), reference["accelerate"])
    assert printed(outcome.outputs[1]) == []
    assert AutoModelForCausalLM.from_pretrained(base / "runs/accelerate").num_parameters()


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_lora(run, reference, base, regime):
    outcome = run("lora.py", *STEPS, "--regime", regime, "--output", base / regime, "--peak", 1e12)
    agree(printed(outcome.outputs[0]), reference["lora"])
    assert "MFU" in outcome.outputs[0]
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    adapted = peft.PeftModel.from_pretrained(model, base / regime)
    weights = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(weights) == 2 * 7 * model.config.num_hidden_layers
    assert all(
        float(p.abs().max()) > 0 for name, p in weights.items() if "lora_B" in name
    )  # trained: they begin at zero


def test_sft_trainer_learns_completions_only(run, reference, base):
    arguments = ("--documents", SETTINGS["sft_documents"], "--max-length", SETTINGS["sft_length"], "--use-cpu")
    arguments += ("--tokens-per-step", SETTINGS["sft_tokens_per_step"], "--capacity", 200, "--steps", 10)
    run("sft.py", *arguments, "--output", base / "sft", data=False)
    agree(logged(base / "sft"), reference["sft"])


TRAINER = (*STEPS, "--use-cpu", "--held-out", 0.2, "--held-out-tokens", 600, "--save-steps", 5)


@pytest.mark.parametrize(("engine", "regime"), [("fsdp", "step"), ("fsdp", "slot"), ("ddp", "step")])
def test_trainer(run, reference, base, engine, regime):
    output = base / f"trainer-{engine}-{regime}"
    run("trainer.py", *TRAINER, "--engine", engine, "--regime", regime, "--output", output)
    agree(logged(output), reference["trainer"])
    agree(logged(output, "eval_loss")[-1:], reference["trainer evaluation"])
    assert all(norm > 0 for norm in logged(output, "grad_norm"))
    first, last = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base / "model", output)
    )
    assert last.lm_head.weight is last.model.embed_tokens.weight
    for (name, before), after in zip(first.named_parameters(), last.parameters(), strict=True):
        assert before.shape == after.shape and not torch.equal(before, after), name


def test_trainer_resumes_where_it_was_with_fewer_ranks(run, reference, base):
    folder, kept = base / "resumed", base / "resumed-kept"
    run("trainer.py", *TRAINER, "--output", folder)
    (folder / "checkpoint-10").rename(kept)  # as if the job had ended between steps 5 and 10
    run("trainer.py", *TRAINER, "--capacity", 256, "--output", folder, "--resume", ranks=1)
    agree(logged(folder), reference["trainer"])
    once, resumed = (
        AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32).state_dict()
        for part in (kept, folder / "checkpoint-10")
    )
    for name, weight in once.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=2e-5, msg=name)
