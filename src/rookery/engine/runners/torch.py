"""Runs any registered language model with torch, on the CPU or a GPU. The one file of the engine that imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rookery.checkpoints.checkpoint import Checkpoint
from rookery.engine.runners.protocol import Wanted
from rookery.nn.language_model import LanguageModel
from rookery.state import State


class TorchRowState:
    """One row of a model's state. Models never change a state that they are given, so a copy shares the tensors."""

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def tokens_seen(self) -> int:
        return int(self.state.tokens_seen[0])

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def copy(self) -> TorchRowState:
        return TorchRowState(self.state)

    def tensors(self) -> dict[str, np.ndarray]:
        return self.state.arrays()


class TorchRunner:
    """A `LanguageModel` behind the engine's protocol."""

    name = "torch"

    def __init__(self, model: LanguageModel, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # torch knows one number for the whole process
        self.model = model.eval()
        self.family = model.family
        self.config = model.config

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
        return self.model.fingerprint()

    def init_state(self, tensors: Mapping[str, np.ndarray] | None = None) -> TorchRowState:
        if tensors is None:
            return TorchRowState(self.model.init_state(1))
        return TorchRowState(State.from_arrays(tensors, self.model))

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], state: TorchRowState, logits: Wanted = "last") -> np.ndarray:
        device = state.state.tokens_seen.device
        row = torch.tensor(list(tokens), dtype=torch.int64, device=device)[None]
        features, state.state = self.model.features(row, state.state, None)
        asked = {"none": 0, "last": min(1, len(tokens)), "all": len(tokens)}[logits]
        if not asked:
            return np.empty((0, self.config.vocab_size), np.float32)
        return self.model.head(features[:, -asked:])[0].float().cpu().numpy()
