"""Loss by position: how well a model predicts a token after so many others, also beyond what it was trained on."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rookery.nn.language_model import LanguageModel


@torch.no_grad()
def loss_by_position(model: LanguageModel, inputs: Tensor, targets: Tensor, batch: int = 4) -> np.ndarray:
    """Mean loss in nats of `targets` [rows, t] after `inputs` [rows, t] at every position, float64 [t]."""
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for some, wanted in zip(inputs.split(batch), targets.split(batch)):
        logits, _ = model(some)
        total += cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").double().sum(0)
    return (total / inputs.shape[0]).numpy()


def mean_by_stretch(losses: np.ndarray, stretch: int) -> np.ndarray:
    """Means over stretches of so many positions; the last, if shorter, is left out."""
    return losses[: len(losses) // stretch * stretch].reshape(-1, stretch).mean(axis=1)
