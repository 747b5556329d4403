"""Measure a model on this machine, in less than two minutes, and write the file that planners use.

  hdp profile --out machine.json                          a small Llama on this machine
  hdp profile --model config.json --out machine.json      any transformers configuration, its folder, or a checkpoint
  torchrun --nproc-per-node 8 -m hdp.cli profile ...      also the links between the ranks

Prints each measured length with the error of the fit, and what the model's shape alone would have said.

Exit codes: 0 measured; 1 the file could not be written; 2 bad arguments; 3 the model cannot be measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdp.balance.cost import CostModel
from hdp.balance.devices import DEVICES, find_device
from hdp.balance.machine import Machine
from hdp.balance.measured import predicted
from hdp.balance.models import model_shape
from hdp.balance.plan import PlanError
from hdp.commands.plan import BadArgumentsError

if TYPE_CHECKING:
    from torch import nn

HELP = "measure the model on this machine: times of a layer, memory, links"
CANNOT_WRITE, BAD_ARGUMENTS, CANNOT_MEASURE = 1, 2, 3
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1 << 20,
}
"""The small Llama that is measured when no model is given."""
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a transformers config.json, its folder or name; default: a small Llama")
    parser.add_argument("--layers", type=int, help="measure with fewer layers than the model has; times are per layer")
    parser.add_argument(
        "--lengths", help="tokens to measure, such as 512,1024,4096; default: growing within the budget"
    )
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the model's runs; default: 60")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--device", choices=list(DEVICES), help="compare with this device of the table; default: the one that this is"
    )
    parser.add_argument("--out", metavar="FILE", help="write what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints on rank 0, writes there."""
    try:
        return _run(arguments)
    except BadArgumentsError as error:
        print(f"hdp profile: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except (PlanError, ValueError) as error:
        print(f"hdp profile: {error}", file=sys.stderr)
        return CANNOT_MEASURE
    except OSError as error:
        print(f"hdp profile: {error}", file=sys.stderr)
        return CANNOT_WRITE


def _run(arguments: argparse.Namespace) -> int:
    import hdp
    from hdp.parallel.costs import NotKnown, device_name
    from hdp.parallel.profile import profile

    lengths = _lengths(arguments.lengths)
    if not arguments.budget > 0:
        raise BadArgumentsError(f"--budget is {arguments.budget}: give a positive number of seconds")
    if arguments.out and not Path(arguments.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out is {arguments.out}: there is no folder {Path(arguments.out).parent}")
    start = time.perf_counter()
    with hdp.init() as world:
        model, layers = build(arguments, world.device.type)
        measured = profile(
            model, world, lengths=lengths, budget=arguments.budget, name=arguments.model or "small llama"
        )
        if world.rank == 0:
            try:
                shape = _from_shape(model, arguments.device or device_name(world.device))
            except NotKnown:
                print(
                    f"{measured.device!r} is not in the table of devices: nothing to compare with, unless --device names one"
                )
                shape = None
            print(describe(measured, shape))
            print(f"measured in {time.perf_counter() - start:.0f} s")
    if layers != measured.cost.layers:
        measured = measured.with_layers(layers)
    if world.rank == 0 and arguments.out:
        measured.write(Path(arguments.out))
        print(f"written to {arguments.out}")
    return 0


def _lengths(text: str | None) -> tuple[int, ...]:
    if not text:
        return ()
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = (0,)
    if min(lengths) < 1 or len(lengths) < 3:
        raise BadArgumentsError(
            f"--lengths is {text!r}: give at least three whole numbers of tokens, separated by commas"
        )
    return tuple(sorted(lengths))


def build(arguments: argparse.Namespace, device: str) -> tuple[nn.Module, int]:
    """The model with random weights, and how many layers it has when none is left out."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise PlanError("hdp profile needs transformers: pip install 'hdp[hf]'") from error
    try:
        config: Any = AutoConfig.from_pretrained(arguments.model) if arguments.model else LlamaConfig(**SMALL)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadArgumentsError(
            f"--model is {arguments.model!r}: no config.json, folder or name of a model ({reason})"
        ) from error
    layers = int(model_shape(config).layers)
    if arguments.layers is not None:
        if not 1 <= arguments.layers <= layers:
            raise BadArgumentsError(f"--layers is {arguments.layers}: the model has {layers}")
        config.num_hidden_layers = arguments.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: arguments.layers]
    name = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hdp", dtype=getattr(torch, name))
    return model, layers


def _from_shape(model: Any, device: str) -> CostModel:
    element = next(model.parameters()).element_size()
    return CostModel.from_shape(model.config, flops=find_device(device).attained, bytes_per_element=element)


def describe(measured: Machine, shape: CostModel | None) -> str:
    """The table of lengths, and the terms beside those of the model's shape; None: on a device that is not in the table."""
    cost = measured.cost
    lines = [
        f"{measured.model} on {measured.device}, {measured.world_size} ranks",
        f"{'documents':>9} {'tokens':>8} {'forward s':>10} {'backward s':>10} {'fit s':>9} {'error':>7} {'shape s':>9}",
    ]
    for s in measured.samples:
        said = "-" if shape is None else f"{predicted(shape, s.length, s.documents):.4f}"
        lines.append(
            f"{s.documents:9} {s.length:8} {s.forward:10.4f} {s.backward:10.4f} {s.fitted:9.4f} {s.error:+7.1%} {said:>9}"
        )
    lines.append(f"{'per layer':34} {'measured':>12} {'from shape':>12}")
    for label, name in (
        ("a, s per squared token, forward", "quadratic"),
        ("b, s per token, forward", "linear"),
        ("c, s per micro-batch, both", "constant"),
        ("backward / forward, quadratic", "backward_quadratic"),
        ("backward / forward, linear", "backward_linear"),
        ("head, s per token, forward", "head"),
        ("bytes kept per token", "activation_bytes"),
        ("ring bytes per token, forward", "ring_bytes"),
    ):
        said = "-" if shape is None else f"{getattr(shape, name):.4g}"
        lines.append(f"{label:34} {getattr(cost, name):12.4g} {said:>12}")
    for label, link in (("inside nodes", measured.intra), ("across nodes", measured.inter)):
        if link is not None:
            lines.append(f"link {label}: {link.bandwidth / 1e6:.4g} MB/s a rank, latency {link.latency * 1e6:.3g} us")
    host = measured.host
    for label, each, setup in (
        ("tile", host.piece_seconds, host.piece_setup),
        ("message", host.message_seconds, host.message_setup),
    ):
        lines.append(f"host, each {label}: {1e6 * each:.3g} us a layer, {1e6 * setup:.3g} us a micro-batch")
    lines.append(f"host, each round: {1e6 * host.round_seconds:.3g} us a layer")
    if measured.sharding_seconds:
        lines.append(f"host, sharding (FSDP2): {1e3 * measured.sharding_seconds:.3g} ms a step")
    if host.quota_period:
        lines.append(
            f"CPU quota: {host.quota_share:.0%} of each {1e3 * host.quota_period:.3g} ms; times are of the long run"
        )
    if measured.gather_bandwidth:
        rates = f"{measured.gather_bandwidth / 1e6:.4g} MB/s, reduce-scatter {measured.reduce_bandwidth / 1e6:.4g} MB/s"
        lines.append(f"all-gather {rates}")
    return "\n".join(lines)
