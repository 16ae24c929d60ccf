"""Masked autoencoding with Vision-RWKV (arXiv 2403.02308, appendix; arXiv 2111.06377): learning from pictures alone.

The encoder sees a fourth of the patches, a small decoder puts the others back. Two things differ from the released
code, which adds the positions twice and gives the encoder its patches in random order: here positions are added once,
and the patches that are kept stay in the order of the image, so that distances mean something.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rookery.families.vision_rwkv import VisionRWKVConfig, create
from rookery.models.vision import Block, Kept, VisionRWKV, initial_vectors
from rookery.nn.initial import normal_
from rookery.nn.rwkv import set_vectors


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """How much is hidden, and the decoder."""

    hidden_share: float = 0.75
    """Part of the patches that the encoder does not see."""
    decoder_size: int = 512
    """Width of the decoder."""
    decoder_layers: int = 8
    """Its blocks."""

    def __post_init__(self) -> None:
        if not 0 < self.hidden_share < 1 or self.decoder_size < 1 or self.decoder_layers < 1:
            raise ValueError(
                "hidden_share must lie between 0 and 1, decoder_size and decoder_layers be at least 1; got "
                f"{self.hidden_share}, {self.decoder_size}, {self.decoder_layers}"
            )


class MaskedAutoencoder(nn.Module):
    """`loss, predicted, hidden = model(images, generator)`; `model.encoder` is what is kept afterwards."""

    def __init__(self, encoder: VisionRWKV, config: MaskedConfig) -> None:
        """ValueError for the seventh variant, whose scans need every token of the grid."""
        super().__init__()
        if encoder.config.variant == "v7":
            raise ValueError("masked autoencoding needs Vision-RWKV v4 or v6: v7 goes through whole rows and columns")
        self.config, sizes = config, encoder.config
        self.encoder = encoder
        width = config.decoder_size
        self.sizes: VisionRWKVConfig = replace(
            create(hidden_size=width, variant=sizes.variant, num_hidden_layers=config.decoder_layers),
            **{name: getattr(sizes, name) for name in ("image_size", "patch_size", "in_channels", "shift")},
            post_norm=True,
            layer_scale=1e-5,
            key_norm=True,
        )
        self.decoder_embed = nn.Linear(sizes.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, sizes.grid**2, width))
        self.decoder = nn.ModuleList(Block(self.sizes, i) for i in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, sizes.patch_size**2 * sizes.in_channels)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error on the hidden patches; the prediction [b, t, pixels of a patch]; which are hidden [b, t].

        Images must have the size of the encoder's positions. Pixels of each patch are normalised by their own mean and
        deviation. `generator` draws what is hidden.
        """
        size = self.encoder.config.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(f"masked autoencoding reads images of {size} × {size}, got {list(images.shape)}")
        x, grid = self.encoder.embed(images)
        kept = self.choose(len(x), x.shape[1], generator).to(x.device)
        encoded = self.encode(x, grid, kept)
        hidden = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, kept, False)
        predicted = self.decode(encoded, grid, kept)
        error = (predicted - self.targets(images)).square().mean(-1)
        return (error * hidden).sum() / hidden.sum(), predicted, hidden

    def choose(self, batch: int, tokens: int, generator: torch.Generator | None) -> Tensor:
        """Numbers of the patches that the encoder sees, rising: int64 [b, n], n at least 1."""
        count = max(1, round(tokens * (1 - self.config.hidden_share)))
        return torch.rand(batch, tokens, generator=generator).argsort(1)[:, :count].sort(1).values

    def encode(self, x: Tensor, grid: tuple[int, int], kept: Tensor) -> Tensor:
        """The last norm's output for the patches seen [b, n, c], of tokens [b, t, c] with their positions."""
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        for block in self.encoder.layers:
            x, _ = block(x, Kept(*grid, kept), None)
        return self.encoder.ln1(x)

    def decode(self, encoded: Tensor, grid: tuple[int, int], kept: Tensor) -> Tensor:
        """Normalised pixels of all patches [b, t, pixels]."""
        x = self.mask_token.expand(len(encoded), grid[0] * grid[1], -1)
        seen = self.decoder_embed(encoded)
        x = x.to(seen.dtype).scatter(1, kept[..., None].expand_as(seen), seen) + self.decoder_pos_embed
        for block in self.decoder:
            x, _ = block(x, grid, None)
        return self.predict(self.decoder_norm(x))

    def targets(self, images: Tensor) -> Tensor:
        """Pixels of each patch [b, t, pixels], of mean 0 and deviation 1."""
        patch = self.encoder.config.patch_size
        patches = nn.functional.unfold(images, patch, stride=patch).mT
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()

    def parameter_groups(
        self, *, weight_decay: float = 0.05, layer_decay: float = 1.0, decay_vectors: bool = False
    ) -> list[dict]:
        """The encoder's groups, and the decoder's matrices and vectors."""
        own = [p for name, p in self.named_parameters() if not name.startswith("encoder.") and p.requires_grad]
        matrices = [p for p in own if p.squeeze().dim() == 2 and p is not self.decoder_pos_embed]
        known = {id(p) for p in matrices}
        groups = self.encoder.parameter_groups(
            weight_decay=weight_decay, layer_decay=layer_decay, decay_vectors=decay_vectors
        )
        vectors = [p for p in own if id(p) not in known]
        return [
            *groups,
            {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
            {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
        ]

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """The decoder as an encoder; its positions and what stands for hidden patches N(0, 0.02)."""
        generator = torch.Generator().manual_seed(seed)
        for layer, block in enumerate(self.decoder):
            set_vectors(block, initial_vectors(self.sizes, layer))
            block.gamma1.fill_(1e-5)
            block.gamma2.fill_(1e-5)
        for module in self.modules():
            if module is self.encoder or any(module is part for part in self.encoder.modules()):
                continue
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, nn.Linear):
                normal_(module.weight, 0.02, generator)
                if module.bias is not None:
                    module.bias.zero_()
        for name, parameter in self.named_parameters():
            if not name.startswith("encoder.") and ("_w1" in name or "_w2" in name):
                normal_(parameter, 1e-4, generator)
        normal_(self.mask_token, 0.02, generator)
        normal_(self.decoder_pos_embed, 0.02, generator)
