"""The front door for text-to-image models, as users of diffusers know it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rookery.checkpoints.atomic import replacing
from rookery.data.images import pillow
from rookery.errors import BadCheckpoint
from rookery.imaging.sample import Guidance, sample
from rookery.imaging.samplers import Sampler, sampler
from rookery.models import load, save_model
from rookery.models.dir7 import DIR7, Prompt, Text, join
from rookery.nn.noise import Noise

SHIPPED = Path(__file__).parents[1] / "assets" / "imagine" / "model.safetensors"
"""The text-to-digit model that comes with the package."""

TextEncoder = Callable[[Sequence[str]], Text]
"""Prompts -> features [b, l, d] and mask; any frozen encoder fits behind it."""


class Decoder(Protocol):
    """An autoencoder's way back from latents to pixels."""

    factor: int
    """Pixels of a latent's side, 8 for that of Stable Diffusion."""
    scale: float
    """What latents were multiplied by for training, 0.18215 there."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [b, channels, factor · h, factor · w], −1 to 1."""


@dataclass(frozen=True)
class Output:
    """What the pipeline gives."""

    images: Any
    """A list of Pillow images; float32 [n, h, w, channels] ("np") or [n, channels, h, w] ("pt"), both 0 to 1."""


class DIR7Pipeline:
    """A DIR-7 model and what is needed to use it: `DIR7Pipeline.from_pretrained()("three").images[0]`."""

    def __init__(
        self,
        model: DIR7,
        text_encoder: TextEncoder | None = None,
        scheduler: str = "ddim",
        vae: Decoder | None = None,
    ) -> None:
        """`text_encoder` where the model has no table of words of its own; `vae` where it makes latents."""
        self.model, self.vae, self.scheduler = model.eval(), vae, scheduler
        self.text_encoder = text_encoder or model.words
        self._sampler(1)  # refuses a scheduler that does not fit

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str] | None = None,
        *,
        text_encoder: TextEncoder | None = None,
        vae: Decoder | None = None,
        device: str | None = None,
    ) -> DIR7Pipeline:
        """The pipeline in a file, in a folder that `save_pretrained` wrote, or (without a path) the one shipped."""
        path = Path(SHIPPED if path is None else path)
        folder = path if path.is_dir() else path.parent
        model = load(path / "model.safetensors" if path.is_dir() else path, dtype=torch.float32, device=device)
        if not isinstance(model, DIR7):
            raise ValueError(f"{str(path)!r} is a {model.family} model; texts are drawn by dir-7")
        settings = folder / "pipeline.json"
        scheduler = _read(settings)["scheduler"] if path.is_dir() and settings.exists() else "ddim"
        return DIR7Pipeline(model, text_encoder, scheduler, vae)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model and the scheduler's name into `folder`; a text encoder or a decoder is not written."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.model, Path(folder) / "model.safetensors")
        with replacing(Path(folder) / "pipeline.json") as temporary:
            temporary.write_text(json.dumps({"scheduler": self.scheduler}), encoding="utf-8")

    @torch.no_grad()
    def cache_prompt(self, prompt: str | Sequence[str]) -> Prompt:
        """What the model keeps of prompts. Read once, it serves every later call in place of the text.

        ValueError where none of a prompt's words is known, or where there is no text encoder.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        text = self.text_encoder(prompts)
        device = self.model.like.device
        return self.model.read(Text(text.features.to(self.model.like), text.mask.to(device)))

    def __call__(
        self,
        prompt: str | Sequence[str] | Prompt,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        guidance: Guidance | None = None,
        report: Callable[[int, int], None] = lambda done, steps: None,
    ) -> Output:
        """Images for the prompts, `num_images_per_prompt` for the first, then for the second, and so on.

        `generator` may be a seed; without one the noise is new every time. `height` and `width` are pixels, those of
        the training pictures where left out; any size works. `guidance` says more than `guidance_scale` can.
        ValueError for sizes that the decoder cannot make and for prompts that do not fit.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is one of pil, np, pt; got {output_type!r}")
        height, width = (side or self.size for side in (height, width))
        factor = self.vae.factor if self.vae else 1
        if height % factor or width % factor or min(height, width) < 1:
            raise ValueError(f"height and width must be multiples of {factor} above 0, got {height} and {width}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        kept = prompt if isinstance(prompt, Prompt) else self.cache_prompt(prompt)
        rows = _rows(kept).repeat_interleave(num_images_per_prompt)
        steps = self._sampler(num_inference_steps)
        images = sample(
            self.model,
            kept.select(rows.to(self.model.like.device)),
            shape=(len(rows), height // factor, width // factor),
            sampler=steps,
            negative=self._negative(negative_prompt, len(rows)),
            guidance=guidance or Guidance(scale=guidance_scale),
            generator=torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator,
            report=report,
        )
        if self.vae:
            images = self.vae.decode(images / self.vae.scale)
        return Output(_as(images, output_type))

    @property
    def size(self) -> int:
        """Pixels of a side where none is given."""
        return self.model.config.image_size * (self.vae.factor if self.vae else 1)

    def _sampler(self, steps: int) -> Sampler:
        made = sampler(self.scheduler, Noise.of(self.model.config), clip=None if self.vae else 1.0)
        made.set_timesteps(steps)
        return made

    def _negative(self, prompt: str | Sequence[str] | None, count: int) -> Prompt | None:
        if prompt is None:
            return None
        kept = self.cache_prompt(prompt)
        given = len(_rows(kept))
        if given not in (1, count):
            raise ValueError(f"there are {given} negative prompts for {count} images: give one, or one for each")
        return kept if given == count else join([kept] * count)


def _rows(prompt: Prompt) -> Tensor:
    """The places of a prompt's rows."""
    first = prompt.layers[0][0] if prompt.layers else prompt.pooled
    if first is None:
        raise ValueError("this model reads no text (cross='none', nothing pooled), so a prompt has nothing to say")
    return torch.arange(len(first))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("scheduler"), str):
        raise BadCheckpoint(f"{str(path)!r} does not name a scheduler; write it again with save_pretrained")
    return found


def _as(images: Tensor, kind: str) -> Any:
    """Images of −1 to 1 in the form asked for."""
    images = (images.float().cpu() / 2 + 0.5).clamp(0, 1)
    if kind == "pt":
        return images
    arrays = images.movedim(1, 3).numpy()
    if kind == "np":
        return arrays
    Image = pillow()
    pixels = np.rint(arrays * 255).astype(np.uint8)
    return [Image.fromarray(one[..., 0] if one.shape[2] == 1 else one) for one in pixels]
