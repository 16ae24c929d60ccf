"""What engine tests need: a runner that says what it is told to, and pieces of text as tokens."""

import zlib
from types import SimpleNamespace

import numpy as np

from rookery.engine.llm import LLM
from rookery.engine.runners.protocol import asked, check_rows, select
from rookery.tokenizers.base import StreamDecoder


class Pieces:
    """A tokenizer over a list of byte strings, greedy longest match; id = place in the list."""

    def __init__(self, pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def encode(self, text):
        data, ids = text.encode(), []
        while data:
            known = [(len(piece), i) for i, piece in enumerate(self.pieces) if piece and data.startswith(piece)]
            size, token = max(known)
            ids.append(token)
            data = data[size:]
        return ids

    def token_bytes(self, token):
        return self.pieces[token]

    def decode_bytes(self, tokens):
        return b"".join(self.pieces[token] for token in tokens)

    def stream(self):
        return StreamDecoder(self)


class Read:
    """A state that is the list of tokens read."""

    nbytes = 0

    def __init__(self, tokens=()):
        self.tokens = list(tokens)

    @property
    def tokens_seen(self):
        return len(self.tokens)

    def copy(self):
        return Read(self.tokens)

    def tensors(self):
        return {"layers.0.tokens": np.array([self.tokens]), "tokens_seen": np.array([len(self.tokens)])}


class Scripted:
    """Gives all weight to the token that stands next in the script, by the number of tokens read."""

    name = family = "scripted"

    def __init__(self, script, vocab_size):
        self.script, self.config = list(script), SimpleNamespace(vocab_size=vocab_size)
        self.calls = []

    def fingerprint(self):
        return "scripted"

    def init_state(self, tensors=None):
        return Read() if tensors is None else Read(tensors["layers.0.tokens"][0].tolist())

    def forward(self, tokens, state, logits="last"):
        self.calls.append(len(tokens))
        rows = []
        for token in tokens:
            state.tokens.append(token)
            row = np.full(self.config.vocab_size, -50, np.float32)
            row[self.script[len(state.tokens)] if len(state.tokens) < len(self.script) else 0] = 50
            rows.append(row)
        count = asked(logits, len(rows))
        return np.stack(rows)[len(rows) - count :] if count else np.empty((0, self.config.vocab_size), np.float32)

    def forward_rows(self, rows, states, logits):
        check_rows(rows, states, logits)
        return [self.forward(*row) for row in zip(rows, states, logits)]

    def select(self, states, rows):
        return select(states, rows)


class Remembering(Scripted):
    """Logits are a function of all tokens read, each as good as any other's; no two texts have the same."""

    def __init__(self, vocab_size=32):
        super().__init__([], vocab_size)

    def forward(self, tokens, state, logits="last"):
        self.calls.append(len(tokens))
        rows = []
        for token in tokens:
            state.tokens.append(token)
            seed = zlib.crc32(np.array(state.tokens).tobytes())
            rows.append(np.random.default_rng(seed).standard_normal(self.config.vocab_size, np.float32))
        count = asked(logits, len(rows))
        return np.stack(rows)[len(rows) - count :] if count else np.empty((0, self.config.vocab_size), np.float32)


def scripted(prompt, said, pieces):
    """An LLM that follows the ids `prompt` with the pieces `said` (strings or bytes of `pieces`), then ends."""
    tokenizer = Pieces(pieces)
    ids = [tokenizer.pieces.index(piece.encode() if isinstance(piece, str) else piece) for piece in said]
    return LLM.from_runner(Scripted([*prompt, *ids, 0], len(tokenizer.pieces)), tokenizer=tokenizer)
