"""Real ranks for tests: processes over gloo that start in a fraction of a second, and can be killed for real.

torch and transformers are imported once, in a fork server; ranks are forked from there, run module-level functions of the
tests (``function(world, *arguments)``) and hand back what these return. A test waits with a hard limit: ranks that exceed it
are made to print their stacks and are killed. A rank whose function raises ends, as a script would.

    with Ranks(2) as ranks:
        assert ranks.run(rank_of) == [0, 1]
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ports import ReservedPort
from torch.distributed import TCPStore

PRELOAD = [
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.sdpa_attention",
    "transformers.generation.utils",
    "hdp.attention.huggingface",
    "hdp.parallel.fsdp",
    "hdp.parallel.loader",
    "hypothesis",
    "pytest",
]

CONTEXT = multiprocessing.get_context("forkserver")

# Limits end what hangs and measure nothing: a slow machine whose cores are busy with other work stays far below them.
PATIENCE = 200.0
"""Seconds that ranks wait for each other (``hdp.init``). No rank is ever so late, so a peer that is lost ends it sooner."""
IMPATIENCE = 10.0
"""The same where a test makes ranks wait for what never comes. Joining takes a fifth of a second, on busy cores too."""
LIMIT = 600.0
"""Seconds that a call may take. More than any time-out of ranks, so that they end by themselves, with their own error."""
IN_VAIN = 150.0
"""Seconds that a call with :data:`IMPATIENCE` may take: less than ``hdp.init`` waits if nobody says anything, so that ranks
which do not keep to their time-out are killed, and seen to have been."""
GRACE = 120.0
"""Seconds that the other ranks have to end once one has failed."""


class RanksFailed(AssertionError):
    """A rank raised, died, or exceeded the limit; shows every rank's traceback and output."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended on one rank."""

    rank: int
    value: Any = None
    error: str | None = None
    """Type and message of the exception."""
    trace: str = ""
    exit_code: int | None = None
    """None: the rank lives on. Negative: the signal that ended it."""
    seconds: float = 0.0
    """From the call to this outcome."""
    output: str = ""
    """What the rank printed so far, stdout and stderr together; only where something went wrong."""

    def __str__(self) -> str:
        how = self.error or ("ended well" if self.exit_code is None else f"ended with exit code {self.exit_code}")
        return f"--- rank {self.rank}: {how}\n{self.trace}{self.output}"


class Ranks:
    """``world_size`` processes that have joined one job through ``hdp.init``.

    Args:
        timeout: of ``hdp.init``, seconds.
        rank0_hosts_store: the job's store lives in rank 0, as without torchrun; otherwise in this process, as torchrun
            does it.
    """

    def __init__(self, world_size: int, *, timeout: float = PATIENCE, rank0_hosts_store: bool = False) -> None:
        start_server()
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="hdp-ranks-")
        self._store = None if rank0_hosts_store else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._port = None if self._store is not None else ReservedPort()
        port = self._store.port if self._store is not None else self._port.number
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            mine, theirs = CONTEXT.Pipe()
            arguments = (rank, world_size, port, rank0_hosts_store, timeout, theirs, str(self.output(rank)))
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True, name=f"rank{rank}")
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.run(_ready)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(world, *arguments)`` returned on each rank. Raises RanksFailed if any did not return."""
        outcomes = self.outcomes(function, *arguments)
        if any(outcome.error or outcome.exit_code is not None for outcome in outcomes):
            raise RanksFailed("\n" + "\n".join(map(str, outcomes)))
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT, stuck: Collection[int] = ()
    ) -> list[Outcome]:
        """How ``function`` ended on each rank, well or not. After a failure no rank is left and ``alive`` is False.

        ``limit``: seconds that it may take; ``stuck``: ranks that will not end by themselves, and are killed after the others.
        """
        call = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(call)
        began, until = time.monotonic(), limit
        found: dict[int, Outcome] = {}
        awaited = set(range(self.world_size)) - set(stuck)
        while awaited - found.keys() and (left := until - (time.monotonic() - began)) > 0:
            waiting = {self._pipes[r]: r for r in range(self.world_size) if r not in found}
            for pipe in wait(list(waiting), timeout=left):
                outcome = self._receive(waiting[pipe], time.monotonic() - began)
                found[outcome.rank] = outcome
                if outcome.exit_code is not None:
                    until = min(until, outcome.seconds + GRACE)
        if len(found) == self.world_size and all(o.exit_code is None for o in found.values()):
            return [found[rank] for rank in range(self.world_size)]
        late = self._end(missing=[rank for rank in range(self.world_size) if rank not in found])
        found |= {o.rank: o for o in late}
        outputs = [
            o.read_text(errors="replace") if o.exists() else "" for o in map(self.output, range(self.world_size))
        ]
        return [Outcome(**{**found[r].__dict__, "output": outputs[r]}) for r in range(self.world_size)]

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Ends all ranks: they get a moment to leave, then SIGKILL (which ends stopped ones as well)."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 5
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._pipes, self._processes = [], []
        if self._port is not None:
            self._port.close()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def output(self, rank: int) -> Path:
        """What the rank prints, stdout and stderr together."""
        return Path(self._folder.name) / f"rank{rank}.txt"

    def _receive(self, rank: int, seconds: float) -> Outcome:
        try:
            fields = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return Outcome(rank=rank, exit_code=self._processes[rank].exitcode, seconds=seconds)
        return Outcome(rank=rank, seconds=seconds, **fields)

    def _end(self, missing: list[int]) -> list[Outcome]:
        for rank in missing:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)  # prints the stacks
        time.sleep(0.5 if missing else 0.0)
        for process in self._processes:
            process.kill()
            process.join()
        return [Outcome(rank=rank, error="exceeded the limit and was killed", exit_code=-9) for rank in missing]


def start_server() -> None:
    """Starts the fork server; it goes on importing while this process does."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def _ready(world: Any) -> None:
    """Ranks have joined."""


def _serve(
    rank: int, world_size: int, port: int, hosts_store: bool, timeout: float, pipe: Connection, output: str
) -> None:
    """A rank's life: join, run what comes, leave when the pipe is closed."""
    if sys.platform == "linux":  # a test process that is killed takes its ranks along
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    target = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not hosts_store:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    code = 1
    try:
        import hdp

        with hdp.init(timeout=timeout, device="cpu") as world:
            while True:
                function, arguments = pickle.loads(pipe.recv_bytes())
                pipe.send_bytes(pickle.dumps({"value": function(world, *arguments)}))
    except EOFError:
        code = 0
    except BaseException as error:
        fields = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(), "exit_code": 1}
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(pickle.dumps(fields))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
