"""Changes to pictures in training, all of them drawn from a generator that is given."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rookery.data.images import pillow, resized

if TYPE_CHECKING:
    from torch import Tensor

    from rookery.data.image_input import ImageInput


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How pictures are changed before they are learned from."""

    area: float = 1.0
    """Smallest share of a picture's area that is cut out of it and resized; 1 keeps it whole."""
    stretch: float = 4 / 3
    """Largest ratio of the sides of such a part, relative to the model's square."""
    move: int = 0
    """Pixels by which a picture is moved at most, on zeros."""
    flip: bool = False
    """Whether half of the pictures are mirrored."""
    operations: int = 0
    """Random changes of shape, colour and contrast one after the other (RandAugment, arXiv 1909.13719)."""
    magnitude: float = 9.0
    """How strong they are, of 10."""
    erase: float = 0.0
    """Chance that a rectangle of 2 to 33% of the area is replaced by noise (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Parameter of the Beta distribution by which two pictures are averaged (arXiv 1710.09412); 0 for never."""
    cutmix: float = 0.0
    """The same for a rectangle that comes from another picture (arXiv 1905.04899). With both, either one or the other.
    """

    def __post_init__(self) -> None:
        if not 0 < self.area <= 1 or self.stretch < 1 or not 0 <= self.erase <= 1:
            raise ValueError(
                f"augment.area must lie in (0, 1], stretch be at least 1 and erase a chance; got {self.area}, "
                f"{self.stretch}, {self.erase}"
            )
        if min(self.move, self.operations, self.mixup, self.cutmix) < 0:
            raise ValueError("augment.move, operations, mixup and cutmix must be 0 or more")

    def picture(self, pixels: np.ndarray, want: "ImageInput", generator: np.random.Generator) -> np.ndarray:
        """One picture, uint8 [h, w, channels], changed: uint8 [size, size, channels]."""
        pixels = part_of(pixels, self, want.size, generator) if self.area < 1 else want.prepare(pixels)
        if self.flip and generator.random() < 0.5:
            pixels = pixels[:, ::-1]
        if self.move:
            pixels = moved(pixels, *generator.integers(-self.move, self.move + 1, 2))
        for _ in range(self.operations):
            pixels = changed(pixels, self.magnitude / 10, generator)
        if self.erase and generator.random() < self.erase:
            pixels = erased(pixels, generator)
        return pixels

    def blend(self, images: "Tensor", targets: "Tensor", generator: np.random.Generator) -> tuple["Tensor", "Tensor"]:
        """A batch [n, c, h, w] and its targets [n, classes], each mixed with that in reverse order."""
        kinds = [name for name in ("mixup", "cutmix") if getattr(self, name)]
        if not kinds:
            return images, targets
        kind = kinds[generator.integers(len(kinds))]
        share = float(generator.beta(getattr(self, kind), getattr(self, kind)))
        if kind == "mixup":
            images = share * images + (1 - share) * images.flip(0)
        else:
            top, left, bottom, right = rectangle(*images.shape[2:], 1 - share, 1.0, generator)
            images = images.clone()
            images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        return images, share * targets + (1 - share) * targets.flip(0)


def rectangle(
    height: int, width: int, area: float, stretch: float, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a random rectangle of about that share of the area."""
    ratio = float(np.exp(generator.uniform(-np.log(stretch), np.log(stretch)))) ** 0.5
    tall = int(np.clip(round(height * area**0.5 / ratio), 1, height))
    wide = int(np.clip(round(width * area**0.5 * ratio), 1, width))
    top, left = (int(generator.integers(room + 1)) for room in (height - tall, width - wide))
    return top, left, top + tall, left + wide


def part_of(pixels: np.ndarray, how: Augment, size: int, generator: np.random.Generator) -> np.ndarray:
    """A random part of the picture, resized (RandomResizedCrop, arXiv 1409.4842)."""
    top, left, bottom, right = rectangle(*pixels.shape[:2], generator.uniform(how.area, 1), how.stretch, generator)
    return resized(pixels[top:bottom, left:right], size, size)


def moved(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """The picture shifted, with zeros where nothing comes in."""
    height, width = pixels.shape[:2]
    result = np.zeros_like(pixels)
    if abs(down) >= height or abs(right) >= width:
        return result
    source = pixels[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    result[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = source
    return result


def erased(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The picture with noise in a rectangle."""
    top, left, bottom, right = rectangle(*pixels.shape[:2], generator.uniform(0.02, 1 / 3), 3.3, generator)
    result = pixels.copy()
    hole = result[top:bottom, left:right]
    hole[...] = generator.integers(0, 256, hole.shape, dtype=np.uint8)
    return result


def changed(pixels: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """One of RandAugment's operations, stronger for a `strength` nearer to 1, in either direction."""
    from PIL import ImageEnhance, ImageOps

    Image = pillow()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    amount = float(np.clip(generator.normal(strength, 0.05), 0, 1))
    sign = 1 if generator.random() < 0.5 else -1
    factor, side = 1 + sign * 0.9 * amount, image.width
    shear, offset = sign * 0.3 * amount, sign * 0.45 * amount * side

    def bent(*matrix: float) -> Any:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    operations = (
        lambda: image.rotate(sign * 30 * amount, Image.Resampling.BILINEAR),
        lambda: bent(1, shear, 0, 0, 1, 0),
        lambda: bent(1, 0, 0, shear, 1, 0),
        lambda: bent(1, 0, offset, 0, 1, 0),
        lambda: bent(1, 0, 0, 0, 1, offset),
        lambda: ImageEnhance.Brightness(image).enhance(factor),
        lambda: ImageEnhance.Contrast(image).enhance(factor),
        lambda: ImageEnhance.Sharpness(image).enhance(factor),
        lambda: ImageEnhance.Color(image).enhance(factor),
        lambda: ImageOps.posterize(image, 8 - round(4 * amount)),
        lambda: ImageOps.solarize(image, 256 - round(255 * amount)),
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: ImageOps.invert(image),
    )
    result = np.asarray(operations[generator.integers(len(operations))]())
    return result[..., None] if result.ndim == 2 else result
