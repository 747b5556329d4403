"""Memory and time of offloading saved activations: a Llama with SmolLM2-135M's layer shape on one rank.

    OMP_NUM_THREADS=1 python benchmarks/offload.py --folder /local/scratch [--cluster PATH]

Every setting runs in one process, one after the other, in as many rounds as given (in one where it is not the shortest); its
time is the median of its ratios to the ``r=0`` of the same round. Memory is the process's peak resident set during the
step less what it held before (saved activations, and whatever else a step needs), and, apart from that, the engine's own
count of saved activations. The disk tier uses O_DIRECT, so that no page cache holds what has left. The head has a small
vocabulary: logits, which no setting touches, would hide the rest.

With ``--cluster`` (see benchmarks/training.py) also whole steps over four hosts, planned with offload and without:
``two_hosts_vs_four``: a document that needs four hosts without and two with; ``slots_with_vs_without``: regime slot, where
room outside means fewer slots. Both are step times with offload over those without. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hdp.offload import FileTier, OffloadEngine

VOCABULARY = 1024
SETTINGS: dict[str, dict[str, Any]] = {
    "r=0": {"policy": "keep"},
    "r=1": {"ratio": 1.0},
    "r=0.25": {"ratio": 0.25},
    "r=0.5": {"ratio": 0.5},
    "r=0.75": {"ratio": 0.75},
    "recompute": {"policy": "recompute", "ratio": 1.0},
    "auto": {"policy": "auto"},
}
SHORT = ("r=0", "r=1")
"""Settings of every round but the first."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One timed step."""

    setting: str
    tokens: int
    round: int
    seconds: float
    busy: float
    """CPU seconds of the computing thread and seconds that it waited for copies: what a step takes undisturbed."""
    rss: int
    """Peak resident bytes during the step less those before it."""
    saved: int
    """Engine's peak count of saved activations on the device, in bytes."""
    left: int
    """Bytes that left."""
    loss: float


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


class Turn:
    """Holds an exclusive lock for at most ``seconds`` (and the step under way), so that a shared machine's users take turns."""

    def __init__(self, path: str | None, seconds: float) -> None:
        self._path, self._seconds = path, seconds
        self._file: IO[str] | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        if self._path is not None and self._file is None:
            self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115 (held across calls)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()
        try:
            yield
        finally:
            if self._file is not None and time.monotonic() - self._since > self._seconds:
                self.end()

    def end(self) -> None:
        if self._file is not None:
            self._file.close()  # and with it the lock
            self._file = None


def make_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).bfloat16()


def run_step(model: LlamaForCausalLM, engine: OffloadEngine, ids: torch.Tensor, setting: str, round_: int) -> Step:
    model.zero_grad(set_to_none=False)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the last step's heap still held would hide this step's growth
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak resident set
    before = resident("VmRSS")
    engine.meter.reset_peaks()
    start, cpu = time.perf_counter(), time.thread_time()
    with engine.micro_batch(model, tokens=ids.shape[1], **SETTINGS[setting]):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    seconds, cpu = time.perf_counter() - start, time.thread_time() - cpu
    meter = engine.meter
    step = Step(
        setting=setting,
        tokens=ids.shape[1],
        round=round_,
        seconds=seconds,
        busy=cpu + meter.waited_out + meter.waited_back,
        rss=resident("VmHWM") - before,
        saved=meter.peak_device,
        left=meter.left,
        loss=loss.item(),
    )
    rss, saved, left = (n / 2**20 for n in (step.rss, step.saved, step.left))
    print(
        f"{step.tokens:5d} tokens  round {round_}  {setting:10s} {seconds:7.2f} s  busy {step.busy:7.2f} s  "
        f"rss +{rss:6.0f} MiB  saved {saved:6.0f} MiB  left {left:6.0f} MiB  "
        f"waited {meter.waited_out:.2f} s out, {meter.waited_back:.2f} s back, {meter.late} late",
        flush=True,
    )
    return step


def relative(steps: list[Step], tokens: int, setting: str, field: str) -> float:
    """Median over rounds of a setting's figure over that of ``r=0`` in the same round."""
    base = {s.round: getattr(s, field) for s in steps if s.tokens == tokens and s.setting == "r=0"}
    ratios = [getattr(s, field) / base[s.round] for s in steps if s.tokens == tokens and s.setting == setting]
    return statistics.median(ratios)


def on_envelope(points: dict[str, tuple[float, float]], name: str, tolerance: float) -> bool:
    """Whether no other (time, memory) beats the named one: better in one by more than ``tolerance``, no worse in the other."""
    time_, memory = points[name]
    less, most = 1 - tolerance, 1 + tolerance
    return not any(
        (t < time_ * less and m <= memory * most) or (m < memory * less and t <= time_ * most)
        for other, (t, m) in points.items()
        if other != name
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="folder on a local disk for the scratch file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.02, help="noise allowed when the envelope is judged")
    parser.add_argument("--cluster", help="program that starts one process per host with limited links")
    parser.add_argument("--only", choices=["rank", "hosts"], help="one part")
    parser.add_argument("--lock", help="file to lock exclusively while steps are timed")
    parser.add_argument("--turn", type=float, default=60.0, help="seconds after which the lock is let go between steps")
    args = parser.parse_args()

    result: dict[str, Any] = {}
    if args.only != "hosts":
        result |= on_one_rank(args)
    if args.cluster and args.only != "rank":
        result |= over_hosts(args)
    print(json.dumps(result))


def on_one_rank(args: argparse.Namespace) -> dict[str, Any]:
    """The table of settings, and its figures."""
    turn = Turn(args.lock, args.turn)
    model = make_model(args.layers)
    generator = torch.Generator().manual_seed(1)
    steps: list[Step] = []
    with OffloadEngine([FileTier(args.folder)]) as engine:
        with turn.alone():
            bandwidth = engine.measure(nbytes=512 << 20)
        print(f"disk: {bandwidth.out / 1e9:.2f} GB/s out, {bandwidth.back / 1e9:.2f} GB/s back", flush=True)
        ids = torch.randint(0, VOCABULARY, (1, min(args.tokens) // 4), generator=generator)
        for setting in ("r=0", "r=1", "recompute"):  # warm-up, not counted
            run_step(model, engine, ids, setting, -1)
        for tokens in args.tokens:
            ids = torch.randint(0, VOCABULARY, (1, tokens), generator=generator)
            if not engine.profiles:  # `auto` takes its first profile; that of longer steps is scaled from the nearest
                with turn.alone(), engine.micro_batch(model, tokens=tokens, policy="auto"):
                    model(ids, labels=ids, use_cache=False).loss.backward()
            for round_ in range(args.rounds if tokens == min(args.tokens) else 1):
                for setting in SETTINGS if round_ == 0 else SHORT:
                    with turn.alone():
                        steps.append(run_step(model, engine, ids, setting, round_))
    turn.end()
    return report(args, steps, bandwidth)


WORKER = Path(__file__).with_name("training_worker.py")
LINK_MBIT = 124
"""At which the static mesh spends half of its step on communication (benchmarks/training.py)."""
BATCHES = {
    "two_hosts_vs_four": ("step", "giant", 1024),
    "slots_with_vs_without": ("slot", "long-tail", 1280),
}
"""Regime, batch and capacity."""


def over_hosts(args: argparse.Namespace) -> dict[str, float]:
    """Median step time with offload over that without, in turn, on four hosts of half a core."""

    def run(*arguments: str) -> dict[str, Any]:
        start = [args.cluster, "-n", "4", "-r", f"{LINK_MBIT}mbit", "-c", "50", "--", sys.executable, str(WORKER)]
        command = [*start, *arguments, "--folder", args.folder, "--rate", str(LINK_MBIT * 1e6 / 8)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    figures = {}
    for name, (regime, batch, capacity) in BATCHES.items():
        fit = json.dumps(run("fit", "--regime", regime))
        print(f"{name}: {fit}", flush=True)
        seconds: dict[str, list[float]] = {"off": [], "auto": []}
        for offload in ("off", "auto", "auto", "off"):
            options = f"--regime {regime} --batch {batch} --capacity {capacity} --repeats 1".split()
            step = run("steps", *options, "--fit", fit, "--offload", offload)
            seconds[offload] += step["seconds"]
            print(
                f"{name}, offload {offload}: {statistics.median(step['seconds']):.2f} s a step, groups {step['groups']}, "
                f"{step['slots']} slots, ratio up to {step['offload']:.2f}",
                flush=True,
            )
        figures[name] = statistics.median(seconds["auto"]) / statistics.median(seconds["off"])
    return figures


def report(args: argparse.Namespace, steps: list[Step], bandwidth: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    envelope = True
    for tokens in args.tokens:
        points = {}
        print(f"\n{tokens} tokens, relative to r=0:  time   busy   rss    saved activations")
        for setting in SETTINGS:
            t, busy, rss, saved = (relative(steps, tokens, setting, f) for f in ("seconds", "busy", "rss", "saved"))
            points[setting] = (t, rss)
            print(f"  {setting:24s} {t:6.3f} {busy:6.3f} {rss:6.3f} {saved:6.3f}")
        envelope &= on_envelope(points, "auto", args.tolerance)
        losses = {s.loss for s in steps if s.tokens == tokens}
        if len(losses) != 1:
            raise RuntimeError(f"losses differ between settings: {losses}")
        result[f"table_{tokens}"] = {name: {"time": t, "memory": m} for name, (t, m) in points.items()}
    longest = max(args.tokens)
    result["memory_r1"] = relative(steps, longest, "r=1", "saved")
    result["memory_r1_rss"] = relative(steps, longest, "r=1", "rss")
    result["time_r1"] = relative(steps, longest, "r=1", "seconds")
    result["busy_r1"] = relative(steps, longest, "r=1", "busy")
    by_round = {(s.setting, s.round): s.seconds for s in steps if s.tokens == longest}
    result["time_recompute"] = statistics.median(
        by_round["r=1", n] / seconds for (setting, n), seconds in by_round.items() if setting == "recompute"
    )
    result["auto_on_envelope"] = envelope
    result["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} compute thread(s)"
    result["disk_bytes_per_second"] = asdict(bandwidth)
    result["date"] = time.strftime("%Y-%m-%d")
    return result


if __name__ == "__main__":
    main()
