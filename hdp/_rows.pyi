import numpy as np

def run(tensors: np.ndarray, moves: np.ndarray, dim: int) -> None: ...
def run_results(
    tensors: np.ndarray,
    addresses: list[int],
    lies: np.ndarray,
    skipped: int,
    moves: np.ndarray,
    dim: int,
    first: int,
    last: int,
) -> None: ...
