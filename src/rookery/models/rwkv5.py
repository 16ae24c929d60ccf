"""RWKV-5 "Eagle" (arXiv 2404.05892): RWKV-4's skeleton around a matrix state. Versions 5.0, 5.1 and 5.2.

Parameters have the names and shapes of the official files (BlinkDL/RWKV-LM, RWKV-v5, Apache-2.0).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rookery.families.rwkv5 import FAMILY, RWKV5Config
from rookery.models.rwkv4 import ChannelMix
from rookery.nn.rwkv import RWKV, place, set_matrices, set_vectors
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv5 import wkv5

# b batch, t time, c width, h heads, n channels of a head


class TimeMix(nn.Module):
    """Reads and writes the matrix state (eq. 3-9)."""

    recurrence = staticmethod(wkv5)
    """What may take the place of `wkv5` in one instance, to look at what it is given; `forward` takes one, too."""

    def __init__(self, config: RWKV5Config, layer: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        per_head = (config.num_heads, config.head_dim) if config.decay == "channel" else (config.num_heads,)
        self.signals = "kvrg" if config.has_gate else "kvr"
        for name in self.signals:
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.time_decay = nn.Parameter(torch.empty(per_head))
        setattr(self, config.bonus, nn.Parameter(torch.empty(per_head)))
        for name in ("receptance", "key", "value", "output", *(["gate"] if config.has_gate else [])):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ln_x = nn.GroupNorm(config.num_heads, width, eps=config.group_norm_eps)

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        wkv: Tensor,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None,
        recurrence: Callable | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        run = recurrence or self.recurrence
        # official mixes weigh the token itself, the op weighs the one before
        mix = 1 - torch.cat([getattr(self, f"time_mix_{name}") for name in self.signals]).flatten(1)
        mixed, shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        k, v, r = (
            project(part).unflatten(-1, (-1, self.config.head_dim))
            for project, part in zip((self.key, self.value, self.receptance), mixed)
        )
        # float32: the decay of a channel is applied once per token, and an error in it compounds
        log_w = -self.time_decay.to(wkv.dtype).exp()
        y, wkv = run(
            r=r, log_w=self.per_channel(log_w), k=k, v=v, u=self.bonus(wkv.dtype), state=wkv, cu_seqlens=cu_seqlens
        )
        y = head_norm(self.ln_x, y)
        if self.config.has_gate:
            y = y * silu(self.gate(mixed[3]))
        return self.output(y), shift, wkv, v_first

    def bonus(self, dtype: torch.dtype) -> Tensor:
        """u [h, n]; the oldest files hold its logarithm."""
        stored = getattr(self, self.config.bonus).to(dtype)
        return self.per_channel(stored.exp() if self.config.bonus == "time_first" else stored)

    def per_channel(self, values: Tensor) -> Tensor:
        """One value per head becomes one per channel."""
        return values if values.dim() == 2 else values[:, None].expand(-1, self.config.head_dim)


def head_norm(norm: nn.GroupNorm, y: Tensor) -> Tensor:
    """The norm of each head's output y [b, t, h, n], as [b, t, c]; statistics in float32."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    normed = nn.functional.group_norm(
        wide.flatten(0, 1).flatten(1), norm.num_groups, norm.weight.to(wide), norm.bias.to(wide), norm.eps
    )
    return normed.view(*y.shape[:2], norm.num_channels).to(y.dtype)


class RWKV5(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = True
    time_mix = TimeMix

    @staticmethod
    def channel_mix(config: RWKV5Config, layer: int) -> ChannelMix:
        return ChannelMix(config.hidden_size, config.intermediate_size)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (core.md 1.9); the same for the same seed.

        ρ = layer / (layers − 1), ρ₁ = 1 − layer / layers, d = i / width, e = i / (width − 1), z = ((i + 1) mod 3) − 1;
        in 5.0 and 5.1 e is the head's place, head / (heads − 1), and there is no z.

        | parameter | value |
        |---|---|
        | `time_decay` | −6 + 5 e^(0.7 + 1.3ρ) |
        | `time_faaaa` | ρ (1 − e) + 0.1 z |
        | `time_first` (5.0) | −3 |
        | `time_mix_k` | d^ρ₁ |
        | `time_mix_v` | d^ρ₁ + 0.3ρ |
        | `time_mix_r`, `time_mix_g` | d^(ρ₁ / 2) |
        | `ffn.time_mix_k`, `ffn.time_mix_r` | d^ρ₁ |
        | `receptance`, `value`, `ffn.key` | orthogonal, gain 1 |
        | `key`, `gate` | orthogonal, gain 0.1 |
        | `output`, `ffn.value`, `ffn.receptance` | 0 |
        | `ln_x.weight` | ((1 + layer) / layers)^0.7 |
        | `emb` | U(−1e-4, 1e-4) |
        | `head` | orthogonal, gain ½ √(max(1, vocab / width)) |
        | other norms | 1, biases 0 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_norms()
        for layer, block in enumerate(self.blocks):
            set_vectors(block, initial_vectors(self.config, layer))
            set_matrices(block, MATRIX_GAIN, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / self.config.num_hidden_layers) ** 0.7)
        self.init_embedding_and_head(generator)


MATRIX_GAIN = {
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "att.gate.weight": 0.1,
    "att.output.weight": 0.0,
    "ffn.key.weight": 1.0,
    "ffn.receptance.weight": 0.0,
    "ffn.value.weight": 0.0,
}
"""Gain of each orthogonal matrix of a block; 0 means zeros."""


def initial_decay_and_bonus(config, layer: int) -> tuple[Tensor, Tensor]:
    """Raw decay and bonus per channel, RWKV-5.2 and 6."""
    rho, _, _, e = place(config, layer)
    zigzag = (torch.arange(config.hidden_size, dtype=torch.float64) + 1) % 3 - 1
    return -6 + 5 * e ** (0.7 + 1.3 * rho), rho * (1 - e) + 0.1 * zigzag


def initial_vectors(config: RWKV5Config, layer: int) -> dict[str, Tensor]:
    """Vectors of a block by name."""
    rho, rho1, d, _ = place(config, layer)
    decay, bonus = initial_decay_and_bonus(config, layer)
    if config.decay == "head":
        e = torch.arange(config.num_heads, dtype=torch.float64) / max(1, config.num_heads - 1)
        decay, bonus = -6 + 5 * e ** (0.7 + 1.3 * rho), rho * (1 - e)
    if config.bonus == "time_first":
        bonus = torch.full_like(bonus, -3)
    vectors = {
        "att.time_mix_k": d**rho1,
        "att.time_mix_v": d**rho1 + 0.3 * rho,
        "att.time_mix_r": d ** (0.5 * rho1),
        "att.time_decay": decay,
        f"att.{config.bonus}": bonus,
        "ffn.time_mix_k": d**rho1,
        "ffn.time_mix_r": d**rho1,
    }
    return vectors | ({"att.time_mix_g": d ** (0.5 * rho1)} if config.has_gate else {})
