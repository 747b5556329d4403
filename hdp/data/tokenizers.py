"""Text to token ids: bytes by default, so that nothing needs a download, or any tokenizer of transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hdp.data.problems import DataError

IntArray = NDArray[np.int64]


class Tokenizer(Protocol):
    """What the data layer needs of a tokenizer."""

    vocab_size: int
    """Ids are 0..vocab_size-1."""
    identity: str
    """Changes whenever the ids of some text would: part of the name of the cache file."""

    def encode(self, text: str) -> IntArray: ...  # [tokens], ends with the end-of-document id where there is one

    def decode(self, ids: Any) -> str: ...


class ByteTokenizer:
    """One token a UTF-8 byte (ids 0..255) and one more that ends a document (256)."""

    end_of_document = 256
    vocab_size = 257
    identity = "bytes-257"

    def encode(self, text: str) -> IntArray:
        raw = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        return np.append(raw.astype(np.int64), self.end_of_document)

    def decode(self, ids: Any) -> str:
        """Bytes that are not UTF-8 (a document cut inside a character) become U+FFFD; ids over 255 are left out."""
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")


class TransformersTokenizer:
    """A tokenizer of transformers with its own special tokens; its end-of-sequence id ends each document."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.end_of_document: int | None = tokenizer.eos_token_id
        self.identity = _identity(tokenizer)

    def encode(self, text: str) -> IntArray:
        # Long documents are the point here: the warning about the model's context says nothing.
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if self.end_of_document is not None and (not ids or ids[-1] != self.end_of_document):
            ids.append(self.end_of_document)
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids]))


def _identity(tokenizer: Any) -> str:
    """Hash of all that decides the ids: the whole tokenizer where it can be written down, else vocabulary and options."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = backend.to_str()
    else:
        state = json.dumps(
            [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.init_kwargs.items(), key=str))]
        )
    text = f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {state}"
    return hashlib.sha256(text.encode()).hexdigest()


def load_tokenizer(source: str | Path | Any | None = None) -> Tokenizer:
    """The tokenizer that ``source`` names.

    ``None`` or ``"bytes"``: :class:`ByteTokenizer`. A path: a folder with a tokenizer of transformers, or a ``.gguf`` file that
    carries one. Anything else: a tokenizer object of transformers, or one that follows :class:`Tokenizer`.
    Raises :class:`DataError` when there is none at the path, ImportError when transformers is not installed.
    """
    if source is None or source == "bytes":
        return ByteTokenizer()
    if not isinstance(source, str | Path):
        return source if hasattr(source, "identity") else TransformersTokenizer(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"no tokenizer at {path}: give 'bytes', a folder with a tokenizer of transformers, or a .gguf file"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the tokenizer at {path} needs transformers: pip install 'hdp[hf]'") from error
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"transformers finds no tokenizer at {path}: {error}") from error
    return TransformersTokenizer(tokenizer)
