"""One clear error for a job of many ranks, whichever rank meets it."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
from hdp.report import launch, failures
failures.PATIENCE = float({patience})
sleep = failures.time.sleep

def waits(seconds):
    print("waits", flush=True)
    sleep(seconds)

failures.time.sleep = waits

def main():
    {body}

launch(main)
"""


def start(tmp_path, body, *, rank=None, patience=0.5, **environment):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT).format(body=body, patience=patience))
    env = {**os.environ, **environment} | ({} if rank is None else {"RANK": str(rank)})
    return subprocess.Popen(
        [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(tmp_path, body, *, at_once=False, **options):
    """Exit code and what it told; ``at_once``: without waiting for another rank to speak first."""
    process = start(tmp_path, body, **options)
    output, errors = process.communicate()
    assert output == "" or not at_once
    return process.returncode, errors


@pytest.mark.parametrize("rank", [None, 0])
def test_a_mistake_of_the_user_is_one_line(tmp_path, rank):
    code, errors = run(tmp_path, "raise ValueError('capacity is 0: give at least 1')", rank=rank)
    assert code == 1
    assert errors.splitlines() == ["error: capacity is 0: give at least 1"]


def test_an_error_of_the_library_is_one_line_too(tmp_path):
    code, errors = run(tmp_path, "from hdp.data import open_documents; open_documents('/nowhere')", rank=0)
    assert code == 1 and errors.startswith("error: no data at /nowhere") and len(errors.splitlines()) == 1


def test_the_traceback_can_be_asked_for(tmp_path):
    _, errors = run(tmp_path, "raise ValueError('capacity is 0')", HDP_TRACEBACK="1")
    assert "Traceback" in errors and errors.splitlines()[-1] == "error: capacity is 0"


def test_another_rank_waits_for_rank_0_and_is_ended_quietly(tmp_path):
    process = start(tmp_path, "raise ValueError('capacity is 0')", rank=1, patience=3600)
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 1 and errors == ""


def test_an_error_that_only_one_rank_has_is_told_by_it(tmp_path):
    code, errors = run(tmp_path, "raise ValueError('this disk is full')", rank=3)
    assert code == 1 and errors.splitlines() == ["[rank 3] error: this disk is full"]


def test_a_defect_keeps_its_traceback_and_names_its_rank(tmp_path):
    for body in ("dict()['missing']", "import json; json.loads('nonsense')"):  # the second is a ValueError of others
        code, errors = run(tmp_path, body, rank=2)
        assert code == 1 and all(line.startswith("[rank 2] ") for line in errors.splitlines())
        assert "Traceback" in errors


def test_torchrun_is_told_the_same_line(tmp_path):
    record = tmp_path / "error.json"
    run(tmp_path, "raise ValueError('capacity is 0')", rank=0, TORCHELASTIC_ERROR_FILE=str(record))
    assert json.loads(record.read_text())["message"]["message"] == "error: capacity is 0"


def test_success_ends_with_0(tmp_path):
    assert run(tmp_path, "pass") == (0, "")


def test_what_is_about_a_rank_is_told_by_it_at_once(tmp_path):
    body = "from hdp.parallel.errors import PeerError; raise PeerError('rank 2 lost rank 0')"
    code, errors = run(tmp_path, body, rank=2, at_once=True)
    assert code == 1 and errors.splitlines() == ["error: rank 2 lost rank 0"]


def test_a_disk_that_fails_is_one_line_of_each_rank(tmp_path):
    body = "from hdp.offload.errors import OffloadError; raise OffloadError('disk: no space left')"
    assert run(tmp_path, body, rank=1, at_once=True) == (1, "[rank 1] error: disk: no space left\n")
    assert run(tmp_path, body) == (1, "error: disk: no space left\n")


def test_warnings_of_the_library_are_one_line(tmp_path):
    body = "import warnings; from hdp.data.problems import warn; warn('left out 2'); warnings.warn('of others')"
    code, errors = run(tmp_path, body)
    assert code == 0 and errors.splitlines()[0] == "warning: left out 2"
    assert errors.splitlines()[1].endswith("UserWarning: of others")


ARGUMENTS = "from hdp.report import ArgumentParser; ArgumentParser(prog='job').parse_args({})"


def test_wrong_arguments_are_told_by_rank_0_alone(tmp_path):
    record = tmp_path / "error.json"
    body = ARGUMENTS.format(["--stpes", "3"])
    code, errors = run(tmp_path, body, rank=0, TORCHELASTIC_ERROR_FILE=str(record))
    assert code == 2 and errors.splitlines() == [
        "usage: job [-h]", "job: error: unrecognized arguments: --stpes 3"
    ]  # fmt: skip
    assert json.loads(record.read_text())["message"]["message"] == "error: unrecognized arguments: --stpes 3"
    assert run(tmp_path, body, rank=1) == (2, "")


def test_another_rank_with_wrong_arguments_leaves_rank_0_time_to_speak(tmp_path):
    process = start(tmp_path, ARGUMENTS.format(["--stpes", "3"]), rank=1, patience=3600)
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 2 and errors == ""


def test_help_is_printed_once(tmp_path):
    for rank, printed in ((None, True), (0, True), (1, False)):
        process = start(tmp_path, ARGUMENTS.format(["--help"]), rank=rank)
        output, errors = process.communicate()
        assert process.returncode == 0 and errors == ""
        assert ("usage: job" in output) == printed and bool(output) == printed
