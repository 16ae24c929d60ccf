"""RAD-RWKV6 (arXiv 2505.03005): the teacher's projections around a gated linear recurrence, decays as in RWKV-6.

Parameters have the names of the published models (recursal/QRWKV6-…, model type rwkv6qwen2).
"""

import torch
from torch import Tensor, nn

from rookery.families.rad_rwkv6 import FAMILY, SIGNALS, RADRWKV6Config
from rookery.models.arwkv import Call, Converted, MixState
from rookery.nn.initial import normal_, orthogonal_, uniform_
from rookery.nn.rwkv import place
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv6 import wkv6

# b batch, t time, c width, h heads, n channels of a head, m channels of all heads

SLOWEST = -5.0
"""Lowest log decay: what a channel keeps of a token is at least e⁻⁵."""


class Projections(nn.Module):
    """q_proj, k_proj, v_proj, o_proj of the attention that was converted; keys and values serve groups of queries."""

    def __init__(self, config: RADRWKV6Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, mixed, keys = config.hidden_size, config.mixed_width, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, mixed, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(mixed, width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[b, t, h, n] of all query heads; a group's key or value is repeated for its queries."""
        x = x.unflatten(-1, (-1, self.config.head_dim))
        return x.repeat_interleave(self.config.num_attention_heads // x.shape[2], dim=2)


class TimeMix(Projections):
    """y_t = N^(−1/2) S_t q_t with S_t = S_{t−1} diag(w_t) + v_t k_tᵀ: the current token included, no bonus, no norm."""

    def __init__(self, config: RADRWKV6Config, layer: int) -> None:
        super().__init__(config, layer)
        width, mixed = config.hidden_size, config.mixed_width
        for name in "x" + SIGNALS:
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.time_maa_w1 = nn.Parameter(torch.empty(width, len(SIGNALS) * config.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(SIGNALS), config.mix_rank, width))
        self.time_decay = nn.Parameter(torch.empty(1, 1, mixed))
        self.time_decay_w1 = nn.Parameter(torch.empty(width, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, mixed))
        if config.gate == "full":
            self.gate = nn.Linear(width, mixed, bias=False)
        elif config.gate == "low-rank":
            self.g1 = nn.Parameter(torch.empty(width, config.gate_rank))
            self.g2 = nn.Parameter(torch.empty(config.gate_rank, mixed))

    def forward(
        self, x: Tensor, state: MixState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, MixState, Tensor | None]:
        signals, shift = self.interpolate(x, state.att_shift, call.cu_seqlens)
        q, k, v = (self.heads(proj(signals[n])) for n, proj in zip("rkv", (self.q_proj, self.k_proj, self.v_proj)))
        # float32: the decay is exponentiated twice
        raw = (self.time_decay + (signals["w"] @ self.time_decay_w1).tanh() @ self.time_decay_w2).to(state.wkv.dtype)
        log_w = (-raw.clamp(max=80).exp()).clamp(min=SLOWEST).unflatten(-1, (-1, self.config.head_dim))
        w = log_w.exp().to(k.dtype)
        if self.config.balance_state:
            k = k * (1 - w)
        # RWKV-6 reads the state before it decays: reading it with w ⊙ q and adding the token itself is S_t q
        nothing = torch.zeros(self.config.wkv_shape[:2], dtype=q.dtype, device=q.device)
        y, wkv = wkv6(r=w * q, log_w=log_w, k=k, v=v, u=nothing, state=state.wkv, cu_seqlens=call.cu_seqlens)
        y = (y + (k * q).sum(-1, keepdim=True) * v).flatten(2) * self.config.head_dim**-0.5
        if self.config.gate != "none":
            y = (
                y
                * (
                    self.gate(signals["g"]) if self.config.gate == "full" else signals["g"] @ self.g1 @ self.g2
                ).sigmoid()
            )
        return self.o_proj(y), MixState(shift, wkv), v_first

    def interpolate(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by letter, each [b, t, c], mixed from the token and the one before by data-dependent weights."""
        mix = torch.stack([self.time_maa_x.flatten(), torch.ones_like(self.time_maa_x.flatten())])
        (probe, before), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        inner = (probe @ self.time_maa_w1).tanh().unflatten(-1, (len(SIGNALS), -1))
        moved = torch.einsum("btsq,sqc->sbtc", inner, self.time_maa_w2)
        step = before - x
        return {n: x + step * (getattr(self, f"time_maa_{n}") + moved[i]) for i, n in enumerate(SIGNALS)}, shift


def init_projections(mixer: Projections, generator: torch.Generator) -> None:
    """What a conversion takes from its teacher, here as in a new transformer: N(0, 0.02), biases 0."""
    for name, parameter in mixer.named_parameters():
        if "_proj." in name:
            parameter.zero_() if name.endswith("bias") else normal_(parameter, 0.02, generator)


class RADRWKV6(Converted):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    mixer = TimeMix

    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the mixers' are those of adaptation.md B.2.2.

        The token shift begins as none.

        | parameter | value |
        |---|---|
        | norms | 1 |
        | `embed_tokens`, `lm_head`, `gate_proj`, `up_proj`, `down_proj` | N(0, 0.02), as in a new transformer |
        | `q_proj k_proj v_proj o_proj` | N(0, 0.02), biases 0 |
        | `time_maa_x` | 1 |
        | other `time_maa_*`, `time_maa_w1`, `time_decay_w1`, `gate`, `g1` | 0 |
        | `time_maa_w2`, `time_decay_w2` | U(−0.01, 0.01) |
        | `time_decay` | −6 + 5 e^(0.7 + 1.3ρ), e = i / (channels − 1) |
        | `g2` | orthogonal, gain 0.1 |
        """
        super().init_weights(seed)

    def init_mixer(self, mixer: TimeMix, layer: int, generator: torch.Generator) -> None:
        init_projections(mixer, generator)
        rho = place(self.config, layer).rho
        e = torch.arange(self.config.mixed_width, dtype=torch.float64) / (self.config.mixed_width - 1)
        for name, parameter in mixer.named_parameters():
            if name == "time_decay":
                parameter.copy_((-6 + 5 * e ** (0.7 + 1.3 * rho)).view_as(parameter))
            elif name in ("time_maa_w2", "time_decay_w2"):
                uniform_(parameter, 0.01, generator)
            elif name == "g2":
                orthogonal_(parameter, 0.1, generator)
            elif "_proj." not in name:
                parameter.fill_(1.0 if name == "time_maa_x" else 0.0)
