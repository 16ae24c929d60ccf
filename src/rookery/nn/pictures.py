"""What models of images begin with: the check of what they are given, whole patches, positions for any size."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

# b batch, c channels, t tokens; a grid is (rows, columns) of tokens

Grid = tuple[int, int]


def check_images(images: Tensor, channels: int, floats: str, how: str) -> None:
    """ValueError unless `images` are floats [b, channels, height, width] of a pixel or more.

    `floats` says which floats are meant, `how` what makes bytes into them.
    """
    if images.dim() != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
        raise ValueError(
            f"images must be [batch, {channels}, height, width] of at least one pixel, got {list(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be {floats}, got {images.dtype}; {how}")


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """`images` [b, c, height, width] with zeros on the right and below, so that patches cover them."""
    return pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))


def resized(positions: Tensor, learned: int, grid: Grid) -> Tensor:
    """Positions [1, t, c], learned for a square of `learned` rows, for another grid (bicubic, float32 at least)."""
    if grid == (learned, learned):
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    square = wide.mT.unflatten(2, (learned, learned))
    return interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).mT.to(positions.dtype)
