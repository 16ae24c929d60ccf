"""Feature maps at four resolutions out of a plain encoder, for detection and segmentation heads."""

from torch import Tensor, nn
from torch.nn.functional import max_pool2d


class Pyramid(nn.Module):
    """Four maps from four equal ones: at a fourth, a half, once and twice the stride of the encoder's patches.

    The simple pyramid of ViTDet (arXiv 2203.16527): two transposed convolutions, one, none, and a pool. `width` is the
    channels of the maps, `out` those of the results.
    """

    def __init__(self, width: int, out: int = 256) -> None:
        super().__init__()
        half = max(1, width // 2)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, 2),
                    nn.GroupNorm(1, width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, half, 2, 2),
                    nn.Conv2d(half, out, 1),
                ),
                nn.Sequential(nn.ConvTranspose2d(width, half, 2, 2), nn.Conv2d(half, out, 1)),
                nn.Conv2d(width, out, 1),
                nn.Conv2d(width, out, 1),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [b, width, h, w], the shallowest first, to [b, out, 4h, 4w] … [b, out, ⌈h / 2⌉, ⌈w / 2⌉]."""
        if len(maps) != len(self.levels):
            raise ValueError(f"a pyramid takes {len(self.levels)} maps, there are {len(maps)}")
        *finer, coarsest = maps
        pooled = max_pool2d(coarsest, 2, 2, ceil_mode=True)
        return [level(x) for level, x in zip(self.levels, [*finer, pooled], strict=True)]
