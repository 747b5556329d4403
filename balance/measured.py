"""From measured micro-batches to the terms of a cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hdp.balance.cost import CostModel


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured micro-batch: some documents of one length on one rank."""

    length: int
    """Tokens of each document."""
    documents: int
    forward: float
    """Seconds."""
    backward: float
    """Seconds."""
    fitted: float = 0.0
    """Seconds of forward and backward together that the fitted cost model says."""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def error(self) -> float:
        """Of the fit, relative."""
        return self.fitted / self.seconds - 1.0


def fit(
    samples: Sequence[Sample], layers: int, head: float, piece: float = 0.0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(a, b, c) of one layer's forward and backward: seconds per squared token, per token, per micro-batch.

    Least squares of relative errors, no term negative. ``head``: seconds per token outside the layers, forward and
    backward together; one third of it counts as forward. ``piece``: seconds of each document in each layer and pass that
    are counted elsewhere.
    """
    tokens = np.array([s.length * s.documents for s in samples], dtype=np.float64)
    documents = np.array([s.documents for s in samples], dtype=np.float64)
    squares = np.array([float(s.length) ** 2 * s.documents for s in samples])
    matrix = np.stack([squares, tokens, np.ones(len(samples))], axis=1)
    passes = []
    for part, seconds in ((1 / 3, [s.forward for s in samples]), (2 / 3, [s.backward for s in samples])):
        layer = (np.array(seconds) - tokens * head * part) / layers - piece * documents
        passes.append(fit_terms(matrix, np.maximum(layer, 0.02 * np.array(seconds) / layers)))
    return passes[0], passes[1]


def fit_terms(matrix: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, ...]:
    """Seconds of each column of ``matrix`` [samples, columns]: least squares of relative errors, no term negative.

    The last column alone, which is for what depends on nothing, explains no times.
    """
    scaled, ones, columns = matrix / seconds[:, None], np.ones(len(seconds)), matrix.shape[1]
    best, least = np.zeros(columns), np.inf
    for number in range(columns, 0, -1):  # the best subset whose terms are not negative
        for chosen in combinations(range(columns), number):
            if chosen == (columns - 1,):
                continue
            found = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)[0]
            error = float(((scaled[:, chosen] @ found - ones) ** 2).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(columns), error
                best[list(chosen)] = found
    return tuple(best.tolist())


def predicted(cost: CostModel, length: int, documents: int, piece: float = 0.0) -> float:
    """Seconds of ``documents`` whole documents in one micro-batch on one rank, forward and backward."""
    attention = float(cost.attention_seconds([length])[0]) * (1.0 + cost.backward_quadratic)
    linear = length * (cost.layers * cost.linear + cost.head) * (1.0 + cost.backward_linear)
    return documents * (attention + linear + 2 * cost.layers * piece) + cost.layers * cost.constant
