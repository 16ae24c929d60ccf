"""How images become noise, and what a model's prediction says about both (DDPM, arXiv 2006.11239; rectified flow).

Everything is said with two numbers a level: an image x with noise ε is α x + σ ε.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# b batch, T levels; images are [b, channels, height, width]


class Parts(NamedTuple):
    """What a prediction says."""

    image: Tensor
    noise: Tensor
    share: Tensor | None
    """Where between its bounds the logarithm of a step's variance lies, 0 to 1; None where it is not learned."""


@dataclass(frozen=True)
class Noise:
    """The levels that a model was trained on, from 0, the least noise, to T − 1."""

    alpha: Tensor
    """float64 [T]"""
    sigma: Tensor
    """float64 [T]"""
    prediction: Literal["eps", "v", "flow"]

    @staticmethod
    def of(config: Any) -> "Noise":
        """The levels of a model's config (`rookery.families.diffusion.DiffusionConfig`).

        A flow goes in a line from the image to noise; the others keep α² + σ² = 1 with β rising in a line.
        """
        steps = config.noise_steps
        if config.prediction == "flow":
            sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            return Noise(1 - sigma, sigma, "flow")
        betas = torch.linspace(config.beta_first, config.beta_last, steps, dtype=torch.float64)
        alpha_bar = (1 - betas).cumprod(0)
        return Noise(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), config.prediction)

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def alpha_bar(self) -> Tensor:
        """α² [T], DDPM's ᾱ."""
        return self.alpha**2

    def at(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of levels int [b], in the shape and dtype to multiply `like` [b, ...] with."""
        found = (part.to(level.device)[level] for part in (self.alpha, self.sigma))
        alpha, sigma = (part.to(like.dtype).view(-1, *[1] * (like.dim() - 1)) for part in found)
        return alpha, sigma

    def add(self, images: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Images with noise of level int [b]."""
        alpha, sigma = self.at(level, images)
        return alpha * images + sigma * noise

    def target(self, images: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What a model is to predict."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "flow":
            return noise - images
        alpha, sigma = self.at(level, images)
        return alpha * noise - sigma * images

    def parts(self, noisy: Tensor, output: Tensor, level: Tensor, clip: float | None = None) -> Parts:
        """Image and noise according to a model's `output` for images with noise.

        `clip` bounds the image to ±clip; the noise is then what is left.
        """
        alpha, sigma = self.at(level, noisy)
        channels = noisy.shape[1]
        share = (output[:, channels:] + 1) / 2 if output.shape[1] == 2 * channels else None
        output = output[:, :channels]
        if self.prediction == "eps":
            image, noise = (noisy - sigma * output) / alpha, output
        elif self.prediction == "v":
            image, noise = alpha * noisy - sigma * output, sigma * noisy + alpha * output
        else:
            image, noise = noisy - sigma * output, noisy + alpha * output
        if clip is not None:
            image = image.clamp(-clip, clip)
            noise = (noisy - alpha * image) / sigma
        return Parts(image, noise, share)


class Step(NamedTuple):
    """One step of DDPM's way back, as numbers: the mean is `image` x + `noisy` x_t, the rest its variance."""

    image: float
    noisy: float
    beta: float
    """Variance that the step added: the upper bound of its reversal's."""
    posterior: float
    """Variance of the reversal where the image is known: the lower bound. 0 at the last step."""


def posterior(alpha_bar: float, before: float) -> Step:
    """The step from ᾱ to the larger ᾱ `before` (DDPM eq. 6-7)."""
    beta = 1 - alpha_bar / before
    scale = 1 - alpha_bar
    return Step(
        math.sqrt(before) * beta / scale,
        math.sqrt(1 - beta) * (1 - before) / scale,
        beta,
        beta * (1 - before) / scale,
    )


def log_variance(step: Step, share: Tensor, floor: float) -> Tensor:
    """Logarithm of a learned variance between the bounds (arXiv 2102.09672, eq. 15); a bound of 0 becomes `floor`."""
    low = math.log(step.posterior or floor)
    return share * math.log(step.beta) + (1 - share) * low


def variational_bound(noise: Noise, images: Tensor, noisy: Tensor, output: Tensor, level: Tensor) -> Tensor:
    """Bits per number that each step costs, [b]: what teaches the learned variance (arXiv 2102.09672, 3.1).

    The mean that it is measured with takes no gradient. Level 0 is scored against images in steps of 2 / 255.
    """
    found = noise.parts(noisy, output, level)
    bars = noise.alpha_bar.tolist()
    steps = [posterior(bars[i], bars[i - 1] if i else 1.0) for i in level.tolist()]
    floor = posterior(bars[1], bars[0]).posterior

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=noisy.dtype, device=noisy.device).view(-1, 1, 1, 1)

    low = column([math.log(step.posterior or floor) for step in steps])
    high = column([math.log(step.beta) for step in steps])
    log_var = found.share * high + (1 - found.share) * low
    near, far = column([step.image for step in steps]), column([step.noisy for step in steps])
    mean = (near * found.image + far * noisy).detach()
    true = near * images + far * noisy
    divergence = 0.5 * (log_var - low + (low - log_var).exp() - 1 + (true - mean).square() * (-log_var).exp())
    nats = torch.where((level == 0).view(-1, 1, 1, 1), -discrete_log_likelihood(images, mean, log_var / 2), divergence)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def discrete_log_likelihood(images: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of values in 255 steps from −1 to 1, the first and last reaching to infinity."""
    half = 1 / 255
    normal = torch.special.ndtr
    above = torch.where(images > 0.999, 1.0, normal((images + half - mean) * (-log_std).exp()))
    below = torch.where(images < -0.999, 0.0, normal((images - half - mean) * (-log_std).exp()))
    return (above - below).clamp(min=1e-12).log()
