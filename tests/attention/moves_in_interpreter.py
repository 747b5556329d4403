"""Random tables of moves, and whole attention calls, through Triton's interpreter and through C++. Run by test_moves.

Needs TRITON_INTERPRET=1 before triton is imported.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from virtual import Sequence_, attend_together, make_data

from hdp.attention import bound, moves_triton
from hdp.attention.backends import Scoring
from hdp.attention.lowered import Op
from hdp.attention.mask import Mask
from hdp.attention.moves import describe, run_on_cpu
from hdp.attention.moves_triton import DeviceTable, on_device, run_on_device
from hdp.attention.program import HeadCount

ROWS, HEADS, MOVES = 40, 6, 30
CPU = torch.device("cpu")
OUTS, NARROW, GRADIENTS, LSES = (0, 1), 2, 3, (4, 5, 6)
"""Numbers of tensors: sums in fp32; one in fp16 or fp32; gradients that nothing is written to; lse."""


def shuffled(table: DeviceTable, seed: int = 0) -> DeviceTable:
    """A GPU runs the programs of a kernel in any order, the interpreter one after the other."""
    generator = torch.Generator().manual_seed(seed)
    launches = [(kind, blocks[torch.randperm(len(blocks), generator=generator)]) for kind, blocks in table.launches]
    return DeviceTable(table.moves, tuple(launches))


def random_table(draw: np.random.Generator) -> np.ndarray:
    """Moves of all sorts in any order, which often touch what others write."""
    rows_of = []
    for _ in range(MOVES):
        rows, heads = int(draw.integers(1, 20)), int(draw.integers(1, HEADS))

        def place(number: int, rows: int = rows, heads: int = heads) -> list[int]:
            return [number, int(draw.integers(0, ROWS - rows + 1)), int(draw.integers(0, HEADS - heads + 1))]

        one, other = draw.permutation(OUTS).tolist()
        lse, other_lse = draw.permutation(LSES).tolist()[:2]
        none, op = [-1, 0, 0], Op(int(draw.integers(0, 6)))
        source, target, source2, target2 = place(one), place(other), none, none
        if op is Op.COPY:
            source, target = (place(n) for n in draw.permutation([one, NARROW]).tolist())
        elif op is Op.MERGE:
            source2, target2 = place(lse), place(other_lse)
        elif op is Op.REBUILD:
            source, source2 = place(GRADIENTS), place(lse)
        elif op is Op.ZERO:
            source = none
        elif op is Op.EMPTY:
            source, target = none, place(lse)
        rows_of.append([op, *source, *target, rows, heads, op is not Op.EMPTY, *source2, *target2])
    return np.array(rows_of, dtype=np.int64)


def check_random(seed: int) -> int:
    """Both give the same numbers; how many kernels the table took."""
    draw, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    dim = (5, 16, 20)[seed % 3]
    tensors = [torch.randn(ROWS, HEADS, dim, generator=generator) for _ in range(4)]
    tensors += [torch.randn(ROWS, HEADS, generator=generator) for _ in LSES]
    tensors[NARROW] = tensors[NARROW].to((torch.float32, torch.float16)[seed % 2])
    table = random_table(draw)
    expected, found = ([t.clone() for t in tensors] for _ in range(2))
    run_on_cpu(np.array([describe(t) for t in expected]), table, dim)
    places = np.array([[number, 0, 1] for number in range(len(tensors))])
    device_table = on_device(table, places, np.array([describe(t)[3] for t in tensors]), CPU)
    run_on_device(torch.tensor([describe(t) for t in found]), shuffled(device_table, seed), dim)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3 if seed % 2 else 1e-4, atol=1e-4, equal_nan=True)
    return len(device_table.launches)


def check_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of one bundle and of several, whole ones among them."""
    group = (0, 1, 2)
    lengths = (37, 5, 19)
    sequences = [Sequence_(length=n, group=group, schedule=name) for n in lengths]
    sequences += [Sequence_(length=19, group=(1, 0), schedule=name), Sequence_(length=9, group=(2,))]
    heads, mask, scoring = HeadCount(query=4, key=2), Mask(), Scoring(8**-0.5)
    data = make_data([s.length for s in sequences], heads, 8, mask, scoring, torch.float32, seed=1)
    plain = attend_together(sequences, data, mask, scoring, torch.float32, backend="cpu", seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(bound, "is_fused", lambda device, dtype: True)
        patch.setattr(moves_triton, "on_device", lambda *arguments: shuffled(on_device(*arguments)))
        fused = attend_together(sequences, data, mask, scoring, torch.float32, backend="cpu", seed=3)
    exact = plain.errors(data)
    for what, error in fused.errors(data).items():
        assert error <= 2 * exact[what] + 1e-6, (name, what, error, exact[what])


if __name__ == "__main__":
    if sys.argv[1] == "random":
        assert max(map(check_random, range(8))) > 6
    else:
        for schedule in ("token_ring", "ulysses"):
            check_attention(schedule, pytest.MonkeyPatch())
    print("alike")
