"""The line that a run shows while it goes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR = 20  # characters
LINE_EVERY = 5.0  # seconds between lines where there is no terminal


class Progress:
    """Rewrites one line on a terminal; writes a line every few seconds (and the first and last) elsewhere."""

    def __init__(self, total: int | None, *, stream: TextIO | None = None) -> None:
        self.total = total
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._began = time.monotonic()
        self._said = -LINE_EVERY
        self._open = False

    def update(self, done: int, text: str) -> None:
        """``done`` steps are done; ``text`` says how they go."""
        elapsed = time.monotonic() - self._began
        line = f"{self._head(done, elapsed)}  {text}"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{line[:width]}")
            self._open = True
        elif elapsed - self._said >= LINE_EVERY or done == self.total:
            self._said = elapsed
            self._stream.write(line + "\n")
        self._stream.flush()

    def _head(self, done: int, elapsed: float) -> str:
        if self.total is None:
            return f"step {done:,} {clock(elapsed)}"
        width = len(f"{self.total:,}")
        left = elapsed / max(done, 1) * (self.total - done)
        head = f"step {done:>{width},}/{self.total:,} {clock(elapsed)}<{clock(left)}"
        if not self._terminal:
            return head
        full = BAR * done // max(self.total, 1)
        return f"[{'#' * full}{'.' * (BAR - full)}] {head}"

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


def clock(seconds: float) -> str:
    """``75`` -> ``"1:15"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
