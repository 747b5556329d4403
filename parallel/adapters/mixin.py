"""``transformers.Trainer`` with planned global batches, and any trainer made from it, TRL's ``SFTTrainer`` among them.

The trainer keeps its loop, schedule, logging, callbacks, evaluation strategy and checkpoints. What changes:

- its dataset's rows become documents (``hdp.parallel.adapters.rows``), drawn into global batches of
  ``HdpConfig.tokens_per_step`` tokens; one batch is one optimizer step;
- ``training_step`` hands the whole batch to the engine, ``evaluation_loop`` hands it the whole evaluation set;
- accelerate does not wrap the model: the engine has done so;
- a checkpoint holds whole weights for ``from_pretrained``, and the state of training in shards, for any number of ranks.

An epoch is a pass over all documents. Epochs differ by a few steps, because every shuffle packs documents into batches
differently; the trainer's ``epoch`` and the strategies ``"epoch"`` go by the mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hdp.parallel.adapters.arguments import check_arguments, check_trainer, ignored_arguments
from hdp.parallel.adapters.checkpoint import full_state_dict, load_state, save_state
from hdp.parallel.adapters.config import HdpConfig, build_engine
from hdp.parallel.adapters.meter import Meter
from hdp.parallel.adapters.rows import RowDocuments
from hdp.parallel.batch import PlannedBatch
from hdp.parallel.engine import Engine
from hdp.parallel.fitting import AUTO
from hdp.parallel.loader import Loader
from hdp.parallel.machine import find_machine, read_for_all
from hdp.parallel.world import World, init

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger("hdp")

SCHEDULER_FILE, MACHINE_FILE, CAPACITY_FILE = "scheduler.pt", "machine.json", "capacity.json"

_OVERRIDDEN = (
    "_clip_grad_norm",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_save",
    "_save_optimizer_and_scheduler",
    "_track_num_input_tokens",
    "evaluation_loop",
    "get_batch_samples",
    "set_initial_training_values",
    "training_step",
)
"""What the mixin replaces. A version of transformers without one of them would go on without hdp, in silence."""


class HdpTrainerMixin(_Trainer):
    """Goes in front of a trainer class: ``class HdpSFTTrainer(HdpTrainerMixin, SFTTrainer)``.

    Args:
        hdp: how batches are planned and the model is wrapped; stands in for the batch sizes of the training arguments.
        world: from ``hdp.init``; None: joins the job that the training arguments have joined.

    All other arguments go to the trainer. ``save_model`` gathers weights: every rank has to call it.

    Raises:
        ValueError: arguments that cannot work with planned batches; those without effect are named in a warning.
        ImportError: a version of transformers whose trainer is built differently.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, hdp: HdpConfig, world: World | None = None, **keywords: Any) -> None:
        plain = super()
        missing = [name for name in _OVERRIDDEN if not hasattr(plain, name)]
        if missing:
            import transformers

            raise ImportError(
                f"the trainer of transformers {transformers.__version__} has no {missing[0]!r}: this version of hdp works"
                " with transformers 5.x"
            )
        super().__init__(*args, **keywords)
        check_arguments(self.args)
        check_trainer(self)
        self.hdp_config = hdp
        self.world = world if world is not None else _join(self.args.device)
        if self.world.world_size != self.args.world_size:
            raise ValueError(_other_world(self.world.world_size, self.args))
        self.meter = Meter(self.world)
        self._engine: Engine | None = None
        self._documents: RowDocuments | None = None
        self._batches: Iterator[PlannedBatch] | None = None
        self._total_steps = 0
        self._capacity = hdp.capacity
        """``AUTO`` until it has been found, or a checkpoint has told it."""
        ignored = ignored_arguments(self.args)
        if ignored and self.world.rank == 0:
            logger.warning("training arguments without effect, because batches are planned: %s", ", ".join(ignored))

    @property
    def engine(self) -> Engine:
        """Wraps the model on first use: in train(), evaluate() or when the optimizer is made."""
        if self._engine is None:
            self._engine = build_engine(self.model, self.world, self.hdp_config, bf16=self.args.bf16)
            if self.hdp_config.machine is not None:
                self._engine.machine = find_machine(self._engine, self.hdp_config.machine)
            self.model._is_accelerate_prepared = True  # accelerate's own mark: it will not wrap the model again
        return self._engine

    # ------------------------------------------------------------ batches

    def get_train_dataloader(self) -> DataLoader:
        """Yields one number per step of an epoch; batches are drawn by :meth:`get_batch_samples`."""
        plain = super().get_train_dataloader()
        self._documents = RowDocuments(plain.dataset, plain.collate_fn)
        self._close_batches()
        epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else 1
        self._total_steps = count_steps(self._loader(self._documents, steps=1 << 62), epochs)
        steps = math.ceil(self._total_steps / epochs)
        return DataLoader(_Steps(steps), batch_size=1, collate_fn=_first, generator=torch.Generator())

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[Any, ...]:
        """As the trainer's; without ``max_steps`` every document is seen ``num_train_epochs`` times, to the step."""
        epochs, per_epoch, _, _, batch, in_epoch, max_steps = super().set_initial_training_values(args, dataloader)
        if args.max_steps <= 0:
            max_steps = self._total_steps
            epochs = math.ceil(max_steps / per_epoch)
        assert self._documents is not None
        documents = len(self._documents)
        return epochs, per_epoch, documents, round(documents * max_steps / per_epoch), batch, in_epoch, max_steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[PlannedBatch], Tensor | None]:
        """The next planned batch, and its label tokens. After a resume it is the one after the checkpoint's."""
        if next(epoch_iterator, None) is None:
            return [], None
        if self._batches is None:
            assert self._documents is not None
            loader = self._loader(self._documents, start=self.state.global_step, steps=self.state.max_steps)
            self._batches = iter(loader)
        batch = next(self._batches)
        assert batch.step == self.state.global_step, f"batch {batch.step} at step {self.state.global_step}"
        return [batch], torch.tensor(batch.label_tokens, device=device)

    def _loader(self, documents: RowDocuments, **options: Any) -> Loader:
        config = self.hdp_config
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        loader = Loader(
            documents,
            self.engine,
            tokens_per_step=config.tokens_per_step,
            capacity=self._capacity,
            planner=config.planner,
            reduction=config.reduction,
            seed=None if self.args.train_sampling_strategy == "sequential" else seed,
            **options,
        )
        self._capacity = loader.capacity
        return loader

    def _close_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
            self._batches = None

    # ------------------------------------------------------------ training

    def train(self, *args: Any, **keywords: Any) -> Any:
        """As the trainer's."""
        try:
            return super().train(*args, **keywords)
        except BaseException as error:
            self.world.guard.report(error)
            raise
        finally:
            self._close_batches()

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: PlannedBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs one global batch; returns its mean loss over label tokens, equal on all ranks."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        with self._precision():
            result = self.engine.forward_backward(inputs)
        self.meter.add(inputs, result, self.model)
        return torch.tensor(result.loss, dtype=torch.float32, device=self.args.device)

    def _precision(self) -> AbstractContextManager[object]:
        """bf16 under DDP; FSDP2 has its own."""
        if self.args.bf16 and self.hdp_config.engine == "ddp":
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the trainer's, over the wrapped model's parameters.

        Raises:
            ValueError: an optimizer that was made before the model was wrapped.
        """
        known = {id(p) for p in self.engine.model.parameters()}
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds parameters that the wrapped model does not have: pass optimizer_cls_and_kwargs in"
                " place of optimizers, so that it is made after wrapping"
            )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.engine.clip_grad_norm_(self.args.max_grad_norm)

    def _track_num_input_tokens(self, inputs: PlannedBatch) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += inputs.tokens

    def floating_point_ops(self, inputs: PlannedBatch) -> int:  # type: ignore[override]
        """This rank's share of the batch's model FLOPs; the trainer adds up all ranks'."""
        return self.meter.flops(inputs, self.model) // self.world.world_size

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """As the trainer's; beside a training loss also the throughput since the last one."""
        if "loss" in logs:
            logs.update(self.meter.take())
        super().log(logs, *args, **keywords)

    # ------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Mean loss over the label tokens of the whole set, spread over all ranks, whoever of them has documents."""
        from transformers.trainer_utils import EvalLoopOutput

        documents = RowDocuments(dataloader.dataset, dataloader.collate_fn)  # type: ignore[arg-type]
        self.callback_handler.eval_dataloader = dataloader
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        config = self.hdp_config
        with self._precision():
            loss = self.engine.evaluate(documents, capacity=config.capacity, planner=config.planner)
        self.model.eval()  # as the trainer leaves it; its own log() goes by that
        metrics = {f"{metric_key_prefix}_loss": loss}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(documents))  # type: ignore[arg-type]

    def predict(self, *args: Any, **keywords: Any) -> Any:
        """Raises ValueError: predictions are logits, which never exist here."""
        raise ValueError("predict() needs logits, which hdp never makes: save the model and use a plain Trainer")

    # ------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        whole = full_state_dict(self.engine.model) if state_dict is None else state_dict
        if self.args.should_save:
            super()._save(output_dir, state_dict=whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(output_dir, self.engine.model, self._plain_optimizer())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), f"{output_dir}/{SCHEDULER_FILE}")
            if self.engine.machine is not None:
                self.engine.machine.write(f"{output_dir}/{MACHINE_FILE}")
            found = {"capacity": self._capacity, "world_size": self.world.world_size}
            Path(output_dir, CAPACITY_FILE).write_text(json.dumps(found) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_state(resume_from_checkpoint, self.engine.model)
        stored = read_for_all(self.world, f"{resume_from_checkpoint}/{MACHINE_FILE}")
        if stored is not None and self.hdp_config.machine is None:
            self.engine.machine = stored  # the same plans as before
        if self.hdp_config.capacity == AUTO:
            self._capacity = self._stored_capacity(resume_from_checkpoint)

    def _stored_capacity(self, checkpoint: str) -> int | str:
        """What was found from memory when the run began, so that a resumed one draws the same plans; other ranks hold another
        share of the model, and find their own."""
        told: list[dict[str, Any]] = [{}]
        file = Path(checkpoint, CAPACITY_FILE)
        if self.world.rank == 0 and file.is_file():
            told = [json.loads(file.read_text())]
        dist.broadcast_object_list(told, group=self.world.control, group_src=0)
        return told[0]["capacity"] if told[0].get("world_size") == self.world.world_size else AUTO

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_state(checkpoint, self.engine.model, self._plain_optimizer())
            self.lr_scheduler.load_state_dict(torch.load(f"{checkpoint}/{SCHEDULER_FILE}", weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None:
            raise ValueError("load_best_model_at_end: no checkpoint was the best one; save and evaluate at least once")
        load_state(best, self.engine.model)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper, which holds no parameters itself."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


class _Steps(torch.utils.data.Dataset):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> int:
        return index


def _first(items: list[int]) -> int:
    return items[0]


def _other_world(ranks: int, args: Any) -> str:
    """The training arguments join a job by rules of their own: without a GPU only if they are told to use the CPU."""
    is_alone = args.world_size == 1 and args.device.type == "cpu" and not args.use_cpu
    cure = (
        "without a GPU give TrainingArguments(use_cpu=True)" if is_alone else "call hdp.init() under the same launcher"
    )
    return f"hdp's world has {ranks} ranks, the training arguments' {args.world_size}: {cure}"


def _join(device: torch.device) -> World:
    return init(device=device)


def count_steps(loader: Loader, epochs: float) -> int:
    """Batches in so many passes over a loader's documents; of a part of a pass its share, rounded up."""
    whole = math.floor(epochs)
    ends: list[int] = []  # batches drawn when each pass ended
    drawn = 0
    for batches, indices in enumerate(loader._draw(), start=1):
        drawn += len(indices)
        if drawn == (len(ends) + 1) * len(loader.documents):
            ends.append(batches)
            if len(ends) >= epochs:
                break
    if whole == epochs:
        return ends[-1]
    before = ends[whole - 1] if whole else 0
    return before + math.ceil((epochs - whole) * (ends[whole] - before))
