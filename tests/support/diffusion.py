"""Diffusion models and what they are told, to test with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rookery.models import create_model
from rookery.models.diffusion import DiffusionModel, DiffusionRWKV
from rookery.models.dir7 import DIR7, Prompt, Text
from rookery.registry import families, list_models


def names() -> list[str]:
    """Every -test preset of the registered diffusion models."""
    found = [family.name for family in families().values() if family.kind == "diffusion"]
    return [name for family in found for name in list_models(f"{family}*-test")]


@torch.no_grad()
def randomised(name: str, *, dtype: torch.dtype = torch.float64, **overrides) -> DiffusionModel:
    """A model far from its initial weights, which set whole matrices to zero."""
    return randomise(create_model(name, dtype=dtype, **overrides)).eval()


@torch.no_grad()
def randomise(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.squeeze().dim() > 1 else 0.3
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(std * noise.to(parameter.dtype))
    return module


def images(*size: int, batch: int = 2, channels: int = 1, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def texts(*lengths: int, size: int = 12, seed: int = 5) -> Text:
    """Texts of these lengths, padded on the right with rubbish."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    features = torch.randn(len(lengths), longest, size, generator=generator, dtype=torch.float64)
    return Text(features, torch.arange(longest) < torch.tensor(lengths)[:, None])


def condition(model: DiffusionModel, batch: int) -> Any:
    """Something to say to `batch` images, different for each."""
    if isinstance(model, DiffusionRWKV):
        return torch.arange(batch) % model.config.num_classes
    return texts(*(3 + i % 3 for i in range(batch)))


def row(given: Any, i: int) -> Any:
    """The condition of image i alone."""
    if isinstance(given, Text):
        length = int(given.mask[i].sum())
        return Text(given.features[i : i + 1, :length], given.mask[i : i + 1, :length])
    return given[i : i + 1]


def padded(text: Text, left: int = 0, right: int = 0) -> Text:
    """The text between tokens that are not there."""
    return Text(pad(text.features, (0, 0, left, right), value=7.0), pad(text.mask, (left, right)))


__all__ = [
    "DIR7",
    "Prompt",
    "Text",
    "condition",
    "images",
    "names",
    "padded",
    "randomise",
    "randomised",
    "row",
    "texts",
]
