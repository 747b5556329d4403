"""Finds out who is to blame when ranks stop answering, and says where each one stood.

Every rank writes a sign of life (a counter, and what it is doing) to the job's store once a second. When a transfer or a
collective fails or exceeds the timeout, a rank looks for the cause: first for a failure that some rank has left word of,
then for a rank whose sign of life stands still (it is dead or stopped), then for one that lives but does not move. The
first to find the cause leaves word of it, so ranks that wait for each other in a chain do not each search anew. Where all wait
for each other (in different attention calls, say), the error shows where each of them does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from hdp.parallel.channel import TorchChannel, first_line
from hdp.parallel.errors import PeerError

BEAT_SECONDS = 1.0
"""A rank that does not move gives a sign of life so often; one that moves, up to four times as often."""
SILENCE_BEATS = 3.5
"""A rank whose sign of life has not changed for so many beats is called dead."""
WRITES_PER_SECOND = 4000
"""Signs of life that all ranks together write to the store at most; in larger worlds they become rarer."""
POLL_SECONDS = 0.2
"""How often a rank in search of a cause looks for word of one."""
SHOWN = 8
"""Ranks that one message names at most."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One rank's sign of life."""

    beat: int
    where: str
    """What it does, the attention call included."""
    waiting: bool
    """Blocked in a transfer, or in search of a cause itself: whatever is wrong, it is not this rank's fault."""
    left: str = ""
    """``"done"``: it has closed its world. ``"failed"``: after an error, which is then the news, not its absence."""


class Guard:
    """This rank's sign of life, and a reader of the others'. Stops with :meth:`stop`."""

    def __init__(self, rank: int, world_size: int, channel: TorchChannel, generation: int = 0) -> None:
        self.rank, self.world_size, self.channel = rank, world_size, channel
        self.beat_seconds = max(BEAT_SECONDS, 4 * world_size / WRITES_PER_SECOND)
        self._is_searching = False
        self._has_failed = False
        self._own_words: list[int] = []
        """Numbers of the words that this rank left of its own failures."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._signals = _TermNotice(self._tell_place) if _is_main_thread() else None
        if world_size > 1:
            self._store = dist.PrefixStore(f"hdp/life/{generation}", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
            self._write(0)
            self._thread = threading.Thread(target=self._beat, name="hdp-guard", daemon=True)
            self._thread.start()

    def enter(self, where: str) -> None:
        """Notes what this rank is doing ("step 3, slot 1, backward"); shown in errors here and at others."""
        self.channel.where, self.channel.call = where, None

    @contextlib.contextmanager
    def watch(self, where: str) -> Iterator[None]:
        """Work that other ranks take part in: errors of this rank are reported to them, errors of communication explained.

        Raises:
            PeerError: in place of an error of communication; names the rank that caused it.
        """
        self.enter(where)
        self._retract()
        try:
            yield
        except Exception as error:
            if getattr(error, "explained", False):
                raise
            if _is_communication_error(error):
                raise self.explain(error) from error
            self.report(error)
            raise

    def stop(self) -> None:
        """Ends the signs of life; this rank then says that it left."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with contextlib.suppress(RuntimeError):  # the store may have left before us
                self._write(0, left="failed" if self._has_failed else "done")
        if self._signals is not None:
            self._signals.close()
            self._signals = None

    def report(self, error: BaseException) -> None:
        """Leaves word of this rank's own failure for the others.

        Consequences of another rank's failure (PeerError) and of a signal (SystemExit, KeyboardInterrupt) are not news.
        """
        self._has_failed = True
        if self.world_size > 1 and isinstance(error, Exception) and not isinstance(error, PeerError):
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it those who could read this
                text = f"rank {self.rank} failed: {type(error).__name__}: {first_line(error)}"
                self._own_words.append(self._leave_word(self.rank, text))

    def _retract(self) -> None:
        """A rank that begins new work has outlived what it reported: nobody is to be told of it any more."""
        for number in self._own_words:
            self._store.delete_key(f"word/{number}")
        self._own_words.clear()
        self._has_failed = False

    def explain(self, error: BaseException) -> PeerError:
        """An error that names the ranks that failed, died or fell silent, if any did; else one that repeats ``error``."""
        own = first_line(error)
        if not own.startswith(f"rank {self.rank},"):
            own = f"rank {self.rank}, {self.channel.place}: {own}"
        causes: list[str] = []
        elsewhere = ""
        if self.world_size > 1:
            self._has_failed = self._is_searching = True
            try:
                causes, signs = self._causes()
                elsewhere = self._elsewhere(signs, getattr(error, "peer", None))
            except RuntimeError:
                causes = ["the job's store does not answer: the rank that hosts it (rank 0, or the launcher) is gone"]
        explained = PeerError("; ".join(causes) + f" (noticed by {own})" if causes else own + elsewhere)
        explained.explained = True
        return explained

    # ------------------------------------------------------------ causes

    def _causes(self) -> tuple[list[str], list[Sign]]:
        """Whose fault it is, as far as it is known; else nobody's, and every rank's last sign of life."""
        before = self._read_all()
        silence = SILENCE_BEATS * self.beat_seconds
        until = time.monotonic() + silence
        while True:
            if words := self._words():
                return words, []
            if time.monotonic() >= until:
                break
            time.sleep(POLL_SECONDS)
        after = self._read_all()
        others = [rank for rank in range(self.world_size) if rank != self.rank and after[rank].left != "failed"]
        found = {r: "has left the job (its script ended, or closed its world)" for r in others if after[r].left}
        for r in others:
            if not after[r].left and after[r].beat == before[r].beat:
                found[r] = f"is dead or stopped: no sign of life for {silence:.1f} s, last seen at: {after[r].where}"
        if not found:
            still = [r for r in others if not after[r].waiting and after[r].where == before[r].where]
            found = {r: f"lives but has not moved from: {after[r].where}" for r in still}
        for rank, what in list(found.items())[:SHOWN]:
            self._leave_word(rank, f"rank {rank} {what}")
        return self._words(), after

    def _elsewhere(self, signs: list[Sign], peer: int | None) -> str:
        """Where ranks are that do something else than this one, ``peer`` first."""
        places: dict[str, list[int]] = {}
        for rank in sorted(range(len(signs)), key=lambda rank: (rank != peer, rank)):
            if rank != self.rank and signs[rank].where != self.channel.place:
                places.setdefault(signs[rank].where, []).append(rank)
        shown = [
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:SHOWN]))}"
            f"{' and more' if len(ranks) > SHOWN else ''} at: {place}"
            for place, ranks in list(places.items())[:SHOWN]
        ]
        return "; meanwhile " + "; ".join(shown) if shown else ""

    def _leave_word(self, rank: int, text: str) -> int:
        """Notes the cause of a failure, the fault of ``rank``; returns the word's number."""
        number = self._store.add("words", 1)
        self._store.set(f"word/{number}", json.dumps([rank, text[:500]]))
        return int(number)

    def _words(self) -> list[str]:
        """Causes that were noted, the first of each rank."""
        found: dict[int, str] = {}
        for number in range(1, self._store.add("words", 0) + 1):
            if self._store.check([f"word/{number}"]):  # never wait in the store: that would hold up our signs of life
                rank, text = json.loads(self._store.get(f"word/{number}"))
                found.setdefault(rank, text)
        return list(found.values())[:SHOWN]

    # ------------------------------------------------------------ signs of life

    def _read_all(self) -> list[Sign]:
        keys = [str(rank) for rank in range(self.world_size)]
        if not self._store.check(keys):  # some rank is still on its way in
            return [self._read(key) for key in keys]
        values = self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys)  # type: ignore[attr-defined]
        return [Sign(**json.loads(value)) for value in values]

    def _read(self, key: str) -> Sign:
        if self._store.check([key]):
            return Sign(**json.loads(self._store.get(key)))
        return Sign(beat=-1, where="before hdp.init", waiting=False)

    def _write(self, beat: int, left: str = "") -> None:
        waiting = self._is_searching or self.channel.is_waiting
        sign = Sign(beat=beat, where=self.channel.place, waiting=waiting, left=left)
        self._store.set(str(self.rank), json.dumps(sign.__dict__))

    def _beat(self) -> None:
        beat, where, last = 0, "", time.monotonic()
        while not self._stop.wait(self.beat_seconds / 4):
            if where == self.channel.where and time.monotonic() - last < self.beat_seconds:
                continue
            beat, where, last = beat + 1, self.channel.where, time.monotonic()
            try:
                self._write(beat)
            except RuntimeError:
                return  # the store is gone; whoever waits for us learns it from their own transfers

    def _tell_place(self) -> None:
        print(f"rank {self.rank}: told to end by SIGTERM, at: {self.channel.place}", file=sys.stderr, flush=True)


class _TermNotice:
    """Tells where the rank stands when SIGTERM comes, even while the main thread is blocked in a transfer.

    Python runs signal handlers in the main thread, which may not return from gloo or NCCL before the launcher's SIGKILL; the
    wakeup descriptor is written at once, and a thread waits for it. What SIGTERM did before happens after that: a handler
    that was there is called, otherwise the process ends.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._told = threading.Lock()
        self._old_handler = signal.signal(signal.SIGTERM, self._handle)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="hdp-sigterm", daemon=True).start()

    def close(self) -> None:
        if not _is_main_thread():
            return
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._old_handler)
        current = signal.set_wakeup_fd(self._old_descriptor)
        if current not in (self._writer, -1):  # someone else's by now
            signal.set_wakeup_fd(current)
        os.close(self._writer)

    def _watch(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] == signal.SIGTERM:
                self._tell_once()
        os.close(self._reader)

    def _tell_once(self) -> None:
        if self._told.acquire(blocking=False):
            self._tell()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._tell_once()
        if callable(self._old_handler):
            self._old_handler(number, frame)
        elif self._old_handler != signal.SIG_IGN:
            raise SystemExit(128 + number)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_communication_error(error: Exception) -> bool:
    if isinstance(error, PeerError | dist.DistError):
        return True
    text = str(error).lower()
    # Gloo's words where it does not give its name; "pair closure" is what one timeout leaves to all that wait beside it.
    signs = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "pair closure")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
