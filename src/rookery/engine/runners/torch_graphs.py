"""One-token steps of a torch model as CUDA graphs: a step is one launch instead of hundreds.

A graph works on tensors in fixed places, so the states of the rows that go on stay there, each in a seat of its own,
and are changed in place; whoever wants a row's state for anything else gets a copy. Graphs are captured for a few batch
sizes when these are first needed; seats that nobody has are computed along. Only models whose steps are always the same
work can be captured (`LanguageModel.static_step`).
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rookery.engine.runners.torch_rows import TorchRowState, together
from rookery.nn.language_model import LanguageModel

log = logging.getLogger("rookery")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batch sizes that are captured; beyond, multiples of the last."""
WARM_UP = 3
"""Calls before a capture: kernels are compiled and chosen, and libraries take their memory."""


class CudaGraphs:
    """Captures functions that work on tensors in fixed places; what it gives runs them again."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # one pool for all: they never run at the same time, and what one gives is read before the next runs; other
            # threads may go on using the GPU
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        self._pool = graph.pool()
        return graph.replay


class Steps:
    """One-token steps of a model. `capture` takes a function and gives what does the same on the same tensors."""

    def __init__(
        self,
        model: LanguageModel,
        logits: Callable[[Tensor], Tensor],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self._model, self._logits, self._capture = model, logits, capture
        self._lock = threading.RLock()
        self._seats = model.init_state(0)
        self._tokens = torch.zeros(0, 1, dtype=torch.int64)
        self._sitting: list[weakref.ref[TorchRowState] | None] = []
        self._places: list[int] = []
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._captured: dict[int, tuple[Callable[[], None], list[Tensor]]] = {}  # batch size -> replay, its logits
        self.broken = False
        """True after a capture failed; steps are then computed as any other call."""

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], rows: Sequence[TorchRowState]) -> Tensor | None:
        """Reads one token in each row, advancing it; logits [rows, vocab], or None where nothing was done."""
        with self._lock:
            size = size_for(len(rows))
            if size not in self._captured and not self._prepare(size):
                return None
            places = self._seat(rows, size)
            if places != self._places:  # told the GPU when it changes, not every time
                self._places, self._chosen = places, torch.tensor(places, device=self._tokens.device)
            ids = torch.zeros(size, 1, dtype=torch.int64)
            ids[places, 0] = torch.tensor(tokens)
            self._tokens[:size].copy_(ids)
            replay, logits = self._captured[size]
            replay()
            return logits[0].index_select(0, self._chosen)  # a copy: the next step writes to the same place

    @torch.inference_mode()
    def leave(self, rows: Sequence[TorchRowState]) -> None:
        """Gives these rows, if they still sit here, states of their own."""
        with self._lock:
            rows = [row for row in rows if row.home is self]
            if rows:
                batch = self._seats.select([row.row for row in rows])
                for i, row in enumerate(rows):
                    self._sitting[row.row] = None
                    row.put(batch, i)

    def _prepare(self, size: int) -> bool:
        """Captures steps of so many rows; False where that cannot be done."""
        if self.broken:
            return False
        self.leave(self._present())  # trying the function changes all seats
        try:
            if size > len(self._sitting):
                self._captured.clear()  # their places are given up
                self._seats = self._model.init_state(size).clone()
                self._tokens = torch.zeros(size, 1, dtype=torch.int64, device=self._seats.tokens_seen.device)
                self._sitting = [None] * size
            logits: list[Tensor] = []
            self._captured[size] = self._capture(self._step(size, logits)), logits
        except RuntimeError as reason:
            self.broken = True
            self._captured.clear()
            log.warning("steps of this model cannot be captured and run slower: %s", str(reason).splitlines()[0])
            return False
        return True

    def _step(self, size: int, logits: list[Tensor]) -> Callable[[], None]:
        """What advances the first `size` seats by their tokens, and leaves the logits in the list."""
        seats, tokens = self._seats.map(lambda tensor: tensor[:size]), self._tokens[:size]

        def run() -> None:
            features, after = self._model.features(tokens, seats, None)
            logits[:] = [self._logits(features[:, 0])]
            new = after.tensors()
            for name, seat in seats.tensors().items():
                seat.copy_(new[name])
            seats.tokens_seen.copy_(after.tokens_seen)

        return run

    def _seat(self, rows: Sequence[TorchRowState], size: int) -> list[int]:
        """Lets exactly these rows sit on the first `size` seats; where each one does."""
        wanted = {id(row) for row in rows}
        self.leave([row for row in self._present() if id(row) not in wanted or row.row >= size])
        new = [row for row in rows if row.home is not self]
        free = [i for i in range(size) if self._sitting[i] is None][: len(new)]
        if new:
            group, places = together(new), torch.tensor(free, device=self._tokens.device)
            tensors = group.tensors()
            for name, seat in self._seats.tensors().items():
                seat.index_copy_(0, places, tensors[name])
            self._seats.tokens_seen.index_copy_(0, places, group.tokens_seen)
        for row, place in zip(new, free):
            row.put(self._seats, place, self)
            self._sitting[place] = weakref.ref(row)
        return [row.row for row in rows]

    def _present(self) -> list[TorchRowState]:
        """The rows that sit here; seats of those that nobody has any more become free."""
        rows = [None if known is None else known() for known in self._sitting]
        for i, row in enumerate(rows):
            if row is None or row.home is not self or row.row != i:
                self._sitting[i] = None
        return [row for row, known in zip(rows, self._sitting) if known is not None]


def size_for(rows: int) -> int:
    """The captured batch size that so many rows fit into."""
    largest = SIZES[-1]
    return next((size for size in SIZES if size >= rows), -(-rows // largest) * largest)
