"""How likely a model finds given continuations of given contexts: what nearly every benchmark asks.

A recurrent model's state is all that it knows of a context, and has a constant size. So what several requests begin
with is read once: the requests make a tree of token sequences, the tree is read from its root, and every branch goes on
from its parent's state. Branches are packed, so rows need not be of equal length and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rookery.nn.language_model import LanguageModel
from rookery.state import State

SHARED = 16
"""Tokens that neighbours must have in common before they share a branch: for fewer, one more call is not worth it."""


class Request(NamedTuple):
    """Tokens, and tokens that may follow them."""

    context: Sequence[int]
    """Not empty; benchmarks that begin with a text put token 0 before it."""
    target: Sequence[int]


class Score(NamedTuple):
    """What the model thinks of one request."""

    log_prob: float
    """ln p(target | context), in nats"""
    is_greedy: bool
    """Whether every token of the target is the likeliest at its place."""
    first_log_probs: Tensor | None = None
    """float32 [vocab] of what follows the context; only where it was asked for."""


@dataclass
class Branch:
    """Tokens that a run of requests has in common, behind those of its parent."""

    tokens: Sequence[int]
    start: int
    """Place of its first token in the requests' sequences."""
    requests: Sequence[int]
    children: list[Branch] = field(default_factory=list)


class Scorer:
    """Scores requests with one model.

    `budget` bounds the tokens of one call and with it the memory; `rows` its documents. With `reuse=False` every
    request is read from its beginning. `start` gives the state that texts begin with (a tuned one), else the fresh one.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        budget: int = 4096,
        rows: int = 256,
        reuse: bool = True,
        start: Callable[[int], State] | None = None,
    ) -> None:
        if budget < 1 or rows < 1:
            raise ValueError(f"budget and rows must be at least 1, got {budget} and {rows}")
        self.model, self.budget, self.rows, self.reuse = model, budget, rows, reuse
        self.start = start or model.init_state
        self.tokens_read = 0
        """Tokens that the model has read so far."""
        self.tokens_asked = 0
        """Tokens that it would have read without sharing."""

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], *, first: bool = False) -> list[Score]:
        """The scores in the order of the requests; `first` adds the whole distribution behind each context."""
        if any(not len(request.context) for request in requests):
            raise ValueError("a request has an empty context: nothing predicts its first token; begin with token 0")
        sums = torch.zeros(len(requests), dtype=torch.float64)
        greedy = torch.ones(len(requests), dtype=torch.bool)
        firsts: dict[int, Tensor] = {}
        sequences = [[*request.context, *request.target[:-1]] for request in requests]
        self.tokens_asked += sum(map(len, sequences))
        for branches, rows in self._read(_tree(sequences, self.budget, self.reuse), None):
            wanted = list(_wanted(branches, requests))
            if not wanted:
                continue
            place, target, of, is_first = (torch.tensor(column) for column in zip(*wanted))
            for part in torch.arange(len(wanted)).split(max(1, self.budget // 4)):
                # float32: the softmax of a bfloat16 model must not be rounded to three digits
                log_probs = self.model.head(rows[place[part]]).float().log_softmax(dim=-1).cpu()
                found = log_probs.gather(1, target[part, None].clamp(min=0))[:, 0].double()
                real = target[part] >= 0
                sums.index_add_(0, of[part][real], found[real])
                missed = real & (log_probs.argmax(dim=-1) != target[part])
                greedy[of[part][missed]] = False
                if first:
                    firsts |= {int(of[i]): log_probs[j].clone() for j, i in enumerate(part) if is_first[i]}
        return [Score(float(s), bool(g), firsts.get(i)) for i, (s, g) in enumerate(zip(sums, greedy))]

    def log_likelihood(self, contexts_and_targets: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """`score` for plain pairs."""
        return self.score([Request(*pair) for pair in contexts_and_targets])

    def _read(self, branches: list[Branch], state: State | None) -> Iterator[tuple[list[Branch], Tensor]]:
        """Branches that were read in one call, and their features [tokens, c]; then their children's, call by call.

        A chunk's children are read before the next chunk, so that few states are held at a time.
        """
        device = next(self.model.parameters()).device
        for chunk in _chunks(branches, self.budget, self.rows):
            index = [i for i, _ in chunk]
            before = self.start(len(index)) if state is None else state.select(index)
            taken = [branch for _, branch in chunk]
            tokens = torch.tensor([token for branch in taken for token in branch.tokens], device=device)
            ends = torch.tensor([0, *(len(branch.tokens) for branch in taken)], device=device).cumsum(0)
            features, after = self.model.features(tokens[None], before, ends)
            self.tokens_read += len(tokens)
            yield taken, features[0]
            parents = [i for i, branch in enumerate(taken) if branch.children]
            if parents:
                kept = after.select([i for i in parents for _ in taken[i].children])
                del after, features
                yield from self._read([child for i in parents for child in taken[i].children], kept)


def _wanted(branches: Sequence[Branch], requests: Sequence[Request]) -> Iterator[tuple[int, int, int, bool]]:
    """Place among the branches' tokens, token to predict there (−1 for none), request, whether it is its first."""
    offset = 0
    for branch in branches:
        end = branch.start + len(branch.tokens)
        for i in branch.requests:
            request = requests[i]
            context = len(request.context)
            first, last = max(branch.start, context - 1), min(end, context - 1 + max(1, len(request.target)))
            for place in range(first, last):
                k = place - (context - 1)
                yield offset + place - branch.start, request.target[k] if len(request.target) else -1, i, k == 0
        offset += len(branch.tokens)


def _tree(sequences: Sequence[Sequence[int]], longest: int, reuse: bool) -> list[Branch]:
    """The sequences as a forest of branches of at most `longest` tokens each."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    if not reuse:
        return [_chain(sequences[i], 0, [i], longest)[0] for i in order]
    common = [_common(sequences[a], sequences[b]) for a, b in zip(order, order[1:])]
    return _grow(sequences, order, common, 0, longest)


def _grow(
    sequences: Sequence[Sequence[int]], order: Sequence[int], common: Sequence[int], start: int, longest: int
) -> list[Branch]:
    """Branches of sorted sequences behind their first `start` tokens, which are alike; `common` is of neighbours."""
    branches = []
    first = 0
    for i in range(len(order)):
        if i + 1 < len(order) and common[i] - start >= SHARED:
            continue
        run, shared = order[first : i + 1], common[first:i]
        end = min(shared) if shared else len(sequences[run[0]])
        if end > start:  # else: the sequence is the beginning of another and has been read with it
            top, bottom = _chain(sequences[run[0]][:end], start, run, longest)
            if shared:
                bottom.children = _grow(sequences, run, shared, end, longest)
            branches.append(top)
        first = i + 1
    return branches


def _chain(tokens: Sequence[int], start: int, requests: Sequence[int], longest: int) -> tuple[Branch, Branch]:
    """`tokens` behind `start` as branches one below the other; the first and the last of them."""
    pieces = [Branch(tokens[i : i + longest], i, requests) for i in range(start, len(tokens), longest)]
    for above, below in zip(pieces, pieces[1:]):
        above.children = [below]
    return pieces[0], pieces[-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _chunks(branches: Sequence[Branch], budget: int, rows: int) -> Iterator[list[tuple[int, Branch]]]:
    """Branches with their places, as many at a time as fit into one call; one that is alone may be as long as it is."""
    chunk: list[tuple[int, Branch]] = []
    filled = 0
    for numbered in enumerate(branches):
        length = len(numbered[1].tokens)
        if chunk and (filled + length > budget or len(chunk) == rows):
            yield chunk
            chunk, filled = [], 0
        chunk.append(numbered)
        filled += length
    if chunk:
        yield chunk
