"""Loss by position: how well a model predicts a token after so many others, also beyond what it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rookery.checkpoints.atomic import replacing
from rookery.nn.language_model import LanguageModel
from rookery.plotting import new_figure


@torch.no_grad()
def loss_by_position(
    model: LanguageModel, inputs: Tensor, targets: Tensor, batch: int = 4, chunk: int = 512
) -> np.ndarray:
    """Mean loss in nats of `targets` [rows, t] after `inputs` [rows, t] at every position, float64 [t].

    The state is carried from chunk to chunk, so rows may be many times as long as what the model was trained on.
    """
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    device = next(model.parameters()).device
    for some, wanted in zip(inputs.to(device).split(batch), targets.to(device).split(batch)):
        state = None
        for begin in range(0, some.shape[1], chunk):
            features, state = model.features(some[:, begin : begin + chunk], state, None)
            for row, target in zip(features, wanted[:, begin : begin + chunk]):
                # row by row: the logits of a large vocabulary fill the memory
                log_probs = model.head(row).float().log_softmax(dim=-1)
                found = -log_probs.gather(1, target[:, None])[:, 0].double().cpu()
                total[begin : begin + len(found)] += found
    return (total / inputs.shape[0]).numpy()


def mean_by_stretch(losses: np.ndarray, stretch: int) -> np.ndarray:
    """Means over stretches of so many positions; the last, if shorter, is left out."""
    return losses[: len(losses) // stretch * stretch].reshape(-1, stretch).mean(axis=1)


class Stretch(NamedTuple):
    """The mean loss of neighbouring positions."""

    first: int
    last: int
    nats: float


def by_octave(losses: np.ndarray, parts: int = 3) -> list[Stretch]:
    """Means over stretches that grow with the position, `parts` of them every time it doubles."""
    count = max(1, round(np.log2(len(losses) + 1) * parts))
    borders = np.unique(np.round(np.geomspace(1, len(losses) + 1, count + 1)).astype(np.int64)) - 1
    return [Stretch(int(a), int(b) - 1, float(losses[a:b].mean())) for a, b in zip(borders, borders[1:])]


def rows_of(tokens: np.ndarray, length: int, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length] from the start of a text, fewer where it is short; ValueError for none."""
    rows = min(rows, (len(tokens) - 1) // length)
    if rows < 1:
        raise ValueError(f"{len(tokens)} tokens of text are too few for a row of {length}; give a smaller length")
    taken = torch.from_numpy(tokens[: rows * length + 1].astype(np.int64))
    return taken[:-1].view(rows, length), taken[1:].view(rows, length)


def plot_loss_by_position(
    curves: Mapping[str, np.ndarray], path: str | os.PathLike[str], *, trained_length: int = 0
) -> None:
    """Writes a PNG with the losses of every name, as `loss_by_position` gives them; a line marks `trained_length`."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, losses in curves.items():
        means = by_octave(losses)
        middles = [((m.first + 1) * (m.last + 1)) ** 0.5 for m in means]
        axes.plot(middles, [m.nats for m in means], marker=".", label=name)
    if trained_length:
        axes.axvline(trained_length, color="grey", linestyle=":", label="training length")
    axes.set(xscale="log", xlabel="position (tokens)", ylabel="loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
