"""What runs a model: the engine's side of the native and the torch runner."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from rookery.checkpoints.adapter import Adapter

Wanted = Literal["none", "last", "all"] | int
"""Which positions' logits a call computes, or how many of the last ones: the head is a large part of the work, so
prefill asks for the last alone."""


class RowState(Protocol):
    """What a model remembers of one row of tokens. Its runner advances it in place; `copy` first to keep it."""

    @property
    def tokens_seen(self) -> int:
        """Tokens whose effect is in the state."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers in it."""

    def copy(self) -> "RowState":
        """An independent copy."""

    def tensors(self) -> dict[str, np.ndarray]:
        """Copies of all tensors under their names in state files, each [1, …], with "tokens_seen" int64 [1]."""


class Runner(Protocol):
    """A loaded model."""

    name: str
    """"native" or "torch"."""
    family: str
    """Registered name of the family."""
    config: Any
    """The family's config with the sizes of this model."""

    def fingerprint(self) -> str:
        """Names these weights in state files."""

    def init_state(self, tensors: Mapping[str, np.ndarray] | None = None) -> RowState:
        """The state before the first token, or the one that `RowState.tensors` gave; BadState where it does not fit."""

    def forward(self, tokens: Sequence[int], state: RowState, logits: Wanted = "last") -> np.ndarray:
        """Reads tokens, advancing `state`; float32 logits [n, vocab] of the last places. The array is the caller's."""

    def forward_rows(
        self, rows: Sequence[Sequence[int]], states: Sequence[RowState], logits: Sequence[Wanted]
    ) -> list[np.ndarray]:
        """As `forward` for several rows at once, each of one token or more and with a state of its own.

        Weights are read once for all of them, so that continuing some rows beside a piece of another's prompt costs
        little more than either.
        """

    def adapted(self, adapter: Adapter) -> "Runner":
        """The same weights with an adapter beside them, which nothing merges.

        States that it makes belong to the adapter: whichever runner on these weights is given them computes with it,
        and rows of one batch may have different ones. BadCheckpoint where it does not fit the model, BackendUnavailable
        for a form that this runner cannot swap.
        """

    def select(self, states: Sequence[RowState], rows: Sequence[int]) -> list[RowState]:
        """States by index, in any order and number: what beam search keeps. The given ones are used up."""


def base_of(runner: Runner) -> Runner:
    """What holds the weights that `runner` runs on: itself, where it is not one with an adapter."""
    return getattr(runner, "base", runner)


def asked(wanted: Wanted, tokens: int) -> int:
    """Of how many positions logits are wanted, the last ones of `tokens`."""
    return min(tokens, {"none": 0, "last": 1, "all": tokens}.get(wanted, wanted))


def check_rows(rows: Sequence[Sequence[int]], states: Sequence[RowState], logits: Sequence[Wanted]) -> None:
    """ValueError unless every row of a batch has its own state and says which logits it wants."""
    if not len(rows) == len(states) == len(logits):
        raise ValueError(
            f"{len(rows)} rows for {len(states)} states and {len(logits)} wishes; give one of each for each"
        )
    if len({id(state) for state in states}) < len(states):
        raise ValueError("a state is in the batch twice; copy it first")
    if not all(map(len, rows)):
        raise ValueError("a row of the batch has no tokens; leave it out")


def select(states: Sequence[RowState], rows: Sequence[int]) -> list[RowState]:
    """States by index; the first that asks for one gets it, later ones a copy."""
    taken: set[int] = set()
    chosen = []
    for row in rows:
        chosen.append(states[row].copy() if row in taken else states[row])
        taken.add(row)
    return chosen
