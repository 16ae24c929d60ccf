"""RWKV-7a (core.md 1.6): RWKV-7 whose hidden units are gated by a bilinear form that every token brings along.

The tables hold most of the weights, and a token needs one row of each: at inference they may stay on disk, see
`rookery.nn.table`.
"""

import torch
from torch import Tensor, nn

from rookery.families.rwkv7a import FAMILY, RWKV7aConfig
from rookery.models.rwkv7 import RWKV7, ChannelMix
from rookery.nn.rwkv import Block, Call, LayerState, set_matrices
from rookery.ops.relu_squared import relu_squared
from rookery.ops.token_shift import token_shift

# b batch, t time, c width, f hidden units, n embed_rank


class DeepEmbedMix(ChannelMix):
    """RWKV-7's channel mix with hidden units times (x·s1 · E[token])·s2 + s0."""

    def __init__(self, config: RWKV7aConfig) -> None:
        super().__init__(config)
        rank = config.embed_rank
        self.rank = rank
        self.s_emb = nn.Embedding(config.vocab_size, rank**2)
        self.s_emb_x = nn.Linear(config.hidden_size, rank**2, bias=False)
        self.s0 = nn.Parameter(torch.empty(config.intermediate_size))
        self.s1 = nn.Parameter(torch.empty(config.hidden_size, rank))
        self.s2 = nn.Parameter(torch.empty(rank, config.intermediate_size))

    def forward(self, x: Tensor, shift: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        (xk,), shift = token_shift(x=x, mix=self.x_k.flatten(1), previous=shift, cu_seqlens=call.cu_seqlens)
        table = self.s_emb(call.tokens) + self.s_emb_x(call.embedded)
        # the gate sees the token itself, not the shifted mixture
        form = (x @ self.s1)[..., None, :] @ table.unflatten(-1, (self.rank, self.rank))  # [b, t, 1, n]
        gate = form[..., 0, :] @ self.s2 + self.s0  # [b, t, f]
        return self.value(relu_squared(x=self.key(xk)) * gate), shift


class TokenBlock(Block):
    """A block whose channel mix is told the tokens."""

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        mixed, att_shift, wkv, v_first = self.att(self.ln1(x), state.att_shift, state.wkv, v_first, call.cu_seqlens)
        x = x + mixed
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, call)
        return x + mixed, LayerState(att_shift, wkv, ffn_shift), v_first


GATE_GAIN = {
    "ffn.s_emb.weight": 0.0,
    "ffn.s_emb_x.weight": 1.0,
    "ffn.s1": 0.1,
    "ffn.s2": 0.0,
}
"""Gain of each orthogonal matrix of a gate; 0 means zeros."""


class RWKV7a(RWKV7):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name

    @staticmethod
    def channel_mix(config: RWKV7aConfig, layer: int) -> DeepEmbedMix:
        return DeepEmbedMix(config)

    def block(self, config: RWKV7aConfig, layer: int) -> TokenBlock:
        mixes = self.time_mix(config, layer), self.channel_mix(config, layer)
        return TokenBlock(*mixes, config.hidden_size, config.layer_norm_eps, first=layer == 0)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        No training code is published: the gates are ours, and a fresh model computes what a fresh RWKV-7 does.

        | parameter | value |
        |---|---|
        | `att`, `ffn.x_k`, `ffn.key`, `ffn.value`, `emb`, `head` | as in RWKV-7 |
        | `s0` | 1 |
        | `s_emb.weight`, `s2` | 0 |
        | `s_emb_x` | orthogonal, gain 1 |
        | `s1` | orthogonal, gain 0.1 |
        | norms | 1, biases 0 |
        """
        super().init_weights(seed)
        generator = torch.Generator().manual_seed(1 + (seed or 0))
        for block in self.blocks:
            block.ffn.s0.fill_(1)
            set_matrices(block, GATE_GAIN, generator)
