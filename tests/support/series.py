"""Series to test forecasters with."""

import fnmatch

import torch
from torch import Tensor

from rookery.models import create_model
from rookery.models.forecast import Forecaster
from rookery.registry import families, list_models


def names() -> list[str]:
    """The -test preset of every registered family of forecasters."""
    series = [family.name for family in families().values() if family.kind == "series"]
    return [name for name in list_models("*-test") if any(fnmatch.fnmatch(name, f"{f}-test") for f in series)]


@torch.no_grad()
def randomised(name: str, *, dtype: torch.dtype = torch.float64, **overrides) -> Forecaster:
    """A forecaster far from its initial weights, which set whole matrices to zero."""
    model = create_model(name, dtype=dtype, **overrides)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.squeeze().dim() > 1 else 0.3
        parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype))
    return model.eval()


def some_series(*shape: int, seed: int = 2) -> Tensor:
    """Random walks, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(dim=-1)
