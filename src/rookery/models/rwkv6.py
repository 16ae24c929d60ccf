"""RWKV-6 "Finch" (arXiv 2404.05892): interpolations and decay that depend on the data. x060 and variants a, b, c.

Parameters have the names and shapes of the official files (BlinkDL/RWKV-LM, RWKV-v5, Apache-2.0).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rookery.families.rwkv6 import FAMILY, RWKV6Config, mix_factors
from rookery.models.rwkv5 import MATRIX_GAIN, head_norm, initial_decay_and_bonus
from rookery.nn.initial import uniform_
from rookery.nn.rwkv import RWKV, place, set_matrices, set_vectors
from rookery.ops.relu_squared import relu_squared
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv6 import wkv6

# b batch, t time, c width, h heads, n channels of a head, s interpolated signals, q rank


class TimeMix(nn.Module):
    """Reads and writes the matrix state (eq. 10-20)."""

    recurrence = staticmethod(wkv6)
    """What may take the place of `wkv6` in one instance, to look at what it is given; `forward` takes one, too."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        self.config = config
        width, count = config.hidden_size, len(config.signals)
        for name in ("x", *config.signals):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.factors = mix_factors(config)
        setattr(self, f"{self.factors}1", nn.Parameter(torch.empty(width, count * config.mix_rank)))
        setattr(self, f"{self.factors}2", nn.Parameter(torch.empty(count, config.mix_rank, width)))
        self.time_decay = nn.Parameter(torch.empty(1, 1, width))
        self.time_decay_w1 = nn.Parameter(torch.empty(width, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, width))
        self.time_faaaa = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        for name in ("receptance", "key", "value", "output", *(["gate"] if config.variant == "x060" else [])):
            setattr(self, name, nn.Linear(width, width, bias=False))
        if config.variant == "x060a":
            self.gate_w1 = nn.Parameter(torch.empty(width, config.gate_rank))
            self.gate_w2 = nn.Parameter(torch.empty(config.gate_rank, width))
        # variants b and c normalise all heads together
        groups = config.num_heads if config.variant in ("x060", "x060a") else 1
        self.ln_x = nn.GroupNorm(groups, width, eps=config.group_norm_eps)

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
        signals, shift = self.interpolate(x, shift, cu_seqlens)
        raw, log_w = self.decay(signals["w"], wkv.dtype)
        r, v, k = self.receptance(signals["r"]), self.value(signals["v"]), self.key(signals["k"])
        if self.config.variant == "x060c":
            k = k * (1 - log_w.exp()).to(k.dtype)
        if self.config.damp_keys:
            k = k * raw.clamp(max=0).exp().to(k.dtype)
        r, log_w, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (r, log_w, k, v))
        y, wkv = run(r=r, log_w=log_w, k=k, v=v, u=self.time_faaaa, state=wkv, cu_seqlens=cu_seqlens)
        y = head_norm(self.ln_x, y)
        if self.config.variant == "x060":
            y = y * silu(self.gate(signals["g"]))
        elif self.config.variant == "x060a":
            y = y * ((signals["g"] @ self.gate_w1).tanh() @ self.gate_w2)
        return self.output(y), shift, wkv, v_first

    def decay(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The raw decay of every channel and its logarithm, [b, t, c] each, in `dtype`."""
        # float32: the decay is exponentiated twice
        raw = (self.time_decay + (x @ self.time_decay_w1).tanh() @ self.time_decay_w2).to(dtype)
        # e^88 is infinite in float32 and the gradient there 0 · ∞; every decay beyond raw = 5 is 0 anyway
        return raw, -raw.clamp(max=80).exp()

    def interpolate(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, each [b, t, c], mixed from the token and the one before by data-dependent weights."""
        # a mix of 1 is the token before itself
        mix = torch.stack([self.time_maa_x.flatten(), torch.ones_like(self.time_maa_x.flatten())])
        (probe, before), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        names = self.config.signals
        inner = (probe @ getattr(self, f"{self.factors}1")).tanh().unflatten(-1, (len(names), -1))
        moved = torch.einsum("btsq,sqc->sbtc", inner, getattr(self, f"{self.factors}2"))
        step = before - x
        return {n: x + step * (getattr(self, f"time_maa_{n}") + moved[i]) for i, n in enumerate(names)}, shift


class ChannelMix(nn.Module):
    """A ReLU² MLP on a token-shifted input, gated by a sigmoid; the mixes weigh the token before."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        for name in "kr":
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.key = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = torch.cat([self.time_maa_k, self.time_maa_r]).flatten(1)
        (xk, xr), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        return self.receptance(xr).sigmoid() * self.value(relu_squared(x=self.key(xk))), shift


class RWKV6(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = True
    time_mix = TimeMix
    channel_mix = ChannelMix

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value (core.md 1.9); the same for the same seed.

        ρ = layer / (layers − 1), ρ₁ = 1 − layer / layers, d = i / width, e = i / (width − 1), z = ((i + 1) mod 3) − 1.

        | parameter | value |
        |---|---|
        | `time_decay` | −6 + 5 e^(0.7 + 1.3ρ) |
        | `time_faaaa` | ρ (1 − e) + 0.1 z |
        | `time_maa_x`, `_w`, `_k` | 1 − d^ρ₁ |
        | `time_maa_v` | 1 − (d^ρ₁ + 0.3ρ) |
        | `time_maa_r`, `_g` | 1 − d^(ρ₁ / 2) |
        | `time_maa_w1`, `time_decay_w1`, `gate_w1` | 0 |
        | `time_maa_w2`, `time_decay_w2`, `gate_w2` | U(−0.01, 0.01) |
        | `ffn.time_maa_k`, `_r` | 1 − d^(ρ₁³) |
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
            for name, parameter in block.att.named_parameters():
                if name.endswith("_w1"):
                    parameter.zero_()
                elif name.endswith("_w2"):
                    uniform_(parameter, 0.01, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / self.config.num_hidden_layers) ** 0.7)
        self.init_embedding_and_head(generator)


def initial_vectors(config: RWKV6Config, layer: int) -> dict[str, Tensor]:
    """Vectors of a block by name."""
    rho, rho1, d, _ = place(config, layer)
    decay, bonus = initial_decay_and_bonus(config, layer)
    mixes = {
        **dict.fromkeys("xwk", 1 - d**rho1),
        "v": 1 - (d**rho1 + 0.3 * rho),
        **dict.fromkeys("rg", 1 - d ** (0.5 * rho1)),
    }
    return {
        "att.time_decay": decay,
        "att.time_faaaa": bonus,
        **{f"att.time_maa_{name}": mixes[name] for name in ("x", *config.signals)},
        "ffn.time_maa_k": 1 - d ** (rho1**3),
        "ffn.time_maa_r": 1 - d ** (rho1**3),
    }
