"""csrc/tables.cpp: see hdp.attention.tables."""

import numpy as np

Move = tuple[tuple[int, ...], tuple[np.ndarray | None, ...], np.ndarray]

def expand(moves: list[Move]) -> np.ndarray: ...
def expand_results(moves: list[Move], launch: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]: ...
