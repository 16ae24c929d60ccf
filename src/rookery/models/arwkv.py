"""ARWKV (arXiv 2501.15570): RWKV attention in a transformer's body, and the body for other mixers to stand in.

Blocks that a config names keep the attention they had (`attention_layers`): a hybrid, whose cache grows there.

Parameters have the names of the published models (RWKV-Red-Team/ARWKV-…, model type rwkv_hybrid). Against RWKV-7 the
norm over heads and the gate are optional, and there is no channel mix: the transformer's MLP stays.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from rookery.families.arwkv import FAMILY, ARWKVConfig
from rookery.families.converted import ConvertedConfig
from rookery.models import rwkv7, transformer
from rookery.models.transformer import MLP, KeyValues, Place, place_of
from rookery.nn.initial import normal_, orthogonal_
from rookery.nn.language_model import LanguageModel
from rookery.nn.packing import row_mask, unpack
from rookery.nn.rwkv import place
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7_inputs import wkv7_inputs
from rookery.state import State

# b batch, t time, c width, h heads, n channels of a head


class MixState(NamedTuple):
    """What one block remembers."""

    att_shift: Tensor
    """[b, config.shift_width], the time mix's last input"""
    wkv: Tensor
    """[b, h, value, key], float32 at least"""


class Call(NamedTuple):
    """What every mixer of one call is told."""

    cu_seqlens: Tensor | None
    positions: Tensor
    """int64 [b, t], of each token in its own row or document"""
    real: Tensor | None = None
    """bool [documents, longest] where kept attention gives each document of a packed row a row of its own"""
    place: Place | None = None
    """Where the tokens stand in the caches of kept attention; None without any"""


class Attention(transformer.Attention):
    """The teacher's softmax attention, in blocks that keep it."""

    def __init__(self, config: ConvertedConfig) -> None:
        super().__init__(config.attention)

    def forward(
        self, x: Tensor, state: KeyValues, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, KeyValues, Tensor | None]:
        rows = x if call.real is None else unpack(x, call.real)
        y, state = super().forward(rows, state, call.place)
        return y if call.real is None else y[call.real][None], state, v_first


class Block(nn.Module):
    """A time mix in place of attention, and the MLP, each on the norm of the residual stream."""

    def __init__(self, config: ConvertedConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = mixer
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, state: MixState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, MixState, Tensor | None]:
        mixed, state, v_first = self.self_attn(self.input_layernorm(x), state, v_first, call)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), state, v_first


class Body(nn.Module):
    """Everything whose published names start with "model."."""

    def __init__(self, config: ConvertedConfig, mixers: list[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in mixers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Converted(LanguageModel):
    """Base of the converted transformers: a family defines `mixer` and `init_mixer`.

    `output, state, v_first = mixer(x, state, v_first, call)` stands where `self_attn` stood.
    """

    def __init__(self, config: ConvertedConfig) -> None:
        super().__init__()
        self.config = config
        kept = config.attention_layers
        mixers = [Attention(config) if i in kept else self.mixer(config, i) for i in range(config.num_hidden_layers)]
        self.model = Body(config, mixers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def mixer(config: ConvertedConfig, layer: int) -> nn.Module:
        """What stands where the attention of block `layer` stood."""
        raise NotImplementedError

    def init_mixer(self, mixer: nn.Module, layer: int, generator: torch.Generator) -> None:
        """Gives the parameters of a mixer their initial values."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        return self.lm_head

    @property
    def static_step(self) -> bool:
        """Attention that was kept has a growing cache."""
        return not self.config.attention_layers

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.check_tokens(tokens, state, cu_seqlens)
        call = self.call(tokens, state, cu_seqlens)
        x = self.model.embed_tokens(tokens)
        layers, v_first = [], None
        for block, before in zip(self.model.layers, state.layers, strict=True):
            x, after, v_first = block(x, before, v_first, call)
            layers.append(after)
        read = cu_seqlens.diff() if cu_seqlens is not None else tokens.shape[1]
        return self.model.norm(x), State(tuple(layers), state.tokens_seen + read, self.config)

    def call(self, tokens: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        """What the mixers are told of a call."""
        call = Call(cu_seqlens, _positions(tokens, state.tokens_seen, cu_seqlens))
        if not self.config.attention_layers:
            return call
        cached = state.layers[self.config.attention_layers[0]].keys.shape[2]
        real = None
        if cu_seqlens is not None:
            real = row_mask(cu_seqlens)
            tokens = unpack(tokens, real)
        return call._replace(real=real, place=place_of(tokens, state.tokens_seen, cached, real))

    def init_state(self, batch: int = 1) -> State:
        like, config = self.model.norm.weight, self.config
        wide = torch.promote_types(like.dtype, torch.float32)
        mixed = MixState(
            like.new_zeros(batch, config.shift_width), like.new_zeros(batch, *config.wkv_shape, dtype=wide)
        )
        layers: list[MixState | KeyValues] = [mixed] * config.num_hidden_layers
        for i in config.attention_layers:
            shape = (batch, config.attention.num_key_value_heads, 0, config.attention.head_dim)
            layers[i] = KeyValues(like.new_zeros(shape), like.new_zeros(shape))
        tokens_seen = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return State(tuple(layers), tokens_seen, config)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self.model.embed_tokens.weight, self.model.norm.weight

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Norms 1, every matrix of the body N(0, 0.02), as a new transformer; the mixers have their own values.

        A conversion copies the body from its teacher and keeps the mixers' (adaptation.md A.2, B.2).
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        for name, parameter in self.named_parameters():
            if ".self_attn." not in name:
                parameter.fill_(1) if parameter.dim() == 1 else normal_(parameter, 0.02, generator)
        for layer, block in enumerate(self.model.layers):
            if layer not in self.config.attention_layers:
                self.init_mixer(block.self_attn, layer, generator)
                continue
            for parameter in block.self_attn.parameters():
                parameter.zero_() if parameter.dim() == 1 else normal_(parameter, 0.02, generator)


def _positions(tokens: Tensor, seen: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    if cu_seqlens is None:
        return seen[:, None] + columns
    lengths = cu_seqlens.diff()
    starts = (seen - cu_seqlens[:-1]).repeat_interleave(lengths)  # each document goes on where its row stands
    return (columns + starts)[None]


class TimeMix(rwkv7.TimeMix):
    """RWKV-7's time mix (arXiv 2503.14456, eq. 3-21) without its gate or its norm, where the config says so."""

    def __init__(self, config: ARWKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        if layer == config.first_mixer and layer:
            del self.v0, self.v1, self.v2  # nothing before it to mix values with, though blocks with attention
        if config.gate == "none":
            del self.x_g, self.g1, self.g2
        if not config.has_group_norm:
            del self.ln_x

    def forward(
        self, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config, gated = self.config, self.config.gate != "none"
        letters = "rwkvag" if gated else "rwkva"
        mix = torch.cat([getattr(self, f"x_{name}") for name in letters]).flatten(1)
        mixed, shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        xr, xw, xk, xv, xa = mixed[:5]

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        if v_first is None:
            v_first = v
        else:
            share = (self.v0 + xv @ self.v1 @ self.v2).sigmoid()
            v = v.lerp(v_first, share.to(v.dtype))  # under autocast sums are wider than products
        log_w, k, a, b = wkv7_inputs(
            k=k,
            decay_logit=self.w0 + (xw @ self.w1).tanh() @ self.w2,
            rate_logit=self.a0 + xa @ self.a1 @ self.a2,
            k_k=self.k_k.flatten(),
            k_a=self.k_a.flatten(),
            head_dim=config.head_dim,
        )
        r, v = r.unflatten(-1, (-1, config.head_dim)), v.unflatten(-1, (-1, config.head_dim))
        y, wkv = wkv7(r=r, log_w=log_w, k=k, v=v, a=a, b=b, state=wkv, cu_seqlens=cu_seqlens)
        if config.has_group_norm:
            y = norm_of_heads(self.ln_x, y)
        y = (y + (r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        if gated:
            gate = (mixed[5] @ self.g1).sigmoid() @ self.g2
            y = y * (1 + gate if config.gate == "delta" else gate)
        return self.output(y), shift, wkv, v_first


def norm_of_heads(norm: nn.GroupNorm, y: Tensor) -> Tensor:
    """The norm of every head of y [b, t, h, n], affine over all channels."""
    flat = group_norm(y.flatten(0, 1).flatten(1), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return flat.view_as(y)


class Mixer(nn.Module):
    """Where the time mix stands in the published names: "self_attn.time_mixer."."""

    def __init__(self, config: ARWKVConfig, layer: int) -> None:
        super().__init__()
        self.time_mixer = TimeMix(config, layer)

    def forward(
        self, x: Tensor, state: MixState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, MixState, Tensor]:
        y, shift, wkv, v_first = self.time_mixer(x, state.att_shift, state.wkv, v_first, call.cu_seqlens)
        return y, MixState(shift, wkv), v_first


class ARWKV(Converted):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    mixer = Mixer

    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the mixers' are those of adaptation.md A.2.1.

        Nothing is taken from the attention that stood here. ρ, ρ₁, d and e are those of RWKV-7.

        | parameter | value |
        |---|---|
        | norms | 1 |
        | `embed_tokens`, `lm_head`, `gate_proj`, `up_proj`, `down_proj` | N(0, 0.02), as in a new transformer |
        | `x_r` | 1 − d^(0.2ρ₁) |
        | `x_w`, `x_a` | 1 − d^(0.9ρ₁) |
        | `x_k`, `x_v` | 1 − (d^(0.9ρ₁) + 0.4ρ), 1 − (d^(0.4ρ₁) + 0.6ρ) |
        | `x_g` | 1 |
        | `w0` | −7 + 5 e^(0.85 + √ρ) + 0.5 |
        | `a0`, `v0`, `k_k`, `k_a`, `r_k` | 0, 1, 0.85, 1, 0 |
        | `w1 a1 v1`, and `g1 g2` of a delta gate | 0 |
        | `w2 a2 v2 g2` | orthogonal, gain 0.1 |
        | `receptance key value output` | U(−1/√width, 1/√width) |
        | `q_proj k_proj v_proj o_proj` of attention that stays | N(0, 0.02), biases 0 |
        """
        super().init_weights(seed)

    def init_mixer(self, mixer: Mixer, layer: int, generator: torch.Generator) -> None:
        mix, config = mixer.time_mixer, self.config
        rho, rho1, d, e = place(config, layer)
        vectors = {
            **{f"x_{name}": 1 - d ** (power * rho1) for name, power in zip("rwa", (0.2, 0.9, 0.9))},
            "x_k": 1 - (d ** (0.9 * rho1) + 0.4 * rho),
            "x_v": 1 - (d ** (0.4 * rho1) + 0.6 * rho),
            "w0": -6.5 + 5 * e ** (0.85 + rho**0.5),
        }
        constants = {"x_g": 1.0, "a0": 0.0, "v0": 1.0, "k_k": 0.85, "k_a": 1.0, "r_k": 0.0, "ln_x.weight": 1.0}
        for name, parameter in mix.named_parameters():
            if name in vectors:
                parameter.copy_(vectors[name].view_as(parameter))
            elif name in constants:
                parameter.fill_(constants[name])
            elif name.endswith(".weight"):
                bound = config.hidden_size**-0.5
                parameter.copy_(2 * bound * torch.rand(parameter.shape, generator=generator) - bound)
            elif name[1] == "2" and not (name == "g2" and config.gate == "delta"):
                orthogonal_(parameter, 0.1, generator)
            else:
                parameter.zero_()
