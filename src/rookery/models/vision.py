"""Vision-RWKV (arXiv 2403.02308) in the paper's order: shift, spatial mix, channel mix, block, model.

Parameters have the names and shapes of the published files (OpenGVLab/Vision-RWKV, Apache-2.0), without their
`backbone.`. The variants differ in the spatial mix alone: v4 averages over all tokens, v6 reads a matrix from both
directions, and v7, which has no official definition, is RWKV-7's time mix whose blocks go through the image in turns.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from rookery.families.vision_rwkv import FAMILY, VisionRWKVConfig
from rookery.models.rwkv5 import head_norm, initial_decay_and_bonus
from rookery.models.rwkv7 import MATRIX_GAIN, TimeMix, initial_2025_05
from rookery.nn.grid import ORDERS, q_shift, scan, shift, unscan
from rookery.nn.initial import normal_, uniform_
from rookery.nn.pictures import check_images, resized, whole_patches
from rookery.nn.rwkv import place, set_matrices, set_vectors
from rookery.ops.bi_wkv import bi_wkv
from rookery.ops.bi_wkv6 import bi_wkv6
from rookery.ops.relu_squared import relu_squared
from rookery.state import fingerprint_of

# b batch, t tokens, c width, h heads, n channels of a head; a grid is (rows, columns) of tokens


class Kept(NamedTuple):
    """A grid of which only some tokens are there, as in masked autoencoding."""

    rows: int
    columns: int
    places: Tensor
    """Numbers of those that are there, rising: int64 [b, t]."""


Grid = tuple[int, int] | Kept


def neighbours(x: Tensor, grid: Grid, config: VisionRWKVConfig) -> Tensor:
    """What each token [b, t, c] is mixed with (eq. 3-4); zeros for tokens that are not there."""
    if config.shift == "q" and isinstance(grid, Kept):
        index = grid.places[..., None].expand_as(x)
        whole = x.new_zeros(len(x), grid.rows * grid.columns, x.shape[2]).scatter(1, index, x)
        return q_shift(whole, (grid.rows, grid.columns), heads=config.num_heads).gather(1, index)
    if config.shift == "q":
        return q_shift(x, grid, heads=config.num_heads)
    return shift(x) if config.shift == "1d" else x


def vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width))


class SpatialMix4(nn.Module):
    """Averages over all tokens, per channel and with a decay by distance, gated (eq. 5-10)."""

    def __init__(self, config: VisionRWKVConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.spatial_decay = nn.Parameter(torch.empty(width))
        self.spatial_first = nn.Parameter(torch.empty(width))
        for name in "kvr":
            setattr(self, f"spatial_mix_{name}", vector(width))
        for name in ("key", "value", "receptance", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        if config.key_norm:
            self.key_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, grid: Grid, v_first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        near = neighbours(x, grid, self.config)
        xk, xv, xr = (near.lerp(x, getattr(self, f"spatial_mix_{name}")) for name in "kvr")
        # divided by the number of tokens, the largest exponent is that of the parameter, whatever the resolution
        wide = torch.promote_types(x.dtype, torch.float32)
        omega, mu = (parameter.to(wide) / x.shape[1] for parameter in (self.spatial_decay, self.spatial_first))
        y = bi_wkv(omega=omega, mu=mu, k=self.key(xk), v=self.value(xv), compat=self.config.compat)
        if self.config.key_norm:
            y = self.key_norm(y)
        return self.output(self.receptance(xr).sigmoid() * y), v_first


class SpatialMix6(nn.Module):
    """RWKV-6's matrix per head, read and written in both directions."""

    def __init__(self, config: VisionRWKVConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        for name in "xwkvrg":
            setattr(self, f"time_maa_{name}", vector(width))
        self.time_maa_w1 = nn.Parameter(torch.empty(width, 5 * config.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.mix_rank, width))
        self.time_decay = vector(width)
        self.time_decay_w1 = nn.Parameter(torch.empty(width, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, width))
        self.time_faaaa = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        for name in ("receptance", "key", "value", "gate", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        if config.key_norm:
            self.key_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ln_x = nn.GroupNorm(config.num_heads, width, eps=config.group_norm_eps)

    def forward(self, x: Tensor, grid: Grid, v_first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.attend(x, neighbours(x, grid, self.config)), v_first

    def attend(self, x: Tensor, near: Tensor, real: Tensor | None = None) -> Tensor:
        """What follows the shift, which gave `near` [b, t, c]; where `real` [b, t] is false, tokens write nothing."""
        step = near - x
        inner = ((x + step * self.time_maa_x) @ self.time_maa_w1).tanh().unflatten(-1, (5, -1))
        moved = torch.einsum("btsq,sqc->sbtc", inner, self.time_maa_w2)
        xw, xk, xv, xr, xg = (x + step * (getattr(self, f"time_maa_{n}") + m) for n, m in zip("wkvrg", moved))
        # float32: the decay is exponentiated twice; see rwkv6.TimeMix for the bound
        wide = torch.promote_types(x.dtype, torch.float32)
        raw = (self.time_decay + (xw @ self.time_decay_w1).tanh() @ self.time_decay_w2).to(wide)
        parts = self.receptance(xr), -raw.clamp(max=80).exp(), self.key(xk), self.value(xv)
        r, log_w, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in parts)
        if real is not None:
            log_w, k, v = (part * real[..., None, None].to(part.dtype) for part in (log_w, k, v))
        y = bi_wkv6(r=r, log_w=log_w, k=k, v=v, u=self.time_faaaa)
        if self.config.key_norm:
            y = self.key_norm(y.flatten(2)).view_as(y)
        return self.output(head_norm(self.ln_x, y) * silu(self.gate(xg)))


class SpatialMix7(TimeMix):
    """RWKV-7's time mix on the neighbours in the image, in an order that changes from block to block."""

    def __init__(self, config: VisionRWKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.order = ORDERS[layer % len(ORDERS)]
        if config.key_norm:
            self.key_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, grid: Grid, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        near = neighbours(x, grid, self.config)
        mixed = [scan(x.lerp(near, mix), self.order, grid) for mix in self.mixes()]
        first = None if v_first is None else scan(v_first, self.order, grid)
        y, _, first = self.attend(torch.stack(mixed), None, first)
        y = unscan(y, self.order, grid)
        return self.key_norm(y) if self.config.key_norm else y, unscan(first, self.order, grid)


SPATIAL_MIXES = {"v4": SpatialMix4, "v6": SpatialMix6, "v7": SpatialMix7}


class ChannelMix(nn.Module):
    """A ReLU² MLP on tokens mixed with their neighbours, gated by a sigmoid (eq. 11)."""

    def __init__(self, config: VisionRWKVConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.intermediate_size
        self.spatial_mix_k, self.spatial_mix_r = vector(width), vector(width)
        self.key = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        if config.key_norm:
            self.key_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        near = neighbours(x, grid, self.config)
        k = relu_squared(x=self.key(near.lerp(x, self.spatial_mix_k)))
        if self.config.key_norm:
            k = self.key_norm(k)
        return self.receptance(near.lerp(x, self.spatial_mix_r)).sigmoid() * self.value(k)


class Block(nn.Module):
    """Spatial mix and channel mix, each with a norm before or after it and, if configured, a factor per channel."""

    def __init__(self, config: VisionRWKVConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.post_norm = config.post_norm
        self.drop_path = config.drop_path * layer / max(1, config.num_hidden_layers - 1)
        if config.layer_scale is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.empty(width)) for _ in range(2))
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.att = SPATIAL_MIXES[config.variant](config, layer)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, grid: Grid, v_first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        mixed, v_first = self.att(x if self.post_norm else self.ln1(x), grid, v_first)
        x = x + self.finish(mixed, 1)
        return x + self.finish(self.ffn(x if self.post_norm else self.ln2(x), grid), 2), v_first

    def finish(self, mixed: Tensor, part: int) -> Tensor:
        """Norm (after the mixer), then factor, then stochastic depth, in this order."""
        if self.post_norm:
            mixed = getattr(self, f"ln{part}")(mixed)
        if hasattr(self, "gamma1"):
            mixed = mixed * getattr(self, f"gamma{part}")
        if not self.training or not self.drop_path:
            return mixed
        kept = torch.rand(len(mixed), 1, 1, device=mixed.device) >= self.drop_path
        return mixed * (kept / (1 - self.drop_path)).to(mixed)


class VisionRWKV(nn.Module):
    """The model: `logits = model(images)` for images [b, channels, height, width] of any size."""

    family = FAMILY.name

    def __init__(self, config: VisionRWKVConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(config.in_channels, width, patch, patch)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.ln1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = self._new_head()
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, classes]; features [b, c] of a model without classes."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last norm's output [b, c, rows, columns], a cell for every patch."""
        return self.forward_intermediates(images, [len(self.layers) - 1])[0]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features [b, c, rows, columns]; with `pre_logits`, or without classes, their average [b, c]."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """The residual stream [b, c, rows, columns] after each of these blocks, counted from 0; the last is normed."""
        x, grid = self.embed(images)
        found, v_first = {}, None
        for i, block in enumerate(self.layers):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, v_first = checkpoint(block, x, grid, v_first, use_reentrant=False)
            else:
                x, v_first = block(x, grid, v_first)
            if i in layers:
                found[i] = self.ln1(x) if i == len(self.layers) - 1 else x
        if missing := [i for i in layers if i not in found]:
            raise ValueError(f"there is no block {missing[0]}; the model has 0 to {len(self.layers) - 1}")
        return [found[i].mT.unflatten(2, grid) for i in layers]

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens [b, t, c] with their positions, and their grid. Images are filled up with zeros, right and below."""
        check_images(images, self.config.in_channels, "normalised floats", "divide bytes by 255 and normalise")
        x = self.patch_embed.projection(whole_patches(images, self.config.patch_size))
        grid = (x.shape[2], x.shape[3])
        return x.flatten(2).mT + self.positions(grid), grid

    def positions(self, grid: Grid) -> Tensor:
        """The learned positions [1, t, c], resized (bicubic, float32) where the grid is another."""
        return resized(self.pos_embed, self.config.grid, grid)

    @torch.no_grad()
    def set_input_size(self, image_size: int) -> None:
        """Positions for images of `image_size` pixels a side, resized from those there are; ValueError between patches.

        Any size works without this: it makes a resizing of every call a part of the weights, for training at that size.
        """
        config = replace(self.config, image_size=image_size)
        self.pos_embed = nn.Parameter(self.positions((config.grid, config.grid)).clone())
        self.config = config

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.no_grad()
    def reset_classifier(self, num_classes: int, seed: int = 0) -> None:
        """A new head for `num_classes`, 0 for none; all else stays as it is."""
        self.config = replace(self.config, num_classes=num_classes)
        with torch.device(self.pos_embed.device):
            self.head = self._new_head().to(self.pos_embed.dtype)
        self._init_linears(self.head, torch.Generator().manual_seed(seed))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks keep nothing for the backward pass but their input, and compute the rest again."""
        self.grad_checkpointing = enable

    def layer_of(self, name: str) -> int:
        """How deep the parameter lies: 0 for patches and positions, i + 1 for block i, one more for norm and head."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("pos_embed", "patch_embed")) else len(self.layers) + 1

    def parameter_groups(
        self, *, weight_decay: float = 0.05, layer_decay: float = 1.0, decay_vectors: bool = False
    ) -> list[dict]:
        """Groups for an optimiser: "params", "weight_decay", and "lr_scale" = layer_decay^(blocks above).

        Matrices decay. So do decays, mixes, factors and positions where `decay_vectors` says so, as the authors have
        it; norms and biases never.
        """
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            norm_or_bias = name.endswith(".bias") or name.split(".")[-2:-1] in ([f"ln{i}"] for i in (0, 1, 2, "_x"))
            is_vector = parameter.squeeze().dim() < 2 or name == "pos_embed"
            decays = not norm_or_bias and "key_norm" not in name and (decay_vectors or not is_vector)
            if parameter.requires_grad:
                groups.setdefault((self.layer_of(name), decays), []).append(parameter)
        top = len(self.layers) + 1
        return [
            {"params": params, "weight_decay": weight_decay * decays, "lr_scale": layer_decay ** (top - layer)}
            for (layer, decays), params in sorted(groups.items(), key=lambda item: item[0])
        ]

    def fingerprint(self) -> str:
        """Names these weights (see `rookery.checkpoints.state_file.fingerprint`)."""
        return fingerprint_of(self.family, self.config, self.patch_embed.projection.weight, self.ln1.weight)

    def _new_head(self) -> nn.Module:
        width, hidden, classes = self.config.hidden_size, self.config.head_hidden_size, self.config.num_classes
        if not classes:
            return nn.Identity()
        if hidden:
            return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes))
        return nn.Sequential(OrderedDict(fc=nn.Linear(width, classes)))

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (vision.md 2.2.5); the same for the same seed.

        ρ = layer / (layers − 1), ρ₁ = 1 − layer / layers, d = i / width, e = i / (width − 1), z = ((i + 1) mod 3) − 1.

        | parameter | "fancy" | "local" | "global" |
        |---|---|---|---|
        | `spatial_decay` | −5 + 8 e^(0.7 + 1.3ρ) | 1 | 0 |
        | `spatial_first` | ln 0.3 + 0.5 z | 1 | 0 |
        | `spatial_mix_k` | d^ρ₁ | 1 | 0.5 |
        | `att.spatial_mix_v` | d^ρ₁ + 0.3ρ | 1 | 0.5 |
        | `att.spatial_mix_r` | d^(ρ₁ / 2) | 1 | 0.5 |
        | `ffn.spatial_mix_r` | d^ρ₁ | 1 | 0.5 |

        v6: decay and bonus as in RWKV-6, `time_maa_*` 1 less the mixes above (`x` and `w` as `k`, `g` as `r`), low-rank
        factors U(−1e-4, 1e-4). v7: the time mix as in RWKV-7. All other matrices N(0, 0.02), patches U(±1 / √inputs),
        positions and biases 0, norms 1, factors `config.layer_scale`.
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.pos_embed.zero_()
        bound = (self.config.in_channels * self.config.patch_size**2) ** -0.5
        for parameter in self.patch_embed.parameters():
            uniform_(parameter, bound, generator)
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm | nn.GroupNorm):
                norm.weight.fill_(1)
                norm.bias.zero_()
        for layer, block in enumerate(self.layers):
            self._init_linears(block, generator)
            set_vectors(block, initial_vectors(self.config, layer))
            if self.config.layer_scale is not None:
                block.gamma1.fill_(self.config.layer_scale)
                block.gamma2.fill_(self.config.layer_scale)
            if self.config.variant == "v6":
                for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
                    uniform_(block.att.get_parameter(name), 1e-4, generator)
            elif self.config.variant == "v7":
                set_matrices(block, {n: g for n, g in MATRIX_GAIN.items() if n.startswith("att.")}, generator)
        self._init_linears(self.head, generator)

    @staticmethod
    def _init_linears(module: nn.Module, generator: torch.Generator) -> None:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                normal_(linear.weight, 0.02, generator)
                if linear.bias is not None:
                    linear.bias.zero_()


def initial_vectors(config: VisionRWKVConfig, layer: int) -> dict[str, Tensor]:
    """Vectors of a block by name."""
    rho, rho1, d, e = place(config, layer)
    zigzag = (torch.arange(config.hidden_size, dtype=torch.float64) + 1) % 3 - 1
    mixes = {"k": d**rho1, "v": d**rho1 + 0.3 * rho, "r": d ** (0.5 * rho1)}
    decay, first, ffn = -5 + 8 * e ** (0.7 + 1.3 * rho), zigzag * 0.5 - 1.2039728043259361, d**rho1
    if config.init != "fancy":
        value, mix = (1.0, 1.0) if config.init == "local" else (0.0, 0.5)
        decay = first = torch.full_like(d, value)
        ffn = torch.full_like(d, mix)
        mixes = dict.fromkeys("kvr", ffn)
    vectors = {"ffn.spatial_mix_k": ffn, "ffn.spatial_mix_r": ffn}
    if config.variant == "v4":
        mixed = {f"att.spatial_mix_{name}": mix for name, mix in mixes.items()}
        return vectors | mixed | {"att.spatial_decay": decay, "att.spatial_first": first}
    if config.variant == "v6":
        decay, bonus = initial_decay_and_bonus(config, layer)
        mixes |= {"x": mixes["k"], "w": mixes["k"], "g": mixes["r"]}
        vectors |= {f"att.time_maa_{name}": 1 - mix for name, mix in mixes.items()}
        return vectors | {"att.time_decay": decay, "att.time_faaaa": bonus}
    time_mix = {name: value for name, value in initial_2025_05(config, layer).items() if name.startswith("att.")}
    return vectors | time_mix
