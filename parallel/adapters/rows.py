"""Rows of a tokenised dataset as documents: what a collator makes of one row at a time, without padding.

Collators turn rows into labels (completion-only masks, ignored pad tokens), so they are kept, but each is called on one row: a
planned batch has no padding. They must be deterministic, because ranks that share a document each read it.
A row that TRL packed (with ``seq_lengths``) is several documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdp.parallel.batch import UNUSED_MASKS as MASKS

Collator = Callable[[list[Any]], Mapping[str, Any]]


class RowDocuments:
    """Documents (see ``hdp.parallel.batch``) over rows with ``input_ids`` and perhaps ``labels`` and ``attention_mask``.

    Args:
        rows: a ``datasets.Dataset``, or any sequence of mappings.
        collate: makes ``input_ids``, ``labels`` and ``attention_mask``, each [1, tokens], of a list of one row. Without labels
            of its own or the row's, every token is one.

    Raises:
        ValueError: rows without a length or without ``input_ids``, masks but no labels, a masked language model's collator.
    """

    def __init__(self, rows: Any, collate: Collator) -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ValueError(
                f"{type(rows).__name__} has no length: planning needs the lengths of all documents up front; give a dataset"
                " that is indexed, not a stream"
            )
        if getattr(collate, "mlm", False):
            raise ValueError(
                "the collator masks tokens at random (mlm=True): give a causal language model's, mlm=False"
            )
        self.rows, self.collate = rows, collate
        pieces = list(_pieces(rows))
        counts = np.array([len(p) for p in pieces], dtype=np.int64)
        lengths = np.array([n for p in pieces for n in p], dtype=np.int64)
        full = lengths > 0  # rows without tokens have nothing to train on
        self._row = np.repeat(np.arange(len(pieces)), counts)[full]
        self._piece = np.concatenate([np.arange(n) for n in counts])[full] if len(counts) else counts
        self._pieces = pieces
        self.lengths = lengths[full]
        if len(self):
            self[0]  # a collator that does not fit is an error now, not in the middle of a step

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self._row[index])
        lengths = self._pieces[number]
        row = self.rows[number]
        fields = _one_row(self.collate([row]), row, number)
        found, expected = len(fields["input_ids"]), sum(lengths)
        if found != expected:
            raise ValueError(
                f"row {number}: the collator {type(self.collate).__name__} made {found} tokens of {expected};"
                " leave out pad_to_multiple_of and truncation there: a planned batch has no padding"
            )
        start = sum(lengths[: int(self._piece[index])])
        part = slice(start, start + int(self.lengths[index]))
        return {name: tensor[part] for name, tensor in fields.items()}


def _one_row(collated: Mapping[str, Any], row: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    if "input_ids" not in collated:
        raise ValueError(f"row {number} has no 'input_ids' after collation (it has {sorted(collated)})")
    ids = _flat(collated["input_ids"])
    labels = collated.get("labels", row.get("labels"))
    if labels is None:
        present = [name for name in MASKS if name in row]
        if present:
            raise ValueError(
                f"row {number} has {present[0]!r} but no 'labels', so that every token would be trained on:"
                " make a 'labels' column, -100 where the mask is 0"
            )
        labels = ids
    labels = _flat(labels)
    keep = collated.get("attention_mask")
    if keep is not None:
        kept = _flat(keep).bool()
        places = kept.nonzero().flatten()
        if len(places) and int(places[-1] - places[0]) + 1 != len(places):
            raise ValueError(f"row {number}: its attention mask has holes; only padding at either end can be left out")
        if labels.shape == ids.shape:
            labels = labels[kept]
        ids = ids[kept]
    return {"input_ids": ids, "labels": labels}


def _flat(value: Any) -> Tensor:
    return torch.as_tensor(value).flatten()


def _pieces(rows: Any) -> Iterator[Sequence[int]]:
    """For each row the lengths of the documents in it: one, or those that were packed."""
    columns: list[str] = getattr(rows, "column_names", None) or []
    if not columns or not hasattr(rows, "with_format") or rows.format["type"] == "custom":
        yield from (_row_pieces(rows[i], i) for i in range(len(rows)))
        return
    if "input_ids" not in columns:
        raise ValueError(f"the dataset has no column 'input_ids' (it has {', '.join(columns)}): tokenise it first")
    masks = [name for name in MASKS if name in columns]
    if masks and "labels" not in columns:
        raise ValueError(
            f"the dataset has {masks[0]!r} but no 'labels', so that every token would be trained on:"
            " make a 'labels' column, -100 where the mask is 0"
        )
    wanted = [name for name in ("input_ids", "attention_mask", "seq_lengths") if name in columns]
    for table in rows.select_columns(wanted).with_format("arrow").iter(batch_size=10_000):
        yield from _table_pieces(table)


def _table_pieces(table: Any) -> Iterator[Sequence[int]]:
    """Of an Arrow table; token ids stay in Arrow's memory."""
    if "seq_lengths" in table.column_names:
        yield from table.column("seq_lengths").to_pylist()
        return
    lengths = _list_lengths(table.column("input_ids"))
    if "attention_mask" in table.column_names:
        column = table.column("attention_mask").combine_chunks()
        ends = np.cumsum(_list_lengths(column))
        sums = np.concatenate(([0], np.cumsum(column.flatten().to_numpy(zero_copy_only=False))))
        lengths = sums[ends] - sums[np.concatenate(([0], ends[:-1]))]
    yield from ((int(n),) for n in lengths)


def _list_lengths(column: Any) -> np.ndarray:
    import pyarrow.compute

    return np.asarray(pyarrow.compute.list_value_length(column), dtype=np.int64)


def _row_pieces(row: Any, number: int) -> Sequence[int]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise ValueError(f"row {number} has no 'input_ids': tokenise the dataset first")
    if "seq_lengths" in row:
        return [int(n) for n in row["seq_lengths"]]
    mask = row.get("attention_mask")
    return (len(row["input_ids"]) if mask is None else int(np.asarray(mask).sum()),)
