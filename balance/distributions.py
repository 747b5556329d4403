"""Document lengths to plan for: named distributions, files of lengths, source trees.

Draws come from a seeded generator and end when the batch holds the tokens asked for. No document is longer than the
context: longer ones are drawn again, as a data loader that filters by length would.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np

from hdp.balance.plan import IntArray, PlanError

# Token shares by bucket, in percent (ByteScale, figure 4; edges in units of 1,024 tokens). Within a bucket lengths are
# spread evenly on a log scale; the last bucket is cut by the context.
_EDGES = (0.25, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_BYTED = (14.2, 11.4, 7.6, 7.6, 7.6, 7.6, 7.3, 9.7, 7.6, 7.6 + 12.1)
_GITHUB = (34.0, 10.7, 10.4, 10.2, 9.5, 8.8, 6.4, 4.5, 2.6, 2.7)

Draw = Callable[[np.random.Generator, int, int], IntArray]


def _bucketed(shares: tuple[float, ...]) -> Draw:
    low = np.array(_EDGES[:-1]) * 1024
    high = np.array(_EDGES[1:]) * 1024
    chance = np.array(shares) / ((high - low) / np.log(high / low))
    chance /= chance.sum()

    def draw(rng: np.random.Generator, count: int, context: int) -> IntArray:
        bucket = rng.choice(len(chance), size=count, p=chance)
        return (low[bucket] * (high[bucket] / low[bucket]) ** rng.random(count)).astype(np.int64) + 1

    return draw


def _lognormal_pareto(rng: np.random.Generator, count: int, context: int) -> IntArray:
    """A lognormal body (median 1,100 tokens) and, for one document in fifty, a Pareto tail of index 1.1 from 16K."""
    body = np.exp(rng.normal(7.0, 1.1, count))
    tail = 16384.0 * (1.0 + rng.pareto(1.1, count))
    return np.minimum(np.where(rng.random(count) < 0.02, tail, body), 2.0**40).astype(np.int64) + 1


def _short(rng: np.random.Generator, count: int, context: int) -> IntArray:
    return np.minimum(np.exp(rng.normal(6.5, 0.8, count)), 4096).astype(np.int64) + 1


def _equal(rng: np.random.Generator, count: int, context: int) -> IntArray:
    return np.full(count, context, dtype=np.int64)


def _one_giant(rng: np.random.Generator, count: int, context: int) -> IntArray:
    lengths = _short(rng, count, context)
    return lengths


def _source_tree(rng: np.random.Generator, count: int, context: int) -> IntArray:
    text = resources.files("hdp.balance").joinpath("data/source_tree.txt").read_text()
    return rng.choice(np.array(text.split(), dtype=np.int64), size=count)


DISTRIBUTIONS: dict[str, Draw] = {
    "lognormal-pareto": _lognormal_pareto,
    "github": _bucketed(_GITHUB),
    "byted": _bucketed(_BYTED),
    "short": _short,
    "one-giant": _one_giant,
    "equal": _equal,
    "source-tree": _source_tree,
}
"""``source-tree``: files of ten Python and C++ packages, four bytes a token; ``one-giant``: ``short`` and one document as
long as the context; ``equal``: every document as long as the context."""

LONG_TAILED = ("lognormal-pareto", "github", "byted", "source-tree")


def draw_lengths(name: str, *, tokens: int, context: int, seed: int = 0) -> IntArray:
    """Lengths of documents of at most ``context`` tokens that sum to at least ``tokens`` (less than one more document)."""
    if name not in DISTRIBUTIONS:
        raise PlanError(f"unknown distribution {name!r}: choose one of {', '.join(DISTRIBUTIONS)}")
    if tokens < 1 or context < 1:
        raise PlanError(f"{tokens} tokens of documents of at most {context}: give at least 1 of each")
    rng = np.random.default_rng(seed)
    parts: list[IntArray] = []
    held = 0
    if name == "one-giant":
        parts.append(np.array([context], dtype=np.int64))
        held = context
    while held < tokens:
        drawn = DISTRIBUTIONS[name](rng, 8192, context)
        drawn = drawn[drawn <= context]
        total = held + np.cumsum(drawn)
        drawn = drawn[: int(np.searchsorted(total, tokens)) + 1]
        parts.append(drawn)
        held += int(drawn.sum())
    return np.concatenate(parts)


def read_lengths(path: str | Path) -> IntArray:
    """One length a line; the line number, from 0, is the sequence.

    Blank lines at the end are passed over; elsewhere they are an error, for they would shift the sequences after them.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"lengths file {str(path)!r} cannot be read: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise PlanError(f"lengths file {str(path)!r} is empty: give one whole number a line")
    lengths = np.zeros(len(lines), dtype=np.int64)
    for number, line in enumerate(lines):
        digits = line.strip()
        # Not what int() takes beyond digits (signs, underscores), nor more than int64 holds.
        if not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
            raise PlanError(
                f"{path}, line {number + 1}: {line!r} is no length: give one whole number of at least 0 a line"
            )
        lengths[number] = int(digits)
    return lengths


def source_tree_lengths(folder: str | Path, *, bytes_per_token: float = 4.0) -> IntArray:
    """Tokens of the files below ``folder``, estimated from their sizes, in the order of their paths."""
    root = Path(folder)
    if not root.is_dir():
        raise PlanError(f"source tree {str(folder)!r} is no folder")
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    return np.array([int(p.stat().st_size / bytes_per_token) for p in files], dtype=np.int64)
