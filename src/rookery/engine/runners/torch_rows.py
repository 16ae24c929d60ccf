"""Rows of the states of torch models, as the engine keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rookery.state import State, cat

if TYPE_CHECKING:
    from rookery.adapt.hot_swap import Changes
    from rookery.engine.runners.torch_graphs import Steps


class TorchRowState:
    """One row of a model's state. Models never change a state that they are given, so a copy shares the tensors.

    Rows that go on together stay in the batch that they were computed in: nothing is joined or taken apart while the
    same rows are called again.
    """

    def __init__(self, batch: State, row: int = 0, changes: Changes | None = None) -> None:
        self.batch, self.row, self.changes = batch, row, changes
        self.home: Steps | None = None
        """Whose seats `batch` is: the next step there changes it."""

    @property
    def state(self) -> State:
        """The row by itself."""
        if self.home is not None:
            self.home.leave([self])
        if self.batch.batch > 1:
            self.state = self.batch.select([self.row])
        return self.batch

    @state.setter
    def state(self, state: State) -> None:
        self.put(state, 0)

    def put(self, batch: State, row: int, home: Steps | None = None) -> None:
        """Makes it another row."""
        self.batch, self.row, self.home = batch, row, home

    @property
    def tokens_seen(self) -> int:
        return int(self.batch.tokens_seen[self.row])

    @property
    def nbytes(self) -> int:
        return self.batch.nbytes // self.batch.batch

    def copy(self) -> TorchRowState:
        return TorchRowState(self.state, changes=self.changes)  # alone: what is kept must not keep a whole batch

    def tensors(self) -> dict[str, np.ndarray]:
        return self.state.arrays()


def together(rows: Sequence[TorchRowState]) -> State:
    """One state with a row for each of these: the batch that they are the rows of, or a new one."""
    batch = rows[0].batch
    if any(row.home is not None for row in rows) or any(row.batch is not batch for row in rows):
        return cat([row.state for row in rows])
    places = [row.row for row in rows]
    return batch if places == list(range(batch.batch)) else batch.select(places)
