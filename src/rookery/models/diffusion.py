"""Diffusion-RWKV (arXiv 2404.04478) in the paper's order: patches, noise level and label, block, head, model.

Parameters have the names and shapes of the authors' model (feizc/Diffusion-RWKV). The mixers are Vision-RWKV's; what
this file adds is what a diffusion model puts around them, for other families, too.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from rookery.families.diffusion import FAMILY, TIME_FEATURES, DiffusionConfig, DiffusionRWKVConfig
from rookery.models.rwkv7 import MATRIX_GAIN
from rookery.models.vision import SPATIAL_MIXES, ChannelMix, initial_vectors
from rookery.nn.initial import normal_, uniform_
from rookery.nn.pictures import Grid, check_images, resized, whole_patches
from rookery.nn.rwkv import set_matrices, set_vectors
from rookery.state import fingerprint_of

# b batch, t tokens, c width; a grid is (rows, columns) of tokens

ATTENTION_GAIN = {n: g for n, g in MATRIX_GAIN.items() if n.startswith("att.")} | {"att.output.weight": 1.0}
"""As RWKV-7's, but outputs do not begin at zero: the gates do, and behind two zeros nothing would ever be learned."""


def level_features(level: Tensor) -> Tensor:
    """Cosines, then sines, of noise levels [b] at 128 frequencies from 1 to nearly 1/10000: [b, 256]."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=level.device, dtype=torch.float64))
    angles = level.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(width: int, grid: Grid) -> Tensor:
    """Positions [rows · columns, width]: half of the channels for the column, half for the row; sines, then cosines."""
    quarter = width // 4
    frequencies = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Tokens [b, t, patch · patch · channels] of images [b, channels, h, w] whose sides are multiples of `patch`."""
    parts = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # b channels rows p columns q
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """Undoes `patchify`."""
    parts = tokens.unflatten(1, grid).unflatten(3, (patch, patch, -1))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, for x [b, t, c] and vectors [b, c]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def ada_ln(width: int, parts: int) -> nn.Sequential:
    """What makes shifts, scales and gates out of the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """Spatial mix and channel mix, shifted, scaled and gated by noise level and condition (adaLN-Zero)."""

    def __init__(self, config: Any, layer: int, *, reads_skip: bool = False, first_norm: bool = False) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.drop_path = getattr(config, "drop_path", 0.0) * layer / config.num_hidden_layers
        if first_norm:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.att = self.mixer(config, layer)
        self.ffn = ChannelMix(config)
        self.adaLN_modulation = ada_ln(width, 6)
        if reads_skip:
            self.skip_linear = nn.Linear(2 * width, width)

    @staticmethod
    def mixer(config: Any, layer: int) -> nn.Module:
        return SPATIAL_MIXES[config.variant](config, layer)

    def forward(
        self, x: Tensor, grid: Grid, c: Tensor, v_first: Tensor | None, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Residual stream [b, t, c] after the block and the values for RWKV-7's value residual; c [b, c]."""
        x = self.enter(x, skip)
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x, v_first = self.attend(x, grid, parts, v_first)
        return self.feed(x, grid, parts), v_first

    def enter(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The stream with what an earlier block wrote, and normed in the first block."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return self.ln0(x) if hasattr(self, "ln0") else x

    def attend(
        self, x: Tensor, grid: Grid, parts: tuple[Tensor, ...], v_first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        mixed, v_first = self.att(modulate(self.ln1(x), *parts[:2]), grid, v_first)
        return x + self.drop(parts[2][:, None] * mixed), v_first

    def feed(self, x: Tensor, grid: Grid, parts: tuple[Tensor, ...]) -> Tensor:
        return x + self.drop(parts[5][:, None] * self.ffn(modulate(self.ln2(x), *parts[3:5]), grid))

    def drop(self, mixed: Tensor) -> Tensor:
        """Leaves the mixer out of some training samples (stochastic depth)."""
        if not self.training or not self.drop_path:
            return mixed
        kept = torch.rand(len(mixed), 1, 1, device=mixed.device) >= self.drop_path
        return mixed * (kept / (1 - self.drop_path)).to(mixed)


class FinalLayer(nn.Module):
    """From the stream to numbers of pixels, modulated once more."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = ada_ln(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        normed = layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(modulate(normed, *self.adaLN_modulation(c).chunk(2, dim=1)))


class LevelEmbed(nn.Module):
    """A noise level as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        return self.mlp(level_features(level).to(self.mlp[0].weight))


class DiffusionModel(nn.Module):
    """What diffusion models share: `predicted = model(images, level, condition)`.

    `images` [b, channels, height, width] of any size, with noise; `level` [b] from 0 to noise_steps − 1, fractions
    allowed. `predicted` has the images' size, what it is says `config.prediction`; the channels of a learned variance
    come last. Sides that are no multiple of the patch are filled up with zeros, right and below, and cut off again.
    A family defines `run` and `null`.
    """

    family: str

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(config.in_channels, width, patch, patch)
        self.time_embed = LevelEmbed(width)
        self.norm_f = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.final_layer = FinalLayer(config)

    def forward(self, images: Tensor, level: Tensor, condition: Any = None) -> Tensor:
        """Predicted [b, out channels, height, width]; no condition is the null condition."""
        x, grid = self.embed(images)
        if level.shape != (len(images),):
            raise ValueError(f"level must be [batch] = [{len(images)}], got {list(level.shape)}")
        c = self.time_embed(level)
        x, c = self.run(x, grid, c, self.null(len(images)) if condition is None else condition)
        tokens = self.final_layer(self.norm_f(x), c)
        return unpatchify(tokens, grid, self.config.patch_size)[..., : images.shape[2], : images.shape[3]]

    def run(self, x: Tensor, grid: Grid, c: Tensor, condition: Any) -> tuple[Tensor, Tensor]:
        """Stream after the blocks, and the noise level with the condition in it."""
        raise NotImplementedError

    def null(self, batch: int) -> Any:
        """The condition of `batch` images that says nothing."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens [b, t, c] with their positions, and their grid."""
        check_images(images, self.config.in_channels, "floats from −1 to 1", "scale bytes by x / 127.5 − 1")
        x = self.patch_embed.proj(whole_patches(images, self.config.patch_size))
        grid = (x.shape[2], x.shape[3])
        return x.flatten(2).mT + self.positions(grid), grid

    def positions(self, grid: Grid) -> Tensor:
        """The learned positions [1, t, c], resized (bicubic, float32) where the grid is another."""
        return resized(self.pos_embed, self.config.grid, grid)

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype and device."""
        return self.norm_f.weight

    def fingerprint(self) -> str:
        """Names these weights (see `rookery.checkpoints.state_file.fingerprint`)."""
        return fingerprint_of(self.family, self.config, self.patch_embed.proj.weight, self.norm_f.weight)

    def init_shared(self, blocks: list[nn.Module], generator: torch.Generator) -> None:
        """The table of `DiffusionRWKV.init_weights`, for these blocks in their order."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, nn.Linear):
                xavier_(module.weight, generator)
                if module.bias is not None:
                    module.bias.zero_()
        positions = sincos_positions(self.config.hidden_size, (self.config.grid,) * 2)
        self.pos_embed.copy_(positions[None])
        xavier_(self.patch_embed.proj.weight, generator)
        self.patch_embed.proj.bias.zero_()
        for number in (0, 2):
            normal_(self.time_embed.mlp[number].weight, 0.02, generator)
        for layer, block in enumerate(blocks):
            vectors = initial_vectors(self.config, layer)
            set_vectors(block, {n: v for n, v in vectors.items() if n.startswith(("att.", "ffn."))})
            if self.config.variant == "v7":
                set_matrices(block, ATTENTION_GAIN, generator)
        for part in (*blocks, self.final_layer):
            part.adaLN_modulation[1].weight.zero_()
        self.final_layer.linear.weight.zero_()


def xavier_(weight: Tensor, generator: torch.Generator) -> None:
    """Fills from U(±√(6 / (inputs + outputs))), a convolution taken as the matrix that it is on patches."""
    uniform_(weight, math.sqrt(6 / (weight.shape[0] + math.prod(weight.shape[1:]))), generator)


class DiffusionRWKV(DiffusionModel):
    """Diffusion-RWKV: the condition is a label for each image, int [b]; `config.num_classes` is the null label.

    Blocks of the second half also read what those of the first half wrote, the last what the first did.
    """

    family = FAMILY.name

    def __init__(self, config: DiffusionRWKVConfig) -> None:
        super().__init__(config)
        half = config.num_hidden_layers // 2
        self.in_blocks = nn.ModuleList(Block(config, i, first_norm=i == 0) for i in range(half))
        self.mid_block = Block(config, half, first_norm=half == 0)
        self.out_blocks = nn.ModuleList(Block(config, half + 1 + i, reads_skip=True) for i in range(half))
        if config.num_classes:
            self.label_emb = nn.Module()
            self.label_emb.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def run(self, x: Tensor, grid: Grid, c: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.num_classes:
            self.check_labels(condition, len(x))
            c = c + self.label_emb.embedding_table(condition)
        v_first, skips = None, []
        for block in self.in_blocks:
            x, v_first = block(x, grid, c, v_first)
            skips.append(x)
        x, v_first = self.mid_block(x, grid, c, v_first)
        for block in self.out_blocks:
            x, v_first = block(x, grid, c, v_first, skips.pop())
        return x, c

    def null(self, batch: int) -> Tensor:
        return torch.full((batch,), self.config.num_classes, device=self.pos_embed.device)

    def check_labels(self, labels: Tensor, batch: int) -> None:
        classes = self.config.num_classes
        if labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(f"labels must be whole numbers [{batch}], got {labels.dtype} {list(labels.shape)}")
        if batch and (int(labels.min()) < 0 or int(labels.max()) > classes):
            raise ValueError(f"labels go from 0 to {classes - 1} ({classes} for none), got {labels.tolist()}")

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (vision.md 4.2); the same for the same seed.

        | parameter | value |
        |---|---|
        | matrices, patches | U(±√(6 / (inputs + outputs))) |
        | `time_embed`, labels | N(0, 0.02) |
        | `adaLN_modulation`, `final_layer.linear`, biases | 0 |
        | positions | sines and cosines in two dimensions |
        | vectors of the mixers | as in Vision-RWKV |
        | matrices of RWKV-7's mixer | as in RWKV-7, but for `output`: orthogonal |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_shared([*self.in_blocks, self.mid_block, *self.out_blocks], generator)
        if self.config.num_classes:
            normal_(self.label_emb.embedding_table.weight, 0.02, generator)
