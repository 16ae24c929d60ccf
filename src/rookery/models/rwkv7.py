"""RWKV-7 "Goose" (arXiv 2503.14456) in the paper's order: token shift, time mix, channel mix, block, model.

Parameters have the names and shapes of the official files (BlinkDL/RWKV-LM, Apache-2.0), so these load unchanged. The
first block's unused v0, v1, v2 do not exist here.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rwkv7 import FAMILY, RWKV7Config
from rookery.nn.rwkv import RWKV, place, set_matrices, set_vectors
from rookery.ops.relu_squared import relu_squared
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7_inputs import wkv7_inputs
from rookery.ops.wkv7_output import wkv7_output

# b batch, t time, c width, h heads, n channels of a head


class TimeMix(nn.Module):
    """Reads and writes the matrix state (eq. 3-21). Shapes of the parameters are the official ones."""

    removal = 1.0
    """Factor of what is removed from the state: 2, in a subclass, lets the transition reach the eigenvalue −1."""
    recurrence = staticmethod(wkv7)
    """What takes the place of `wkv7` where a row's tokens are on several devices."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.hidden_size
        inner = config.num_heads * config.head_dim  # the width, but for models that have grown heads
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, width)))
        ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}
        for name, rank in ranks.items():
            if name == "v" and layer == 0:
                continue  # nothing before the first block to mix values with
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, inner)))
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.empty(1, 1, inner)))
        self.k_k = nn.Parameter(torch.empty(1, 1, inner))
        self.k_a = nn.Parameter(torch.empty(1, 1, inner))
        self.r_k = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        for name in ("receptance", "key", "value"):
            setattr(self, name, nn.Linear(width, inner, bias=False))
        self.output = nn.Linear(inner, width, bias=False)
        self.ln_x = nn.GroupNorm(config.num_heads, inner, eps=config.group_norm_eps)

    def forward(
        self, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output [b, t, c], the new shift and matrix state, and the first block's values (given or made here)."""
        mixed, shift = self.mixed(x, shift, cu_seqlens)
        y, wkv, v_first = self.attend(mixed, wkv, v_first, cu_seqlens)
        return y, shift, wkv, v_first

    def mixed(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The six inputs [6, b, t, c], mixed from the token and the one before, and the new shift."""
        return token_shift(x=x, mix=self.mixes(), previous=shift, cu_seqlens=cu_seqlens)

    def mixes(self) -> Tensor:
        """How much of the token before goes into each of the six inputs, [6, c]."""
        return torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]).flatten(1)

    def attend(
        self, mixed: Tensor, wkv: Tensor | None, v_first: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What follows the token shift, whose six mixtures are `mixed` [6, b, t, c]: all but the shift of `forward`."""
        signals, v_first = self.signals(mixed, v_first)
        y, wkv = self.recurrence(**signals.inputs(), state=wkv, cu_seqlens=cu_seqlens)
        return self.finish(y, signals), wkv, v_first

    def signals(self, mixed: Tensor, v_first: Tensor | None) -> tuple["Signals", Tensor]:
        """What the recurrence and its output are made of, and the first block's values (given or made here)."""
        head_dim = self.config.head_dim
        xr, xw, xk, xv, xa, xg = mixed
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        decay_logit = self.w0 + (xw @ self.w1).tanh() @ self.w2
        rate_logit = self.a0 + xa @ self.a1 @ self.a2
        gate = (xg @ self.g1).sigmoid() @ self.g2
        if v_first is None:
            v_first = v
        else:
            share = (self.v0 + xv @ self.v1 @ self.v2).sigmoid()
            v = v.lerp(v_first, share.to(v.dtype))  # under autocast sums are wider than products

        log_w, k, a, b = wkv7_inputs(
            k=k,
            decay_logit=decay_logit,
            rate_logit=rate_logit,
            k_k=self.k_k.flatten(),
            k_a=self.k_a.flatten(),
            head_dim=head_dim,
        )
        if self.removal != 1.0:
            b = b * self.removal
        r, v = r.unflatten(-1, (-1, head_dim)), v.unflatten(-1, (-1, head_dim))
        return Signals(r, log_w, k, v, a, b, gate, rate_logit), v_first

    def finish(self, y: Tensor, signals: "Signals") -> Tensor:
        """The block's output [b, t, c] from the recurrence's, [b, t, h, n]."""
        norm, own = self.ln_x, {"r_k": self.r_k, "weight": self.ln_x.weight, "bias": self.ln_x.bias}
        y = wkv7_output(y=y, r=signals.r, k=signals.k, v=signals.v, gate=signals.gate, **own, eps=norm.eps)
        return self.output(y)


class Signals(NamedTuple):
    """What a time mix makes of its tokens before anything is read or written."""

    r: Tensor
    """[b, t, h, n], as the next five, which are the arguments of `wkv7`"""
    log_w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    gate: Tensor
    """[b, t, c], on the output"""
    rate_logit: Tensor
    """[b, t, c]; its sigmoid is the in-context learning rate that `b` and `k` contain"""

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of `wkv7` but for the state."""
        return {"r": self.r, "log_w": self.log_w, "k": self.k, "v": self.v, "a": self.a, "b": self.b}


class ChannelMix(nn.Module):
    """A ReLU² MLP on a token-shifted input (eq. 22)."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        (xk,), shift = token_shift(x=x, mix=self.x_k.flatten(1), previous=shift, cu_seqlens=cu_seqlens)
        return self.value(relu_squared(x=self.key(xk))), shift


class RWKV7(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = True
    time_mix = TimeMix

    @staticmethod
    def channel_mix(config: RWKV7Config, layer: int) -> ChannelMix:
        return ChannelMix(config)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (core.md 1.9); the same for the same seed.

        ρ = layer / (layers − 1), ρ₁ = 1 − layer / layers, d = i / width, e = i / (width − 1),
        z = u·|u| for u = the place within the head, from −1 to 1.

        | parameter | "v7-2025-05" | "v7-2024" where it differs |
        |---|---|---|
        | `x_r`, `x_g` | 1 − d^(0.2ρ₁) | |
        | `x_w`, `x_a` | 1 − d^(0.9ρ₁) | |
        | `x_k` | 1 − d^(0.7ρ₁) | 1 − (d^(0.9ρ₁) + 0.4ρ) |
        | `x_v` | 1 − d^(0.7ρ₁) | 1 − (d^(0.4ρ₁) + 0.6ρ) |
        | `ffn.x_k` | 1 − d^(ρ₁⁴) | |
        | `w0` | −5.5 + 6 e^(1 + ρ^0.3) + 2.5 z | −6.5 + 5 e^(0.85 + √ρ) |
        | `a0` | −0.19 + 0.3 z + 0.4 (e − ½) | 0 |
        | `v0` | 0.73 − 0.4 (e − ½) | 1 |
        | `k_k` | 0.71 − 0.1 (e − ½) | 0.85 |
        | `k_a`, `r_k` | 1.02, −0.04 | 1, 0 |
        | `w1 a1 v1 g1`, `output`, `ffn.value` | 0 | |
        | `w2 a2 v2 g2` | orthogonal, gain 0.1 | |
        | `receptance`, `value`, `ffn.key` | orthogonal, gain 1 | |
        | `key` | orthogonal, gain 0.1 | |
        | `ln_x.weight` | ((1 + layer) / layers)^0.7 | |
        | `emb` | U(−1e-4, 1e-4) | |
        | `head` | orthogonal, gain ½ √(max(1, vocab / width)) | |
        | other norms | 1, biases 0 | |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        config = self.config
        vectors = initial_2024 if config.init == "v7-2024" else initial_2025_05
        self.init_norms()
        for layer, block in enumerate(self.blocks):
            set_vectors(block, vectors(config, layer))
            set_matrices(block, MATRIX_GAIN, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / config.num_hidden_layers) ** 0.7)
        self.init_embedding_and_head(generator)


MATRIX_GAIN = {
    **{f"att.{name}1": 0.0 for name in "wavg"},
    **{f"att.{name}2": 0.1 for name in "wavg"},
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "att.output.weight": 0.0,
    "ffn.key.weight": 1.0,
    "ffn.value.weight": 0.0,
}
"""Gain of each orthogonal matrix of a block; 0 means zeros."""


def initial_2025_05(config: RWKV7Config, layer: int) -> dict[str, Tensor]:
    """Vectors of a block by name, RWKV-LM since 2025-05-06."""
    rho, rho1, d, e = place(config, layer)
    middle = (config.head_dim - 1) / 2
    u = (torch.arange(config.hidden_size, dtype=torch.float64) % config.head_dim - middle) / max(middle, 0.5)
    zigzag, slope = u * u.abs(), e - 0.5
    vectors = {
        **{f"att.x_{name}": 1 - d ** (power * rho1) for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2))},
        "att.w0": -5.5 + 6 * e ** (1 + rho**0.3) + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * slope,
        "att.v0": 0.73 - 0.4 * slope,
        "att.k_k": 0.71 - 0.1 * slope,
        "att.k_a": torch.full_like(d, 1.02),
        "att.r_k": torch.full_like(d, -0.04),
        "ffn.x_k": 1 - d ** (rho1**4),
    }
    return vectors if layer else _without_value_residual(vectors)


def initial_2024(config: RWKV7Config, layer: int) -> dict[str, Tensor]:
    """Vectors of a block by name, RWKV-LM before 2025-05-06: what the published loss curve was made with."""
    rho, rho1, d, e = place(config, layer)
    vectors = {
        **{f"att.x_{name}": 1 - d ** (power * rho1) for name, power in zip("rwag", (0.2, 0.9, 0.9, 0.2))},
        "att.x_k": 1 - (d ** (0.9 * rho1) + 0.4 * rho),
        "att.x_v": 1 - (d ** (0.4 * rho1) + 0.6 * rho),
        "att.w0": -6.5 + 5 * e ** (0.85 + rho**0.5),
        "att.a0": torch.zeros_like(d),
        "att.v0": torch.ones_like(d),
        "att.k_k": torch.full_like(d, 0.85),
        "att.k_a": torch.ones_like(d),
        "att.r_k": torch.zeros_like(d),
        "ffn.x_k": 1 - d ** (rho1**4),
    }
    return vectors if layer else _without_value_residual(vectors)


def _without_value_residual(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in vectors.items() if name != "att.v0"}
