"""A vision transformer out of the library's transformer: the baseline of the models of images, for comparisons.

Patches, learned positions, the blocks of `rookery.models.transformer` with every token seeing all others, the average
of the last norm's outputs, a linear head (arXiv 2010.11929, without the class token). It is not registered: nobody
publishes files of this shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rookery.families.transformer import create
from rookery.models.transformer import Block, KeyValues, Place
from rookery.nn.initial import normal_, uniform_
from rookery.nn.pictures import resized, whole_patches


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """Sizes of one vision transformer."""

    num_classes: int = 1000
    """Outputs of the head; 0 for a model of features alone."""
    image_size: int = 224
    """Height and width for which positions are learned; other sizes resize them."""
    patch_size: int = 16
    """Pixels of a token's side."""
    in_channels: int = 3
    """Numbers of a pixel."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks."""
    num_attention_heads: int = 3
    """Heads of the attention."""
    intermediate_size: int = 576
    """Hidden units of the gated MLP: with three widths a block has as many weights as one of Vision-RWKV."""

    @property
    def grid(self) -> int:
        """Tokens along a side of an image of `image_size`."""
        return self.image_size // self.patch_size


class VisionTransformer(nn.Module):
    """`logits = model(images)` for images [b, channels, height, width] of any size; features without classes."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        sizes = create(
            vocab_size=1,
            hidden_size=width,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            is_causal=False,
            rope_theta=None,
        )
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, patch)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps=sizes.rms_norm_eps)
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, classes]; features [b, c] of a model without classes."""
        x = self.patch_embed(whole_patches(images, self.config.patch_size))
        x = x.flatten(2).mT + resized(self.pos_embed, self.config.grid, (x.shape[2], x.shape[3]))
        place = Place(torch.empty(0), x.shape[1], True, None)
        for block in self.layers:
            heads = block.self_attn.heads(x[:, :0])
            x, _ = block(x, KeyValues(heads, heads), place)
        return self.head(self.norm(x).mean(1))

    def parameter_groups(self, *, weight_decay: float = 0.05) -> list[dict]:
        """Matrices decay; norms, biases and positions do not."""
        decays = [p for p in self.parameters() if p.dim() > 1 and p is not self.pos_embed]
        rest = [p for p in self.parameters() if p.dim() <= 1 or p is self.pos_embed]
        return [
            {"params": decays, "weight_decay": weight_decay, "lr_scale": 1.0},
            {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0},
        ]

    @torch.no_grad()
    def init_weights(self, seed: int = 0, positions: float = 0.02) -> None:
        """Matrices N(0, 0.02), outputs of blocks by 1 / √(2 · layers) less, patches U(±1 / √inputs),
        positions N(0, `positions`), biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.startswith("patch_embed"):
                uniform_(parameter, (self.config.in_channels * self.config.patch_size**2) ** -0.5, generator)
            elif name == "pos_embed":
                normal_(parameter, positions, generator)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1)
            else:
                normal_(
                    parameter, residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02, generator
                )
