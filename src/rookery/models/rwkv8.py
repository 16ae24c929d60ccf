"""RWKV-8 preview rc00 and its hybrid (core.md 1.8): RWKV-7 whose channel mix is scaled by a vector of the token.

The hybrid adds an attention as RWKV-7b does, without token shifts, and applies no norm to the embedding. Tables may
stay on disk at inference, see `rookery.nn.table`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families import rwkv8, rwkv8_hybrid
from rookery.families.rwkv8_hybrid import RWKV8HybridConfig
from rookery.models.rwkv7 import RWKV7, ChannelMix, RWKV7Config
from rookery.models.rwkv7a import TokenBlock
from rookery.models.rwkv7b import AttentionBlock, Text, attend
from rookery.nn.growth import growth
from rookery.nn.rwkv import Call, set_matrices
from rookery.state import State

# b batch, r rows, t new tokens, p positions so far, c width, n cache_rank


class EnnMix(ChannelMix):
    """RWKV-7's channel mix times the vector of the token."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.enn = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, x: Tensor, shift: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        mixed, shift = super().forward(x, shift, call.cu_seqlens)
        return mixed * self.enn(call.tokens), shift


class RWKV8(RWKV7):
    """The language model: `logits, state = model(tokens, state)`."""

    family = rwkv8.FAMILY.name

    @staticmethod
    def channel_mix(config: RWKV7Config, layer: int) -> EnnMix:
        return EnnMix(config)

    def block(self, config: RWKV7Config, layer: int) -> nn.Module:
        mixes = self.time_mix(config, layer), self.channel_mix(config, layer)
        return TokenBlock(*mixes, config.hidden_size, config.layer_norm_eps, first=layer == 0)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        No training code is published: a fresh model computes what a fresh RWKV-7 does.

        | parameter | value |
        |---|---|
        | `att`, `ffn.x_k`, `ffn.key`, `ffn.value`, `emb`, `head` | as in RWKV-7 |
        | `enn` | 1 |
        | norms | 1, biases 0 |
        """
        super().init_weights(seed)
        for block in self.blocks:
            block.ffn.enn.weight.fill_(1)


class HybridState(NamedTuple):
    """What one block remembers: RWKV-7's state, compressed keys and values [r, p, n]."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    keys: Tensor
    values: Tensor


class HybridAttention(nn.Module):
    """Causal attention on low-rank keys and values, scaled by the token."""

    def __init__(self, config: RWKV8HybridConfig) -> None:
        super().__init__()
        vocab, width, dim, rank = config.vocab_size, config.hidden_size, config.query_dim, config.cache_rank
        self.qq = nn.Linear(width, dim, bias=False)
        self.kk = nn.Linear(width, rank, bias=False)
        self.kkup = nn.Linear(rank, dim, bias=False)
        self.ennk = nn.Embedding(vocab, dim)
        self.vv = nn.Linear(width, rank, bias=False)
        self.vvup = nn.Linear(rank, width, bias=False)
        self.emm = nn.Embedding(vocab, width)
        for name, size in zip("qkv", (dim, dim, width), strict=True):
            setattr(self, f"ln{name}", nn.LayerNorm(size, eps=config.layer_norm_eps))

    def forward(self, x: Tensor, cache: tuple[Tensor, ...], call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output [b, t, c] for the residual stream [b, t, c], and the new keys and values."""
        grows, tokens = call.growth, call.shared.tokens
        keys = grows.write(cache[0], grows.rows(self.kk(x)))
        values = grows.write(cache[1], grows.rows(self.vv(x)))
        k = self.lnk(self.kkup(keys) * self.ennk(tokens))
        v = self.lnv(self.vvup(values).tanh() * self.emm(tokens))
        y = attend(grows.rows(self.lnq(self.qq(x))), k, v, 32, 1 / 512, grows)
        return grows.packed(y), (keys, values)


ATTENTION_GAIN = {f"qkv.{name}.weight": 1.0 for name in ("qq", "kk", "kkup", "vv", "vvup")}
"""Gain of each orthogonal matrix of an attention."""


class RWKV8Hybrid(RWKV8):
    """The language model: `logits, state = model(tokens, state)`."""

    family = rwkv8_hybrid.FAMILY.name
    static_step = False

    def block(self, config: RWKV8HybridConfig, layer: int) -> AttentionBlock:
        parts = HybridAttention(config), self.time_mix(config, layer), self.channel_mix(config, layer)
        return AttentionBlock(*parts, width=config.hidden_size, eps=config.layer_norm_eps, first=False)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.emb(tokens)

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        grows = growth(tokens, state.tokens_seen, state.shared.tokens.shape[1], cu_seqlens)
        text = grows.write(state.shared.tokens, grows.rows(tokens.to(torch.int64)))
        return Call(tokens, embedded, cu_seqlens, growth=grows, shared=Text(text))

    def init_state(self, batch: int = 1) -> State:
        state = super().init_state(batch)
        return replace(state, shared=Text(state.tokens_seen.new_zeros(batch, 0)))

    def empty_layer(self, batch: int) -> HybridState:
        nothing = self.emb.weight.new_zeros(batch, 0, self.config.cache_rank)
        return HybridState(*super().empty_layer(batch), nothing, nothing)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        No training code is published: the attention is ours, and a fresh model computes what a fresh RWKV-7 does
        whose embedding passes no norm.

        | parameter | value |
        |---|---|
        | `att`, `ffn`, `emb.weight`, `head` | as in rc00 |
        | `qq`, `kk`, `kkup`, `vv`, `vvup` | orthogonal, gain 1 |
        | `ennk`, `emm` | 1 |
        | `lnv.weight` | 0 |
        | norms | 1, biases 0 |
        """
        super().init_weights(seed)
        generator = torch.Generator().manual_seed(2 + (seed or 0))
        for block in self.blocks:
            set_matrices(block, ATTENTION_GAIN, generator)
            block.qkv.ennk.weight.fill_(1)
            block.qkv.emm.weight.fill_(1)
            block.qkv.lnv.weight.zero_()
