"""Greedy longest match in plain Python: the definition that the compiled trie must agree with, and its stand-in."""

from collections.abc import Iterable, Mapping, Sequence


class ReferenceTrie:
    """Splits bytes into the longest pieces of a vocabulary, from left to right. Id 0 is end of text."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = dict(pieces)
        self._ids = {piece: index for index, piece in pieces.items()}
        self.vocab_size = max(pieces, default=0) + 1
        # longest piece for every first two bytes: most positions try a handful of lengths instead of 128
        self._longest: dict[bytes, int] = {}
        for piece in self._ids:
            self._longest[piece[:2]] = max(self._longest.get(piece[:2], 0), len(piece))

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the pieces of `text`. Raises `LookupError(offset in bytes)` where no piece matches."""
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        ids: list[int] = []
        start = 0
        while start < len(data):
            for size in range(self._longest.get(data[start : start + 2], 1), 0, -1):
                index = self._ids.get(data[start : start + size])
                if index is not None:
                    break
            else:
                raise LookupError(start)
            ids.append(index)
            start += size
        return ids

    def encode_array(self, text: str | bytes):
        """As `encode`, a uint32 array."""
        import numpy as np

        return np.array(self.encode(text), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str | bytes], threads: int):
        """An array for each text; Python runs one thread whatever `threads` says."""
        arrays = []
        for number, text in enumerate(texts):
            try:
                arrays.append(self.encode_array(text))
            except LookupError as error:
                raise LookupError(error.args[0], number) from None
        return arrays

    def decode(self, ids: Iterable[int]) -> bytes:
        """The pieces of `ids`, joined. Raises `LookupError(id)`."""
        data = bytearray()
        for index in ids:
            if index != 0:
                if index not in self._pieces:
                    raise LookupError(index)
                data += self._pieces[index]
        return bytes(data)
