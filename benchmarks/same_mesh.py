"""Whole training steps on one mesh with one schedule: hdp against what its users would otherwise write (``packed.py``).

    python benchmarks/same_mesh.py --cluster PATH [--only PART,...] [--keep FILE]        (about 40 minutes)

A Llama of 4 layers, width 256, 8 query heads, FSDP2 gathered once a step, AdamW, the same fused loss; four hosts of half a
core. hdp plans with ``static`` and runs one schedule for all documents; the rival takes the micro-batches of that plan, so
mesh, capacity and packs are the same. Batches (``same_mesh_worker.py``): 40 log-normal documents, 16 equal ones, one of 8,000
tokens beside 30 short; 8:8 and 8:2 heads. Steps are timed from a barrier before ``next(loader)`` to one after ``zero_grad()``,
both sides in turn in the same processes, the order alternating; losses must agree. A figure is the median of the rounds'
ratios, second smallest and second largest in brackets.

- ``same_ulysses``, ``same_gather``, ``same_ring``: rival's seconds over ours without link limits, the smallest over the
  batches; ``..._cpu``: CPU seconds of all ranks.
- ``outside``: CPU seconds of a rank in attention outside its kernels over those in them, threads that move bytes included, the
  largest; ``outside_main``: of the computing thread alone; ``outside_rival``: the smallest of the rivals'.
- ``overlap_ulysses``, ``overlap_gather``, ``overlap_ring``: as ``same``, on links at which communication is half of the rival's
  step; found from its steps without a limit and at about such a rate. hdp runs the variant of the schedule that computes while
  bytes are on their way (``OVERLAPPING``); ``..._plain``: the schedule itself, which waits as the rival does.
- ``local``: our step over that of plain transformers, whole documents on one rank, SDPA document by
  document; ``local_logits``: with the model's own loss; ``local_fsdp``: under FSDP2, as ours; ``..._cpu``.
- ``step_us``, ``lower_20000_s``, ``lower_64_ms``, ``messages_2``, ``messages_8``, and of windows: ``attention_many.py``.

``--only`` runs some parts; with ``--keep`` each leaves its figures in FILE, and the last line has those of all parts kept.
``--cases`` and ``--rounds`` are for a quick look. PATH is a program that starts one process per host with limited links:
``PATH -n RANKS -r RATE -c CPU_PERCENT -- COMMAND``. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
HOSTS, CPU_PERCENT = 4, 50
ROUNDS = 9
QUICK_ROUNDS = 3
SHOWN_MBIT = {"ulysses": 800, "all_gather": 1500, "ring": 1900}
"""Of a rival's step, about what is not hidden: over the seconds of a step a first guess of the rate that is looked for."""
NAMES = {"ulysses": "ulysses", "all_gather": "gather", "ring": "ring"}
"""Schedule to the end of its figures' names."""
ALL = tuple(NAMES)
CASES = {
    "tail 8:8": ("tail", (8, 8), ALL),
    "tail 8:2": ("tail", (8, 2), ("ulysses", "all_gather")),
    "equal 8:2": ("equal", (8, 2), ALL),
    "long 8:8": ("long", (8, 8), ("ulysses",)),
    "long 8:2": ("long", (8, 2), ALL),
}
"""Each batch with each schedule; of the other number of heads what came out smallest."""
OVERLAP_CASE = "tail 8:8"
OVERLAPPING = {"ulysses": "ulysses_home", "all_gather": "all_gather:4"}
"""What for slow links takes the place of a schedule that exchanges first and computes then: see docs/attention.md."""


@dataclass(frozen=True)
class Settings:
    """Of one run."""

    cluster: str | None
    cases: Sequence[str]
    rounds: int

    def hosts(self, rate: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What rank 0 found for each job, on links of ``rate``."""
        if self.cluster is None:
            sys.exit("this part needs --cluster PATH")
        start = [self.cluster, "-n", str(HOSTS), "-r", rate, "-c", str(CPU_PERCENT), "--"]
        return run([*start, sys.executable, str(FOLDER / "same_mesh_worker.py"), json.dumps(jobs)])


def run(command: list[str]) -> Any:
    """The JSON value on the last line of a command's output; what it says meanwhile is shown."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment, timeout=7200)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def middle(values: Sequence[float]) -> tuple[float, str]:
    """Median, and it with the second smallest and second largest."""
    ordered, median = sorted(values), statistics.median(values)
    inner = ordered[1:-1] if len(ordered) > 2 else ordered
    return median, f"{median:.3f} ({inner[0]:.3f} to {inner[-1]:.3f})"


def job(
    case: str, rounds: int, schedules: Sequence[str] | None = None, sides: Sequence[str] = ("hdp", "rival")
) -> dict[str, Any]:
    batch, heads, own = CASES[case]
    return {
        "batch": batch,
        "heads": heads,
        "schedules": list(schedules or own),
        "rounds": rounds,
        "sides": list(sides),
        "variants": OVERLAPPING,
    }


# ---------------------------------------------------------------- what steps say


Steps = list[dict[str, Any]]


def compare(label: str, ours: Steps, theirs: Steps) -> dict[str, float]:
    """Rival over ours, in wall and CPU seconds."""
    found, shown = {}, []
    for what in ("seconds", "cpu"):
        ratio, text = middle([b[what] / a[what] for a, b in zip(ours, theirs, strict=True)])
        a, b = (middle([step[what] for step in steps])[1] for steps in (ours, theirs))
        found[what] = ratio
        shown.append(f"{'CPU s' if what == 'cpu' else 's'}: rival {b}, hdp {a}, ratio {text}")
    print(f"{label}: " + "; ".join(shown), flush=True)
    return found


def around_kernels(label: str, steps: Steps) -> tuple[float, float]:
    """Attention's CPU seconds outside its kernels over those in them: of the process, of the computing thread."""
    kernels = statistics.median(s["attention"][2] for s in steps)
    if not kernels:
        sys.exit(f"{label}: no kernel was timed: attention calls others than same_mesh_worker.KERNELS")
    process, main = ([s["attention"][i] / s["attention"][2] - 1 for s in steps] for i in (0, 1))
    (whole, all_text), (alone, main_text) = middle(process), middle(main)
    print(
        f"{label}: {kernels:.2f} CPU s a rank in kernels, outside over that {all_text}, main thread {main_text}",
        flush=True,
    )
    return whole, alone


def smaller(figures: dict[str, float], name: str, value: float) -> None:
    figures[name] = min(figures.get(name, value), value)


def larger(figures: dict[str, float], name: str, value: float) -> None:
    figures[name] = max(figures.get(name, value), value)


# ---------------------------------------------------------------- parts


def same(settings: Settings) -> dict[str, float]:
    jobs = [job(case, settings.rounds) for case in settings.cases]
    figures: dict[str, float] = {}
    for case, found in zip(settings.cases, settings.hosts("none", jobs), strict=True):
        print(f"{case}: groups {found['groups']}, {found['slots']} slots")
        for schedule in CASES[case][2]:
            ours, theirs = (found["steps"][f"{side}:{schedule}"] for side in ("hdp", "rival"))
            ratios = compare(f"{case}, {schedule}", ours, theirs)
            smaller(figures, f"same_{NAMES[schedule]}", ratios["seconds"])
            smaller(figures, f"same_{NAMES[schedule]}_cpu", ratios["cpu"])
            note_outside(figures, f"{case}, {schedule}", ours, theirs)
    return figures


def outside(settings: Settings) -> dict[str, float]:
    """Of our side alone: what ``same`` finds as well."""
    jobs = [job(case, min(settings.rounds, QUICK_ROUNDS), sides=("hdp",)) for case in settings.cases]
    figures: dict[str, float] = {}
    for case, found in zip(settings.cases, settings.hosts("none", jobs), strict=True):
        for schedule in CASES[case][2]:
            note_outside(figures, f"{case}, {schedule}", found["steps"][f"hdp:{schedule}"], [])
    return figures


def note_outside(figures: dict[str, float], label: str, ours: Steps, theirs: Steps) -> None:
    whole, main = around_kernels(f"{label}, hdp", ours)
    larger(figures, "outside", whole)
    larger(figures, "outside_main", main)
    if theirs:
        smaller(figures, "outside_rival", around_kernels(f"{label}, rival", theirs)[0])


def overlap(settings: Settings) -> dict[str, float]:
    rates, figures = half_rates(settings), {}
    for schedule, (rate, free) in rates.items():
        sides = ("hdp", "rival", "variant") if schedule in OVERLAPPING else ("hdp", "rival")
        (found,) = settings.hosts(f"{rate}kbit", [job(OVERLAP_CASE, settings.rounds, [schedule], sides)])
        steps = {side: found["steps"][f"{side}:{schedule}"] for side in sides}
        limited = statistics.median(step["seconds"] for step in steps["rival"])
        print(f"{schedule}, {rate / 1000:.0f} Mbit/s: communication is {1 - free / limited:.0%} of the rival's step")
        label, name = f"{OVERLAP_CASE}, {rate / 1000:.0f} Mbit/s", f"overlap_{NAMES[schedule]}"
        plain = compare(f"{label}, {schedule}", steps["hdp"], steps["rival"])["seconds"]
        if "variant" in sides:
            figures[f"{name}_plain"] = plain
            figures[name] = compare(f"{label}, {OVERLAPPING[schedule]}", steps["variant"], steps["rival"])["seconds"]
        else:
            figures[name] = plain
    return figures


def half_rates(settings: Settings) -> dict[str, tuple[int, float]]:
    """For each schedule kbit/s at which the rival's step takes twice as long as without a limit, and the latter in seconds."""

    def medians(rate: str, schedules: Sequence[str]) -> list[float]:
        (found,) = settings.hosts(rate, [job(OVERLAP_CASE, QUICK_ROUNDS, schedules, sides=("rival",))])
        return [statistics.median(step["seconds"] for step in found["steps"][f"rival:{s}"]) for s in schedules]

    rates = {}
    for schedule, free in zip(ALL, medians("none", ALL), strict=True):
        probe = int(1000 * SHOWN_MBIT[schedule] / free)
        (limited,) = medians(f"{probe}kbit", [schedule])
        rate = max(int(probe * (limited / free - 1)), probe // 4)
        rates[schedule] = rate, free
        print(
            f"rival, {schedule}: {free:.2f} s a step without a limit, {limited:.2f} s at {probe / 1000:.0f} Mbit/s:"
            f" twice the first at {rate / 1000:.0f}",
            flush=True,
        )
    return rates


def local(settings: Settings) -> dict[str, float]:
    found = run([sys.executable, str(FOLDER / "same_mesh_local.py"), str(settings.rounds)])
    figures = {}
    for name, ratios in found.items():
        figures[name], text = middle(ratios)
        print(f"whole documents on one rank, {name}: hdp over plain {text}")
    return figures


def many(settings: Settings) -> dict[str, float]:
    figures = run([sys.executable, str(FOLDER / "attention_many.py")])
    for size in (2, 8):
        one, all_ = figures[f"messages_{size}_one"], figures[f"messages_{size}"]
        print(f"messages of a rank and layer forward on {size} ranks: {all_} for 128 documents, {one} for one")
    return figures


PARTS = {"same": same, "overlap": overlap, "local": local, "many": many, "outside": outside}
TAKES = {"same": 19, "overlap": 14, "local": 3, "many": 1, "outside": 5}
"""Minutes, about, with two cores of its own."""
WHOLE = ("same", "overlap", "local", "many")
"""``same`` finds what ``outside`` does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", help="program that starts one process per host")
    parser.add_argument("--only", default=",".join(WHOLE), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of same and outside: some of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each comparison")
    parser.add_argument("--keep", type=Path, help="file of figures, by part, that parts run apart add to")
    arguments = parser.parse_args()
    chosen, cases = arguments.only.split(","), arguments.cases.split(",")
    for given, known in ((chosen, PARTS), (cases, CASES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {unknown[0]!r}: choose some of {', '.join(known)}")
    settings = Settings(arguments.cluster, cases, arguments.rounds)
    kept: dict[str, dict[str, Any]] = {}
    if arguments.keep is not None and arguments.keep.exists():
        kept = json.loads(arguments.keep.read_text(encoding="utf-8"))
    for name in chosen:
        begin = time.perf_counter()
        print(f"== {name}: about {TAKES[name]} min", flush=True)
        figures = PARTS[name](settings)
        kept[name] = {"date": time.strftime("%Y-%m-%d %H:%M"), "figures": figures}
        if arguments.keep is not None:
            arguments.keep.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        print(f"-- {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    for name in kept.keys() - set(chosen):
        print(f"kept: {name} of {kept[name]['date']}")
    print(json.dumps({name: round(value, 4) for part in kept.values() for name, value in part["figures"].items()}))


if __name__ == "__main__":
    main()
