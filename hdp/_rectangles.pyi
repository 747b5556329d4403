"""csrc/rectangles.cpp: see hdp.attention.regions."""

import numpy as np

Target = tuple[int, int, int, int, int, np.ndarray]
Sum = tuple[bool, bool, bool, int, np.ndarray, np.ndarray, list[Target]]
Launches = tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]

def cut(
    causal: bool,
    window: int,
    query_bounds: np.ndarray,
    queries: np.ndarray,
    key_bounds: np.ndarray,
    keys: np.ndarray,
) -> np.ndarray: ...
def place(
    rectangles: np.ndarray,
    chosen: np.ndarray,
    bases: np.ndarray,
    turns: np.ndarray,
    packs: bool,
    sums: list[Sum],
    components: int,
) -> tuple[Launches | None, Launches | None, Launches | None, np.ndarray]: ...
