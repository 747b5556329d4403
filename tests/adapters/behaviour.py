"""What trainers do on real ranks beyond their losses: ``behaviour.py MODEL FOLDER NAME...`` runs functions of this file."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hdp
import hdp.report
from hdp.parallel.adapters import HdpConfig, HdpTrainer, HdpTrainerMixin, full_state_dict
from hdp.parallel.flops import ModelFlops

LENGTHS = [60, 5, 17, 40, 90, 7, 33, 1, 25, 12, 3, 70]
PLAN = HdpConfig(tokens_per_step=100, capacity=64)


class HdpSFTTrainer(HdpTrainerMixin, SFTTrainer):
    pass


class Jobs:
    """What all functions need."""

    def __init__(self, model: str, folder: Path) -> None:
        self.source, self.folder = model, folder
        self.world = hdp.init(device="cpu")

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)

    def arguments(self, name: str, kind: type = TrainingArguments, **options: Any) -> Any:
        fixed = {"learning_rate": 5e-3, "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "use_cpu": True}
        return kind(output_dir=str(self.folder / name), **{**fixed, "save_strategy": "no", **options})

    def trainer(self, name: str, model: Any = None, data: Any = None, plan: HdpConfig = PLAN, **options: Any) -> Any:
        given = {key: options.pop(key) for key in ("eval_dataset", "callbacks", "optimizers") if key in options}
        return HdpTrainer(
            self.model() if model is None else model, self.arguments(name, **options), hdp=plan, world=self.world,
            train_dataset=rows() if data is None else data, **given,
        )  # fmt: skip


def rows(lengths: list[int] = LENGTHS, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": [torch.randint(0, 250, (n,), generator=generator) for n in lengths]})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def spy(trainer: Any) -> list[Any]:
    """The batches that the trainer's engine is given."""
    batches: list[Any] = []
    run = trainer.engine.forward_backward
    trainer.engine.forward_backward = lambda batch: (batches.append(batch), run(batch))[1]
    return batches


class Counts(TrainerCallback):
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.calls["step"] += 1

    def on_epoch_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.calls["epoch"] += 1


def epochs_see_every_document_as_often_as_they_say(jobs: Jobs) -> None:
    counts = Counts()
    trainer = jobs.trainer("epochs", num_train_epochs=3, include_num_input_tokens_seen="all", callbacks=[counts])
    batches = spy(trainer)
    trainer.train()
    seen = Counter(index for batch in batches for index in batch.indices)
    assert seen == Counter({i: 3 for i in range(len(LENGTHS))}), seen
    steps = len(batches)
    assert trainer.state.global_step == trainer.state.max_steps == counts.calls["step"] == steps
    assert counts.calls["epoch"] == 3 and abs(trainer.state.epoch - 3) < 3 / steps * 2
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}  # the schedule was as long as the run
    assert trainer.state.num_input_tokens_seen == 3 * sum(LENGTHS)
    flops = ModelFlops.of(trainer.model)
    expected = sum(flops.step(batch.plan.lengths) for batch in batches)
    assert abs(trainer.state.total_flos / expected - 1) < 1e-6, (trainer.state.total_flos, expected)
    again = losses(trainer)
    trainer.train()  # a second run begins at step 0 with the weights of the first
    assert losses(trainer)[0] < again[0] - 0.5 and trainer.state.global_step == steps


def evaluation_needs_no_document_on_every_rank(jobs: Jobs) -> None:
    data = {"one": rows([9]), "many": rows()}
    trainer = jobs.trainer("evaluation", eval_dataset=data, max_steps=2, eval_strategy="steps", eval_steps=1)
    found = trainer.evaluate()
    for name, part in data.items():
        total = labels = 0.0
        plain = jobs.model()
        for row in part:
            ids = torch.as_tensor(row["input_ids"])
            if len(ids) > 1:
                with torch.no_grad():
                    logits = plain(input_ids=ids[None]).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
                labels += len(ids) - 1
        assert abs(found[f"eval_{name}_loss"] - total / labels) < 1e-5, (name, found)
    trainer.train()
    assert sum("eval_one_loss" in entry for entry in trainer.state.log_history) == 2


def a_batch_without_labels_changes_nothing(jobs: Jobs) -> None:
    given = [{"input_ids": [3] * 100, "labels": [3] * 100}, {"input_ids": [4] * 100, "labels": [-100] * 100}]
    trainer = jobs.trainer("labels", data=given, max_steps=2, train_sampling_strategy="sequential", weight_decay=0.0)
    weights: list[dict[str, torch.Tensor]] = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, *args: Any, **keywords: Any) -> None:
            weights.append({n: p.to_local().clone() for n, p in trainer.model.named_parameters()})

    trainer.add_callback(Snapshot())
    trainer.train()
    assert len(weights) == 2 and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert all(math.isfinite(loss) for loss in losses(trainer))


def the_best_model_comes_back(jobs: Jobs) -> None:
    trainer = jobs.trainer(
        "best", max_steps=4, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, eval_dataset=rows(seed=5),
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{1 + evaluations.index(max(evaluations))}"
    found = full_state_dict(trainer.model)
    assert bool(found) == (jobs.world.rank == 0)
    kept = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], kept[name]) for name in found)
    assert abs(trainer.evaluate()["eval_loss"] - max(evaluations)) < 1e-6


def adapters_resume(jobs: Jobs) -> None:
    def make() -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", modules_to_save=None
        )
        model = peft.get_peft_model(jobs.model(), config)
        plan = HdpConfig(tokens_per_step=1000, capacity=64)  # the same documents in every step
        return jobs.trainer("adapters", model=model, plan=plan, max_steps=6, save_strategy="steps", save_steps=3)

    first = make()
    first.train()
    saved = sorted(p.name for p in Path(first.args.output_dir, "checkpoint-3").iterdir())
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved, saved
    resumed = make()
    resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-3")))
    assert max(abs(a - b) for a, b in zip(losses(first), losses(resumed), strict=True)) < 1e-6
    assert losses(first)[0] - losses(first)[-1] > 0.02


def a_found_capacity_is_resumed(jobs: Jobs) -> None:
    """With the memory of its beginning, whatever is free by then."""

    def make(tokens: int) -> Any:
        plan = HdpConfig(tokens_per_step=200)
        trainer = jobs.trainer("found", plan=plan, max_steps=4, save_strategy="steps", save_steps=2)
        foresight = trainer.engine.foresight
        trainer.engine.__dict__["foresight"] = replace(foresight, limit=foresight.at_capacity(tokens).bytes * 1.5)
        return trainer

    first = make(64)
    drawn = spy(first)
    first.train()
    capacity = drawn[0].plan.capacity
    assert 64 < capacity < 200, capacity
    resumed = make(1000)
    again = spy(resumed)
    resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-2")))
    assert [batch.plan.capacity for batch in again] == [capacity] * 2
    assert [batch.plan.digest for batch in again] == [batch.plan.digest for batch in drawn[2:]]


def mixed_precision_keeps_weights_in_fp32(jobs: Jobs) -> None:
    runs = {}
    for engine, bf16 in (("fsdp", False), ("fsdp", True), ("ddp", True)):
        plan = HdpConfig(tokens_per_step=100, capacity=64, engine=engine)
        trainer = jobs.trainer(f"bf16-{engine}-{bf16}", plan=plan, max_steps=5, bf16=bf16, gradient_checkpointing=bf16)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        runs[engine, bf16] = [*losses(trainer), trainer.evaluate(rows())["eval_loss"]]
    for engine in ("fsdp", "ddp"):
        pairs = zip(runs["fsdp", False], runs[engine, True], strict=True)
        assert 1e-5 < max(abs(a - b) for a, b in pairs) < 0.05, runs


def packed_rows_are_the_same_documents(jobs: Jobs) -> None:
    found = []
    tokenizer = AutoTokenizer.from_pretrained(jobs.source)
    text = Dataset.from_dict({"text": ["x" * n + "y" for n in LENGTHS]})
    for packing in (False, True):
        args = jobs.arguments("packed", SFTConfig, packing=packing, max_length=100, max_steps=2, bf16=False)
        trainer = HdpSFTTrainer(
            jobs.model(), args, hdp=PLAN, world=jobs.world, train_dataset=text, processing_class=tokenizer,
            eval_dataset=text,
        )  # fmt: skip
        found.append((trainer.evaluate()["eval_loss"], len(trainer.train_dataset)))
        batches = spy(trainer)
        trainer.train()
        found[-1] += (sorted(batches[0].documents.lengths.tolist()),)
    (loss, count, lengths), (packed_loss, packed_count, packed_lengths) = found
    assert lengths == packed_lengths == sorted(n + 2 for n in LENGTHS) and packed_count < count
    assert abs(loss - packed_loss) < 1e-6


def what_cannot_work_is_refused(jobs: Jobs) -> None:
    def message(make: Any) -> str:
        try:
            make()
        except ValueError as error:
            return str(error)
        raise AssertionError("nothing was refused")

    model = jobs.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = jobs.trainer("refused", model=model, optimizers=(optimizer, None), max_steps=1)
    assert "pass optimizer_cls_and_kwargs" in message(trainer.train)
    assert "needs logits" in message(lambda: trainer.predict(rows()))
    nothing = str(jobs.folder / "nothing")
    assert "no training state" in message(
        lambda: jobs.trainer("refused", max_steps=1).train(resume_from_checkpoint=nothing)
    )
    too_long = jobs.trainer("refused", plan=HdpConfig(tokens_per_step=100, capacity=20), max_steps=1)
    assert "of 90 tokens does not fit" in message(too_long.train)


def main() -> None:
    jobs = Jobs(sys.argv[1], Path(sys.argv[2]))
    done = []
    for name in sys.argv[3:]:
        globals()[name](jobs)
        done.append(name)
    if jobs.world.rank == 0:
        (jobs.folder / "done.json").write_text(json.dumps(done))
    jobs.world.close()


if __name__ == "__main__":
    hdp.report.launch(main)
