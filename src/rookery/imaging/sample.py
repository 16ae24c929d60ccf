"""From noise to images with a model: the loop and classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rookery.imaging.samplers import Sampler, noise_like
from rookery.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far predictions are pushed from what is said without the condition."""

    scale: float = 1.0
    """1 is the conditional prediction, 0 that of the null condition; above 1 the condition counts more."""
    channels: int = 0
    """Guided channels of the prediction, the first ones; 0 for all. The authors of Diffusion-RWKV guide 3."""
    start: float = 0.0
    """Share of the steps after which guidance begins."""
    stop: float = 1.0
    """Share of the steps after which it ends."""
    rescale: float = 0.0
    """How much of the conditional prediction's deviation is restored (arXiv 2305.08891, φ)."""

    def active(self, done: float) -> bool:
        """Whether to guide where this share of the steps is done."""
        return self.scale != 1 and self.start <= done < self.stop


def guided(conditional: Tensor, null: Tensor, guidance: Guidance, channels: int) -> Tensor:
    """The prediction [b, out channels, h, w] of a model with `channels`; a learned variance stays the conditional's."""
    share = min(guidance.channels or channels, channels)
    told = conditional[:, :share]
    pushed = null[:, :share] + guidance.scale * (told - null[:, :share])
    if guidance.rescale:
        sides = (1, 2, 3)
        restored = pushed * (told.std(sides, keepdim=True) / pushed.std(sides, keepdim=True).clamp(min=1e-12))
        pushed = guidance.rescale * restored + (1 - guidance.rescale) * pushed
    return torch.cat([pushed, conditional[:, share:]], dim=1)


@torch.no_grad()
def sample(
    model: DiffusionModel,
    condition: Any,
    *,
    shape: tuple[int, int, int],
    sampler: Sampler,
    negative: Any = None,
    guidance: Guidance | None = None,
    generator: torch.Generator | None = None,
    report: Callable[[int, int], None] = lambda done, steps: None,
) -> Tensor:
    """Images [b, channels, height, width] for `shape` (b, height, width), in the units of the training pictures.

    `negative` is the condition to be pushed away from, the null condition where left out. The sampler's timesteps must
    be set. `report(done, steps)` is called after every step.
    """
    batch, height, width = shape
    guidance = guidance or Guidance()
    away = model.null(batch) if negative is None else negative
    channels = model.config.in_channels
    images = noise_like(model.like.new_empty(batch, channels, height, width), generator)
    steps = len(sampler.timesteps)
    for done, level in enumerate(sampler.timesteps):
        levels = torch.full((batch,), level, device=images.device)
        output = model(images, levels, condition)
        if guidance.active(done / steps):
            output = guided(output, model(images, levels, away), guidance, channels)
        images = sampler.step(output, level, images, generator=generator)
        report(done + 1, steps)
    return images
