"""The skeleton that RWKV-4 to RWKV-7 share (core.md 1.1): embedding, blocks of two mixers, head, and their state.

A family gives a time mix, a channel mix and initial values; nothing here knows which family it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rookery.nn.initial import orthogonal_, uniform_
from rookery.nn.language_model import LanguageModel
from rookery.state import State

# b batch, t time, c width


class LayerState(NamedTuple):
    """What one block remembers."""

    att_shift: Tensor
    """[b, c], the time mix's last input"""
    wkv: Tensor
    """[b, *config.wkv_shape], float32 at least: [h, value, key] since RWKV-5"""
    ffn_shift: Tensor
    """[b, c], the channel mix's last input"""


class Call(NamedTuple):
    """What every block of one call is told besides the residual stream."""

    tokens: Tensor
    """int [b, t]"""
    embedded: Tensor
    """[b, t, c], the residual stream before the first block"""
    cu_seqlens: Tensor | None
    past: Tensor | None = None
    """[r, p, c], what `embedded` was for every token so far"""
    growth: Any = None
    """for families that keep histories: a `Growth`, or a plan of their own"""
    shared: Any = None
    """NamedTuple of what the state after the call holds for all blocks, None where nothing"""
    last: int | None = None
    """of how many last tokens the features are wanted; None for all"""


class Block(nn.Module):
    """Time mix and channel mix, each on the norm of the residual stream.

    `att(x, shift, wkv, v_first, cu_seqlens)` gives its output, the new shift and matrix state and the first block's
    values (families without a value residual pass them on as they are); `ffn(x, shift, cu_seqlens)` output and shift.
    """

    def __init__(self, att: nn.Module, ffn: nn.Module, width: int, eps: float, *, first: bool) -> None:
        super().__init__()
        if first:
            self.ln0 = nn.LayerNorm(width, eps=eps)
        self.ln1 = nn.LayerNorm(width, eps=eps)
        self.ln2 = nn.LayerNorm(width, eps=eps)
        self.att = att
        self.ffn = ffn

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        mixed, att_shift, wkv, v_first = self.att(self.ln1(x), state.att_shift, state.wkv, v_first, call.cu_seqlens)
        x = x + mixed
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, call.cu_seqlens)
        return x + mixed, LayerState(att_shift, wkv, ffn_shift), v_first


def through(
    blocks: Iterable[nn.Module], x: Tensor, layers: Iterable[NamedTuple], call: Call, rescale_every: int = 0
) -> tuple[Tensor, tuple[NamedTuple, ...]]:
    """The residual stream [b, t, c] after `blocks`, and what each remembers then; see `rescale` for `rescale_every`."""
    after, v_first = [], None
    for i, (block, before) in enumerate(zip(blocks, layers, strict=True), start=1):
        x, layer, v_first = block(x, before, v_first, call)
        after.append(layer)
        if rescale_every and i % rescale_every == 0:
            x = x / 2
    return x, tuple(after)


class RWKV(LanguageModel):
    """Base of the RWKV language models: `logits, state = model(tokens, state)`.

    A family defines `time_mix`, `channel_mix` and `init_weights`, and `wkv_shape` in its config. One whose blocks are
    put together otherwise defines `block`, and `empty_layer` where these remember something else.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.emb = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(self.block(config, i) for i in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    @staticmethod
    def time_mix(config: Any, layer: int) -> nn.Module:
        """The time mix of block `layer`."""
        raise NotImplementedError

    @staticmethod
    def channel_mix(config: Any, layer: int) -> nn.Module:
        """The channel mix of block `layer`."""
        raise NotImplementedError

    def block(self, config: Any, layer: int) -> nn.Module:
        """Block `layer`: `x, state, v_first = block(x, state, v_first, call)`."""
        mixes = self.time_mix(config, layer), self.channel_mix(config, layer)
        return Block(*mixes, config.hidden_size, config.layer_norm_eps, first=layer == 0)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first block, [..., c]."""
        return self.blocks[0].ln0(self.emb(tokens))

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        """What the blocks are told about these tokens."""
        return Call(tokens, embedded, cu_seqlens)

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.check_tokens(tokens, state, cu_seqlens)
        x = self.embed(tokens)
        return self.run(x, state, self.call(tokens, x, state, cu_seqlens))

    def run(self, x: Tensor, state: State, call: Call) -> tuple[Tensor, State]:
        """`features` for embedded tokens [b, t, c]."""
        x, layers, shared = self.stack(x, state.layers, call)
        read = call.cu_seqlens.diff() if call.cu_seqlens is not None else call.tokens.shape[1]
        return self.ln_out(x), State(layers, state.tokens_seen + read, self.config, shared)

    def stack(self, x: Tensor, states: Sequence[NamedTuple], call: Call) -> tuple[Tensor, tuple[NamedTuple, ...], Any]:
        """The residual stream after all blocks, their states, and what these share."""
        return *through(self.blocks, x, states, call, getattr(self.config, "rescale_every", 0)), call.shared

    def init_state(self, batch: int = 1) -> State:
        tokens_seen = torch.zeros(batch, dtype=torch.int64, device=self.emb.weight.device)
        empty = self.empty_layer(batch)
        return State((empty,) * len(self.blocks), tokens_seen, self.config)

    def empty_layer(self, batch: int) -> NamedTuple:
        """What one block remembers before the first token."""
        like = self.emb.weight
        shift = like.new_zeros(batch, self.config.hidden_size)
        wkv = self.empty_wkv(batch, torch.promote_types(like.dtype, torch.float32))
        return LayerState(shift, wkv, shift)

    def empty_wkv(self, batch: int, dtype: torch.dtype) -> Tensor:
        """One block's recurrent state before the first token, [batch, *config.wkv_shape]."""
        return self.emb.weight.new_zeros(batch, *self.config.wkv_shape, dtype=dtype)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self.emb.weight, self.ln_out.weight

    def init_norms(self) -> None:
        """Layer and group norms begin as the identity."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()

    def init_embedding_and_head(self, generator: torch.Generator, emb: float = 1e-4) -> None:
        """`emb` is U(−emb, emb), `head` orthogonal with gain ½ √(max(1, vocab / width)), as since RWKV-5."""
        config = self.config
        uniform_(self.emb.weight, emb, generator)
        orthogonal_(self.head.weight, 0.5 * max(1, config.vocab_size / config.hidden_size) ** 0.5, generator)


@torch.no_grad()
def rescale(model: RWKV, every: int = 6) -> None:
    """Changes a finished model, in place, so that its residual stream is halved after every so many blocks.

    Deep RWKV-4 to RWKV-6 models grow beyond 65504, the largest float16. What block i adds, the output of `att.output`
    and of `ffn.value`, is divided by 2^(i // every); all that reads the stream is a layer norm, which does not see a
    factor (but for its epsilon), so the logits stay what they were. `every=0` takes it back. States from before belong
    to another model. Raises ValueError for families that do not offer it.
    """
    before = getattr(model.config, "rescale_every", None)
    if before is None:
        raise ValueError(f"{model.family} has no rescale_every; RWKV-4, 5 and 6 have")
    for i, block in enumerate(model.blocks):
        exponent = (i // before if before else 0) - (i // every if every else 0)
        for weight in (block.att.output.weight, block.ffn.value.weight):
            weight.mul_(2.0**exponent)
    model.config = replace(model.config, rescale_every=every)


def set_vectors(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies initial values, given as flat vectors, into the parameters of a block by name."""
    for name, value in values.items():
        parameter = block.get_parameter(name)
        parameter.copy_(value.view_as(parameter))


def set_matrices(block: nn.Module, gains: Mapping[str, float], generator: torch.Generator) -> None:
    """Makes the named matrices of a block orthogonal with the given gain; 0 means zeros."""
    for name, parameter in block.named_parameters():
        gain = gains.get(name)
        if gain == 0:
            parameter.zero_()
        elif gain is not None:
            orthogonal_(parameter, gain, generator)


class Place(NamedTuple):
    """Depth of a block and place of each channel, as the tables of initial values use them (core.md 1.9)."""

    rho: float
    """layer / (layers − 1), 0 for a model of one block"""
    rho1: float
    """1 − layer / layers"""
    d: Tensor
    """channel / width"""
    e: Tensor
    """channel / (width − 1)"""


def place(config: Any, layer: int) -> Place:
    """Where block `layer` of a model stands."""
    layers, width = config.num_hidden_layers, config.hidden_size
    channels = torch.arange(width, dtype=torch.float64)
    return Place(layer / max(1, layers - 1), 1 - layer / layers, channels / width, channels / (width - 1))
