"""Tokens of texts that are too long to be held as a whole."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from rookery.tokenizers.base import Tokenizer

LONGEST_TOKEN = 256
"""More bytes than any token has: a token that ends so far before the end of a block cannot change with what follows."""


def tokens_of(blocks: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Tokens of a text and the bytes they stand for, block by block.

    What a block ends with is tokenised again with the next one, so that greedy tokenizers give the tokens of the whole
    text; one that looks further than `LONGEST_TOKEN` bytes may cut a word otherwise where two blocks meet.
    """
    rest = b""
    utf8 = codecs.getincrementaldecoder("utf-8")("strict")
    for block in blocks:
        rest += utf8.decode(block).encode()  # holds back half characters
        tokens, taken = tokenizer.encode(rest), 0
        ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in tokens])
        if not len(ends) or ends[-1] != len(rest):
            continue  # a tokenizer that changes the text: places in it mean nothing, so it is tokenised in one
        keep = int(np.searchsorted(ends, len(rest) - LONGEST_TOKEN, side="right"))
        if keep:
            taken = int(ends[keep - 1])
            yield tokens[:keep], taken
            rest = rest[taken:]
    utf8.decode(b"", final=True)
    if rest:
        yield tokenizer.encode(rest), len(rest)
