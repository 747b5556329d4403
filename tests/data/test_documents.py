"""The data layer: every source gives the documents that were put in, and says what it left out."""

import json
import os
import pickle
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CONTEXT, start_server

from hdp.data import ByteTokenizer, DataError, DataWarning, open_documents
from hdp.data.sources import standard_library

TEXTS = {"a.txt": "first", "b/c.txt": "zweites Dokument, größer", "d.txt": "x" * 50}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write_folder(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(documents) -> list[str]:
    return [ByteTokenizer().decode(documents[i]) for i in range(len(documents))]


def test_a_folder_gives_its_files_in_the_order_of_their_paths(tmp_path, cache):
    documents = open_documents(write_folder(tmp_path / "text", TEXTS), cache=cache)
    assert texts_of(documents) == list(TEXTS.values())
    assert documents.lengths.tolist() == [len(t.encode()) + 1 for t in TEXTS.values()]
    assert documents[0].dtype == torch.int64 and documents[0].tolist() == [*b"first", 256]


def test_jsonl_and_a_dataset_on_disk_give_the_same_documents(tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    rows = [{"body": text} for text in TEXTS.values()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "plain"))
    split = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:1]))
    split.save_to_disk(str(tmp_path / "splits"))
    for path in (write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "plain", tmp_path / "splits"):
        assert texts_of(open_documents(path, text_column="body", cache=cache)) == list(TEXTS.values())


def test_rows_that_are_tokenised_already_keep_their_ids_and_labels(tmp_path, cache):
    rows = [{"input_ids": [5, 6, 700], "labels": [-100, 6, 7]}, {"input_ids": [1], "labels": [1]}]
    documents = open_documents(write_lines(tmp_path / "rows.jsonl", rows), cache=cache)
    first = documents[0]
    assert first["input_ids"].tolist() == [5, 6, 700] and first["labels"].tolist() == [-100, 6, 7]
    assert documents.vocab_size == 701


def test_ids_win_over_text_in_the_same_row(tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "abc", "input_ids": [5, 6], "labels": [-100, 6]}, {"text": "d", "input_ids": [7], "labels": [7]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    for path in (write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "data"):
        documents = open_documents(path, cache=cache)
        assert [documents[i]["input_ids"].tolist() for i in range(2)] == [[5, 6], [7]]
        assert documents[0]["labels"].tolist() == [-100, 6]


@pytest.mark.parametrize("format_", ["numpy", "torch"])
def test_ids_of_a_formatted_dataset(tmp_path, cache, format_):
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    datasets.Dataset.from_list(rows).with_format(format_).save_to_disk(str(tmp_path / "data"))
    documents = open_documents(tmp_path / "data", cache=cache)
    assert [documents[i]["input_ids"].tolist() for i in range(2)] == [[5, 6], [7]]


@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_ids_of_large_vocabularies_are_kept_whatever_came_before(tmp_path, cache, monkeypatch, chunk):
    monkeypatch.setattr("hdp.data.cache.CHUNK", chunk)
    rows = [{"text": "before"}, {"input_ids": [5, 65535]}, {"input_ids": [70000, 2**31 - 1, 1]}, {"text": "after"}]
    documents = open_documents(write_lines(tmp_path / "rows.jsonl", rows), cache=cache)
    got = [documents[i].tolist() for i in range(4)]
    assert got == [[*b"before", 256], [5, 65535], [70000, 2**31 - 1, 1], [*b"after", 256]]
    assert documents.vocab_size == 2**31


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [[1, 2], [3, 4]]}, r"line 2: input_ids is \[\[1, 2\], \[3, 4\]\]: it must be one flat list"),
        ({"input_ids": [[1], [3, 4]]}, r"line 2: input_ids is \[\[1\], \[3, 4\]\]: it must be one flat list"),
        ({"input_ids": 5}, "line 2: input_ids is 5: it must be one flat list"),
        ({"input_ids": "5 6"}, "line 2: input_ids is '5 6': it must be one flat list"),
        ({"input_ids": {"a": 1}}, "line 2: input_ids is {'a': 1}: it must be one flat list"),
        ({"input_ids": [1, 2.7]}, r"line 2: input_ids has 2\.7 at position 1: all must be integers"),
        ({"input_ids": [1, "2"]}, "line 2: input_ids has '2' at position 1: all must be integers"),
        ({"input_ids": [1, None]}, "line 2: input_ids has None at position 1: all must be integers"),
        ({"input_ids": [True, False]}, "line 2: input_ids has True at position 0: all must be integers"),
        ({"input_ids": [1, -2]}, r"line 2: input_ids has -2 at position 1: it must be in 0\.\."),
        ({"input_ids": [1, 2**31]}, r"line 2: input_ids has 2147483648 at position 1: it must be in 0\.\."),
        ({"input_ids": [1, 2**63]}, "line 2: input_ids has 9223372036854775808 at position 1"),
        ({"input_ids": [1, 2**70]}, "line 2: input_ids has 1180591620717411303424 at position 1"),
        ({"input_ids": [1, 2], "labels": [1.5, -7]}, r"line 2: labels has 1\.5 at position 0: all must be integers"),
        ({"input_ids": [1, 2], "labels": [1, -7]}, r"line 2: labels has -7 at position 1: it must be in .* or -100"),
        ({"input_ids": [1, 2], "labels": [[1, 2]]}, r"line 2: labels is \[\[1, 2\]\]: it must be one flat list"),
        ({"text": "ab", "labels": [1, 2]}, "line 2 has 'text' and labels but no input_ids"),
    ],
)
def test_ids_and_labels_that_are_not_integers_are_refused_and_never_converted(tmp_path, cache, row, message):
    path = write_lines(tmp_path / "rows.jsonl", [{"input_ids": [1], "labels": [1]}, row])
    with pytest.raises(DataError, match=message) as caught:
        open_documents(path, cache=cache)
    assert str(path) in str(caught.value)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_class_beside_a_text_is_no_label_of_tokens(tmp_path, cache):
    rows = [{"text": "good", "labels": 1}]
    assert texts_of(open_documents(write_lines(tmp_path / "rows.jsonl", rows), cache=cache)) == ["good"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_mask": [1, 0]}, "line 1: attention_mask has zeros"),
        ({"completion_mask": [0, 1]}, "line 1 has 'completion_mask' but no labels"),
        ({"assistant_masks": [0, 1]}, "line 1 has 'assistant_masks' but no labels"),
    ],
)
def test_masks_that_would_be_left_out_are_refused(tmp_path, cache, fields, message):
    path = write_lines(tmp_path / "rows.jsonl", [{"input_ids": [5, 6], **fields}])
    with pytest.raises(DataError, match=message):
        open_documents(path, cache=cache)
    whole = {"input_ids": [5, 6], "attention_mask": [1, 1], "completion_mask": [0, 1], "labels": [-100, 6]}
    found = open_documents(write_lines(tmp_path / "whole.jsonl", [whole]), cache=cache)[0]
    assert (found["input_ids"].tolist(), found["labels"].tolist()) == ([5, 6], [-100, 6])


def test_labels_that_do_not_fit_are_refused(tmp_path, cache):
    rows = [{"input_ids": [5, 6], "labels": [5]}]
    with pytest.raises(DataError, match="line 1 has 2 input_ids but 1 labels"):
        open_documents(write_lines(tmp_path / "rows.jsonl", rows), cache=cache)
    mixed = [{"input_ids": [5]}, {"input_ids": [6], "labels": [6]}]
    with pytest.raises(DataError, match="either all documents have labels or none"):
        open_documents(write_lines(tmp_path / "mixed.jsonl", mixed), cache=cache)


def test_long_documents_are_cut_counted_and_lose_no_token(tmp_path, cache):
    folder = write_folder(tmp_path / "text", TEXTS)
    whole = open_documents(folder, cache=cache)
    with pytest.warns(
        DataWarning, match=r"cut 2 of 3 documents, the longest of 51 tokens, into 9 pieces of at most 10"
    ):
        pieces = open_documents(folder, max_length=10, cache=cache)
    assert pieces.lengths.max() == 10 and pieces.tokens == whole.tokens
    joined = torch.cat([pieces[i] for i in range(len(pieces))])
    assert torch.equal(joined, torch.cat([whole[i] for i in range(len(whole))]))


def test_what_is_left_out_is_named_and_counted_also_from_the_cache(tmp_path, cache):
    bad = {"empty.txt": b"", "latin.txt": b"\xe9t\xe9", "broken.txt": b"\xff\xfe"}
    folder = write_folder(tmp_path / "text", {**TEXTS, **bad})
    for _ in range(2):
        with pytest.warns(DataWarning, match=r"2 not UTF-8 text \(broken.txt, latin.txt\), 1 empty \(empty.txt\)"):
            assert len(open_documents(folder, cache=cache)) == 3


def test_only_regular_files_are_read_and_the_rest_is_counted(tmp_path, cache):
    folder = write_folder(tmp_path / "text", TEXTS)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "linked.txt").symlink_to(folder / "a.txt")
    os.mkfifo(folder / "pipe.txt")
    with pytest.warns(DataWarning, match=r"2 broken link \(gone.txt, loop.txt\), 1 not a regular file \(pipe.txt\)"):
        documents = open_documents(folder, cache=cache)
    assert texts_of(documents) == [*TEXTS.values(), "first"]
    (folder / "nowhere").write_text("there now")  # a link that leads somewhere again is a document
    with pytest.warns(DataWarning, match=r"left out 1 broken link \(loop.txt\)"):
        assert "there now" in texts_of(open_documents(folder, cache=cache))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*pipe\.jsonl"):
        open_documents(tmp_path / "pipe.jsonl", cache=cache)


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path, cache):
    folder = write_folder(tmp_path / "text", {"a.txt": "x" * 100_000})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the token cache .*/file/cache cannot be used .*Not a directory.*HDP_CACHE"):
        open_documents(folder, cache=tmp_path / "file" / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a write fails half way, as on a full disk
    try:
        with pytest.raises(DataError, match=r"the token cache .* cannot be used .*File too large.*HDP_CACHE"):
            open_documents(folder, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]
    assert len(open_documents(folder, cache=cache)) == 1


def test_a_source_that_fails_is_not_blamed_on_the_cache(tmp_path, cache, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    opened = Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: .*Permission denied"):
        open_documents(path, cache=cache)


def test_bad_lines_of_jsonl_are_named(tmp_path, cache):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": \n{"other": 1}\n[1]\n{"text": "\xff"}\n{"text": ""}\n')
    with pytest.warns(DataWarning) as caught:
        assert texts_of(open_documents(path, cache=cache)) == ["good"]
    message = str(caught[0].message)
    for part in (
        "2 without text in 'text' (line 4, line 5)",
        "1 not JSON (line 3)",
        "1 not UTF-8 text (line 6)",
        "1 empty (line 7)",
    ):
        assert part in message


def test_only_rank_0_warns(tmp_path, cache, monkeypatch):
    folder = write_folder(tmp_path / "text", {**TEXTS, "empty.txt": b""})
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        open_documents(folder, cache=cache)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no document"),
        ({"only.txt": b""}, r"holds no document; left out: 1 empty \(only.txt\)"),
        ({"only.txt": b"\xff"}, r"holds no document; left out: 1 not UTF-8 text \(only.txt\)"),
    ],
)
def test_nothing_left_is_an_error(tmp_path, cache, files, message):
    folder = tmp_path / "text"
    folder.mkdir()
    with pytest.raises(DataError, match=message):
        open_documents(write_folder(folder, files), cache=cache)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]  # nothing half-done stays


def test_wrong_paths_and_settings_are_errors(tmp_path, cache):
    with pytest.raises(DataError, match="no data at"):
        open_documents(tmp_path / "nowhere", cache=cache)
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"cannot read .*table\.csv"):
        open_documents(tmp_path / "table.csv", cache=cache)
    with pytest.raises(DataError, match="no tokenizer at"):
        open_documents(write_folder(tmp_path / "text", TEXTS), tokenizer=tmp_path / "nowhere", cache=cache)
    with pytest.raises(DataError, match="max_length is 1"):
        open_documents(tmp_path / "text", max_length=1, cache=cache)


def test_a_dataset_without_text_names_its_columns(tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"body": "x"}]).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"neither a column 'text' nor 'input_ids'.*\['body'\]"):
        open_documents(tmp_path / "data", cache=cache)


def test_the_cache_is_used_and_follows_the_files(tmp_path, cache):
    folder = write_folder(tmp_path / "text", TEXTS)
    open_documents(folder, cache=cache)
    built = {entry: entry.stat().st_mtime_ns for entry in cache.iterdir() if entry.is_dir()}
    assert texts_of(open_documents(folder, cache=cache)) == list(TEXTS.values())
    assert {entry: entry.stat().st_mtime_ns for entry in cache.iterdir() if entry.is_dir()} == built
    (folder / "a.txt").write_text("changed")
    assert texts_of(open_documents(folder, cache=cache))[0] == "changed"


def _open_in_a_process(folder: Path, cache: Path, answers) -> None:
    documents = open_documents(folder, cache=cache)
    answers.send((len(documents), documents.tokens))


def test_processes_that_start_together_tokenise_once(tmp_path, cache):
    folder = write_folder(tmp_path / "text", {f"{i}.txt": "word " * 2000 for i in range(40)})
    start_server()
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(4)]
    processes = [
        CONTEXT.Process(target=_open_in_a_process, args=(folder, cache, answers), daemon=True) for _, answers in pipes
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert {answer.recv() for answer, _ in pipes} == {(40, 40 * 10001)}
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1


def test_split_keeps_documents_apart_and_follows_the_seed(tmp_path, cache):
    texts = {f"{i:03}.txt": chr(97 + i) * (30 + i) for i in range(20)}
    with pytest.warns(DataWarning):
        documents = open_documents(write_folder(tmp_path / "text", texts), max_length=16, cache=cache)
    train, held_out = documents.split(held_out=0.2, seed=3)
    assert train.tokens + held_out.tokens == documents.tokens

    def letters(part):
        return {int(part[i][0]) for i in range(len(part))} - {256}

    assert letters(train).isdisjoint(letters(held_out)) and len(letters(held_out)) == 4
    again, other = documents.split(held_out=0.2, seed=3)[1], documents.split(held_out=0.2, seed=4)[1]
    assert letters(again) == letters(held_out) != letters(other)


def test_split_and_sample_keep_their_limits(tmp_path, cache):
    documents = open_documents(write_folder(tmp_path / "text", TEXTS), cache=cache)
    train, held_out = documents.split(held_out=0.01, seed=0)
    assert (len(train), len(held_out)) == (2, 1)
    assert documents.sample(tokens=40, seed=0).tokens <= 40
    assert len(documents.sample(tokens=1, seed=0)) == 1
    for share in (0.0, 1.0):
        with pytest.raises(DataError, match="held_out is"):
            documents.split(held_out=share, seed=0)
    with pytest.raises(DataError, match="only one document"):
        documents.select(np.array([0])).split(held_out=0.5, seed=0)


def test_documents_travel_to_other_processes(tmp_path, cache):
    documents = open_documents(write_folder(tmp_path / "text", TEXTS), cache=cache)
    documents[0]
    copy = pickle.loads(pickle.dumps(documents))
    assert texts_of(copy) == texts_of(documents)
    with pytest.raises(IndexError, match="document 3 of 3"):
        copy[3]


def test_a_tokenizer_of_transformers_ends_each_document(tmp_path, cache):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "to": 2, "be": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(tmp_path / "tokenizer")
    made.model_max_length = 3
    folder = write_folder(tmp_path / "text", {"a.txt": "to be", "b.txt": "or not to be"})
    for tokenizer in (tmp_path / "tokenizer", made):
        documents = open_documents(folder, tokenizer=tokenizer, cache=cache)
        assert [documents[i].tolist() for i in range(2)] == [[2, 3, 1], [0, 0, 2, 3, 1]]
        assert documents.vocab_size == 4
    assert made.model_max_length == 3  # the user's object stays as it was


def test_the_standard_library_has_a_long_tail_and_nothing_installed():
    source = standard_library()
    sizes = np.array([path.stat().st_size for path in source.paths()])
    assert len(sizes) > 500 and sizes.max() > 20 * np.median(sizes)
    assert not [path for path in source.paths() if "site-packages" in path.relative_to(source.root).parts]
