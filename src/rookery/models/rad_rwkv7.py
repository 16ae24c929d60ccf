"""RAD-RWKV7 (arXiv 2505.03005): the teacher's projections, rotary positions included, around RWKV-7's recurrence.

Parameters have the names of the published models (recursal/QRWKV7-…, model type rwkv7qwen2). There is no token shift.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rookery.families.rad_rwkv7 import FAMILY, RADRWKV7Config
from rookery.models.arwkv import Call, Converted, MixState, norm_of_heads
from rookery.models.rad_rwkv6 import Projections, init_projections
from rookery.models.transformer import rotate
from rookery.nn.initial import orthogonal_
from rookery.nn.rwkv import place
from rookery.ops.wkv7 import wkv7

# b batch, t time, c width, h heads, n channels of a head, m channels of all heads

LOG_DECAY = -0.6065306597126334
"""−e^(−1/2): the strongest log decay."""


class TimeMix(Projections):
    """S_t = S_{t−1} diag(w) − S_{t−1} κ̂ (κ̂ ⊙ a)ᵀ + v k̃ᵀ, y_t = S_t q_t, with or without RWKV-7's own keys."""

    def __init__(self, config: RADRWKV7Config, layer: int) -> None:
        super().__init__(config, layer)
        width, mixed = config.hidden_size, config.mixed_width
        ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}
        for name, rank in ranks.items():
            if name == "v" and layer == config.first_mixer:
                continue  # nothing before the first block to mix values with
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, mixed)))
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.empty(1, 1, mixed)))
        if not config.balance_state:
            self.k_k = nn.Parameter(torch.empty(1, 1, mixed))
            self.k_a = nn.Parameter(torch.empty(1, 1, mixed))
        if config.has_group_norm:
            self.ln_x = nn.GroupNorm(config.num_attention_heads, mixed, eps=1e-5 * config.head_dim)

    def forward(
        self, x: Tensor, state: MixState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, MixState, Tensor]:
        config, dim = self.config, self.config.head_dim
        q, k, v = (proj(x).unflatten(-1, (-1, dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if config.rope_theta is not None:
            q, k = (rotate(part.transpose(1, 2), call.positions, config.rope_theta).transpose(1, 2) for part in (q, k))
        k, v = self.heads(k.flatten(2)), self.heads(v.flatten(2)).flatten(2)
        if v_first is None:
            v_first = v
        else:
            share = (self.v0 + x @ self.v1 @ self.v2).sigmoid()
            v = v.lerp(v_first, share.to(v.dtype))  # under autocast sums are wider than products
        v = v.unflatten(-1, (-1, dim))
        # float32: log decays are summed over many tokens
        logit = (self.w0 + (x @ self.w1).tanh() @ self.w2).to(state.wkv.dtype)
        log_w = (LOG_DECAY * logit.sigmoid()).unflatten(-1, (-1, dim))
        rate = (self.a0 + x @ self.a1 @ self.a2).sigmoid().unflatten(-1, (-1, dim))
        if config.balance_state:
            removal = k / (k.norm(dim=-1, keepdim=True) + 1e-12)
            k = k * (1 - log_w.exp().to(k.dtype) + rate)
        else:
            removal = normalize(k * self.k_k.view(-1, dim), dim=-1, eps=1e-12)
            k = k * (1 + (rate - 1) * self.k_a.view(-1, dim))
        y, wkv = wkv7(
            r=q, log_w=log_w, k=k, v=v, a=-removal, b=removal * rate, state=state.wkv, cu_seqlens=call.cu_seqlens
        )
        y = norm_of_heads(self.ln_x, y) if config.has_group_norm else y * dim**-0.5
        gate = (x @ self.g1).sigmoid() @ self.g2
        return self.o_proj(y.flatten(2) * gate), MixState(state.att_shift, wkv), v_first


class RADRWKV7(Converted):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    mixer = TimeMix

    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the mixers' are those of adaptation.md B.2.3.

        | parameter | value |
        |---|---|
        | norms | 1 |
        | `embed_tokens`, `lm_head`, `gate_proj`, `up_proj`, `down_proj` | N(0, 0.02), as in a new transformer |
        | `q_proj k_proj v_proj o_proj` | N(0, 0.02), biases 0 |
        | `w0` | −7 + 5 e^(0.85 + √ρ) + 0.5, e = i / (channels − 1) |
        | `a0`, `v0`, `k_k`, `k_a` | 0, 1, 0.85, 1 |
        | `w1 a1 v1 g1` | 0 |
        | `w2 a2 v2 g2` | orthogonal, gain 0.1 |
        """
        super().init_weights(seed)

    def init_mixer(self, mixer: TimeMix, layer: int, generator: torch.Generator) -> None:
        init_projections(mixer, generator)
        rho = place(self.config, layer).rho
        e = torch.arange(self.config.mixed_width, dtype=torch.float64) / (self.config.mixed_width - 1)
        constants = {"v0": 1.0, "k_k": 0.85, "k_a": 1.0, "ln_x.weight": 1.0}
        for name, parameter in mixer.named_parameters():
            if name == "w0":
                parameter.copy_((-6.5 + 5 * e ** (0.85 + rho**0.5)).view_as(parameter))
            elif name[1:] == "2":
                orthogonal_(parameter, 0.1, generator)
            elif "_proj." not in name:
                parameter.fill_(constants.get(name, 0.0))
