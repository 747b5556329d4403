"""A run and the folder it leaves behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hdp.report import settings as settings_
from hdp.report.curve import draw_loss
from hdp.report.metrics import Metrics
from hdp.report.progress import Progress, clock
from hdp.report.recording import title, write_step
from hdp.report.summary import table
from hdp.report.timeline import Step, draw_steps


class World(Protocol):
    """What a report needs of ``hdp.World``."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


class Run:
    """Progress, metrics, pictures and summary of one run. Use it as a context manager.

    ``folder``: where to write; when it exists already, ``folder-2``, ``folder-3``, ... (no run is overwritten).
    ``steps``: how many there will be, None when that is not known. ``settings``: anything JSON holds that reproduces
    the run, beside what is collected anyway. ``tensorboard``, ``figures``: False to leave them out. ``picture``: the
    step to draw, None for the one whose groups differ most; one that is never reached is said to be missing at the
    end. Raises ImportError when something is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        world: World,
        *,
        steps: int | None = None,
        settings: dict[str, Any] | None = None,
        tensorboard: bool = True,
        figures: bool = True,
        picture: int | None = None,
    ) -> None:
        self.speaks = world.rank == 0
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[tuple[int, float]] = []
        self._figures = figures
        self._picture = picture
        self._pictured: tuple[Any, Any] | None = None
        self._machine: Any = None
        self._began = time.monotonic()
        if not self.speaks:
            return
        self.folder = _free(Path(folder))
        self.folder.mkdir(parents=True)
        self._settings = settings_.collect(world.world_size, settings or {})
        settings_.write(self.folder / "settings.json", self._settings)
        self._metrics = Metrics(self.folder, tensorboard=tensorboard)
        self._progress = Progress(steps)

    def evaluation(self, loss: float) -> None:
        """Notes the held-out loss (nats a token) after the steps so far."""
        step = self.history[-1]["step"] + 1 if self.history else 0
        self.evaluations.append((step, loss))
        if self.speaks:
            self._metrics.write("held_out", step, {"loss": loss})
            self.say(f"held-out loss {loss:.4f} {'before training' if not self.history else f'after {step} steps'}")

    def step(self, batch: Any, result: Any, *, lr: float | None = None, grad_norm: float | None = None) -> None:
        """Notes one step: ``batch`` is a ``hdp.PlannedBatch``, ``result`` the ``hdp.StepResult`` of it."""
        if not self.speaks:
            return
        values = {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "tokens": result.tokens,
            "label_tokens": result.label_tokens,
            "documents": len(batch.plan.lengths),
            "seconds": result.seconds,
            "seconds_predicted": result.predicted.seconds if result.predicted else None,
            "tokens_per_second": result.tokens / result.seconds if result.seconds else 0.0,
            "imbalance": result.imbalance,
            "waiting_share": result.waiting_share,
            "groups": batch.plan.describe_groups(),
            "planner": batch.plan.planner,
            "busy_seconds": tuple(result.busy_seconds),
            "wait_seconds": tuple(result.wait_seconds),
            "attention_bytes": result.attention_bytes,
            "memory": result.memory,
            "memory_foreseen": result.foreseen.bytes if result.foreseen else None,
            "memory_parts": result.foreseen.peak.parts if result.foreseen else None,
        }
        self._keep_machine(batch)
        self.history.append({"step": batch.step, **values})
        self._metrics.write("train", batch.step, values)
        self._keep_for_the_picture(batch, result)
        self._progress.update(
            len(self.history),
            f"loss {result.loss:.4f}  {values['tokens_per_second']:,.0f} tokens/s  groups {values['groups']}  "
            f"imbalance {result.imbalance:.2f}  waiting {result.waiting_share:.0%}",
        )

    def _keep_machine(self, batch: Any) -> None:
        """With which the run can be planned again to the bit; one measured meanwhile is named by its first step."""
        machine = getattr(batch, "machine", None)
        if machine is not None and machine != self._machine:
            name = "machine.json" if self._machine is None else f"machine-{batch.step}.json"
            machine.write(self.folder / name)
            self._machine = machine

    def say(self, text: str) -> None:
        """One line on rank 0, without breaking the progress bar."""
        if self.speaks:
            self._progress.close()
            print(text, file=sys.stderr, flush=True)

    def _keep_for_the_picture(self, batch: Any, result: Any) -> None:
        """The step that was asked for, else the one whose groups differ most.

        The first step, in which everything warms up, is kept only as long as there is no other.
        """

        def worth(kept: tuple[Any, Any]) -> tuple[int, int]:
            sizes = kept[0].plan.group_sizes()
            return len(sizes), min(sizes[max(sizes)], 3) if sizes else 0

        if self._picture is not None:
            better = batch.step == self._picture
        else:
            better = self._pictured is None or len(self.history) == 2 or worth((batch, result)) > worth(self._pictured)
        if better:
            self._pictured = (batch, result)

    def summary(self) -> str:
        """The table of the whole run. The first step, which warms up, is left out of rates where there are others."""
        steady = self.history[1:] or self.history
        seconds = sum(step["seconds"] for step in steady)
        waited = sum(sum(step["wait_seconds"]) for step in steady)
        lived = waited + sum(sum(step["busy_seconds"]) for step in steady)
        rows = [("steps", f"{len(self.history):,}")]
        if self.history:
            rows += [
                ("tokens trained on", f"{sum(step['tokens'] for step in self.history):,}"),
                ("training loss", f"{self.history[0]['loss']:.4f} -> {self.history[-1]['loss']:.4f}"),
            ]
        if self.evaluations:
            rows.append(("held-out loss", " -> ".join(f"{loss:.4f}" for _, loss in self.evaluations)))
        if seconds:
            rows += [
                ("tokens/s", f"{sum(step['tokens'] for step in steady) / seconds:,.0f}"),
                ("imbalance (max/mean busy)", f"{_mean([step['imbalance'] for step in steady]):.3f}"),
                ("share of time waiting", f"{waited / lived:.1%}" if lived else "0.0%"),
            ]
        rows += _predicted_rows(steady)
        rows += _memory_rows(self.history)
        rows += [("wall time", clock(time.monotonic() - self._began)), ("folder", str(self.folder))]
        return table(rows)

    def close(self) -> None:
        """Draws the pictures, prints and keeps the summary. Leaving the ``with`` block calls it."""
        if not self.speaks:
            return
        self._progress.close()
        self._metrics.close()
        if self._figures and self.history:
            self._draw()
        text = self.summary()
        (self.folder / "summary.txt").write_text(text + "\n")
        print(text, file=sys.stderr, flush=True)

    def _draw(self) -> None:
        steps = [step["step"] for step in self.history]
        losses = [step["loss"] for step in self.history]
        name = self.folder.name
        draw_loss(self.folder / "loss.png", steps=steps, losses=losses, evaluations=self.evaluations, title=name)
        if self._pictured is None:
            self.say(
                f"warning: step {self._picture}, which was to be drawn, was never reached: there is no step.png "
                f"(the run had the steps {steps[0]} to {steps[-1]})"
            )
            return
        batch, result = self._pictured
        step = Step(plan=batch.plan, spans=result.spans, seconds=result.seconds, title=title(batch, result))
        write_step(self.folder / "step.json", step)
        draw_steps(self.folder / "step.png", [step])

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.speaks:  # what there is stays in the folder; the error is the message
            self._progress.close()
            self._metrics.close()


def _free(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _predicted_rows(history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Mean seconds of a step, and what the machine predicted of the same steps."""
    both = [(step["seconds"], step["seconds_predicted"]) for step in history if step["seconds_predicted"]]
    if not both:
        return []
    measured, predicted = (_mean(list(each)) for each in zip(*both, strict=True))
    return [("seconds a step", f"{measured:.3g}, predicted {predicted:.3g} ({measured / predicted - 1:+.0%})")]


def _memory_rows(history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Of the fullest rank: what was taken at most, and what was foreseen."""
    taken = max((step["memory"] for step in history), default=0)
    foreseen = max((step["memory_foreseen"] or 0 for step in history), default=0)
    shown = [f"{size / 1e6:,.0f} MB" for size in (taken, foreseen)]
    if not taken:
        return []
    return [("memory of the fullest rank", shown[0] + (f", foreseen {shown[1]}" if foreseen else ""))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
