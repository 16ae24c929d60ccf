"""Runs any registered language model with torch, on the CPU or a GPU. The engine's one door to torch."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from rookery.checkpoints.adapter import Adapter, digest_of, fingerprint_with
from rookery.checkpoints.checkpoint import Checkpoint
from rookery.engine.runners.protocol import Wanted, asked, check_rows, select
from rookery.engine.runners.torch_graphs import CudaGraphs, Steps
from rookery.engine.runners.torch_rows import TorchRowState, together
from rookery.errors import BadState
from rookery.nn.language_model import LanguageModel
from rookery.state import State

if TYPE_CHECKING:
    from rookery.adapt.hot_swap import Changes, HotSwap

STEP = -1
"""A kind of call: one token of a row whose steps are captured. Other kinds are numbers of kernel features."""


class TorchRunner:
    """A `LanguageModel` behind the engine's protocol."""

    name = "torch"

    def __init__(self, model: LanguageModel, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # torch knows one number for the whole process
        self.model = model.eval()
        self.family = model.family
        self.config = model.config
        self.steps: Steps | None = None
        """Replays one-token steps on a CUDA device; set None, and they are computed as any other call."""
        device = next(model.parameters()).device
        if device.type == "cuda" and model.static_step:
            self.steps = Steps(model, self._logits, CudaGraphs(device))
        self._hosts: dict[int, LanguageModel] = {}
        self._base: TorchRunner | None = None
        self._swap: HotSwap | None = None
        self._changes: Changes | None = None
        self._digest = ""

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | Checkpoint, *, device: str = "cpu", threads: int | None = None
    ) -> TorchRunner:
        """The model in a file of any readable format, on `device`; ValueError where there is no such device."""
        from rookery.models import load

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            raise ValueError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from None
        return cls(load(path, device=device), threads)

    def fingerprint(self) -> str:
        own = self.model.fingerprint()
        return fingerprint_with(own, self._digest) if self._digest else own

    def adapted(self, adapter: Adapter) -> TorchRunner:
        """The same weights with an adapter of any form beside them; see `Runner`. One adapter computes at a time."""
        from rookery.adapt.hot_swap import HotSwap

        base = self.base
        base._swap = base._swap or HotSwap(self.model)
        runner = copy.copy(base)
        runner._base, runner._changes, runner._digest = base, base._swap.changes(adapter), digest_of(adapter)
        return runner

    @property
    def base(self) -> TorchRunner:
        """The runner itself, or the one that `adapted` was called of first."""
        return self._base or self

    def _using(self, changes: Changes | None) -> AbstractContextManager:
        return nullcontext() if self._swap is None else self._swap.using(changes)

    def init_state(self, tensors: Mapping[str, np.ndarray] | None = None) -> TorchRowState:
        if tensors is None:
            return TorchRowState(self.model.init_state(1), changes=self._changes)
        features = tensors["layers.0.kstate"].shape[-1] if "layers.0.kstate" in tensors else 0
        return TorchRowState(State.from_arrays(tensors, self._host(features)), changes=self._changes)

    def _host(self, features: int) -> LanguageModel:
        """What runs states of so many kernel features: the model itself, or one that shares its weights."""
        if not features:
            return self.model
        if features not in self._hosts:
            from rookery.models.kernel_state import KernelStateModel

            try:
                self._hosts[features] = KernelStateModel(self.model, features).eval()
            except ValueError as other:
                raise BadState(f"a kernel-upscaled state cannot start this model: {other}") from None
        return self._hosts[features]

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], state: TorchRowState, logits: Wanted = "last") -> np.ndarray:
        if self._kind(tokens, state)[0] == STEP:
            return self.forward_rows([tokens], [state], [logits])[0]
        device = state.state.tokens_seen.device
        row = torch.tensor(list(tokens), dtype=torch.int64, device=device)[None]
        count = asked(logits, len(tokens))
        with self._using(state.changes):
            features, state.state = self._host(_features(state)).last_features(row, state.state, count)
            if not count:
                return np.empty((0, self.config.vocab_size), np.float32)
            return self._logits(features[0]).cpu().numpy()

    @torch.inference_mode()
    def forward_rows(
        self, rows: Sequence[Sequence[int]], states: Sequence[TorchRowState], logits: Sequence[Wanted]
    ) -> list[np.ndarray]:
        """As `forward` for several rows at once: as a batch where they are of equal length, else packed.

        Where one-token steps are captured, rows with one token are called by themselves.
        """
        if not rows:
            return []
        check_rows(rows, states, logits)
        kinds = [self._kind(*row) for row in zip(rows, states)]
        if len({*kinds}) > 1:
            return self._rows_of_each_kind(rows, states, logits, kinds)
        with self._using(states[0].changes):
            if kinds[0][0] == STEP and (stepped := self._stepped(rows, states, logits)) is not None:
                return stepped
            return self._rows_of_one_kind(rows, states, logits)

    def _rows_of_one_kind(
        self, rows: Sequence[Sequence[int]], states: Sequence[TorchRowState], logits: Sequence[Wanted]
    ) -> list[np.ndarray]:
        model = self._host(_features(states[0]))
        batch = together(states)
        device, lengths = batch.tokens_seen.device, [len(row) for row in rows]
        if len({*lengths}) == 1:
            tokens = torch.tensor([list(row) for row in rows], dtype=torch.int64, device=device)
            features, batch = model.features(tokens, batch, None)
        else:
            tokens = torch.tensor([[token for row in rows for token in row]], dtype=torch.int64, device=device)
            ends = torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)
            features, batch = model.features(tokens, batch, ends)
        for i, state in enumerate(states):
            state.put(batch, i)
        features = features.flatten(0, 1)
        counts = [asked(how, n) for n, how in zip(lengths, logits)]
        places = [end - n + i for end, n in zip(np.cumsum(lengths).tolist(), counts) for i in range(n)]
        if not places:
            return [np.empty((0, self.config.vocab_size), np.float32) for _ in rows]
        return np.split(self._logits(features[places]).cpu().numpy(), np.cumsum(counts)[:-1])

    def _kind(self, tokens: Sequence[int], state: TorchRowState) -> tuple[int, int]:
        """What rows must have in common to be computed in one call."""
        features = _features(state)
        captured = self.steps is not None and not self.steps.broken and state.changes is None
        return STEP if captured and len(tokens) == 1 and not features else features, id(state.changes)

    def _stepped(
        self, rows: Sequence[Sequence[int]], states: Sequence[TorchRowState], logits: Sequence[Wanted]
    ) -> list[np.ndarray] | None:
        """`forward_rows` for one token of each row; None, with nothing done, where steps cannot be captured."""
        found = self.steps([row[0] for row in rows], states)
        if found is None:
            return None
        return [row[None][: asked(how, 1)] for row, how in zip(found.cpu().numpy(), logits)]

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] for features [n, c]; rows of the embedding that are no tokens cannot be sampled."""
        logits = self.model.head(features[None])[0].float()
        if padding := getattr(self.config, "padding_rows", 0):
            logits[:, -padding:] = -torch.inf
        return logits

    def _rows_of_each_kind(
        self,
        rows: Sequence[Sequence[int]],
        states: Sequence[TorchRowState],
        logits: Sequence[Wanted],
        kinds: list[tuple[int, int]],
    ) -> list[np.ndarray]:
        """A call for each kind: steps, plain rows, rows with so many features of a kernel state or with an adapter."""
        found: dict[int, np.ndarray] = {}
        for kind in {*kinds}:
            places = [i for i, own in enumerate(kinds) if own == kind]
            some = ([given[i] for i in places] for given in (rows, states, logits))
            found |= dict(zip(places, self.forward_rows(*some)))
        return [found[i] for i in range(len(rows))]

    def select(self, states: Sequence[TorchRowState], rows: Sequence[int]) -> list[TorchRowState]:
        """States by index, in any order and number: one `State.select` where the rows are those of one batch."""
        if len({id(state.batch) for state in states}) > 1:
            return select(states, rows)
        batch = states[0].batch.select([states[row].row for row in rows])
        return [TorchRowState(batch, i, states[row].changes) for i, row in enumerate(rows)]


def _features(state: TorchRowState) -> int:
    """Kernel features of the row's upscaled state, 0 for a plain one."""
    return getattr(state.batch.config, "features", 0)
