"""Ways back from noise to an image. Each is a rule for one step, from a level to one with less noise.

sampler = SAMPLERS["ddim"](Noise.of(model.config))
sampler.set_timesteps(25)
for level in sampler.timesteps:
    images = sampler.step(output, level, images, generator=generator)
"""

import math

import torch
from torch import Tensor

from rookery.errors import unknown
from rookery.nn.noise import Noise, Parts, posterior


class Sampler:
    """What samplers share: the levels that are kept, spread evenly, and image and noise from a prediction."""

    def __init__(self, noise: Noise, *, clip: float | None = 1.0) -> None:
        """`clip` bounds the image that is predicted at every step: 1 for pixels, None for latents."""
        self.noise, self.clip = noise, clip
        self.timesteps: list[int] = []
        self._after: dict[int, int | None] = {}

    def set_timesteps(self, steps: int) -> None:
        """Keeps so many of the levels, the last and the first among them; ValueError for more than there are."""
        if not 1 <= steps <= len(self.noise):
            raise ValueError(f"steps go from 1 to {len(self.noise)}, the model's noise levels; got {steps}")
        self.timesteps = torch.linspace(len(self.noise) - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        self._after = dict(zip(self.timesteps, [*self.timesteps[1:], None]))

    def step(self, output: Tensor, level: int, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The images at the level that follows, from the model's `output` for `images` at `level`."""
        if level not in self._after:
            raise ValueError(f"level {level} is none of the timesteps; call set_timesteps first and go through them")
        parts = self.noise.parts(images, output, torch.full((len(images),), level, device=images.device), self.clip)
        return self.move(parts, images, level, self._after[level], generator)

    def move(
        self, parts: Parts, images: Tensor, level: int, after: int | None, generator: torch.Generator | None
    ) -> Tensor:
        """The rule; `after` is None at the last step."""
        raise NotImplementedError

    def coefficients(self, level: int | None) -> tuple[float, float]:
        """α and σ; 1 and 0 for an image without noise."""
        return (1.0, 0.0) if level is None else (float(self.noise.alpha[level]), float(self.noise.sigma[level]))


class DDPM(Sampler):
    """Draws every step from the posterior (arXiv 2006.11239), its variance learned where the model learned one."""

    def __init__(self, noise: Noise, *, clip: float | None = 1.0) -> None:
        if noise.prediction == "flow":
            raise ValueError("DDPM's steps do not fit the straight line of a flow; use ddim, euler or dpm++")
        super().__init__(noise, clip=clip)

    def move(
        self, parts: Parts, images: Tensor, level: int, after: int | None, generator: torch.Generator | None
    ) -> Tensor:
        if after is None:
            return parts.image
        bars = self.noise.alpha_bar
        step = posterior(float(bars[level]), float(bars[after]))
        deviation: Tensor | float = math.sqrt(step.posterior)
        if parts.share is not None:
            log_variance = parts.share * math.log(step.beta) + (1 - parts.share) * math.log(step.posterior)
            deviation = (log_variance / 2).exp()
        return step.image * parts.image + step.noisy * images + deviation * noise_like(images, generator)


class DDIM(Sampler):
    """Goes back along the predicted noise (arXiv 2010.02502); `eta` 1 draws as much anew as DDPM, 0 nothing."""

    def __init__(self, noise: Noise, *, clip: float | None = 1.0, eta: float = 0.0) -> None:
        if eta and noise.prediction == "flow":
            raise ValueError("a flow is sampled without new noise: leave eta at 0")
        super().__init__(noise, clip=clip)
        self.eta = eta

    def move(
        self, parts: Parts, images: Tensor, level: int, after: int | None, generator: torch.Generator | None
    ) -> Tensor:
        alpha, sigma = self.coefficients(after)
        if not self.eta or after is None:
            return alpha * parts.image + sigma * parts.noise
        bars = self.noise.alpha_bar
        drawn = self.eta * math.sqrt(posterior(float(bars[level]), float(bars[after])).posterior)
        kept = math.sqrt(max(0.0, sigma**2 - drawn**2))
        return alpha * parts.image + kept * parts.noise + drawn * noise_like(images, generator)


class Euler(DDIM):
    """Euler's method along a flow's straight lines; the same as DDIM with a flow's levels."""

    def __init__(self, noise: Noise, *, clip: float | None = 1.0) -> None:
        if noise.prediction != "flow":
            raise ValueError(f"euler is for models that predict a flow; this one predicts {noise.prediction!r}")
        super().__init__(noise, clip=clip)


class DPM(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095): the last two predictions make a line; good with 10 to 20 steps.

    The step to the first level, where the signal-to-noise ratio leaps, follows the last prediction alone.
    """

    def set_timesteps(self, steps: int) -> None:
        super().set_timesteps(steps)
        self._last: tuple[Tensor, float] | None = None

    def move(
        self, parts: Parts, images: Tensor, level: int, after: int | None, generator: torch.Generator | None
    ) -> Tensor:
        if level == self.timesteps[0]:
            self._last = None
        if after is None:
            return parts.image
        here, there = log_snr(*self.coefficients(level)), log_snr(*self.coefficients(after))
        width = there - here
        image = parts.image
        leaps = after == self.timesteps[-1] or not math.isfinite(width)
        if self._last is not None and not leaps and math.isfinite(self._last[1]):
            weight = width / (2 * self._last[1])
            image = (1 + weight) * image - weight * self._last[0]
        self._last = parts.image, width
        (_, sigma), (alpha_after, sigma_after) = self.coefficients(level), self.coefficients(after)
        return sigma_after / sigma * images - alpha_after * math.expm1(-width) * image


def log_snr(alpha: float, sigma: float) -> float:
    """log(α / σ), −∞ for noise alone."""
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def noise_like(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal noise, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(images.shape, generator=generator, dtype=torch.float32).to(images)


SAMPLERS: dict[str, type[Sampler]] = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPM, "euler": Euler}


def sampler(name: str, noise: Noise, **settings: float | None) -> Sampler:
    """The sampler of that name; UnknownName where there is none."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS, "`rookery imagine --help`")
    return SAMPLERS[name](noise, **settings)
