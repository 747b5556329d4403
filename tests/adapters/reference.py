"""Plain training in one process, without anything of hdp but its reader of documents: what the examples must reproduce.

A script: ``reference.py SETTINGS.json``; writes ``{name: [loss of each step]}`` beside the settings.
Global batches are drawn here by hand, in the order that hdp documents: a shuffle per epoch, then as many documents as fit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import finetune
import lora
import numpy as np
import sft
import torch
import torch.nn.functional as F
import trainer as trainer_example
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

import hdp.data

IGNORE = -100


def draw(lengths: Sequence[int], tokens_per_step: int, seed: int, steps: int) -> list[list[int]]:
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        batch: list[int] = []
        for index in np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist():
            if batch and sum(lengths[i] for i in batch) + lengths[index] > tokens_per_step:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
        epoch += 1
    return batches[:steps]


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), width)
    out = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE),
    }
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        out["input_ids"][i, :n] = torch.as_tensor(row["input_ids"])
        out["attention_mask"][i, :n] = 1
        out["labels"][i, :n] = torch.as_tensor(row.get("labels", row["input_ids"]))
    return out


class GivenBatches:
    """A trainer that trains on ``batches`` (rows of its data set), one per step, in that order."""

    batches: list[list[int]]

    def get_train_dataloader(self) -> DataLoader:
        made = [self.data_collator([self.train_dataset[i] for i in batch]) for batch in self.batches]
        return DataLoader(made, batch_size=None)

    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]


class PlainTrainer(GivenBatches, Trainer):
    pass


class PlainSFTTrainer(GivenBatches, SFTTrainer):
    pass


COMMON = {
    "max_steps": 10, "warmup_steps": 0.1, "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "use_cpu": True,
    "save_strategy": "no",
}  # fmt: skip


def plain_model(settings: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(settings["model"], attn_implementation="sdpa", dtype=torch.float32)


def by_trainer(settings: dict[str, Any], documents: hdp.data.Documents) -> dict[str, list[float]]:
    args = TrainingArguments(
        output_dir=settings["folder"] + "/plain", learning_rate=settings["lr"], lr_scheduler_type="cosine",
        weight_decay=0.1, per_device_eval_batch_size=1000, **COMMON,
    )  # fmt: skip
    set_seed(args.seed)
    train, held_out = documents.split(held_out=0.2, seed=0)
    rows = trainer_example.rows(train)
    held_out = trainer_example.rows(held_out.sample(tokens=600, seed=0))
    plain = PlainTrainer(plain_model(settings), args, data_collator=pad, train_dataset=rows, eval_dataset=held_out)
    plain.batches = draw(train.lengths.tolist(), settings["tokens_per_step"], args.seed, 10)
    plain.train()
    return {"trainer": plain.losses(), "trainer evaluation": [plain.evaluate()["eval_loss"]]}


def by_sft(settings: dict[str, Any]) -> dict[str, list[float]]:
    args = SFTConfig(
        output_dir=settings["folder"] + "/plain", learning_rate=settings["lr"], max_length=settings["sft_length"],
        gradient_checkpointing=False, bf16=False, **COMMON,
    )  # fmt: skip
    set_seed(args.seed)
    data = sft.functions(settings["sft_documents"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    plain = PlainSFTTrainer(plain_model(settings), args, train_dataset=data, processing_class=tokenizer)
    rows = plain.train_dataset
    assert any(IGNORE in row["labels"] for row in rows), "prompts are masked"
    plain.batches = draw([len(row["input_ids"]) for row in rows], settings["sft_tokens_per_step"], args.seed, 10)
    plain.train()
    return {"sft": plain.losses()}


def loop(
    model: torch.nn.Module,
    documents: Sequence[torch.Tensor],
    batches: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
) -> Iterator[float]:
    """One document at a time; clips to 1; yields the mean loss over label tokens of each step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for batch in batches:
        labels = sum(len(documents[i]) - 1 for i in batch)
        total = 0.0
        for i in batch:
            if len(documents[i]) > 1:
                logits = model(input_ids=documents[i][None], use_cache=False).logits[0, :-1]
                loss = F.cross_entropy(logits, documents[i][1:], reduction="sum") / labels
                loss.backward()
                total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield total


def by_loops(settings: dict[str, Any], documents: hdp.data.Documents) -> dict[str, list[float]]:
    batches = draw(documents.lengths.tolist(), settings["tokens_per_step"], 0, 10)
    model = plain_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0.1)
    found = {"accelerate": list(loop(model, documents, batches, optimizer, lambda step: 1.0 - 0.09 * step))}

    torch.manual_seed(0)
    model = lora.adapt(plain_model(settings), 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings["lr"])
    found["lora"] = list(loop(model, documents, batches, optimizer, lambda step: 1.0))

    train, _ = documents.split(held_out=0.2, seed=0)
    batches = draw(train.lengths.tolist(), settings["tokens_per_step"], 0, 10)
    model = plain_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.1)
    rate = lambda step: finetune.learning_rate(step, steps=10, warmup=0.1)  # noqa: E731
    found["finetune"] = list(loop(model, train, batches, optimizer, rate))
    return found


def main() -> None:
    path = Path(sys.argv[1])
    settings = json.loads(path.read_text())
    documents = hdp.data.open_documents(settings["data"], tokenizer="bytes", max_length=settings["max_length"])
    sft.byte_tokenizer().save_pretrained(settings["model"])
    found = by_trainer(settings, documents) | by_sft(settings) | by_loops(settings, documents)
    path.with_name("reference.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
