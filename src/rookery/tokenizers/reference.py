"""Greedy longest match in plain Python: the definition that the compiled trie must agree with, and its stand-in."""

from collections.abc import Mapping


class ReferenceTrie:
    """Splits bytes into the longest pieces of a vocabulary, from left to right."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._ids = {piece: index for index, piece in pieces.items()}
        # longest piece for every first two bytes: most positions try a handful of lengths instead of 128
        self._longest: dict[bytes, int] = {}
        for piece in self._ids:
            self._longest[piece[:2]] = max(self._longest.get(piece[:2], 0), len(piece))

    def encode(self, data: bytes) -> list[int]:
        """Ids of the pieces of `data`. Raises `LookupError(offset)` where no piece matches."""
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
