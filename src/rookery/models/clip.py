"""RWKV-CLIP (arXiv 2406.06973): images and texts in one space, both read by RWKV-6 in both directions.

Parameters have the names of the released files (deepglint/RWKV-CLIP, MIT). The image tower is Vision-RWKV6; the text
tower's blocks are the same but for the shift, which takes the token before and the token after.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from rookery.families.clip import FAMILY, RWKVCLIPConfig, TextTowerConfig
from rookery.models.rwkv6 import MATRIX_GAIN, initial_vectors
from rookery.models.vision import SpatialMix6, VisionRWKV
from rookery.nn.grid import b_shift
from rookery.nn.initial import uniform_
from rookery.nn.rwkv import set_matrices, set_vectors
from rookery.ops.relu_squared import relu_squared
from rookery.state import fingerprint_of

# b batch, t tokens, c width

LARGEST_SCALE = math.log(100)
"""Of the logarithm by which similarities are multiplied."""
GAIN = {**MATRIX_GAIN, "ffn.key.weight": 0.5}
"""Gain of each orthogonal matrix of a text block."""


class TextMix(SpatialMix6):
    """The attention of the text tower: Vision-RWKV6's over a row of tokens."""

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        return self.attend(x, b_shift(x, heads=self.config.num_heads), real)


class TextChannelMix(nn.Module):
    """A gated ReLU² MLP on tokens mixed with both neighbours; the mixes weigh the neighbours."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.intermediate_size
        for name in "kr":
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.key = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        near = b_shift(x, heads=self.config.num_heads)
        xk, xr = (x.lerp(near, mix.to(x.dtype)) for mix in (self.time_maa_k, self.time_maa_r))
        return self.receptance(xr).sigmoid() * self.value(relu_squared(x=self.key(xk)))


class TextBlock(nn.Module):
    """Both mixers, each on the norm of the residual stream."""

    def __init__(self, config: TextTowerConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln1, self.ln2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.att = TextMix(config, layer)
        self.ffn = TextChannelMix(config)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        x = x + self.att(masked(self.ln1(x), real), real)
        return x + self.ffn(masked(self.ln2(x), real))


def masked(x: Tensor, real: Tensor | None) -> Tensor:
    """Zeros where `real` [b, t] is false, so that the shift brings nothing in from there."""
    return x if real is None else x * real[..., None].to(x.dtype)


def wide(features: Tensor) -> Tensor:
    """float32 at least: sums and lengths of bfloat16 vectors are too coarse to compare by."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


class TextTower(nn.Module):
    """Features [b, c] of texts; no positions and no causal mask, order enters by decays and shifts alone."""

    def __init__(self, config: RWKVCLIPConfig) -> None:
        super().__init__()
        self.config = config.text()
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TextBlock(self.config, i) for i in range(config.text_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """The average of the tokens' normalised vectors; of those where `real` [b, t] is true."""
        x = normalize(wide(self.tokens(tokens, real)), dim=-1)
        if real is None:
            return x.mean(1)
        return masked(x, real).sum(1) / real.sum(1, keepdim=True)

    def tokens(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """The last norm's output [b, t, c]."""
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x, real)
        return self.ln_out(x)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm | nn.GroupNorm):
                norm.weight.fill_(1)
                norm.bias.zero_()
        uniform_(self.emb.weight, 1e-4, generator)
        layers = len(self.blocks)
        for layer, block in enumerate(self.blocks):
            set_vectors(block, initial_vectors(self.config, layer))
            set_matrices(block, GAIN, generator)
            for name in ("time_maa", "time_decay"):
                block.att.get_parameter(f"{name}_w1").zero_()
                uniform_(block.att.get_parameter(f"{name}_w2"), 0.01, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / layers) ** 0.7)


class RWKVCLIP(nn.Module):
    """`image_features, text_features, scale = model(images, tokens)`, both of length 1."""

    family = FAMILY.name

    def __init__(self, config: RWKVCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.image_model = VisionRWKV(config.image())
        self.text_model = TextTower(config)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features [b, c] of images [b, channels, h, w] and of tokens [b, t], and what multiplies their
        products."""
        return self.encode_image(images), self.encode_text(tokens), self.scale()

    def scale(self) -> Tensor:
        """e^`logit_scale`, between 1 and 100."""
        return self.logit_scale.clamp(0, LARGEST_SCALE).exp()

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Features [b, c] of images [b, channels, h, w] of any size; of length 1 if `normalize`."""
        features = wide(self.image_model(images))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Features [b, c] of token ids [b, t], which end with the vocabulary's last id and are filled up after it.

        ValueError for ids outside of the vocabulary and for more than `context_length` tokens.
        """
        tokens = self.checked(tokens)
        real = None
        if self.config.pad_mode == "masked":
            ends = (tokens == self.config.vocab_size - 1).cumsum(1)
            # up to the first end of text, it included; a text that was cut elsewhere has none and is real throughout
            real = (ends == 0) | ((ends == 1) & (tokens == self.config.vocab_size - 1))
        features = self.text_model(tokens, real)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def checked(self, tokens: Tensor) -> Tensor:
        limit, vocab_size = self.config.context_length, self.config.vocab_size
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= limit or tokens.is_floating_point():
            raise ValueError(
                f"texts must be token ids [batch, 1 to {limit}], got {tokens.dtype} {list(tokens.shape)}; the model's "
                "tokenizer cuts longer ones"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"token ids must lie in 0 to {vocab_size - 1}; these lie in {int(tokens.min())} to {int(tokens.max())}"
            )
        # what fills up is read like words there: the same text must always get as much of it
        return tokens if self.config.pad_mode == "masked" else pad(tokens, (0, limit - tokens.shape[1]))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks of the image tower keep nothing for the backward pass but their input."""
        self.image_model.set_grad_checkpointing(enable)

    def parameter_groups(
        self, *, weight_decay: float = 0.2, layer_decay: float = 1.0, decay_vectors: bool = True
    ) -> list[dict]:
        """One group with weight decay for all parameters, as published; without `decay_vectors` for matrices alone."""
        if layer_decay != 1.0:
            raise ValueError("the towers of RWKV-CLIP have no common depth: leave optim.layer_decay at 1")
        decays = [p for p in self.parameters() if decay_vectors or p.squeeze().dim() > 1]
        kept = {id(p) for p in decays}
        rest = [p for p in self.parameters() if id(p) not in kept]
        groups = [
            {"params": decays, "weight_decay": weight_decay, "lr_scale": 1.0},
            {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0},
        ]
        return [group for group in groups if group["params"]]

    def fingerprint(self) -> str:
        """Names these weights (see `rookery.checkpoints.state_file.fingerprint`)."""
        return fingerprint_of(self.family, self.config, self.text_model.emb.weight, self.text_model.ln_out.weight)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (vision.md 3.2); the same for the same seed.

        | parameter | value |
        |---|---|
        | `logit_scale` | ln(1 / 0.07) |
        | image tower | as Vision-RWKV6 |
        | text tower's vectors | as RWKV-6 |
        | `emb` | U(−1e-4, 1e-4) |
        | `att.output`, `ffn.value`, `ffn.receptance`, `time_*_w1` | 0 |
        | `att.key`, `att.gate` | orthogonal, gain 0.1 |
        | `att.receptance`, `att.value` | orthogonal, gain 1 |
        | `ffn.key` | orthogonal, gain 0.5 |
        | `time_*_w2` | U(−0.01, 0.01) |
        | `ln_x.weight` | ((1 + layer) / layers)^0.7 |
        """
        self.logit_scale.fill_(math.log(1 / 0.07))
        self.image_model.init_weights(seed)
        self.text_model.init_weights(torch.Generator().manual_seed(1 + (0 if seed is None else seed)))
