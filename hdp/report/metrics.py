"""Numbers of a run, written as they arise: JSONL for programs, TensorBoard for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Metrics:
    """Appends to ``metrics.jsonl`` (one object a line, flushed, so that a killed run keeps its numbers) and to TensorBoard.

    Raises ImportError when ``tensorboard`` is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard files need tensorboard: pip install tensorboard, or turn them off (tensorboard=False)"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line ``{"kind": kind, "step": step, ...}``; the numbers among ``values`` also go to TensorBoard."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._lines.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:
    """JSON knows no NaN: it becomes null, as readers in other languages expect."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
