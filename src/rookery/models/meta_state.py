"""Meta-State (arXiv 2504.08247): RWKV-7 with a self-state encoder in its channel mix, and growth along every axis.

An interpretation; there are no public code, weights or tables to compare with (state_methods.md 2.3). A block's channel
mix reads the state that its time mix has just left:

    q = x̂ of some blocks of channels    s = S_t q    u = x_k;  u[these channels] += η ⊙ norm(s)    y = V relu(K u)²

The token itself asks, what is read is linear in the state, and there are no new matrices: the state is the weights.
With η = 0 it is RWKV-7, bit for bit.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rookery.families.meta_state import FAMILY, MetaStateConfig
from rookery.models.rwkv7 import MATRIX_GAIN, RWKV7, ChannelMix, Signals, initial_2024, initial_2025_05
from rookery.nn.rwkv import Block, Call, set_matrices, set_vectors
from rookery.nn.rwkv import LayerState as PlainState
from rookery.ops.relu_squared import relu_squared
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7 import wkv7

if TYPE_CHECKING:
    from rookery.models.grow import Grown

# b batch, t time, c width, e encoder heads, n channels of a head, f parameter tokens

ETA = 0.1
"""Initial strength of the encoder in a model that is trained from scratch."""


class OwnState(NamedTuple):
    """What one block remembers with `evolve="own"`: RWKV-7's state and that of the channel mix."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    meta: Tensor
    """[b, e, n, n], value × key"""


class MetaMix(ChannelMix):
    """RWKV-7's channel mix, whose input is encoded by a state."""

    def __init__(self, config: MetaStateConfig) -> None:
        super().__init__(config)
        self.config = config
        learned = config.eta == "learned"
        self.sse_eta = nn.Parameter(torch.empty(len(config.encoder_heads) * config.head_dim), requires_grad=learned)

    def forward(
        self, x: Tensor, state: NamedTuple, signals: Signals, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output [b, t, c], the new shift, and the new own state (None where there is none).

        `state` is the block's before these tokens, `signals` what its time mix made of them.
        """
        (xk,), shift = token_shift(x=x, mix=self.x_k.flatten(1), previous=state.ffn_shift, cu_seqlens=cu_seqlens)
        if self.config.evolve == "own":
            y, meta = self.answering(x, xk, signals, state.meta, cu_seqlens)
            return y, shift, meta
        if not self.config.encoder_heads:
            return self.answer(xk), shift, None
        s = self.read(x, signals, state.wkv, cu_seqlens)
        return self.answer(self.encoded(xk, s)), shift, None

    def read(self, x: Tensor, signals: Signals, wkv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """S_t q_t for every token, [b, t, e, n]: the time mix's recurrence once more, read by the residual stream.

        `wkv` is the state before the tokens; the state after them is the time mix's own.
        """
        heads = self.heads(wkv.device)
        inputs = {name: part.index_select(2, heads) for name, part in signals.inputs().items() if name != "r"}
        state = wkv.index_select(1, heads)
        return wkv7(r=self.query(x).to(inputs["v"].dtype), **inputs, state=state, cu_seqlens=cu_seqlens)[0]

    def query(self, x: Tensor) -> Tensor:
        """Unit vectors [b, t, e, n] from the encoder's blocks of channels: nothing is projected."""
        return normalize(self.blocked(x).index_select(-2, self.channels(x.device)), dim=-1)

    def encoded(self, xk: Tensor, s: Tensor) -> Tensor:
        """The channel mix's input with η ⊙ norm(s) added to the encoder's channels."""
        eta = self.sse_eta.view(len(self.config.encoder_heads), -1)
        added = (eta * head_norm(s, self.config.group_norm_eps).to(eta.dtype)).to(xk.dtype)
        return self.blocked(xk).index_add(-2, self.channels(xk.device), added).flatten(-2)

    def answer(self, u: Tensor) -> Tensor:
        """What the parameter tokens say to an encoded input, [b, t, c]."""
        hidden = relu_squared(x=self.key(u))
        config = self.config
        if config.active_groups < config.groups:
            grouped = hidden.unflatten(-1, (config.groups, -1))
            chosen = grouped.square().sum(-1).topk(config.active_groups, dim=-1).indices
            keep = torch.zeros_like(grouped[..., 0]).scatter(-1, chosen, 1.0)
            hidden = (grouped * keep[..., None]).flatten(-2)
        return self.value(hidden)

    def answering(
        self, x: Tensor, xk: Tensor, signals: Signals, meta: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same with a state of its own, token by token: what was answered is written to it."""
        if cu_seqlens is not None:
            ends, outputs, states = cu_seqlens.tolist(), [], []
            for row, (begin, end) in enumerate(pairwise(ends)):
                own = Signals(*(part[:, begin:end] for part in signals))
                y, after = self.answering(x[:, begin:end], xk[:, begin:end], own, meta[row : row + 1], None)
                outputs.append(y)
                states.append(after)
            return torch.cat(outputs, dim=1), torch.cat(states)
        heads, channels, q = self.heads(x.device), self.channels(x.device), self.query(x).to(meta.dtype)
        parts = (signals.log_w, signals.k, signals.a, signals.b)
        log_w, k, a, b = (part.index_select(2, heads).to(meta.dtype) for part in parts)
        outputs = []
        for t in range(x.shape[1]):
            s = (meta @ q[:, t, ..., None])[..., 0]
            y = self.answer(self.encoded(xk[:, t], s))
            v = self.blocked(y).index_select(-2, channels).to(meta.dtype)
            removed = (meta @ a[:, t, ..., None]) * b[:, t, ..., None, :]
            meta = meta * log_w[:, t].exp()[..., None, :] + removed + v[..., None] * k[:, t, ..., None, :]
            outputs.append(y)
        return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(xk)), meta

    def blocked(self, x: Tensor) -> Tensor:
        """Channels by blocks of a head's size, [..., c / n, n]."""
        return x.unflatten(-1, (-1, self.config.head_dim))

    def heads(self, device: torch.device) -> Tensor:
        return torch.tensor(self.config.encoder_heads, dtype=torch.int64, device=device)

    def channels(self, device: torch.device) -> Tensor:
        return torch.tensor(self.config.encoder_blocks, dtype=torch.int64, device=device)


def head_norm(s: Tensor, eps: float) -> Tensor:
    """Vectors [..., n] of mean 0 and variance 1, without weights."""
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()).to(s.dtype)


class MetaBlock(Block):
    """A block whose channel mix is told what its time mix has read."""

    def forward(
        self, x: Tensor, state: NamedTuple, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, NamedTuple, Tensor | None]:
        att, cu_seqlens = self.att, call.cu_seqlens
        mixed, att_shift = att.mixed(self.ln1(x), state.att_shift, cu_seqlens)
        signals, v_first = att.signals(mixed, v_first)
        y, wkv = att.recurrence(**signals.inputs(), state=state.wkv, cu_seqlens=cu_seqlens)
        x = x + att.finish(y, signals)
        mixed, ffn_shift, meta = self.ffn(self.ln2(x), state, signals, cu_seqlens)
        after = PlainState(att_shift, wkv, ffn_shift)
        return x + mixed, after if meta is None else OwnState(*after, meta), v_first


class MetaState(RWKV7):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = False

    @staticmethod
    def channel_mix(config: MetaStateConfig, layer: int) -> MetaMix:
        return MetaMix(config)

    def block(self, config: MetaStateConfig, layer: int) -> MetaBlock:
        mixes = self.time_mix(config, layer), self.channel_mix(config, layer)
        return MetaBlock(*mixes, config.hidden_size, config.layer_norm_eps, first=layer == 0)

    def empty_layer(self, batch: int) -> NamedTuple:
        plain, config = super().empty_layer(batch), self.config
        if config.evolve == "wkv":
            return plain
        size = config.head_dim
        return OwnState(*plain, plain.wkv.new_zeros(batch, len(config.encoder_heads), size, size))

    @classmethod
    def from_rwkv7(cls, model: RWKV7, **chosen) -> MetaState:
        """A Meta-State model with the weights of an RWKV-7 and η = 0: it computes what that computes, bit for bit.

        `chosen` are fields of the config (`sse_ratio`, `evolve`, `groups`, …). ValueError for another family's model.
        """
        if type(model) is not RWKV7:
            raise ValueError(f"Meta-State is made from rwkv7 models, this one is {model.family}")
        sizes = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
        config = MetaStateConfig(**sizes, **chosen)
        weights = model.emb.weight
        with torch.device("meta"):
            made = cls(config)
        made.to_empty(device=weights.device)
        made.to(weights.dtype).init_weights(0)
        made.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, strict=False)
        if config.eta == "learned":
            for block in made.blocks:
                block.ffn.sse_eta.detach().zero_()
        return made.train(model.training)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        | parameter | value |
        |---|---|
        | `sse_eta` | 0.1; 1 where it is not learned |
        | `att`, `ffn.x_k`, `ffn.key`, `ffn.value`, `emb`, `head` | as in RWKV-7, those of a wider time mix as there |
        | norms | 1, biases 0 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        config = self.config
        inner = config.num_heads * config.head_dim
        vectors = initial_2024 if config.init == "v7-2024" else initial_2025_05
        wide = replace(config, hidden_size=inner, encoder_blocks=None, encoder_heads=())
        self.init_norms()
        for layer, block in enumerate(self.blocks):
            own, of_heads = vectors(config, layer), vectors(wide, layer)
            size = {name: block.get_parameter(name).numel() for name in own}
            set_vectors(block, {n: own[n] if own[n].numel() == size[n] else of_heads[n] for n in own})
            set_matrices(block, MATRIX_GAIN, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / config.num_hidden_layers) ** 0.7)
            block.ffn.sse_eta.fill_(ETA if config.eta == "learned" else 1.0)
        self.init_embedding_and_head(generator)

    def grow(self, **by) -> Grown:
        """Makes the model larger in place, without a change of what it computes; see `rookery.models.grow.grow`."""
        from rookery.models.grow import grow

        return grow(self, **by)
