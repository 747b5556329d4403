"""Runs scripts as jobs of several ranks, fast: torch and transformers are imported once, ranks are forked from there.

It does what torchrun does with a script (environment, and SIGTERM for the others when one rank fails), without its ten
seconds of start-up. The server is a process of its own, so that no thread of the test process is forked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from ports import ReservedPort

IMPORTS = ("torch", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama", "matplotlib.pyplot")
IMPORTS += ("hdp.data", "hdp.report", "hdp.parallel.fsdp", "hdp.parallel.loader", "hdp.attention.huggingface")
LIMIT = 600.0  # seconds that one job may take: it ends what hangs, and less than a test may take
_LOG_OF_TORCH = re.compile(r"\[[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ ")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    codes: list[int]
    """Exit code of each rank; negative: the signal that ended it."""
    outputs: list[str]
    """What each rank printed, stdout and stderr together."""
    timed_out: bool

    def lines(self, rank: int) -> list[str]:
        """What a rank printed, but for the log of torch's C++ parts, which tells of sockets as it likes."""
        return [line for line in self.outputs[rank].splitlines() if not _LOG_OF_TORCH.match(line)]

    def check(self) -> Outcome:
        assert not self.timed_out and set(self.codes) == {0}, "\n".join(self.outputs)
        return self


class Server:
    """The test's side: ``run`` starts one job and waits for it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: Path, *arguments: object, ranks: int, folder: Path, **environment: str) -> Outcome:
        request = {
            "script": str(script),
            "arguments": [str(a) for a in arguments],
            "ranks": ranks,
            "folder": str(folder),
            "environment": environment,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)


def _serve() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_run_job(json.loads(line))), flush=True)


def _run_job(request: dict) -> dict:
    port = ReservedPort()
    files = [
        Path(request["folder"]) / f"rank{rank}.{os.getpid()}.{time.monotonic_ns()}" for rank in range(request["ranks"])
    ]
    running = {_fork(request, rank, port.number, file): rank for rank, file in enumerate(files)}
    codes, began, timed_out = {}, time.monotonic(), False
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        failed = any(codes.values())
        late = time.monotonic() - began > LIMIT
        for pid in running if failed or late else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        timed_out |= late
        time.sleep(0.02)
    port.close()
    outputs = [file.read_text(errors="replace") for file in files]
    return {"codes": [codes[rank] for rank in range(request["ranks"])], "outputs": outputs, "timed_out": timed_out}


def _fork(request: dict, rank: int, port: int, output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        target = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if request["ranks"] > 1:
            size = str(request["ranks"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= request["environment"]
        os.chdir(request["folder"])
        sys.argv = [request["script"], *request["arguments"]]
        sys.path.insert(0, str(Path(request["script"]).parent))
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
