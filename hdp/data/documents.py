"""A list of tokenised documents whose lengths are known before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdp.data.cache import TokenFile, default_cache, tokenise
from hdp.data.problems import DataError, warn
from hdp.data.sources import find_source
from hdp.data.tokenizers import Tokenizer, load_tokenizer

IntArray = NDArray[np.int64]


class Documents:
    """Pieces of a :class:`TokenFile`, as a sequence of tensors.

    ``documents[i]`` is a 1-D int64 tensor of token ids, or, where the data has labels, a dict with ``input_ids`` and ``labels``
    (one a token, not shifted, -100 where nothing is to be learnt). Safe to hand to other processes.
    """

    def __init__(self, file: TokenFile, starts: IntArray, stops: IntArray, sources: IntArray) -> None:
        self._file = file
        self._starts = starts  # [pieces]: first token in the file
        self._stops = stops
        self._sources = sources  # [pieces]: the document that each piece is from
        self._mapped: tuple[Any, Any] | None = None

    @property
    def lengths(self) -> IntArray:
        """[documents] tokens of each."""
        return self._stops - self._starts

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.lengths.sum())

    @property
    def vocab_size(self) -> int:
        """The embedding that a model needs for these ids."""
        return self._file.vocab_size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor | dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        if self._mapped is None:
            self._mapped = (self._file.tokens(), self._file.labels())
        tokens, labels = self._mapped
        span = slice(int(self._starts[index]), int(self._stops[index]))
        ids = torch.from_numpy(tokens[span].astype(np.int64))
        if labels is None:
            return ids
        return {"input_ids": ids, "labels": torch.from_numpy(labels[span].astype(np.int64))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def select(self, indices: IntArray) -> Documents:
        """The documents at ``indices``, in that order."""
        return Documents(self._file, self._starts[indices], self._stops[indices], self._sources[indices])

    def split(self, *, held_out: float, seed: int) -> tuple[Documents, Documents]:
        """Documents to train on and documents to measure with: ``held_out`` (0 to 1) of them, drawn by ``seed``.

        Pieces of one long document always stay on one side. Raises :class:`DataError` when a side would be empty.
        """
        if not 0 < held_out < 1:
            raise DataError(f"held_out is {held_out}: it is the share of documents to measure with, between 0 and 1")
        whole = np.unique(self._sources)
        if len(whole) < 2:
            raise DataError(
                "there is only one document: with none to hold out, the run could not be measured; add documents"
            )
        count = min(max(1, round(held_out * len(whole))), len(whole) - 1)
        drawn = np.random.default_rng(seed).permutation(whole)[:count]
        is_held_out = np.isin(self._sources, drawn)
        return self.select(np.flatnonzero(~is_held_out)), self.select(np.flatnonzero(is_held_out))

    def sample(self, *, tokens: int, seed: int) -> Documents:
        """A fixed choice of documents, drawn by ``seed``, of at most ``tokens`` together; the shortest when none fits."""
        chosen, left, lengths = [], tokens, self.lengths
        for index in np.random.default_rng(seed).permutation(len(self)):
            if lengths[index] <= left:
                chosen.append(int(index))
                left -= int(lengths[index])
        return self.select(np.array(sorted(chosen) or [int(lengths.argmin())]))


def open_documents(
    path: str | Path | None = None,
    *,
    tokenizer: str | Path | Tokenizer | Any | None = None,
    text_column: str = "text",
    max_length: int | None = None,
    cache: str | Path | None = None,
) -> Documents:
    """Opens a corpus, tokenising it on first use.

    ``path``: a folder of text files, a ``.jsonl`` file, a Hugging Face dataset on disk, or None for the ``.py`` files of
    the running Python's standard library. ``tokenizer``: see :func:`hdp.data.load_tokenizer`; rows that hold ``input_ids``
    (and perhaps ``labels``, one a token, 0 or more, or -100) are used as they are, whatever text is beside them.
    ``max_length``: longer documents are cut into pieces of at most so many tokens. ``cache``: where token files are kept,
    by default ``$HDP_CACHE`` or ``~/.cache/hdp``.

    Warns (:class:`hdp.data.DataWarning`, rank 0 only) about everything that was left out or cut, every time.
    Raises :class:`hdp.data.DataError` when nothing usable is left.
    """
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length is {max_length}: a piece needs at least 2 tokens, one to read and one to predict")
    source = find_source(path, text_column)
    file = tokenise(
        source, load_tokenizer(tokenizer), Path(cache).expanduser() if cache is not None else default_cache()
    )
    if file.skipped.total:
        warn(f"{source.name}: left out {file.skipped.describe()}")
    starts, stops = file.offsets[:-1], file.offsets[1:]
    if max_length is None:
        return Documents(file, starts, stops, np.arange(len(starts)))
    pieces = -(-(stops - starts) // max_length)
    if (pieces > 1).any():
        longest = int((stops - starts).max())
        warn(
            f"{source.name}: cut {int((pieces > 1).sum()):,} of {len(pieces):,} documents, the longest of {longest:,} tokens, "
            f"into {int(pieces[pieces > 1].sum()):,} pieces of at most {max_length:,}"
        )
    return _cut(file, starts, stops, pieces, max_length)


def _cut(file: TokenFile, starts: IntArray, stops: IntArray, pieces: IntArray, max_length: int) -> Documents:
    sources = np.repeat(np.arange(len(starts)), pieces)
    number = np.arange(len(sources)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # piece of its document
    begin = starts[sources] + number * max_length
    return Documents(file, begin, np.minimum(begin + max_length, stops[sources]), sources)
