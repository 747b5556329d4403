"""Where text comes from: a folder, a JSONL file, a Hugging Face dataset on disk, Python's own standard library.

A source yields documents one by one, in an order that is the same on every machine, and counts what it leaves out.
A document is UTF-8 text (or ids that somebody has tokenised before): the same documents whatever the tokenizer.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hdp.data.problems import DataError, Skipped

IDS = "input_ids"
LABELS = "labels"


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """One document as a source has it: text, or token ids."""

    name: str
    """Where it is from, for messages: a path, or ``line 17``."""
    text: str | None = None
    """UTF-8 text; None when it came tokenised."""
    ids: Sequence[int] | None = None
    """Token ids; None when it came as text."""
    labels: Sequence[int] | None = None
    """One a token, not shifted, -100 where nothing is to be learnt; None: learn every token."""


class Source(Protocol):
    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """Changes whenever the documents do; cheap: sizes and times of files, not their content."""

    def documents(self, skipped: Skipped) -> Iterator[RawDocument]: ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """Text files below a folder, in the order of their paths; hidden files and folders are left alone."""

    root: Path
    name: str
    suffix: str = ""
    """Only files whose name ends so; empty: all."""
    without: frozenset[str] = frozenset()
    """Folder names that are not entered."""

    def paths(self) -> list[Path]:
        found = []
        for folder, inner, files in os.walk(self.root):
            inner[:] = [name for name in inner if not name.startswith(".") and name not in self.without]
            found += [Path(folder, f) for f in files if not f.startswith(".") and f.endswith(self.suffix)]
        return sorted(found, key=lambda path: path.relative_to(self.root).parts)

    def fingerprint(self) -> str:
        stats = [(path.relative_to(self.root).as_posix(), path.stat()) for path in self.paths()]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def documents(self, skipped: Skipped) -> Iterator[RawDocument]:
        for path in self.paths():
            name = path.relative_to(self.root).as_posix()
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                skipped.add("not UTF-8 text", name)
            except OSError as error:
                skipped.add(f"not readable: {error.strerror}", name)
            else:
                yield RawDocument(name=name, text=text)


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line, with text in ``text_column`` or token ids in ``input_ids`` (and ``labels``)."""

    path: Path
    text_column: str

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        stat = self.path.stat()
        return repr((stat.st_size, stat.st_mtime_ns, self.text_column))

    def documents(self, skipped: Skipped) -> Iterator[RawDocument]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                name = f"line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    skipped.add("not UTF-8 text", name)
                except json.JSONDecodeError:
                    skipped.add("not JSON", name)
                else:
                    document = _from_row(row, name, self.text_column) if isinstance(row, dict) else None
                    if document is None:
                        skipped.add(f"without text in {self.text_column!r}", name)
                    else:
                        yield document


@dataclass(frozen=True, kw_only=True)
class HuggingFaceDataset:
    """A dataset that ``Dataset.save_to_disk`` wrote; of several splits the one called ``train``."""

    path: Path
    text_column: str

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        return repr((Files(root=self.path, name="").fingerprint(), self.text_column))

    def documents(self, skipped: Skipped) -> Iterator[RawDocument]:
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError as error:
            raise ImportError(f"{self.path} is a Hugging Face dataset: pip install datasets") from error
        dataset: Any = load_from_disk(str(self.path))
        if isinstance(dataset, DatasetDict):
            if "train" not in dataset:
                raise DataError(f"{self.path} has the splits {sorted(dataset)} but no 'train': give one split's folder")
            dataset = dataset["train"]
        if self.text_column not in dataset.column_names and IDS not in dataset.column_names:
            raise DataError(
                f"{self.path} has neither a column {self.text_column!r} nor {IDS!r}: "
                f"name its text column, one of {sorted(dataset.column_names)}"
            )
        for number, row in enumerate(dataset):
            document = _from_row(row, f"row {number}", self.text_column)
            if document is None:
                skipped.add(f"without text in {self.text_column!r}", f"row {number}")
            else:
                yield document


def _from_row(row: dict[str, Any], name: str, text_column: str) -> RawDocument | None:
    text = row.get(text_column)
    if isinstance(text, str):
        return RawDocument(name=name, text=text)
    ids, labels = row.get(IDS), row.get(LABELS)
    if ids is None:
        return None
    if labels is not None and len(labels) != len(ids):
        raise DataError(f"{name} has {len(ids)} {IDS} but {len(labels)} {LABELS}: there must be one label a token")
    return RawDocument(name=name, ids=ids, labels=labels)


def standard_library() -> Files:
    """The ``.py`` files of the running Python's standard library: text that every machine has, with a long tail."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = frozenset({"site-packages", "dist-packages", "__pycache__"})
    return Files(root=root, name="Python's standard library", suffix=".py", without=without)


def find_source(path: str | Path | None, text_column: str = "text") -> Source:
    """The source at ``path``; None: :func:`standard_library`. Raises :class:`DataError` when there is nothing usable."""
    if path is None:
        return standard_library()
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(
            f"no data at {path}: give a folder of text files, a .jsonl file or a Hugging Face dataset on disk"
        )
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return HuggingFaceDataset(path=path, text_column=text_column)
        return Files(root=path, name=str(path))
    if path.suffix == ".jsonl":
        return JsonLines(path=path, text_column=text_column)
    raise DataError(f"cannot read {path}: give a folder of text files, a .jsonl file or a Hugging Face dataset on disk")
