"""What the loop knows of a task."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rookery.nn.language_model import LanguageModel


class Task(Protocol):
    """A model, what of it is trained, the data, and the loss. Made from the run's config alone.

    A task that inherits from this class gets what is the same for most.
    """

    model: LanguageModel
    trained: nn.Module
    """Its parameters that require gradients are what the optimiser moves."""
    dtype: torch.dtype
    """What `trained` computes in; the optimiser keeps float32."""

    def batch(self, step: int) -> Any:
        """What `step` (from 1) learns from: a function of config and step, so that a resumed run is exact."""

    def tokens(self, batch: Any) -> int:
        """Tokens that the model reads in it."""

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """ "loss", and scalars to log."""

    def split(self, batch: Any, parts: int) -> list[tuple[Any, float]]:
        """The batch as exactly `parts` parts, each with its weight: weighted losses add up to the batch's loss.

        ValueError where the task cannot do that.
        """
        if parts > 1:
            raise ValueError(f"{type(self).__name__} cannot split a batch: use accumulate=1 and one process")
        return [(batch, 1.0)]

    def segment(self, batch: Any, index: int, parts: int) -> Any:
        """Part `index` of `parts` equal parts of every sequence of the batch, for context parallelism."""
        raise ValueError(f"{type(self).__name__} cannot split sequences: use context_parallel=1")

    def backward(self, batch: Any, weight: float) -> dict[str, Tensor]:
        """Adds the gradients of weight × loss; gives what `loss` gives."""
        found = self.loss(batch)
        (found["loss"] * weight).backward()
        return found

    def ready(self, out: Path) -> None:
        """Called once weights have their dtype, before a checkpoint is read: the model is as it was before training."""

    def after_step(self) -> None:
        """Called after every step of the optimiser."""

    def validate(self) -> dict[str, float]:
        """Measurements on held-out data; empty where there is too little."""

    def export(self, out: Path) -> None:
        """Writes the finished result to the run's folder."""
