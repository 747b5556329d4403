"""One measured step on disk: enough to draw it again, or beside another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdp.balance import Plan
from hdp.report.timeline import Step

PLAN_FIELDS = ("world_size", "capacity", "regime", "planner", "layout")
SPAN_FIELDS = ("rank", "slot", "kind", "start", "stop", "sequences")


@dataclass(frozen=True, kw_only=True)
class Span:
    """What one rank did for a while; the same fields as the spans of a ``hdp.StepResult``."""

    rank: int
    slot: int
    kind: str
    """``"compute"`` or ``"wait"``."""
    start: float
    """Seconds from the beginning of the step."""
    stop: float
    sequences: tuple[int, ...]


def title(batch: Any, result: Any) -> str:
    plan = batch.plan
    return (
        f"step {batch.step}: {result.tokens:,} tokens in {len(plan.lengths)} documents, "
        f"groups {plan.describe_groups()}, planner {plan.planner}, "
        f"imbalance {result.imbalance:.2f}, waiting {result.waiting_share:.0%}"
    )


def write_step(path: Path, step: Step) -> None:
    plan = step.plan
    state = {
        "title": step.title,
        "seconds": step.seconds,
        "plan": {name: getattr(plan, name) for name in PLAN_FIELDS},
        "lengths": plan.lengths.tolist(),
        "slots": plan.slots.tolist(),
        "groups": [plan.group(sequence) for sequence in range(len(plan.lengths))],
        "spans": [[getattr(span, name) for name in SPAN_FIELDS] for span in step.spans],
    }
    path.write_text(json.dumps(state) + "\n")


def read_step(path: Path) -> Step:
    """The step that :func:`write_step` wrote (its schedules, which no picture shows, excepted)."""
    state = json.loads(path.read_text())
    plan = Plan.from_groups(state["lengths"], state["groups"], state["slots"], **state["plan"])
    spans = [
        Span(**{**dict(zip(SPAN_FIELDS, row, strict=True)), "sequences": tuple(row[-1])}) for row in state["spans"]
    ]
    return Step(plan=plan, spans=spans, seconds=state["seconds"], title=state["title"])
