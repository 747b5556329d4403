"""Tables of moves on a GPU: as Triton's interpreter runs them, against C++; compiled ahead for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hdp import _tables
from hdp.attention.lowered import FIELDS, Op

FOLDER = Path(__file__).parent
COMPILED = [(80, 0), (80, 2), (90, 0), (90, 1), (90, 2), (90, 3), (90, 4), (100, 5)]
"""GPU and kind of move."""


@pytest.mark.parametrize("what", ["random", "attention"])
def test_as_in_cpp(what: str) -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join((str(FOLDER), str(FOLDER.parent)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(FOLDER / "moves_in_interpreter.py"), what]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("alike"), done.stderr


@pytest.mark.parametrize(("capability", "kind"), COMPILED)
def test_the_kernels_compile_ahead_of_time(capability: int, kind: int) -> None:
    pytest.importorskip("triton")
    from hdp.attention.moves_triton import compile_for

    ptx = compile_for(capability, kind)
    assert f".target sm_{capability}" in ptx and "moves_kernel" in ptx


def move(
    op: Op, source: int, source_row: int, target: int, target_row: int, rows: int, heads: tuple[int, int]
) -> list[int]:
    row = dict.fromkeys(FIELDS, 0)
    row |= {"op": op, "source": source, "source_row": source_row, "source_head": heads[0], "target": target}
    row |= {"target_row": target_row, "target_head": heads[0], "rows": rows, "heads": heads[1] - heads[0], "has_dim": 1}
    return list((row | {"source2": -1, "target2": -1}).values())


def waves(*moves: list[int], places: list[list[int]]) -> list[int]:
    return _tables.waves(np.array(moves), np.array(places)).tolist()


def test_what_touches_the_same_rows_waits() -> None:
    apart = [[0, 0, 100], [1, 0, 100], [2, 0, 100]]
    both = (0, 4)
    first = move(Op.COPY, 0, 0, 1, 0, 10, both)
    assert waves(first, move(Op.ADD, 0, 0, 1, 9, 10, both), places=apart) == [0, 1]  # row 9
    assert waves(first, move(Op.ADD, 0, 0, 1, 10, 10, both), places=apart) == [0, 0]
    assert waves(first, move(Op.COPY, 1, 5, 2, 0, 1, both), places=apart) == [0, 1]  # reads what is written
    assert waves(move(Op.COPY, 1, 5, 2, 0, 1, both), first, places=apart) == [0, 1]  # writes what is read
    assert waves(first, move(Op.COPY, 0, 0, 2, 0, 10, both), places=apart) == [0, 0]  # both only read it
    halves = [move(Op.COPY, 0, 0, 1, 0, 10, heads) for heads in ((0, 2), (2, 4), (1, 3))]
    assert waves(*halves, places=apart) == [0, 0, 1]


def test_tensors_that_share_memory_wait_for_each_other() -> None:
    """One that is received where another one lies, or part of a message."""
    both = (0, 4)
    moves = [move(Op.COPY, 0, 0, 1, 0, 2, both), move(Op.COPY, 2, 50, 0, 50, 2, both)]
    assert waves(*moves, places=[[2, 0, 1], [0, 0, 100], [0, 100, 200]]) == [0, 0]
    assert waves(*moves, places=[[2, 0, 1], [0, 0, 101], [0, 100, 200]]) == [0, 1]
    assert waves(*moves, places=[[2, 0, 1], [1, 0, 101], [0, 100, 200]]) == [0, 0]  # in what is kept, and in the arena
