"""csrc/rectangles.cpp: see hdp.attention.regions."""

import numpy as np

Target = tuple[int, int, int, int, int, np.ndarray]
Sum = tuple[bool, bool, bool, int, np.ndarray, np.ndarray, list[Target]]
Table = tuple[np.ndarray, np.ndarray]

def cut(
    causal: bool,
    window: int,
    query_bounds: np.ndarray,
    queries: np.ndarray,
    key_bounds: np.ndarray,
    keys: np.ndarray,
) -> np.ndarray: ...
def place(
    rectangles: np.ndarray, launches: np.ndarray, documents: np.ndarray, count: int, sums: list[Sum], components: int
) -> tuple[Table, Table, Table, np.ndarray]: ...
