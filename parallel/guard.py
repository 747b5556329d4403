"""Finds out who is missing when ranks stop answering, and says where each one stood.

Every rank writes a sign of life (a counter, and what it is doing) to the job's store once a second. When a transfer or a
collective fails, or a step takes longer than the timeout, the survivors look at all signs of life: a rank whose counter
stands still has died or is stuck, and is named.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from types import FrameType

import torch.distributed as dist

from hdp.parallel.channel import TorchChannel
from hdp.parallel.errors import HdpError

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 3.5
"""A rank whose sign of life has not changed for so long is called missing."""


class Guard:
    """This rank's sign of life, and a reader of the others'. Stops with :meth:`stop`."""

    def __init__(self, rank: int, world_size: int, channel: TorchChannel) -> None:
        self.rank, self.world_size, self.channel = rank, world_size, channel
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._old_handler: object = None
        if world_size > 1:
            self._store = dist.PrefixStore("hdp/life", dist.distributed_c10d._get_default_store().clone())
            self._write(0)
            self._thread = threading.Thread(target=self._beat, name="hdp-guard", daemon=True)
            self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def enter(self, where: str) -> None:
        """Notes what this rank is doing ("step 3, slot 1, backward"); shown in errors here and at others."""
        self.channel.where = where

    def stop(self) -> None:
        """Ends the signs of life; this rank then says that it left."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._old_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._old_handler)  # type: ignore[arg-type]
            self._old_handler = None

    def report(self, error: BaseException) -> None:
        """Leaves word of this rank's failure for the others."""
        if self.world_size > 1:
            text = f"{type(error).__name__}: {error}"
            try:
                self._store.set(f"failed/{self.rank}", text.splitlines()[0][:500])
            except RuntimeError:
                return  # the store is gone, and with it those who could read this

    def explain(self, error: BaseException) -> HdpError:
        """An error that names the ranks that failed, died or fell silent, if any did; else one that repeats ``error``."""
        if self.world_size == 1:
            return HdpError(f"rank {self.rank}, {self.channel.where}: {error}")
        own = f"rank {self.rank}, {self.channel.where}: {str(error).splitlines()[0] if str(error) else error!r}"
        try:
            causes = self._causes()
        except RuntimeError:
            causes = ["the job's store does not answer: the rank that hosts it (rank 0, or the launcher) is gone"]
        return HdpError("; ".join([*causes, own]) if causes else own)

    def _causes(self) -> list[str]:
        before = self._read_all()
        time.sleep(SILENCE_SECONDS)
        after = self._read_all()
        causes = []
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            if self._store.check([f"failed/{rank}"]):
                causes.append(f"rank {rank} failed: {self._store.get(f'failed/{rank}').decode()}")
            elif after[rank]["beat"] == before[rank]["beat"]:
                where = after[rank]["where"]
                causes.append(f"rank {rank} is gone (no sign of life for {SILENCE_SECONDS:.0f} s; it was in {where})")
        return causes

    def _read_all(self) -> dict[int, dict]:
        return {rank: json.loads(self._store.get(str(rank))) for rank in range(self.world_size)}

    def _write(self, beat: int) -> None:
        self._store.set(str(self.rank), json.dumps({"beat": beat, "where": self.channel.where}))

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._write(beat)
            except RuntimeError:
                return  # the store is gone; whoever waits for us learns it from their own transfers

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        print(f"rank {self.rank}: ended by SIGTERM, {self.channel.where}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
