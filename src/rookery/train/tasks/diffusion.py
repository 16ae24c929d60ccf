"""Predict the noise in pictures, told what they show."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rookery.data.image_input import labelled_batches, plain_input
from rookery.data.images import Images, open_images
from rookery.models import create_model, load, save_model
from rookery.models.diffusion import DiffusionModel, DiffusionRWKV
from rookery.models.dir7 import DIR7, Text
from rookery.nn.noise import Noise, variational_bound
from rookery.registry import find
from rookery.train.config import ImagineConfig
from rookery.train.tasks.base import Task
from rookery.train.tasks.images import ImageReader


class Batch(NamedTuple):
    """Pictures and all that is drawn for them."""

    images: Tensor
    """float [b, channels, h, w], −1 to 1"""
    said: Tensor
    """int [b], the class, or the caption's place among all captions"""
    level: Tensor
    """int [b]"""
    noise: Tensor
    """as `images`"""
    withheld: Tensor
    """bool [b], true where the model is not told"""


class DiffusionTask(Task):
    """A diffusion model on labelled pictures; the config's model is of kind "diffusion".

    DIR-7 is told a caption in words, Diffusion-RWKV the number of the class. Channels and classes follow the data
    unless `overrides` says them.
    """

    def __init__(self, config: ImagineConfig) -> None:
        self.config = config
        if not config.data.path:
            raise ValueError("no pictures to train on: give data.path, for example --set data.path=digits")
        train, self.held_out = open_images(config.data.path, 0, config.data.validation_share, config.seed)
        self.model = self.trained = starting_model(config, train)
        sizes = self.model.config
        if sizes.in_channels != train.channels:
            train, self.held_out = (
                Images(p.sources, p.labels, p.classes, sizes.in_channels) for p in (train, self.held_out)
            )
        self.reader = ImageReader(config, train, plain_input(sizes.image_size, sizes.in_channels))
        self.noise = Noise.of(sizes)
        self.dtype = getattr(torch, config.dtype)
        templates = config.captions.split("|")
        self.captions = [template.replace("{}", name) for name in train.classes for template in templates]
        self.templates = len(templates)
        if isinstance(self.model, DIR7):
            self.ids = self.model.word_ids(self.captions)

    def batch(self, step: int) -> Batch:
        self.step = step
        images = self.reader.want.normalised(self.reader.pixels(step))
        labels = torch.from_numpy(self.reader.labels(step))
        return self.drawn(images, labels, np.random.Philox(key=self.config.seed + (4 << 32), counter=step))

    def drawn(self, images: Tensor, labels: Tensor, source: np.random.BitGenerator) -> Batch:
        """Captions, levels, noise and what is withheld, for these pictures."""
        generator, count = np.random.Generator(source), len(images)
        templates = torch.from_numpy(generator.integers(self.templates, size=count))
        return Batch(
            images,
            labels * self.templates + templates if isinstance(self.model, DIR7) else labels,
            torch.from_numpy(generator.integers(len(self.noise), size=count)),
            torch.from_numpy(generator.standard_normal(images.shape, dtype=np.float32)),
            torch.from_numpy(generator.random(count) < self.config.drop),
        )

    def tokens(self, batch: Batch) -> int:
        return len(batch.images) * self.model.config.grid**2

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        self.model.train()
        with torch.random.fork_rng():  # stochastic depth is a function of the step, so that a resumed run is exact
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            return self.score(batch)

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the prediction, and with a learned variance the bound in bits beside it."""
        like, level = self.model.like, batch.level
        images, noise = batch.images.to(like), batch.noise.to(like)
        noisy = self.noise.add(images, noise, level)
        output = self.model(noisy, level, self.told(batch))
        predicted = output[:, : images.shape[1]].float()
        error = (predicted - self.noise.target(images, noise, level).float()).square().mean()
        if not self.model.config.learn_sigma:
            return {"loss": error}
        bound = variational_bound(self.noise, images.float(), noisy.float(), output.float(), level).mean()
        return {"loss": error + bound, "error": error.detach(), "bound": bound.detach()}

    def told(self, batch: Batch) -> Any:
        """The condition of the model's forward."""
        if not isinstance(self.model, DIR7):
            return torch.where(batch.withheld, self.model.config.num_classes, batch.said)
        ids, mask = (table.to(batch.said.device)[batch.said] for table in self.ids)
        return self.model.dropped(Text(self.model.text_embed(ids), mask), batch.withheld)

    def split(self, batch: Batch, parts: int) -> list[tuple[Batch, float]]:
        if len(batch.images) % parts:
            raise ValueError(f"{len(batch.images)} pictures (batch_size) cannot be divided among {parts} parts")
        return [(Batch(*pieces), 1 / parts) for pieces in zip(*(part.chunk(parts) for part in batch))]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the pictures that were held out, always with the same noise."""
        self.model.eval()
        total, device = 0.0, self.model.pos_embed.device
        for number, (images, labels) in enumerate(
            labelled_batches(self.held_out, self.reader.want, self.config.batch_size)
        ):
            batch = self.drawn(images, labels, np.random.Philox(key=self.config.seed + (5 << 32), counter=number))
            total += float(self.score(Batch(*(part.to(device) for part in batch)))["loss"]) * len(images)
        return {"validation_loss": total / len(self.held_out)}

    def export(self, out: Path) -> None:
        """model.safetensors, which says the names of the classes; words that no caption has are forgotten."""
        if isinstance(self.model, DIR7):
            self.model.keep_words(self.captions)
        names = {"classes": json.dumps(self.held_out.classes, ensure_ascii=False)}
        save_model(self.model, out / "model.safetensors", metadata=names)


def starting_model(config: ImagineConfig, images: Images) -> DiffusionModel:
    """The model before the first step, in float32; ValueError where the config names another kind of model."""
    if config.initial:
        model = load(config.initial, dtype=torch.float32)
    else:
        family, _ = find(config.model)
        follows: dict[str, Any] = {}
        if family.kind == "diffusion":
            follows["in_channels"] = images.channels
        if family.name == DiffusionRWKV.family:
            follows["num_classes"] = len(images.classes)
        model = create_model(config.model, seed=config.seed, **{**follows, **config.overrides})
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"{config.initial or config.model!r} is no diffusion model; diffusion-rwkv and dir-7 are")
    if isinstance(model, DIR7) and not model.config.text_buckets:
        raise ValueError("a model that learns from captions needs a table of words: set overrides.text_buckets=512")
    if isinstance(model, DiffusionRWKV) and 0 < model.config.num_classes < len(images.classes):
        raise ValueError(f"the model has {model.config.num_classes} classes, the pictures have {len(images.classes)}")
    return model
