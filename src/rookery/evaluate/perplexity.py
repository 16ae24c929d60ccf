"""How well a model predicts a text: bits per byte, of files of any length.

Bits per byte can be compared between tokenizers, perplexity per token cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rookery.data.text import read_documents
from rookery.nn.language_model import LanguageModel
from rookery.state import State
from rookery.tokenizers.base import Tokenizer
from rookery.tokenizers.blocks import tokens_of

BLOCK = 1 << 16
"""Bytes of a text that are tokenised at a time."""
CHUNK = 1024
"""Tokens that the model reads in one call."""


@dataclass(frozen=True)
class Perplexity:
    """What a text cost."""

    nats: float
    """−ln p of all tokens."""
    tokens: int
    bytes: int
    """Of the text, in UTF-8."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def per_token(self) -> float:
        """Perplexity: e to the mean nats of a token."""
        return math.exp(self.nats / self.tokens)

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str | Iterable[bytes]],
    *,
    mode: Literal["carried", "sliding"] = "carried",
    window: int = 1024,
    stride: int = 512,
    start: Callable[[int], State] | None = None,
) -> Perplexity:
    """Of all texts together, each by itself behind the token that ends one; a text may come as blocks of bytes.

    "carried" reads a text once with the state carried along, however long it is. "sliding" is for models that have a
    window: every token is predicted from a fresh state and the `window − stride` to `window` tokens before it.
    ValueError where there is no text, or for a stride that is not in 1…window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in 1…{window} (the window), got {stride}")
    total = Perplexity(0.0, 0, 0)
    for text in texts:
        blocks = tokens_of([text.encode()] if isinstance(text, str) else text, tokenizer)
        # the end of the text before; it predicts the first token
        begin = tokenizer.eos_id
        if mode == "carried":
            total += _carried(model, blocks, begin, start)
        else:
            total += _sliding(model, blocks, begin, window, stride, start)
    if not total.bytes:
        raise ValueError("there is no text to predict: the files are empty")
    return total


def file_texts(path: str | Path) -> Iterator[str | Iterable[bytes]]:
    """The texts of a file; a .txt is one text, read block by block, .jsonl and .json as `read_documents` reads them."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no text file {str(path)!r}")
    if path.suffix in (".json", ".jsonl"):
        yield from read_documents(path)
    else:
        yield _blocks(path)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


@torch.inference_mode()
def _carried(
    model: LanguageModel, blocks: Iterable[tuple[list[int], int]], begin: int, start: Callable[[int], State] | None
) -> Perplexity:
    state = start(1) if start else None
    last, nats, count, size = [begin], 0.0, 0, 0
    for tokens, nbytes in blocks:
        size += nbytes
        for i in range(0, len(tokens), CHUNK):
            piece = tokens[i : i + CHUNK]
            losses, state = _losses(model, [*last, *piece[:-1]], piece, state)
            nats += float(losses.sum())
            count += len(piece)
            last = piece[-1:]
    return Perplexity(nats, count, size)


@torch.inference_mode()
def _sliding(
    model: LanguageModel,
    blocks: Iterable[tuple[list[int], int]],
    begin: int,
    window: int,
    stride: int,
    start: Callable[[int], State] | None,
) -> Perplexity:
    known, waiting = [begin], []
    nats, count, size = 0.0, 0, 0

    def step(new: list[int]) -> float:
        inputs = [*known, *new[:-1]][-window:]
        losses, _ = _losses(model, inputs, new, start(1) if start else None)
        return float(losses.sum())

    for tokens, nbytes in blocks:
        size += nbytes
        waiting += tokens
        while len(waiting) >= (room := window if count == 0 else stride):
            new, waiting = waiting[:room], waiting[room:]
            nats, count = nats + step(new), count + len(new)
            known = [*known, *new][-window:]
    if waiting:
        nats, count = nats + step(waiting), count + len(waiting)
    return Perplexity(nats, count, size)


def _losses(
    model: LanguageModel, inputs: Sequence[int], targets: Sequence[int], state: State | None
) -> tuple[Tensor, State]:
    """Nats of `targets`, which the last of the inputs predict, float32; and the state after the inputs."""
    device = next(model.parameters()).device
    features, state = model.features(torch.tensor([inputs], device=device), state, None)
    log_probs = model.head(features[0, -len(targets) :]).float().log_softmax(dim=-1)
    return -log_probs.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0], state
