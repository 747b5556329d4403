"""Where text comes from: a folder, a JSONL file, a Hugging Face dataset on disk, Python's own standard library.

A source yields documents one by one, in an order that is the same on every machine, and counts what it leaves out.
A document is UTF-8 text (or ids that somebody has tokenised before): the same documents whatever the tokenizer.
"""

from __future__ import annotations

import json
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hdp.data.problems import DataError, Skipped
from hdp.data.rows import IDS, RawDocument, from_row


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
        """Regular files and links to such."""
        return [path for path, found in self._entries() if isinstance(found, os.stat_result)]

    def fingerprint(self) -> str:
        entries = [(path.relative_to(self.root).as_posix(), found) for path, found in self._entries()]
        return repr([(name, f if isinstance(f, str) else (f.st_size, f.st_mtime_ns)) for name, f in entries])

    def documents(self, skipped: Skipped) -> Iterator[RawDocument]:
        for path, found in self._entries():
            name = path.relative_to(self.root).as_posix()
            if isinstance(found, str):
                skipped.add(found, name)
                continue
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                skipped.add("not UTF-8 text", name)
            except OSError as error:
                skipped.add(f"not readable: {error.strerror}", name)
            else:
                yield RawDocument(name=name, text=text)

    def _entries(self) -> list[tuple[Path, os.stat_result | str]]:
        """What is there, in order, each with its size and time, or with the reason why it cannot be read."""
        entries: list[tuple[Path, os.stat_result | str]] = []

        def unreadable(error: OSError) -> None:
            entries.append((Path(error.filename), f"not readable: {error.strerror}"))

        for folder, inner, files in os.walk(self.root, onerror=unreadable):
            inner[:] = [name for name in inner if not name.startswith(".") and name not in self.without]
            for file in files:
                if not file.startswith(".") and file.endswith(self.suffix):
                    entries.append((Path(folder, file), _look(Path(folder, file))))
        return sorted(entries, key=lambda entry: entry[0].relative_to(self.root).parts)


def _look(path: Path) -> os.stat_result | str:
    """Size and time of a regular file. Reading a pipe would wait for ever, so nothing else is opened."""
    try:
        found = path.stat()
    except OSError as error:
        return "broken link" if path.is_symlink() else f"not readable: {error.strerror}"
    return found if stat.S_ISREG(found.st_mode) else "not a regular file"


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line, with token ids in ``input_ids`` (and ``labels``), else text in ``text_column``."""

    path: Path
    text_column: str

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        found = self.path.stat()
        return repr((found.st_size, found.st_mtime_ns, self.text_column))

    def documents(self, skipped: Skipped) -> Iterator[RawDocument]:
        options = {"source": self.name, "text_column": self.text_column}
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
                    document = from_row(row, **options, name=name) if isinstance(row, dict) else None
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
            document = from_row(row, name=f"row {number}", source=self.name, text_column=self.text_column)
            if document is None:
                skipped.add(f"without text in {self.text_column!r}", f"row {number}")
            else:
                yield document


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
    if path.suffix == ".jsonl" and path.is_file():
        return JsonLines(path=path, text_column=text_column)
    raise DataError(f"cannot read {path}: give a folder of text files, a .jsonl file or a Hugging Face dataset on disk")
