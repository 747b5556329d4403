"""Tokens on disk, tokenised once and mapped by every process.

One folder a (source, tokenizer) pair: ``tokens.bin`` (all documents, one after the other), ``labels.bin`` where there are
labels, ``offsets.npy`` and ``meta.json``. It is written beside its place and renamed when complete, so a folder that exists
is whole. Processes of one machine take turns at a file lock, which the system releases when its holder dies: the first one
tokenises, the others find the work done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hdp.data.problems import DataError, Skipped
from hdp.data.rows import LARGEST, RawDocument
from hdp.data.sources import Source
from hdp.data.tokenizers import Tokenizer

FORMAT = 3
CHUNK = 1 << 22  # tokens
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One tokenised corpus on disk."""

    folder: Path
    offsets: IntArray
    """[documents + 1]: where each document begins in ``tokens.bin``, in tokens."""
    token_dtype: str
    has_labels: bool
    vocab_size: int
    """Of the tokenizer, or one more than the largest id where ids came ready."""
    skipped: Skipped

    def tokens(self) -> NDArray[np.unsignedinteger]:
        return np.memmap(self.folder / "tokens.bin", dtype=self.token_dtype, mode="r")

    def labels(self) -> NDArray[np.int32] | None:
        return np.memmap(self.folder / "labels.bin", dtype=np.int32, mode="r") if self.has_labels else None


def default_cache() -> Path:
    """``$HDP_CACHE``, else ``$XDG_CACHE_HOME/hdp``, else ``~/.cache/hdp``."""
    if "HDP_CACHE" in os.environ:
        return Path(os.environ["HDP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hdp"


def tokenise(source: Source, tokenizer: Tokenizer, cache: Path) -> TokenFile:
    """The tokens of ``source``, from ``cache`` where they are there already.

    Raises :class:`DataError` when the source holds no token, cannot be read, or when the cache cannot be written.
    """
    key = hashlib.sha256(repr((FORMAT, source.name, source.fingerprint(), tokenizer.identity)).encode()).hexdigest()[
        :24
    ]
    folder = cache / key
    try:
        if not (folder / "meta.json").exists():
            cache.mkdir(parents=True, exist_ok=True)
            with _turn(cache / f"{key}.lock"):
                if not (folder / "meta.json").exists():
                    _build(source, tokenizer, folder)
        return _open(folder)
    except OSError as error:
        raise DataError(
            f"the token cache {cache} cannot be used ({error}): set HDP_CACHE to a folder that can be written and has room"
        ) from error


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write(source, tokenizer, unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    skipped, largest, any_labels = Skipped(), -1, False
    lengths: list[int] = []
    dtype: type[np.uint16 | np.uint32] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    began, told = time.monotonic(), time.monotonic()
    with (folder / "tokens.bin").open("w+b") as tokens, (folder / "labels.bin").open("wb") as labels:
        for document in _reading(source, skipped):
            ids = _ids(document, tokenizer)
            if len(ids) == 0:
                skipped.add("empty", document.name)
                continue
            if ids.min() < 0 or ids.max() > LARGEST:
                raise DataError(f"{document.name} of {source.name}: the tokenizer gives ids outside 0..{LARGEST}")
            if dtype is np.uint16 and ids.max() > np.iinfo(dtype).max:  # ids that came ready
                _widen(tokens)
                dtype = np.uint32
            if any_labels != (document.labels is not None) and lengths:
                raise DataError(f"{document.name} of {source.name}: either all documents have labels or none")
            any_labels = document.labels is not None
            tokens.write(ids.astype(dtype).tobytes())
            if document.labels is not None:
                labels.write(document.labels.astype(np.int32).tobytes())
            lengths.append(len(ids))
            largest = max(largest, int(ids.max()))
            if time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"tokenising {source.name}: {len(lengths):,} documents, {told - began:.0f} s", file=sys.stderr)
    if not lengths:
        left_out = f"; left out: {skipped.describe()}" if skipped.total else ""
        if any(reason.startswith("without text in") for reason in skipped.counts):
            left_out += "; text_column says which column holds the text"
        raise DataError(f"{source.name} holds no document{left_out}")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    meta = {
        "source": source.name,
        "token_dtype": np.dtype(dtype).name,
        "has_labels": any_labels,
        "vocab_size": max(tokenizer.vocab_size, largest + 1),
        "skipped": skipped.to_json(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _reading(source: Source, skipped: Skipped) -> Iterator[RawDocument]:
    """The documents of ``source``, whose disk errors are not those of the cache."""
    try:
        yield from source.documents(skipped)
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error}") from error


def _widen(tokens: BinaryIO) -> None:
    """Turns what is written so far from 2 into 4 bytes a token, in place: from the end, where nothing unread is in the way."""
    for stop in range(tokens.tell() // 2, 0, -CHUNK):
        start = max(0, stop - CHUNK)
        tokens.seek(2 * start)
        part = np.frombuffer(tokens.read(2 * (stop - start)), dtype=np.uint16)
        tokens.seek(4 * start)
        tokens.write(part.astype(np.uint32).tobytes())
    tokens.seek(0, os.SEEK_END)


def _ids(document: RawDocument, tokenizer: Tokenizer) -> IntArray:
    if document.ids is not None:
        return document.ids
    # An end-of-document mark alone is not a document.
    return tokenizer.encode(document.text) if document.text else np.empty(0, dtype=np.int64)


def _open(folder: Path) -> TokenFile:
    meta = json.loads((folder / "meta.json").read_text())
    return TokenFile(
        folder=folder,
        offsets=np.load(folder / "offsets.npy"),
        token_dtype=meta["token_dtype"],
        has_labels=meta["has_labels"],
        vocab_size=meta["vocab_size"],
        skipped=Skipped.from_json(meta["skipped"]),
    )
