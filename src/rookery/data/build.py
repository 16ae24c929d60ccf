"""Texts to tokens in binidx files, by many processes. Needs no torch."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from rookery.data.binidx import BinIdxWriter
from rookery.data.documents import END_OF_TEXT, read_documents
from rookery.tokenizers import load_tokenizer

PARCEL = 1 << 20
"""Characters that a process is given at a time."""


@dataclass
class Built:
    """How far it is, or was."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0


def build(
    sources: Sequence[str],
    path: str,
    tokenizer: str,
    processes: int = 1,
    progress: Callable[[Built], None] = lambda built: None,
) -> Built:
    """Writes the documents of `sources` (see `read_documents`) to `path`.bin and `path`.idx, in their order.

    Each document ends with END_OF_TEXT. The files are the same for any number of processes, and appear when all is
    done. ValueError where there are no documents.
    """
    built = Built()
    vocab_size = load_tokenizer(tokenizer).vocab_size
    parcels = _parcels(text for source in sources for text in read_documents(source))
    with BinIdxWriter(path, vocab_size) as writer:
        for encoded, characters in _encoded(parcels, tokenizer, processes):
            for tokens in encoded:
                writer.add(tokens)
                built.tokens += len(tokens)
            built.documents += len(encoded)
            built.characters += characters
            progress(built)
        if not built.documents:
            raise ValueError(f"there are no documents in {', '.join(sources)}")
    return built


def _parcels(documents: Iterable[str]) -> Iterator[list[str]]:
    parcel, size = [], 0
    for text in documents:
        parcel.append(text)
        size += len(text)
        if size >= PARCEL:
            yield parcel
            parcel, size = [], 0
    if parcel:
        yield parcel


def _encoded(parcels: Iterator[list[str]], tokenizer: str, processes: int) -> Iterator[tuple[list[np.ndarray], int]]:
    if processes == 1:
        _open(tokenizer)
        yield from map(_encode, parcels)
        return
    # spawned, because a forked child of a program with threads may stand still
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_open, initargs=(tokenizer,)) as pool:
        # a few parcels for each process, so that not all of the text is read at once
        waiting: deque = deque()
        for parcel in parcels:
            waiting.append(pool.submit(_encode, parcel))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_tokenizer = None
"""Of this process."""


def _open(name: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(name)


def _encode(parcel: list[str]) -> tuple[list[np.ndarray], int]:
    dtype = np.uint16 if _tokenizer.vocab_size <= 1 << 16 else np.int32
    encoded = [np.asarray([*_tokenizer.encode(text), END_OF_TEXT], dtype) for text in parcel]
    return encoded, sum(map(len, parcel))
