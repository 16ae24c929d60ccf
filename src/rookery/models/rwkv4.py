"""RWKV-4 (arXiv 2305.13048) in the paper's order: time mix, channel mix, model.

Parameters have the names and shapes of the official files (BlinkDL/RWKV-LM, RWKV-v4neo, Apache-2.0).
"""

import torch
from torch import Tensor, nn

from rookery.families.rwkv4 import FAMILY, RWKV4Config
from rookery.nn.initial import uniform_
from rookery.nn.rwkv import RWKV, place, set_matrices, set_vectors
from rookery.ops.relu_squared import relu_squared
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv4 import empty_state, wkv4

# b batch, t time, c width


class TimeMix(nn.Module):
    """A decaying average of values (eq. 11-18)."""

    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.time_decay = nn.Parameter(torch.empty(width))
        self.time_first = nn.Parameter(torch.empty(width))
        for name in "kvr":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.empty(1, 1, width)))
        for name in ("key", "value", "receptance", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(
        self, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # official mixes weigh the token itself, the op weighs the one before
        mix = 1 - torch.cat([self.time_mix_k, self.time_mix_v, self.time_mix_r]).flatten(1)
        (xk, xv, xr), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr).sigmoid()
        # float32: the decay of a channel is applied once per token, and an error in it compounds
        log_w = -self.time_decay.to(wkv.dtype).exp()
        y, wkv = wkv4(log_w=log_w, u=self.time_first.to(wkv.dtype), k=k, v=v, state=wkv, cu_seqlens=cu_seqlens)
        return self.output(r * y), shift, wkv, v_first


class ChannelMix(nn.Module):
    """A ReLU² MLP on a token-shifted input, gated by a sigmoid (eq. 19-21); RWKV-4 and 5."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        for name in "kr":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.key = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = 1 - torch.cat([self.time_mix_k, self.time_mix_r]).flatten(1)
        (xk, xr), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        return self.mixed(xk, xr), shift

    def mixed(self, xk: Tensor, xr: Tensor) -> Tensor:
        """The output for inputs that are mixed already."""
        return self.receptance(xr).sigmoid() * self.value(relu_squared(x=self.key(xk)))


class RWKV4(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = True
    time_mix = TimeMix

    @staticmethod
    def channel_mix(config: RWKV4Config, layer: int) -> ChannelMix:
        return ChannelMix(config.hidden_size, config.intermediate_size)

    def empty_wkv(self, batch: int, dtype: torch.dtype) -> Tensor:
        return empty_state(batch, self.config.hidden_size, like=self.emb.weight).to(dtype)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (core.md 1.9); the same for the same seed.

        ρ = layer / (layers − 1), ρ₁ = 1 − layer / layers, d = i / width, e = i / (width − 1), z = ((i + 1) mod 3) − 1.

        | parameter | value |
        |---|---|
        | `time_decay` | −5 + 8 e^(0.7 + 1.3ρ) |
        | `time_first` | ln 0.3 + z / 2 |
        | `time_mix_k` | d^ρ₁ |
        | `time_mix_v` | d^ρ₁ + 0.3ρ |
        | `time_mix_r` | d^(ρ₁ / 2) |
        | `ffn.time_mix_k`, `ffn.time_mix_r` | d^ρ₁ |
        | `value`, `ffn.key` | orthogonal, gain √(max(1, rows / columns)) |
        | `key`, `receptance`, `output`, `ffn.value`, `ffn.receptance` | 0 |
        | `emb` | U(−6e-4, 6e-4): the bound is the run's learning rate |
        | `head` | orthogonal, gain ½ √(max(1, vocab / width)) |
        | norms | 1, biases 0 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        config = self.config
        gains = {**MATRIX_GAIN, "ffn.key.weight": max(1, config.intermediate_size / config.hidden_size) ** 0.5}
        self.init_norms()
        for layer, block in enumerate(self.blocks):
            set_vectors(block, initial_vectors(config, layer))
            set_matrices(block, gains, generator)
        self.init_embedding_and_head(generator)
        uniform_(self.emb.weight, 6e-4, generator)


MATRIX_GAIN = {
    "att.key.weight": 0.0,
    "att.value.weight": 1.0,
    "att.receptance.weight": 0.0,
    "att.output.weight": 0.0,
    "ffn.receptance.weight": 0.0,
    "ffn.value.weight": 0.0,
}
"""Gain of each orthogonal matrix of a block but `ffn.key`; 0 means zeros."""


def initial_vectors(config: RWKV4Config, layer: int) -> dict[str, Tensor]:
    """Vectors of a block by name."""
    rho, rho1, d, e = place(config, layer)
    zigzag = (torch.arange(config.hidden_size, dtype=torch.float64) + 1) % 3 - 1
    return {
        "att.time_decay": -5 + 8 * e ** (0.7 + 1.3 * rho),
        "att.time_first": torch.full_like(d, 0.3).log() + 0.5 * zigzag,
        "att.time_mix_k": d**rho1,
        "att.time_mix_v": d**rho1 + 0.3 * rho,
        "att.time_mix_r": d ** (0.5 * rho1),
        "ffn.time_mix_k": d**rho1,
        "ffn.time_mix_r": d**rho1,
    }
