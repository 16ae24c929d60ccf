"""ROSA language models (core.md 1.8): every block retrieves by longest match, then thinks with RWKV-7's channel mix.

x = x + rosa(ln3 x);  x = x + ffn(ln2 x). Nothing recurs: the state is the history of queries, keys and values. It keeps
their numbers and not only their signs, because the gradient over a flipped bit asks how far it was from flipping.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rosa import FAMILY, RosaConfig
from rookery.models.rwkv7 import ChannelMix
from rookery.nn.growth import growth
from rookery.nn.rwkv import RWKV, Call, place, set_matrices, set_vectors
from rookery.ops.rosa import rosa
from rookery.ops.token_shift import token_shift
from rookery.state import State

# b batch, r rows, t new tokens, p positions so far, c width


class History(NamedTuple):
    """What one ROSA mixer remembers."""

    shift: Tensor
    """[r, c], its last input"""
    q: Tensor
    """[r, p, c], and so are k and v"""
    k: Tensor
    v: Tensor


class Retrieved(nn.Module):
    """The vector that a retrieved bit adds or takes away, per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.Parameter(torch.empty(1, 1, width))


class RosaMix(nn.Module):
    """ROSA-QKV between two linear maps: `±emb` by the bit that followed the longest match of the query in the keys."""

    def __init__(self, width: int, bits: int, *, unmatched: int) -> None:
        super().__init__()
        self.bits, self.unmatched = bits, unmatched
        for name in "qkv":
            setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, width)))
        for name in "qkvo":
            setattr(self, name, nn.Linear(width, width))
        self.rosa_qkv = Retrieved(width)

    def forward(self, x: Tensor, before: History, call: Call) -> tuple[Tensor, History]:
        """Output [b, t, c] for x [b, t, c], and the lengthened history."""
        grows = call.growth
        mix = torch.cat([self.x_q, self.x_k, self.x_v]).flatten(1)
        (xq, xk, xv), shift = token_shift(x=x, mix=mix, previous=before.shift, cu_seqlens=call.cu_seqlens)
        q = grows.write(before.q, grows.rows(self.q(xq)))
        k = grows.write(before.k, grows.rows(self.k(xk)))
        v = grows.write(before.v, grows.rows(self.v(xv)))
        ones, zeros = rosa(q=q, k=k, v=v, start=grows.start, time=grows.positions.shape[1], bits=self.bits)
        answer = ones - zeros + self.unmatched * (1 - ones - zeros)
        return self.o(grows.packed(answer) * self.rosa_qkv.emb), History(shift, q, k, v)

    @staticmethod
    def empty(like: Tensor, batch: int, width: int) -> History:
        """The history before the first token, of `like`'s dtype and device."""
        nothing = like.new_zeros(batch, 0, width)
        return History(like.new_zeros(batch, width), nothing, nothing, nothing)


class LayerState(NamedTuple):
    """What one block remembers: the mixer's history, and the channel mix's last input [r, c]."""

    shift: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    ffn_shift: Tensor


class Block(nn.Module):
    """Retrieval and channel mix, each on the norm of the residual stream."""

    def __init__(self, config: RosaConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln2 = nn.LayerNorm(width, eps=eps)
        self.ln3 = nn.LayerNorm(width, eps=eps)
        self.rosa = RosaMix(width, config.bits, unmatched=-1 if config.bits == 1 else 0)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, state: LayerState, v_first: None, call: Call) -> tuple[Tensor, LayerState, None]:
        retrieved, history = self.rosa(self.ln3(x), History(*state[:4]), call)
        x = x + retrieved
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, call.cu_seqlens)
        return x + mixed, LayerState(*history, ffn_shift), None


class Rosa(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name

    def block(self, config: RosaConfig, layer: int) -> Block:
        return Block(config, layer)

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        grows = growth(tokens, state.tokens_seen, state.layers[0].q.shape[1], cu_seqlens)
        return Call(tokens, embedded, cu_seqlens, growth=grows)

    def empty_layer(self, batch: int) -> LayerState:
        history = RosaMix.empty(self.emb.weight, batch, self.config.hidden_size)
        return LayerState(*history, history.shift)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        No training code of these models is published: the values of `rosa` are ours, the others RWKV-7's.

        | parameter | value |
        |---|---|
        | `x_q`, `x_k`, `x_v` | 1 − d^(0.7ρ₁), as RWKV-7's `x_k` |
        | `rosa.q.weight`, `rosa.k.weight`, `rosa.v.weight` | orthogonal, gain 1 |
        | `rosa.o.weight`, `ffn.value` | 0 |
        | `rosa.*.bias` | 0 |
        | `rosa_qkv.emb` | 1 |
        | `ffn.x_k` | 1 − d^(ρ₁⁴) |
        | `ffn.key` | orthogonal, gain 1 |
        | `emb` | U(−1e-4, 1e-4) |
        | `head` | orthogonal, gain ½ √(max(1, vocab / width)) |
        | norms | 1, biases 0 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_norms()
        for layer, block in enumerate(self.blocks):
            rho1, d = place(self.config, layer)[1:3]
            set_vectors(block, initial_mix(rho1, d, "rosa.") | {"ffn.x_k": 1 - d ** (rho1**4)})
            set_matrices(block, {**mix_gains("rosa."), "ffn.key.weight": 1.0, "ffn.value.weight": 0.0}, generator)
        self.init_embedding_and_head(generator)


def initial_mix(rho1: float, d: Tensor, prefix: str) -> dict[str, Tensor]:
    """Initial vectors of a mixer by name."""
    mixes = {f"{prefix}x_{name}": 1 - d ** (0.7 * rho1) for name in "qkv"}
    return mixes | {f"{prefix}{n}.bias": 0 * d for n in "qkvo"} | {f"{prefix}rosa_qkv.emb": torch.ones_like(d)}


def mix_gains(prefix: str) -> dict[str, float]:
    """Gains of a mixer's orthogonal matrices; the output starts at zero, so that a fresh block changes nothing."""
    return {f"{prefix}{name}.weight": 1.0 for name in "qkv"} | {f"{prefix}o.weight": 0.0}
