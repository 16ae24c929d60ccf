"""Name the class of a picture."""

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rookery.data.image_input import ImageInput, labelled_batches, named_input
from rookery.data.images import Images, open_images
from rookery.data.order import Permuted
from rookery.models import create_model, load, save_model
from rookery.models.vision import VisionRWKV
from rookery.registry import find
from rookery.train.config import ImageConfig
from rookery.train.tasks.base import Task

Batch = tuple[Tensor, Tensor]
"""Pictures float32 [n, channels, h, w] and targets [n, classes], or labels [n]."""


class ImageReader:
    """The pictures of each step, changed as the config says: a function of the step alone.

    With `workers` the next step's are read in threads while the present one is learned from; decoding and resizing
    leave the interpreter's lock.
    """

    def __init__(self, config: ImageConfig, images: Images, want: ImageInput) -> None:
        self.config, self.images, self.want = config, images, want
        self.order = Permuted(len(images), config.seed)
        self.pool = ThreadPoolExecutor(config.data.workers) if config.data.workers else None
        self._next: tuple[int, list[Future]] = (0, [])

    def places(self, step: int) -> range:
        """Numbers of the samples of `step`, over the whole run."""
        return range((step - 1) * self.config.batch_size, step * self.config.batch_size)

    def pixels(self, step: int) -> np.ndarray:
        """uint8 [batch_size, size, size, channels]"""
        if self.pool is None:
            return np.stack([self.one(place) for place in self.places(step)])
        if self._next[0] != step:
            self._submit(step)
        pictures = [future.result() for future in self._next[1]]
        if step < self.config.steps:
            self._submit(step + 1)
        return np.stack(pictures)

    def _submit(self, step: int) -> None:
        for place in self.places(step):
            self.order.item(place)  # here, because threads would race to shuffle a new pass
        items = [(place, self.order.item(place)) for place in self.places(step)]
        self._next = step, [self.pool.submit(self.one, place, item) for place, item in items]

    def one(self, place: int, item: int | None = None) -> np.ndarray:
        """Sample number `place`, changed."""
        generator = np.random.Generator(np.random.Philox(key=self.config.seed + (2 << 32), counter=place))
        item = self.order.item(place) if item is None else item
        return self.config.augment.picture(self.images[item], self.want, generator)

    def labels(self, step: int) -> np.ndarray:
        """int64 [batch_size]"""
        return self.images.labels[[self.order.item(place) for place in self.places(step)]]


class ImageTask(Task):
    """A classifier on labelled pictures; the config's model is of kind "image".

    The number of classes follows the data unless `overrides` says it; a model that starts from a file has that file's
    sizes, and gets a new head where its own has another number of classes.
    """

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        if not config.data.path:
            raise ValueError("no pictures to train on: give data.path, for example --set data.path=digits")
        train, self.held_out = open_images(config.data.path, 0, config.data.validation_share, config.seed)
        self.model = self.trained = starting_classifier(config, train)
        sizes = self.model.config
        if sizes.in_channels != train.channels:
            train, self.held_out = (
                Images(p.sources, p.labels, p.classes, sizes.in_channels) for p in (train, self.held_out)
            )
        self.want = named_input(config.data.normalise, sizes.image_size, sizes.in_channels, config.data.crop)
        self.reader = ImageReader(config, train, self.want)
        self.dtype = getattr(torch, config.dtype)

    def batch(self, step: int) -> Batch:
        self.step, config = step, self.config
        images = self.want.normalised(self.reader.pixels(step))
        labels = torch.from_numpy(self.reader.labels(step))
        targets = one_hot(labels, self.model.config.num_classes).to(torch.float32)
        targets = targets * (1 - config.smoothing) + config.smoothing / targets.shape[1]
        generator = np.random.Generator(np.random.Philox(key=config.seed + (3 << 32), counter=step))
        return config.augment.blend(images, targets, generator)

    def tokens(self, batch: Batch) -> int:
        return len(batch[0]) * self.model.config.grid**2

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        images, targets = batch
        self.model.train()
        with torch.random.fork_rng():  # stochastic depth is a function of the step, so that a resumed run is exact
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            logits = self.model(images.to(self.model.pos_embed.dtype)).float()
        right = (logits.argmax(-1) == targets.argmax(-1)).float().mean()
        return {"loss": cross_entropy(logits, targets), "accuracy": right.detach()}

    def split(self, batch: Batch, parts: int) -> list[tuple[Batch, float]]:
        images, targets = batch
        if len(images) % parts:
            raise ValueError(f"{len(images)} pictures (batch_size) cannot be divided among {parts} parts")
        return [(pair, 1 / parts) for pair in zip(images.chunk(parts), targets.chunk(parts))]

    def validate(self) -> dict[str, float]:
        """Loss and accuracy on the pictures that were held out."""
        self.model.eval()
        loss = right = 0.0
        with torch.no_grad():
            for pixels, labels in labelled_batches(self.held_out, self.want, self.config.batch_size):
                logits = self.model(pixels.to(self.model.pos_embed)).float().cpu()
                loss += float(cross_entropy(logits, labels, reduction="sum"))
                right += float((logits.argmax(-1) == labels).sum())
        count = len(self.held_out)
        print(f"held-out accuracy {right / count:.2%}", file=sys.stderr)
        return {"validation_loss": loss / count, "validation_accuracy": right / count}

    def export(self, out: Path) -> None:
        """model.safetensors, which says the names of its classes and how it wants its pictures."""
        names = {"classes": json.dumps(self.held_out.classes, ensure_ascii=False)}
        save_model(self.model, out / "model.safetensors", metadata=names | self.want.metadata())


def starting_classifier(config: ImageConfig, images: Images) -> VisionRWKV:
    """The model before the first step, in float32; ValueError where the config names another kind of model."""
    classes = len(images.classes)
    if config.initial:
        model = load(config.initial, dtype=torch.float32)
    else:
        if find(config.model)[0].kind != "image":
            raise ValueError(f"{config.model!r} is no classifier of images; vision-rwkv is")
        known = {"num_classes": classes, "in_channels": images.channels}
        model = create_model(config.model, seed=config.seed, **{**known, **config.overrides})
    if not isinstance(model, VisionRWKV):
        raise ValueError(f"{config.initial!r} is no classifier of images; vision-rwkv is")
    if config.initial and model.config.num_classes != classes:
        model.reset_classifier(classes, config.seed)
    if model.config.num_classes < classes:
        raise ValueError(f"the pictures are of {classes} classes, the model knows {model.config.num_classes}")
    return model
