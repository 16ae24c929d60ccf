"""RWKV-X (arXiv 2504.21463): RWKV-7 blocks, and after every few of them a block of top-k chunk sparse attention.

Parameters have the names and shapes of the published files (howard-hou/RWKV-X). The attention has no position encoding
of any kind; its cache is bounded, see `rookery.nn.chunk_cache`.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rwkv_x import FAMILY, RWKVXConfig
from rookery.models.rwkv7 import RWKV7, ChannelMix, initial_2025_05
from rookery.nn import chunk_cache
from rookery.nn.chunk_cache import ChunkCache
from rookery.nn.initial import orthogonal_, uniform_
from rookery.nn.language_model import LanguageModel
from rookery.nn.rwkv import Call, through
from rookery.state import State

# b batch, r rows, t new tokens, c width, h heads, n channels of a head


class SparseState(NamedTuple):
    """What a sparse block remembers: the fields of `ChunkCache`, and the channel mix's last input [r, c]."""

    past_keys: Tensor
    past_values: Tensor
    past_positions: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    chunk_means: Tensor
    queries: Tensor
    ffn_shift: Tensor


class SparseAttention(nn.Module):
    """Attention of every head to its own chunk and to the past chunks it likes best (eq. 4-6)."""

    def __init__(self, config: RWKVXConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("receptance", "key", "value", "output"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x: Tensor, cache: ChunkCache, plan: chunk_cache.Plan) -> tuple[Tensor, ChunkCache]:
        """Output [b, t, c], and the cache after it."""
        q, k, v = (self.heads(plan.layout.rows(part(x))) for part in (self.receptance, self.key, self.value))
        y, cache = chunk_cache.attend(self.config, q, k, v, cache, plan.rounds)
        return self.output(plan.layout.packed(y.flatten(2))), cache

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))  # [r, t, h, n]


class SparseBlock(nn.Module):
    """Sparse attention and RWKV-7's channel mix, each on the norm of the residual stream."""

    def __init__(self, config: RWKVXConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ln2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.att = SparseAttention(config)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, state: SparseState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, SparseState, Tensor | None]:
        """As `Block`; the first block's values pass by."""
        mixed, cache = self.att(self.ln1(x), ChunkCache(*state[:-1]), call.growth)
        x = x + mixed
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, call.cu_seqlens)
        return x + mixed, SparseState(*cache, ffn_shift), v_first


class RWKVX(LanguageModel):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name

    def __init__(self, config: RWKVXConfig) -> None:
        super().__init__()
        self.config = config
        self.rwkv = RWKV7(config.rwkv7())
        self.moba = nn.ModuleList(SparseBlock(config) for _ in range(config.num_sparse_layers))

    @property
    def head(self) -> nn.Module:
        return self.rwkv.head

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they run."""
        return [self.get_submodule(name) for name in self.config.order]

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.check_tokens(tokens, state, cu_seqlens)
        x = self.rwkv.embed(tokens)
        call = Call(tokens, x, cu_seqlens, growth=self.plan(tokens, state, cu_seqlens))
        x, layers = through(self.blocks, x, state.layers, call)
        read = cu_seqlens.diff() if cu_seqlens is not None else tokens.shape[1]
        return self.rwkv.ln_out(x), State(layers, state.tokens_seen + read, self.config)

    def plan(self, tokens: Tensor, state: State, cu_seqlens: Tensor | None) -> chunk_cache.Plan | None:
        """How the call goes through the caches, which are all of one size; None where there is none."""
        for layer in state.layers:
            if isinstance(layer, SparseState):
                return chunk_cache.plan(self.config, tokens, state.tokens_seen, ChunkCache(*layer[:-1]), cu_seqlens)
        return None

    def init_state(self, batch: int = 1) -> State:
        config, like = self.config, self.rwkv.emb.weight
        recurrent = self.rwkv.empty_layer(batch)
        cache = chunk_cache.empty(config, batch, config.num_heads, config.head_dim, like)
        sparse = SparseState(*cache, recurrent.ffn_shift)
        layers = tuple(sparse if name.startswith("moba.") else recurrent for name in config.order)
        return State(layers, torch.zeros(batch, dtype=torch.int64, device=like.device), config)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self.rwkv.fingerprint_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed. D is the width.

        | parameter | value |
        |---|---|
        | `rwkv.*` | as in RWKV-7 |
        | `moba.*.att.receptance.weight`, `moba.*.att.value.weight` | U(−0.5/√D, 0.5/√D) |
        | `moba.*.att.key.weight` | U(−0.05/√D, 0.05/√D) |
        | `moba.*.att.output.weight`, `moba.*.ffn.value.weight` | 0 |
        | `moba.*.ffn.key.weight` | orthogonal, gain 1 |
        | `moba.*.ffn.x_k` | as in RWKV-7's block of the same number |
        | norms | 1, biases 0 |
        """
        self.rwkv.init_weights(seed)
        generator = torch.Generator().manual_seed(1 + (seed or 0))
        scale = self.config.hidden_size**-0.5
        for number, block in enumerate(self.moba):
            init_norms_and_mix(self.config, block, number)
            uniform_(block.att.receptance.weight, 0.5 * scale, generator)
            uniform_(block.att.key.weight, 0.05 * scale, generator)
            uniform_(block.att.value.weight, 0.5 * scale, generator)
            orthogonal_(block.ffn.key.weight, 1.0, generator)
            block.att.output.weight.zero_()
            block.ffn.value.weight.zero_()


def init_norms_and_mix(config: RWKVXConfig, block: SparseBlock, number: int) -> None:
    """The initial values that a sparse block always has, wherever its matrices come from."""
    for norm in (block.ln1, block.ln2):
        norm.weight.fill_(1)
        norm.bias.zero_()
    block.ffn.x_k.copy_(initial_2025_05(config.rwkv7(), number)["ffn.x_k"].view(1, 1, -1))


@torch.no_grad()
def expand(base: RWKV7, *, init: Literal["zero", "copy"] = "zero", **settings: Any) -> RWKVX:
    """An RWKV-X around a trained RWKV-7, whose weights it takes over (not a copy of them).

    A sparse block begins with the matrices of the RWKV-7 block right before it. With "zero" (LLaMA-Pro, arXiv
    2401.02415, and the paper's section 3.3.1) its two output matrices are zero, so that the model computes exactly what
    `base` does; "copy" keeps them, as the published training code does. `settings` are fields of `RWKVXConfig`:
    `num_sparse_layers`, `chunk_size`, `topk` and so on. Raises ValueError for a base that is no RWKV-7.
    """
    if getattr(base, "family", None) != "rwkv7":
        raise ValueError(f"sparse blocks go between those of an RWKV-7, not of {getattr(base, 'family', base)}")
    if init not in ("zero", "copy"):
        raise ValueError(f"init must be zero or copy, got {init!r}")
    plain = {name: getattr(base.config, name) for name in base.config.__dataclass_fields__}
    config = FAMILY.create(**{**plain, **settings})
    like = base.emb.weight
    model = RWKVX(config).to(device=like.device, dtype=like.dtype)
    model.rwkv = base
    for number, block in enumerate(model.moba):
        before = base.blocks[max(0, (number + 1) * config.interval - 1)]
        init_norms_and_mix(config, block, number)
        for name in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"):
            block.get_submodule(name).weight.copy_(before.get_submodule(name).weight)
        if init == "zero":
            block.att.output.weight.zero_()
            block.ffn.value.weight.zero_()
    return model
