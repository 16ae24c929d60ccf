"""From pixels to what a model reads: resizing, cropping, normalisation."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.data.images import Images, resized

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's red, green and blue, in 0 to 1."""
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Those of CLIP's training pictures."""


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """How a model wants its pictures."""

    size: int = 224
    """Height and width in pixels."""
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET[0]
    """Subtracted from values of 0 to 1, one number a channel."""
    deviation: tuple[float, ...] = IMAGENET[1]
    """What they are divided by then."""
    crop: float = 0.875
    """Share of the shorter side that is kept, from the middle: 224 of 256."""

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [h, w, channels] of any size to [size, size, channels]: the shorter side resized, the middle kept."""
        if pixels.shape[:2] == (self.size, self.size):
            return pixels
        short = max(self.size, round(self.size / self.crop))
        scale = short / min(pixels.shape[:2])
        # whole pictures of extreme shapes would be too long when resized: only what can be kept is
        height, width = pixels.shape[:2]
        across = int(np.ceil(short / scale)) + 2
        if max(height, width) > across:
            top, left = max(0, (height - across) // 2), max(0, (width - across) // 2)
            pixels = pixels[top : top + across, left : left + across]
        sides = [max(self.size, round(side * scale)) for side in pixels.shape[:2]]
        pixels = resized(pixels, *sides)
        top, left = ((side - self.size) // 2 for side in pixels.shape[:2])
        return pixels[top : top + self.size, left : left + self.size]

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """uint8 [n, h, w, channels] as float32 [n, channels, h, w]."""
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (self.mean, self.deviation))
        values = torch.from_numpy(np.array(pixels)).movedim(3, 1).to(torch.float32)
        return (values / 255 - mean) / deviation

    def metadata(self) -> dict[str, str]:
        """What a model file says of it."""
        return {"image_input": json.dumps(vars(self))}


def labelled_batches(images: Images, want: ImageInput, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures in their order, as they are judged: float32 [n, channels, h, w] and labels [n], n up to `size`."""
    for start in range(0, len(images), size):
        places = range(start, min(start + size, len(images)))
        pixels = np.stack([want.prepare(images[i]) for i in places])
        yield want.normalised(pixels), torch.from_numpy(images.labels[start : places.stop])


def image_input(config: Any, metadata: Mapping[str, str]) -> ImageInput:
    """What a model of this config, from a file with this metadata, wants: the file's word, else ImageNet's figures."""
    if "image_input" in metadata:
        kept = json.loads(metadata["image_input"])
        return ImageInput(**{name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()})
    if config.in_channels == 3:
        return ImageInput(size=config.image_size)
    return plain_input(config.image_size, config.in_channels)


def named_input(name: str, size: int, channels: int, crop: float = 1.0) -> ImageInput:
    """Values of −1 to 1 ("plain"), or by the figures of "imagenet" or "clip", which are for 3 channels."""
    if name == "plain":
        half = (0.5,) * channels
        return ImageInput(size=size, channels=channels, mean=half, deviation=half, crop=crop)
    if channels != 3:
        raise ValueError(f"data.normalise={name!r} is for pictures of 3 channels, the model has {channels}")
    mean, deviation = {"imagenet": IMAGENET, "clip": CLIP}[name]
    return ImageInput(size=size, mean=mean, deviation=deviation, crop=crop)


def plain_input(size: int, channels: int) -> ImageInput:
    """Values of −1 to 1, nothing cut off but what makes a square."""
    return named_input("plain", size, channels)
