"""Rows of a table to documents: text, or token ids that somebody has made before, which are checked one by one.

Ids end up in one long array where only lengths tell documents apart: a nested list or a rounded number would shift or
change every document after it. So nothing is converted here; what is not a flat list of integers is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp.data.problems import DataError

IntArray = NDArray[np.int64]

IDS = "input_ids"
LABELS = "labels"
IGNORED = -100
LARGEST = (1 << 31) - 1  # of ids and labels


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """One document as a source has it: text, or token ids."""

    name: str
    """Where it is from, for messages: a path, or ``line 17``."""
    text: str | None = None
    """UTF-8 text; None when it came tokenised."""
    ids: IntArray | None = None
    """[tokens], 0..2^31-1; None when it came as text."""
    labels: IntArray | None = None
    """[tokens], not shifted, -100 where nothing is to be learnt; None: learn every token."""


def from_row(row: Mapping[str, Any], *, name: str, source: str, text_column: str) -> RawDocument | None:
    """The document of ``row``: its ``input_ids`` and ``labels`` as they are, else its text; None when it has neither.

    Raises :class:`DataError` when ids or labels are not a flat list of integers each, are out of range (ids 0..2^31-1, labels
    also -100), differ in number, when there are labels for text whose tokens are not given, and when another field says that
    some ids are padding, or not to be learnt.
    """
    where = f"{source}, {name}"
    text, given, targets = row.get(text_column), row.get(IDS), row.get(LABELS)
    if given is None:
        if not isinstance(text, str):
            return None
        if targets is not None and np.ndim(targets) > 0:  # a number is a class of the text, which is not learnt here
            raise DataError(
                f"{where} has {text_column!r} and {LABELS} but no {IDS}: labels belong to tokens, add {IDS} or drop them"
            )
        return RawDocument(name=name, text=text)
    ids = _integers(given, f"{where}: {IDS}")
    _check_range(ids, ids >= 0, f"{where}: {IDS}", f"0..{LARGEST}")
    _check_masks(row, where)
    if targets is None:
        return RawDocument(name=name, ids=ids)
    labels = _integers(targets, f"{where}: {LABELS}")
    if len(labels) != len(ids):
        raise DataError(f"{where} has {len(ids)} {IDS} but {len(labels)} {LABELS}: there must be one label a token")
    _check_range(labels, (labels >= 0) | (labels == IGNORED), f"{where}: {LABELS}", f"0..{LARGEST} or {IGNORED}")
    return RawDocument(name=name, ids=ids, labels=labels)


def _check_masks(row: Mapping[str, Any], where: str) -> None:
    mask = row.get("attention_mask")
    if mask is not None and not np.all(mask):
        raise DataError(
            f"{where}: attention_mask has zeros, but documents are trained on without padding: cut it off, and give {LABELS} of"
            f" {IGNORED} where nothing is to be learnt"
        )
    for name in ("completion_mask", "assistant_masks"):
        if row.get(name) is not None and row.get(LABELS) is None:
            raise DataError(
                f"{where} has {name!r} but no {LABELS}, so that every token would be trained on: give {LABELS}, {IGNORED} where"
                " the mask is 0"
            )


def _integers(values: Any, what: str) -> IntArray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):  # rows of different lengths
        array = np.empty((0, 0))
    if array.ndim == 1 and array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or isinstance(values, str):
        raise DataError(f"{what} is {shortened(values)}: it must be one flat list of integers, one document a row")
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:  # uint64, float or object: also what int64 cannot hold
        for index, value in enumerate(values):
            if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
                raise DataError(
                    f"{what} has {shortened(value)} at position {index}: all must be integers, nothing is rounded"
                )
            if abs(int(value)) > LARGEST:
                raise DataError(f"{what} has {value} at position {index}: it must be at most {LARGEST}")
    return array.astype(np.int64)


def _check_range(values: IntArray, allowed: NDArray[np.bool_], what: str, range_: str) -> None:
    allowed = allowed & (values <= LARGEST)
    if not allowed.all():
        index = int(np.argmin(allowed))
        raise DataError(f"{what} has {values[index]} at position {index}: it must be in {range_}")
