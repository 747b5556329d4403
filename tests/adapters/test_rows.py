"""Rows of data sets as documents: lengths, packing, padding, labels, and what is refused."""

import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from stand_in import alone, planning
from transformers import default_data_collator

from hdp.parallel.adapters import RowDocuments
from hdp.parallel.adapters.mixin import count_steps
from hdp.parallel.loader import Loader

ENGINE = planning(alone(1))
ROWS = [
    {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [-100, 6, 7, -100, -100]},
    {"input_ids": [0, 0, 0, 0, 8], "attention_mask": [0, 0, 0, 0, 1], "labels": [-100, -100, -100, -100, 8]},
    {"input_ids": [1, 2, 3, 4, 9], "attention_mask": [1, 1, 1, 1, 1], "labels": [1, 2, 3, 4, -100]},
]


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "datasets"])
def test_padding_is_left_out_at_either_end(make):
    documents = RowDocuments(make(ROWS), default_data_collator)
    assert documents.lengths.tolist() == [3, 1, 5]
    assert [d["input_ids"].tolist() for d in documents] == [[5, 6, 7], [8], [1, 2, 3, 4, 9]]
    assert [d["labels"].tolist() for d in documents] == [[-100, 6, 7], [8], [1, 2, 3, 4, -100]]


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "datasets"])
def test_packed_rows_are_several_documents(make):
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, -100, 4, 5], "seq_lengths": [2, 3]},
        {"input_ids": [6], "labels": [6], "seq_lengths": [1]},
    ]
    documents = RowDocuments(
        make(rows), lambda given: {k: torch.tensor([r[k] for r in given]) for k in ("input_ids", "labels")}
    )
    assert documents.lengths.tolist() == [2, 3, 1]
    assert [d["input_ids"].tolist() for d in documents] == [[1, 2], [3, 4, 5], [6]]
    assert [d["labels"].tolist() for d in documents] == [[1, 2], [-100, 4, 5], [6]]


def test_lengths_of_selected_and_shuffled_tables():
    table = Dataset.from_dict({"input_ids": [[0] * n for n in (3, 1, 4, 1, 5, 9)]}).shuffle(seed=1).select([4, 0, 2])
    documents = RowDocuments(table, default_data_collator)
    assert documents.lengths.tolist() == [len(row["input_ids"]) for row in table]
    assert documents.lengths.tolist() == [len(d["input_ids"]) for d in documents]


def test_without_labels_every_token_is_one():
    documents = RowDocuments([{"input_ids": np.array([4, 5])}], default_data_collator)
    assert documents[0]["labels"].tolist() == [4, 5]


def test_rows_without_tokens_are_passed_over():
    rows = [{"input_ids": []}, {"input_ids": [4, 5]}, {"input_ids": []}, {"input_ids": [6]}, {"input_ids": []}]
    documents = RowDocuments(rows, default_data_collator)
    assert [d["input_ids"].tolist() for d in documents] == [[4, 5], [6]]
    loader = Loader(documents, ENGINE, tokens_per_step=2, capacity=3, steps=1 << 62)
    assert count_steps(loader, 3) == 6


def test_transformed_tables_are_read_row_by_row():
    table = Dataset.from_dict({"n": [2, 3]}).with_transform(lambda b: {"input_ids": [list(range(n)) for n in b["n"]]})
    assert RowDocuments(table, default_data_collator).lengths.tolist() == [2, 3]


def padding_collator(rows):
    return {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "labels": torch.zeros(1, 8, dtype=torch.int64)}


REFUSED = {
    "a stream": ((i for i in range(3)), default_data_collator, "generator has no length"),
    "no tokens": ([{"text": "a"}], default_data_collator, "row 0 has no 'input_ids'"),
    "no column": (Dataset.from_dict({"text": ["a"]}), default_data_collator, "no column 'input_ids' .it has text"),
    "holes": ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], default_data_collator, "mask has holes"),
    "mask": ([{"input_ids": [1], "completion_mask": [1]}], default_data_collator, "'completion_mask' but no 'labels'"),
    "mask column": (
        Dataset.from_dict({"input_ids": [[1]], "assistant_masks": [[1]]}), default_data_collator, "'assistant_masks' but no"
    ),
    "mlm": ([{"input_ids": [1]}], types.SimpleNamespace(mlm=True), "mlm=False"),
    "padding": ([{"input_ids": [1, 2]}], padding_collator, "made 8 tokens of 2"),
    "nothing collated": ([{"input_ids": [1]}], lambda rows: {"pixels": 1}, "no 'input_ids' after collation"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    rows, collate, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        RowDocuments(rows, collate)


@pytest.mark.parametrize("seed", [None, 3])
def test_steps_of_epochs_are_counted_to_the_batch(seed):
    lengths = [60, 5, 5, 40, 41, 7, 33, 100, 250, 1, 1, 1, 17]
    documents = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    loader = Loader(documents, ENGINE, tokens_per_step=100, capacity=300, seed=seed, steps=1 << 62)
    draws = loader._draw()
    seen: list[list[int]] = []
    for steps in range(1, 40):
        seen.append(sorted(next(draws)))
        flat = [i for batch in seen for i in batch]
        epochs, rest = divmod(len(flat), len(documents))
        if rest == 0:
            assert sorted(flat) == sorted(list(range(len(documents))) * epochs)
            assert count_steps(loader, epochs) == steps
    one, two = count_steps(loader, 1), count_steps(loader, 2)
    assert count_steps(loader, 1.5) == one + -(-(two - one) // 2)
    assert count_steps(loader, 0.5) == -(-one // 2)
