"""Trainers on two ranks: epochs, evaluation, checkpoints, precision, packing; and every argument that is refused."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hdp.parallel.adapters import HdpConfig, HdpTrainerMixin, load_state, save_state
from hdp.parallel.adapters.arguments import REFUSED, check_arguments, check_trainer, ignored_arguments
from hdp.parallel.adapters.mixin import _other_world

pytestmark = pytest.mark.slow

BEHAVIOUR = Path(__file__).with_name("behaviour.py")
GROUPS = {
    "training": (
        "epochs_see_every_document_as_often_as_they_say",
        "evaluation_needs_no_document_on_every_rank",
        "a_batch_without_labels_changes_nothing",
    ),
    "checkpoints": ("the_best_model_comes_back", "adapters_resume", "a_found_capacity_is_resumed"),
    "variants": ("mixed_precision_keeps_weights_in_fp32", "packed_rows_are_the_same_documents"),
    "refusals": ("what_cannot_work_is_refused",),
}


@pytest.mark.parametrize("group", GROUPS)
def test_behaviour(server, reference, base, tmp_path, group):
    server.run(BEHAVIOUR, base / "model", tmp_path, *GROUPS[group], ranks=2, folder=tmp_path).check()
    assert json.loads((tmp_path / "done.json").read_text()) == list(GROUPS[group])


ARGUMENTS = {
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": True,
    "parallelism_config": object(),
    "torch_compile": True,
    "auto_find_batch_size": True,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "save_on_each_node": True,
    "batch_eval_metrics": True,
    "activation_offloading": True,
    "loss_type": "dft",
}


@pytest.fixture(scope="module")
def defaults(tmp_path_factory):
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("arguments")), use_cpu=True, report_to="none")


def changed(defaults: TrainingArguments, **values: object) -> TrainingArguments:
    copy = TrainingArguments.__new__(TrainingArguments)
    copy.__dict__.update(defaults.__dict__ | values)
    return copy


def test_default_arguments_pass(defaults):
    check_arguments(defaults)
    assert ignored_arguments(defaults) == []


def test_every_refusal_has_a_case():
    assert ARGUMENTS.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_is_refused_by_name_and_reason(defaults, name):
    with pytest.raises(ValueError, match=f"training argument {name}=.* is not supported with hdp: .{{15}}"):
        check_arguments(changed(defaults, **{name: ARGUMENTS[name]}))


@pytest.mark.parametrize("optimizer", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(defaults, optimizer):
    with pytest.raises(ValueError, match=f"optim='{optimizer}'.*steps inside backward"):
        check_arguments(changed(defaults, optim=optimizer))


def test_a_best_model_needs_its_state(defaults):
    with pytest.raises(ValueError, match="load_best_model_at_end with save_only_model"):
        check_arguments(changed(defaults, load_best_model_at_end=True, save_only_model=True))


def test_several_gpus_in_one_process_are_refused(defaults):
    with pytest.raises(ValueError, match="sees 3 GPUs: launch with torchrun"):
        check_arguments(changed(defaults, _n_gpu=3))


@pytest.mark.parametrize(
    "name",
    ["model_init", "compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "is_fsdp_enabled",
     "is_deepspeed_enabled", "is_distributed_loading_by_transformers"],
)  # fmt: skip
def test_what_trainers_cannot_be_given(name):
    with pytest.raises(
        ValueError, match=r"launched with FSDP or DeepSpeed|sharded by from_pretrained|is not supported with hdp"
    ):
        check_trainer(types.SimpleNamespace(**{name: len if name[:3] != "is_" else True}))


def test_arguments_without_effect_are_named(defaults):
    args = changed(
        defaults, per_device_train_batch_size=3, dataloader_drop_last=True, train_sampling_strategy="sequential"
    )
    assert ignored_arguments(args) == ["per_device_train_batch_size=3", "dataloader_drop_last=True"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens_per_step": 0}, "tokens_per_step is 0"),
        ({"capacity": -1}, "capacity is -1"),
        ({"engine": "zero"}, "engine is 'zero': choose one of fsdp, ddp"),
        ({"regime": "turbo"}, "regime is 'turbo': choose one of step, slot"),
        ({"reduction": "sum"}, "reduction is 'sum': choose one of token, sample"),
        ({"engine": "ddp", "regime": "slot"}, "engine 'ddp' runs regime 'step'"),
    ],
)
def test_config_names_the_wrong_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        HdpConfig(**{"tokens_per_step": 10, "capacity": 10, **wrong})


@pytest.mark.parametrize(
    ("use_cpu", "ranks", "message"),
    [
        (False, 1, r"has 2 ranks, the training arguments' 1: without a GPU give TrainingArguments\(use_cpu=True\)"),
        (True, 1, r"has 2 ranks, the training arguments' 1: call hdp.init\(\) under the same launcher"),
        (False, 3, r"has 2 ranks, the training arguments' 3: call hdp.init\(\) under the same launcher"),
    ],
)
def test_arguments_of_another_world_say_what_to_do(use_cpu, ranks, message):
    args = types.SimpleNamespace(world_size=ranks, use_cpu=use_cpu, device=torch.device("cpu"))
    assert re.search(message, _other_world(2, args))


def test_the_state_of_another_model_is_refused(tmp_path):
    def trained(width: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(width, 3))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    save_state(tmp_path, *trained(4))
    load_state(tmp_path, *trained(4))
    with pytest.raises(ValueError, match=r"hdp_state is not this model's and optimizer's: .*\[3, 4\].*\[3, 5\]"):
        load_state(tmp_path, *trained(5))
    with pytest.raises(ValueError, match="no training state at"):
        load_state(tmp_path / "nothing", *trained(4))


def test_a_trainer_that_is_built_differently_is_an_error():
    class Other:
        def training_step(self) -> None: ...

    class Trainer(HdpTrainerMixin, Other):
        pass

    with pytest.raises(ImportError, match="has no '_clip_grad_norm': this version of hdp works with transformers 5"):
        Trainer(hdp=HdpConfig(tokens_per_step=10, capacity=10))
