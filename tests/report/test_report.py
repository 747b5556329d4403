"""Reports: what a run leaves behind says what happened."""

import io
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from hdp.balance import Plan
from hdp.balance.foresee import Foreseen, Peak
from hdp.report import Run
from hdp.report import progress as progress_line
from hdp.report.progress import Progress, clock
from hdp.report.recording import read_step
from hdp.report.timeline import colours, draw_steps, strips

LENGTHS = [8000, 3000, 1000, 4000]
GROUPS = [(0, 1), (0,), (0,), (1,)]


def make_plan() -> Plan:
    return Plan.from_groups(LENGTHS, GROUPS, [0, 1, 1, 1], world_size=2, capacity=4000, regime="step", planner="naive")


def span(rank, slot, kind, start, stop, *sequences):
    return SimpleNamespace(rank=rank, slot=slot, kind=kind, start=start, stop=stop, sequences=sequences)


SPANS = (
    span(0, 0, "compute", 0.0, 1.0, 0),
    span(0, 0, "wait", 1.0, 1.2),
    span(0, 1, "compute", 1.2, 2.0, 1, 2),
    span(1, 0, "compute", 0.0, 1.2, 0),
    span(1, 1, "compute", 1.2, 1.6, 3),
    span(1, 1, "wait", 1.6, 2.0),
)


def make_step(step: int, loss: float):
    batch = SimpleNamespace(step=step, plan=make_plan(), tokens=16000, label_tokens=15996)
    result = SimpleNamespace(
        loss=loss,
        tokens=16000,
        label_tokens=15996,
        seconds=2.0,
        busy_seconds=(1.8, 1.6),
        wait_seconds=(0.2, 0.4),
        attention_bytes=1 << 20,
        memory=3_000_000,
        foreseen=Foreseen(rank=1, peak=Peak(bytes=2_000_000, when="loss", parts={"saved activations": 2_000_000})),
        predicted=SimpleNamespace(seconds=1.6),
        imbalance=1.8 / 1.7,
        waiting_share=0.15,
        spans=SPANS,
    )
    return batch, result


def run_a_few(folder, world_rank=0, **options):
    with Run(folder, SimpleNamespace(rank=world_rank, world_size=2), steps=3, **options) as run:
        run.evaluation(5.0)
        for step in range(3):
            run.step(*make_step(step, 5.0 - step), lr=1e-3, grad_norm=0.5)
        run.evaluation(2.5)
    return run


def test_a_run_leaves_metrics_pictures_settings_and_summary(tmp_path, capsys):
    run_a_few(tmp_path / "r", settings={"arguments": {"seed": 7}})
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("held_out", 0), ("train", 0), ("train", 1), ("train", 2), ("held_out", 3)
    ]  # fmt: skip
    assert lines[1]["attention_bytes"] == 1 << 20
    assert (lines[1]["memory"], lines[1]["memory_foreseen"]) == (3_000_000, 2_000_000)
    assert (lines[1]["seconds"], lines[1]["seconds_predicted"]) == (2.0, 1.6)
    assert "2, predicted 1.6 (+25%)" in (tmp_path / "r" / "summary.txt").read_text()
    assert lines[1]["memory_parts"] == {"saved activations": 2_000_000}
    assert lines[1]["groups"] == "1x2 + 3x1" and lines[1]["tokens_per_second"] == 8000 and lines[1]["lr"] == 1e-3
    for picture in ("loss.png", "step.png"):
        assert (tmp_path / "r" / picture).read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert settings["arguments"] == {"seed": 7} and "torch" in settings["versions"] and settings["world_size"] == 2
    summary = (tmp_path / "r" / "summary.txt").read_text()
    assert "5.0000 -> 2.5000" in summary and "15.0%" in summary and "48,000" in summary
    assert summary in capsys.readouterr().err


def test_the_pictured_step_can_be_read_and_drawn_again(tmp_path):
    run = run_a_few(tmp_path / "r", tensorboard=False, picture=2)
    step = read_step(run.folder / "step.json")
    assert step.title.startswith("step 2: 16,000 tokens in 4 documents, groups 1x2 + 3x1")
    assert step.plan.digest == make_plan().digest
    assert strips(step.plan, step.spans) == strips(make_plan(), SPANS)
    draw_steps(tmp_path / "both.png", [step, step])
    assert (tmp_path / "both.png").stat().st_size > (run.folder / "step.png").stat().st_size


def test_a_step_to_draw_that_is_never_reached_is_said(tmp_path, capsys):
    run = run_a_few(tmp_path / "r", tensorboard=False, picture=99)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: step 99, which was to be drawn, was never reached: there is no step.png (the run had the steps 0 to 2)"
    ]
    assert (run.folder / "loss.png").exists() and not (run.folder / "step.png").exists()
    run_a_few(tmp_path / "r", tensorboard=False, picture=2)
    assert "never reached" not in capsys.readouterr().err


def test_tensorboard_holds_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_a_few(tmp_path / "r", figures=False)
    events = accumulator.EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [5.0, 4.0, 3.0]
    assert [event.step for event in events.Scalars("held_out/loss")] == [0, 3]


def test_other_ranks_are_silent_and_write_nothing(tmp_path, capsys):
    run_a_few(tmp_path / "r", world_rank=1)
    assert not (tmp_path / "r").exists()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_no_run_is_overwritten(tmp_path):
    first = run_a_few(tmp_path / "r", figures=False, tensorboard=False)
    second = run_a_few(tmp_path / "r", figures=False, tensorboard=False)
    assert first.folder.name == "r" and second.folder.name == "r-2"
    assert not (second.folder / "loss.png").exists() and not (second.folder / "tensorboard").exists()


def test_a_failed_run_keeps_its_numbers_and_lets_the_error_through(tmp_path):
    with (
        pytest.raises(RuntimeError, match="half way"),
        Run(tmp_path / "r", SimpleNamespace(rank=0, world_size=2)) as run,
    ):
        run.step(*make_step(0, 5.0))
        raise RuntimeError("half way")
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "r" / "summary.txt").exists()


def test_a_loss_that_is_not_a_number_is_null_in_json(tmp_path):
    with Run(tmp_path / "r", SimpleNamespace(rank=0, world_size=2), tensorboard=False, figures=False) as run:
        run.step(*make_step(0, float("nan")))
    assert json.loads((tmp_path / "r" / "metrics.jsonl").read_text())["loss"] is None


def test_strips_divide_a_micro_batch_by_tokens():
    cut = strips(make_plan(), SPANS)
    mixed = [strip for strip in cut if strip.rank == 0 and strip.start == 1.2]
    assert [(strip.sequence, strip.bottom, strip.top) for strip in mixed] == [(1, 0.0, 0.75), (2, 0.75, 1.0)]
    assert [strip.sequence for strip in cut if strip.kind == "wait"] == [None, None]
    area = {}
    for strip in cut:
        area[strip.rank] = area.get(strip.rank, 0) + (strip.stop - strip.start) * (strip.top - strip.bottom)
    assert area == pytest.approx({0: 2.0, 1: 2.0})  # every moment of every rank is drawn once


def test_a_dummy_micro_batch_is_drawn_as_nothing():
    (strip,) = strips(make_plan(), [span(1, 2, "compute", 0.0, 1.0)])
    assert strip.sequence is None and strip.kind == "compute"


def test_every_document_has_a_colour_of_its_own():
    lengths = np.arange(1, 61)
    plan = Plan.from_groups(
        lengths, [(0, 1)] * 10 + [(0,)] * 50, range(60), world_size=2, capacity=64, regime="step", planner="naive"
    )
    assert len(set(colours(plan).values())) == 60


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_rewrites_a_line_on_a_terminal_and_prints_few_lines_elsewhere(monkeypatch):
    """A step a second, by a clock of its own."""
    monkeypatch.setenv("COLUMNS", "100")
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        seconds = itertools.count()
        monkeypatch.setattr(progress_line, "time", SimpleNamespace(monotonic=lambda seconds=seconds: next(seconds)))
        progress = Progress(50, stream=stream)
        for step in range(1, 51):
            progress.update(step, f"loss {step}")
        progress.close()
    assert terminal.getvalue().count("\r") == 50 and terminal.getvalue().endswith("loss 50\n")
    assert "#" * 20 in terminal.getvalue()
    told = [int(line.rpartition("loss ")[2]) for line in log.getvalue().splitlines()]
    assert told == [*range(1, 50, round(progress_line.LINE_EVERY)), 50]


def test_clock():
    assert [clock(s) for s in (0, 75, 3725)] == ["0:00", "1:15", "1:02:05"]
