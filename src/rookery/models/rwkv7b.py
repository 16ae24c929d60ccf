"""RWKV-7b (core.md 1.7): RWKV-7a with a causal attention beside the time mix.

x = x + tmix(ln1 x) + attention(x). Its cache keeps a few numbers per token; keys and values are made from these and
from tables indexed by the token, for all tokens in every call.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rwkv7b import FAMILY, RWKV7bConfig
from rookery.models.rwkv7a import RWKV7a
from rookery.nn.growth import Growth, growth
from rookery.nn.rwkv import Block, Call, set_matrices
from rookery.ops.token_shift import token_shift
from rookery.state import State

# b batch, r rows, t new tokens, p positions so far, c width, d query channels, n cache_rank


class LayerState(NamedTuple):
    """What one block remembers: RWKV-7's state, the last query [r, d], compressed keys and values [r, p, n]."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    q_shift: Tensor
    keys: Tensor
    values: Tensor


class Text(NamedTuple):
    """What all blocks remember: the tokens, int64 [r, p]."""

    tokens: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float, grows: Growth) -> Tensor:
    """Causal attention [r, t, c] with scores cap · tanh(q·k · scale); q [r, t, d], k [r, p, d], v [r, p, c]."""
    scores = cap * ((q @ k.mT) * scale).tanh()
    # padding sees entry 0, because a softmax over nothing is NaN
    hidden = torch.arange(k.shape[1], device=q.device) > grows.positions.clamp(min=0)[..., None]
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


def shifted(x: Tensor, mix: Tensor) -> Tensor:
    """Every entry of a whole history [r, p, c] mixed with the one before it."""
    before = nn.functional.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]
    return x + (before - x) * mix


class DeepEmbedAttention(nn.Module):
    """Attention on keys and values that are low-rank in x and scaled, channel by channel, by the token."""

    def __init__(self, config: RWKV7bConfig) -> None:
        super().__init__()
        vocab, width, dim, rank = config.vocab_size, config.hidden_size, config.query_dim, config.cache_rank
        self.qq = nn.Linear(width, dim, bias=False)
        for name, size in (("k", dim), ("v", width)):
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, size)))
            setattr(self, f"{name}_emb", nn.Embedding(vocab, size))
            setattr(self, f"{name}_emb_x", nn.Linear(width, size, bias=False))
        for name, size in (("q", dim), ("k", dim), ("v", width)):
            setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, size)))
            setattr(self, f"ln{name}", nn.LayerNorm(size, eps=config.layer_norm_eps))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output [b, t, c] for the residual stream [b, t, c], and the new last query, keys and values."""
        shift, keys, values = cache
        grows, tokens = call.growth, call.shared.tokens
        (q,), shift = token_shift(x=self.qq(x), mix=self.x_q.flatten(1), previous=shift, cu_seqlens=call.cu_seqlens)
        keys = grows.write(keys, grows.rows(x @ self.k1))
        values = grows.write(values, grows.rows(x @ self.v1))
        k = (keys @ self.k2) * (self.k_emb(tokens) + self.k_emb_x(call.past))
        v = (values @ self.v2).tanh() * (self.v_emb(tokens) + self.v_emb_x(call.past))
        k, v = self.lnk(shifted(k, self.x_k)), self.lnv(shifted(v, self.x_v))
        y = attend(grows.rows(self.lnq(q)), k, v, 64, 1 / 1024, grows)
        return grows.packed(y), (shift, keys, values)


class AttentionBlock(Block):
    """A block with attention beside the time mix, and a channel mix that is told the tokens."""

    def __init__(self, qkv: nn.Module, *mixes: nn.Module, width: int, eps: float, first: bool) -> None:
        super().__init__(*mixes, width, eps, first=first)
        self.qkv = qkv

    def forward(
        self, x: Tensor, state: NamedTuple, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, NamedTuple, Tensor | None]:
        attended, cache = self.qkv(x, state[3:], call)
        mixed, att_shift, wkv, v_first = self.att(self.ln1(x), state.att_shift, state.wkv, v_first, call.cu_seqlens)
        x = x + mixed + attended
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, call)
        return x + mixed, type(state)(att_shift, wkv, ffn_shift, *cache), v_first


ATTENTION_GAIN = {
    "qkv.qq.weight": 1.0,
    "qkv.k1": 1.0,
    "qkv.k2": 1.0,
    "qkv.k_emb.weight": 0.0,
    "qkv.k_emb_x.weight": 1.0,
    "qkv.v1": 1.0,
    "qkv.v2": 1.0,
    "qkv.v_emb.weight": 0.0,
    "qkv.v_emb_x.weight": 1.0,
}
"""Gain of each orthogonal matrix of an attention; 0 means zeros."""


class RWKV7b(RWKV7a):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = False

    def block(self, config: RWKV7bConfig, layer: int) -> AttentionBlock:
        parts = DeepEmbedAttention(config), self.time_mix(config, layer), self.channel_mix(config, layer)
        return AttentionBlock(*parts, width=config.hidden_size, eps=config.layer_norm_eps, first=layer == 0)

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        grows = growth(tokens, state.tokens_seen, state.shared.tokens.shape[1], cu_seqlens)
        text = grows.write(state.shared.tokens, grows.rows(tokens.to(torch.int64)))
        return Call(tokens, embedded, cu_seqlens, self.embed(text), grows, Text(text))

    def init_state(self, batch: int = 1) -> State:
        state = super().init_state(batch)
        return replace(state, shared=Text(state.tokens_seen.new_zeros(batch, 0)))

    def empty_layer(self, batch: int) -> LayerState:
        like, config = self.emb.weight, self.config
        nothing = like.new_zeros(batch, 0, config.cache_rank)
        return LayerState(*super().empty_layer(batch), like.new_zeros(batch, config.query_dim), nothing, nothing)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        No training code is published: the attention is ours, and a fresh model computes what a fresh RWKV-7 does.

        | parameter | value |
        |---|---|
        | `att`, `ffn`, `emb`, `head` | as in RWKV-7a |
        | `qq`, `k1`, `k2`, `v1`, `v2`, `k_emb_x`, `v_emb_x` | orthogonal, gain 1 |
        | `k_emb.weight`, `v_emb.weight` | 0 |
        | `x_q`, `x_k`, `x_v` | 0 |
        | `lnv.weight` | 0 |
        | norms | 1, biases 0 |
        """
        super().init_weights(seed)
        generator = torch.Generator().manual_seed(2 + (seed or 0))
        for block in self.blocks:
            set_matrices(block, ATTENTION_GAIN, generator)
            for parameter in (block.qkv.x_q, block.qkv.x_k, block.qkv.x_v, block.qkv.lnv.weight):
                parameter.zero_()
