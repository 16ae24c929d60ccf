"""Tokens of many documents in Megatron's pair of files, NAME.bin and NAME.idx, as RWKV-LM and RWKV-PEFT read them.

NAME.bin holds the tokens, one after the other. NAME.idx, little-endian: "MMIDIDX\\0\\0", version 1 (u64), type of the
tokens (u8), sequences (u64), documents + 1 (u64), then tokens of each sequence (i32), byte at which each begins (i64),
first sequence of each document and their number (i64) (adaptation.md C.4.3).
"""

import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from rookery.checkpoints.atomic import replacing

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's numbers of token types."""
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


class BinIdx:
    """The documents of a pair of files, memory-mapped: `data[i]` gives the tokens of sequence i."""

    def __init__(self, path: str | Path) -> None:
        """`path` is either file or their common name. ValueError where they are damaged or do not belong together."""
        prefix = prefix_of(path)
        index, tokens = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
        for file in (index, tokens):
            if not file.is_file():
                raise FileNotFoundError(f"there is no {str(file)!r}; a binidx data set needs both .bin and .idx")
        raw = index.read_bytes()
        if len(raw) < HEADER.size or raw[:9] != MAGIC:
            raise ValueError(f"{index} is no index of a binidx data set: it does not begin with {MAGIC!r}")
        _, version, code, count, documents = HEADER.unpack_from(raw)
        expected = HEADER.size + count * 12 + documents * 8
        if version != 1 or code not in DTYPES or len(raw) != expected:
            raise ValueError(
                f"{index} is damaged or of another kind: version {version}, token type {code}, {len(raw)} bytes where "
                f"its {count} sequences take {expected}"
            )
        self.sizes = np.frombuffer(raw, "<i4", count, HEADER.size)
        """int32 [sequences]: tokens of each, the one that ends it included"""
        starts = np.frombuffer(raw, "<i8", count, HEADER.size + 4 * count)
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        size = tokens.stat().st_size
        if (self.sizes < 0).any() or (count and int((starts + self.sizes * dtype.itemsize).max()) > size):
            raise ValueError(f"{tokens} is too short for its index: {size} bytes; one of the two is damaged or too old")
        # numpy maps no empty file
        self.tokens = np.memmap(tokens, dtype, mode="r") if size else np.empty(0, dtype)
        """all tokens [n]"""
        self.starts = starts // dtype.itemsize

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.starts[i] : self.starts[i] + self.sizes[i]]


def is_binidx(path: str) -> bool:
    """Whether `path` names a data set of tokens, by either of its files or their common name."""
    return path.endswith((".bin", ".idx")) or (not Path(path).exists() and Path(path + ".idx").exists())


def prefix_of(path: str | Path) -> Path:
    """The common name of the two files."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class BinIdxWriter:
    """Writes a pair of files, document by document; they appear, whole, when the block ends without error."""

    def __init__(self, path: str | Path, vocab_size: int) -> None:
        prefix = prefix_of(path)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self.sizes: list[int] = []
        self._index, self._bin = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._index.unlink(missing_ok=True)  # or an old index would stand beside new tokens for a moment
        self._file = self._stack.enter_context(self._stack.enter_context(replacing(self._bin)).open("wb"))
        return self

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One document, with the token that ends it."""
        array = np.asarray(tokens, self.dtype)
        self._file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        self.sizes.append(len(array))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            with replacing(self._index) as temporary:
                temporary.write_bytes(self._head())

    def _head(self) -> bytes:
        sizes = np.array(self.sizes, "<i4")
        starts = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1] * np.int64(self.dtype.itemsize), out=starts[1:])
        documents = np.arange(len(sizes) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, 1, CODES[self.dtype], len(sizes), len(documents))
        return header + sizes.tobytes() + starts.tobytes() + documents.tobytes()
