"""A transformer: the baseline and the teacher of everything else.

Llama and Qwen2 in one file: RMS norm, rotary positions, grouped queries, gated MLP (arXiv 2302.13971, 2407.10671).
Parameters have the names of Hugging Face checkpoints. The cache of a row is ordered by position, so that a mask, packed
documents and any cut into calls give the same numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from rookery.families.transformer import FAMILY, TransformerConfig
from rookery.nn.initial import normal_
from rookery.nn.language_model import LanguageModel
from rookery.nn.packing import row_mask, unpack
from rookery.state import State

# b batch, t new tokens, p positions so far and new, h heads, d channels of a head, c width


class KeyValues(NamedTuple):
    """One layer's cache: [b, h, p, d] each, entry j of a row belongs to its position j."""

    keys: Tensor
    values: Tensor


class Place(NamedTuple):
    """Where the new tokens of a call stand."""

    positions: Tensor
    """int64 [b, t], −1 at padding."""
    length: int
    """Cache entries after the call."""
    appends: bool
    """True if every row's cache simply grows by t entries."""
    visible: Tensor | None
    """bool [b, 1, t, length], the entries each query sees; None where the causal triangle (or everything) says it."""


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [b, h, t, d] at positions [b, t]; channel i is paired with i + d/2 (RoFormer, eq. 34)."""
    half = x.shape[-1] // 2
    # float32 angles at least: bfloat16 cannot tell position 1000 from 1001
    wide = torch.promote_types(x.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = positions[:, None, :, None] * frequencies  # [b, 1, t, d/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def place_of(tokens: Tensor, seen: Tensor, cached: int, real: Tensor | None, *, causal: bool = True) -> Place:
    """Positions of new `tokens` [b, t] after `seen` [b] and what they see in caches of `cached` entries.

    `real` [b, t] is false at padding.
    """
    positions = seen[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    appends = real is None and bool((seen == cached).all())
    if real is not None:
        positions = positions.where(real, -1)
    if tokens.numel() == 0:
        return Place(positions, cached, True, None)
    length = cached + tokens.shape[1] if appends else max(cached, int(positions.max()) + 1)
    if appends and cached == 0:
        return Place(positions, length, appends, None)
    last = positions if causal else positions.amax(dim=1, keepdim=True).expand_as(positions)
    # padding sees entry 0, because a softmax over nothing is NaN
    visible = torch.arange(length, device=tokens.device) <= last.clamp(min=0)[..., None]
    return Place(positions, length, appends, visible[:, None])


class Attention(nn.Module):
    """Softmax attention over everything a row has seen."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, width, bias=False)

    def forward(self, x: Tensor, cache: KeyValues, place: Place) -> tuple[Tensor, KeyValues]:
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.rope_theta is not None:
            q, k = (rotate(part, place.positions, self.config.rope_theta) for part in (q, k))
        cache = KeyValues(write(cache.keys, k, place), write(cache.values, v, place))
        y = scaled_dot_product_attention(
            q,
            cache.keys,
            cache.values,
            attn_mask=place.visible,
            is_causal=place.visible is None and self.config.is_causal,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return self.o_proj(y.transpose(1, 2).flatten(2)), cache

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [b, h, t, d]


def write(cache: Tensor, new: Tensor, place: Place) -> Tensor:
    """`cache` [b, h, p, d] with `new` [b, h, t, d] at its positions; padding is left out."""
    if place.appends:
        return torch.cat([cache, new], dim=2) if cache.shape[2] else new
    grown = pad(cache, (0, 0, 0, place.length + 1 - cache.shape[2]))
    # one entry more takes the padding and is cut off again
    index = place.positions.where(place.positions >= 0, place.length)
    return grown.scatter(2, index[:, None, :, None].expand_as(new), new)[:, :, :-1]


class MLP(nn.Module):
    """Gated MLP (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each on the norm of the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValues, place: Place) -> tuple[Tensor, KeyValues]:
        attended, cache = self.self_attn(self.input_layernorm(x), cache, place)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Body(nn.Module):
    """Embedding, blocks and last norm: everything whose published names start with "model."."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(LanguageModel):
    """A decoder (or, with `is_causal=False`, an encoder) that obeys the contract of every language model here."""

    family = FAMILY.name

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head(self) -> nn.Module:
        return self.lm_head

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if state is not None and not self.config.is_causal:
            raise ValueError("an encoder (is_causal=False) reads whole rows and takes no state")
        state = self.check_tokens(tokens, state, cu_seqlens)
        real = None
        if cu_seqlens is not None:  # one row per document, so that attention stays within each
            real = row_mask(cu_seqlens)
            tokens = unpack(tokens, real)
        cached = state.layers[0].keys.shape[2]
        place = place_of(tokens, state.tokens_seen, cached, real, causal=self.config.is_causal)
        x = self.model.embed_tokens(tokens)
        caches = []
        for block, cache in zip(self.model.layers, state.layers, strict=True):
            x, cache = block(x, cache, place)
            caches.append(cache)
        x = self.model.norm(x)
        read = torch.full_like(state.tokens_seen, tokens.shape[1]) if real is None else real.sum(dim=1)
        if real is not None:
            x = x[real][None]
        return x, State(tuple(caches), state.tokens_seen + read, self.config)

    def init_state(self, batch: int = 1) -> State:
        like = self.model.norm.weight
        shape = (batch, self.config.num_key_value_heads, 0, self.config.head_dim)
        layers = tuple(KeyValues(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.model.layers)
        return State(layers, torch.zeros(batch, dtype=torch.int64, device=like.device), self.config)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self.model.embed_tokens.weight, self.model.norm.weight

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        | parameter | value |
        |---|---|
        | norms | 1 |
        | biases | 0 |
        | `o_proj`, `down_proj` | N(0, 0.02 / √(2 · layers)) (GPT-2) |
        | every other matrix | N(0, 0.02) |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        residual = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1)
            else:
                std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                normal_(parameter, std, generator)
