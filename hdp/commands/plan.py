"""Plan one global batch and show what every rank would do.

  hdp plan --lengths lengths.txt --world-size 64
  hdp plan --distribution github --context 262144 --tokens 4e6 --world-size 64 --capacity 8192 --compare

Exit codes: 0 planned; 1 a file could not be written; 2 bad arguments, a bad file of lengths among them; 3 the batch cannot be
planned (a document too long for the cluster, say: the message names the offload ratio that would make it fit).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hdp.balance import PLANNERS, CostModel, Link, PlanError, Topology
from hdp.balance.bounds import slot_bound, step_bound
from hdp.balance.clock import evaluate
from hdp.balance.cost import TICK
from hdp.balance.devices import DEVICES, find_device
from hdp.balance.distributions import DISTRIBUTIONS, draw_lengths, read_lengths, source_tree_lengths
from hdp.balance.evaluate import Evaluation
from hdp.balance.machine import Machine
from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners import make_problem
from hdp.balance.planners import plan as make
from hdp.balance.planners.recompute import RECOMPUTE
from hdp.balance.report import describe, table
from hdp.commands.capacity import AUTO, capacity_argument, settle_capacity

HELP = "plan one batch: groups, balance, waiting, memory"
CANNOT_PLAN = 3
BAD_ARGUMENTS = 2
CANNOT_WRITE = 1
MODEL, DEVICE = "llama-7b", "h100-sxm"
"""What is planned for where the user names neither, said aloud."""
LAYERS_KEPT = ("keep_first", "keep_last", "in_flight")


class BadArgumentsError(Exception):
    """What the user gave is no batch or no cluster, whatever the planner."""


@contextmanager
def reading_arguments() -> Iterator[None]:
    """Inside, a PlanError or a file that cannot be read is the fault of the arguments."""
    try:
        yield
    except (PlanError, OSError) as error:
        raise BadArgumentsError(str(error)) from error


def at_least_one(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def whole_number(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def token_count(text: str) -> int:
    """Tokens, also as 4e6, for argparse."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens") from None


def offload_of(text: str) -> str:
    """``off``, ``auto`` or a ratio, for argparse."""
    try:
        known = text in ("off", "auto") or 0.0 <= float(text) <= 1.0
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither off, auto nor a ratio from 0 to 1")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hdp plan``; those of :func:`add_cluster_arguments` are shared with other commands."""
    add_batch_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--planner", default="auto", choices=list(PLANNERS), help="default: auto")
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="off",
        help="off; auto: layers run again in backward where a document does not fit otherwise; all: all layers but those that"
        " keep everything, so that micro-batches hold more; default: off",
    )
    parser.add_argument("--compare", action="store_true", help="run all planners on the batch and print one table")
    parser.add_argument("--json", metavar="OUT", help="write the plan as JSON; - for standard output")
    parser.add_argument("--png", metavar="OUT", help="draw the timeline of the ranks (needs matplotlib)")
    parser.add_argument("--svg", metavar="OUT", help="the same as SVG")
    parser.add_argument("--trace", metavar="OUT", help="write the timeline as a trace for Perfetto or chrome://tracing")
    parser.add_argument("--seed", type=int, default=0, help="of drawn lengths and of planners that draw; default: 0")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the lengths come from."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--lengths", metavar="FILE", help="one length a line")
    source.add_argument("--distribution", choices=list(DISTRIBUTIONS), help="draw lengths")
    source.add_argument(
        "--dataset",
        metavar="PATH",
        help="documents of a folder of text, a .jsonl file or a Hugging Face dataset on disk",
    )
    source.add_argument("--source-tree", metavar="FOLDER", help="one document a file, four bytes a token")
    parser.add_argument("--tokens", type=token_count, default=1_000_000, help="tokens to draw; default: 1e6")
    parser.add_argument(
        "--context",
        type=at_least_one,
        default=262144,
        help="longest document to draw; a dataset's are cut; default: 262144",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="of --dataset: a folder or .gguf file; default: bytes")
    parser.add_argument("--text-column", default="text", help="of --dataset; default: text")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """World, links, model and device."""
    parser.add_argument("--world-size", type=at_least_one, required=True, help="ranks")
    parser.add_argument("--ranks-per-node", type=at_least_one, default=8, help="default: 8")
    parser.add_argument(
        "--capacity",
        type=capacity_argument,
        default=AUTO,
        help="tokens a rank holds in one micro-batch; default: auto, what fits its memory",
    )
    parser.add_argument("--memory", type=float, help="bytes of a rank, for --capacity auto; default: the device's")
    parser.add_argument("--regime", choices=("step", "slot"), default="step", help="default: step")
    parser.add_argument(
        "--model", help=f"a shipped model, a config.json or its folder; default: {MODEL}, which is said to be assumed"
    )
    parser.add_argument("--machine", metavar="FILE", help="model, ranks and links as hdp profile measured them")
    parser.add_argument("--device", choices=list(DEVICES), help=f"default: {DEVICE}, which is said to be assumed")
    parser.add_argument("--flops", type=float, help="operations per second that a rank attains; default: the device's")
    parser.add_argument("--intra-bandwidth", type=float, help="bytes per second between ranks of a node")
    parser.add_argument("--inter-bandwidth", type=float, help="bytes per second and rank between nodes")
    parser.add_argument("--copy-bandwidth", type=float, help="bytes per second and rank between device and host")
    parser.add_argument("--host-memory", type=float, help="bytes that a rank may offload; default: unlimited")
    parser.add_argument("--disk-memory", type=float, help="bytes on a local disk beyond --host-memory")
    parser.add_argument("--keep-first", type=whole_number, help="first layers that keep everything; default: 1")
    parser.add_argument("--keep-last", type=whole_number, help="last layers that keep everything; default: 1")
    parser.add_argument(
        "--in-flight",
        type=whole_number,
        help="layers on the device while they leave or return: 2 in hdp's engine; default: 0 (Eq. 3)",
    )
    parser.add_argument("--overhead", type=float, default=0.0, help="seconds per layer and micro-batch; default: 0")
    parser.add_argument(
        "--offload",
        type=offload_of,
        default="off",
        help="off, auto, or the largest ratio allowed, 0 to 1; default: off",
    )


def assume_missing(arguments: argparse.Namespace, command: str) -> None:
    """Puts in the model and the device that the user left out, and says so in a line on standard error."""
    if arguments.machine:
        return
    missing = [name for name in ("model", "device") if getattr(arguments, name) is None]
    arguments.model = arguments.model or MODEL
    arguments.device = arguments.device or DEVICE
    if not missing:
        return
    known = find_device(arguments.device)
    what = {
        "model": f"the model {arguments.model}",
        "device": f"the device {arguments.device} ({known.attained / 1e12:.4g} TFLOP/s, {known.intra.bandwidth / 1e9:.4g} GB/s"
        f" inside a node, {known.inter.bandwidth / 1e9:.4g} GB/s across, where no option says otherwise)",
    }
    options = " and ".join(f"--{name}" for name in missing)
    assumed = " and ".join(what[name] for name in missing)
    print(f"{command}: assumes {assumed}: give {options}, or --machine", file=sys.stderr)


def cluster_of(arguments: argparse.Namespace) -> tuple[Topology, CostModel]:
    """Topology and cost model of the arguments; what the user gives wins over the device's table."""
    if arguments.machine:
        return cluster_of_machine(arguments, Machine.read(arguments.machine))
    device = find_device(arguments.device)
    intra, inter = device.intra, device.inter
    if arguments.intra_bandwidth is not None:
        intra = Link(bandwidth=arguments.intra_bandwidth)
    if arguments.inter_bandwidth is not None:
        inter = Link(bandwidth=arguments.inter_bandwidth)
    topology = Topology(
        world_size=arguments.world_size, ranks_per_node=arguments.ranks_per_node, intra=intra, inter=inter
    )
    cost = CostModel.from_shape(
        arguments.model,
        flops=device.attained if arguments.flops is None else arguments.flops,
        copy_bandwidth=device.copy_bandwidth if arguments.copy_bandwidth is None else arguments.copy_bandwidth,
        device_memory=device.memory,
        world_size=arguments.world_size,
    )
    return topology, _with_tiers(arguments, replace(cost, constant=arguments.overhead))


def _with_tiers(arguments: argparse.Namespace, cost: CostModel) -> CostModel:
    """Room for what is offloaded and layers that are not, as far as the user gave them."""
    given = {name: getattr(arguments, name) for name in ("host_memory", "disk_memory", *LAYERS_KEPT)}
    cost = replace(cost, **{name: value for name, value in given.items() if value is not None})
    if cost.disk_memory and not cost.host_memory:
        raise PlanError("--disk-memory is what host memory does not hold: give --host-memory as well")
    return cost


def cluster_of_machine(arguments: argparse.Namespace, machine: Machine) -> tuple[Topology, CostModel]:
    """What a file says; bandwidths that the user gives stand in for links that were not."""
    given = {"intra": arguments.intra_bandwidth, "inter": arguments.inter_bandwidth}
    links = {name: Link(bandwidth=value) for name, value in given.items() if value is not None}
    cost = machine.planning
    if arguments.copy_bandwidth is not None:
        cost = replace(cost, copy_bandwidth=arguments.copy_bandwidth)
    cost = _with_tiers(arguments, cost)
    topology = replace(machine, **links).topology(  # type: ignore[arg-type]
        world_size=arguments.world_size, ranks_per_node=arguments.ranks_per_node
    )
    return topology, cost


def lengths_of(arguments: argparse.Namespace) -> IntArray:
    """Lengths of the batch."""
    if arguments.lengths is not None:
        return read_lengths(arguments.lengths)
    if arguments.source_tree is not None:
        return source_tree_lengths(arguments.source_tree)
    if arguments.dataset is not None:
        return dataset_lengths(arguments)
    return draw_lengths(arguments.distribution, tokens=arguments.tokens, context=arguments.context, seed=arguments.seed)


def dataset_lengths(arguments: argparse.Namespace) -> IntArray:
    """Documents of the dataset in the order of ``--seed`` until they hold ``--tokens``; all of them where it holds fewer."""
    from hdp.data import DataError, open_documents

    try:
        documents = open_documents(
            arguments.dataset,
            tokenizer=arguments.tokenizer,
            text_column=arguments.text_column,
            max_length=max(arguments.context, 2),
        )
    except DataError as error:
        raise PlanError(f"--dataset: {error}") from error
    shuffled = np.random.default_rng(arguments.seed).permutation(documents.lengths).astype(np.int64)
    return shuffled[: int(np.searchsorted(np.cumsum(shuffled), arguments.tokens)) + 1]


def run(arguments: argparse.Namespace) -> int:
    """Plans and writes what was asked for."""
    try:
        return _run(arguments)
    except BadArgumentsError as error:
        print(f"hdp plan: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except PlanError as error:
        print(f"hdp plan: {error}", file=sys.stderr)
        return CANNOT_PLAN
    except OSError as error:
        print(f"hdp plan: {error}", file=sys.stderr)
        return CANNOT_WRITE


def _run(arguments: argparse.Namespace) -> int:
    with reading_arguments():
        assume_missing(arguments, "hdp plan")
        settle_capacity(arguments, "hdp plan")
        topology, cost = cluster_of(arguments)
        lengths = lengths_of(arguments)
    bound, kind = _bound(arguments, lengths, topology, cost)
    names = list(PLANNERS) if arguments.compare else [arguments.planner]
    rows: list[tuple[str, Plan | str, Evaluation | None, float]] = []
    for name in names:
        try:
            made, seconds = _timed(arguments, name, lengths, topology, cost)
        except PlanError as error:
            if not arguments.compare:
                raise
            rows.append((name, str(error), None, 0.0))
            continue
        rows.append((name, made, evaluate(made, cost, topology), seconds))
    text = sys.stderr if arguments.json == "-" else sys.stdout
    if arguments.compare:
        print(table(rows, bound, kind), file=text)
    chosen = next((row for row in rows if row[0] == arguments.planner), None)
    if chosen is None or not isinstance(chosen[1], Plan) or chosen[2] is None:
        raise PlanError(f"planner {arguments.planner} made no plan: {chosen[1] if chosen else 'not run'}")
    made, result, seconds = chosen[1], chosen[2], chosen[3]
    if not arguments.compare:
        print(describe(made, result, cost, topology, bound, kind, seconds), file=text)
    _write(arguments, made, result, cost, topology, bound, seconds)
    return 0


def _timed(
    arguments: argparse.Namespace, name: str, lengths: IntArray, topology: Topology, cost: CostModel
) -> tuple[Plan, float]:
    start = time.perf_counter()
    made = make(
        lengths,
        topology,
        cost,
        capacity=arguments.capacity,
        regime=arguments.regime,
        planner=name,
        offload=arguments.offload,
        recompute=arguments.recompute,
        seed=arguments.seed,
    )
    seconds = time.perf_counter() - start
    made.validate()
    return made, seconds


def _bound(arguments: argparse.Namespace, lengths: IntArray, topology: Topology, cost: CostModel) -> tuple[int, str]:
    """Lower bound in ticks, and its name: the sharper one of regime slot needs scipy."""
    problem = make_problem(
        lengths,
        topology,
        cost,
        capacity=arguments.capacity,
        regime=arguments.regime,
        planner=arguments.planner,
        offload=arguments.offload,
        recompute=arguments.recompute,
    )
    keeps = arguments.offload == "off" and arguments.recompute == "off"
    if arguments.regime == "slot" and find_spec("scipy") is not None and keeps:
        return slot_bound(problem), "barriers counted"
    return step_bound(problem), "barriers not counted" if arguments.regime == "slot" else "work and longest document"


def _write(
    arguments: argparse.Namespace,
    made: Plan,
    result: Evaluation,
    cost: CostModel,
    topology: Topology,
    bound: int,
    seconds: float,
) -> None:
    if arguments.json:
        text = made.to_json(
            planning_seconds=seconds, predicted_seconds=result.seconds, lower_bound_seconds=bound * TICK
        )
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    if arguments.trace:
        from hdp.balance.timeline import write_trace

        write_trace(made, cost, topology, Path(arguments.trace))
    for target, kind in ((arguments.png, "png"), (arguments.svg, "svg")):
        if target:
            from hdp.balance.timeline import draw

            draw(made, cost, topology, Path(target), kind=kind)
