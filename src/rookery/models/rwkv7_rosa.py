"""RWKV-7 with a ROSA branch beside the time mix (core.md 1.8), under the names of the published toy models.

Block i: x = x + tmix(ln{i}a x) + rosa(ln{i}c x);  x = x + ffn(ln{i}b x). No norm follows the embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rwkv7_rosa import FAMILY, RWKV7RosaConfig
from rookery.models.rosa import History, RosaMix, initial_mix, mix_gains
from rookery.models.rwkv7 import MATRIX_GAIN, ChannelMix, TimeMix, initial_2025_05
from rookery.nn.growth import growth
from rookery.nn.initial import normal_, uniform_
from rookery.nn.language_model import LanguageModel
from rookery.nn.rwkv import Call, place, set_matrices, set_vectors
from rookery.state import State


class LayerState(NamedTuple):
    """What one block remembers: RWKV-7's state, then the ROSA mixer's history."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    rosa_shift: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class RWKV7Rosa(LanguageModel):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name

    def __init__(self, config: RWKV7RosaConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        self.e = nn.Embedding(config.vocab_size, width)
        for i in range(1, config.num_hidden_layers + 1):
            for norm in "abc":
                self.add_module(f"ln{i}{norm}", nn.LayerNorm(width, eps=eps))
            self.add_module(f"rwkv{i}", TimeMix(config, i - 1))
            self.add_module(f"ffn{i}", ChannelMix(config))
            self.add_module(f"rosa{i}", RosaMix(width, 1, unmatched=-1))
        self.lno = nn.LayerNorm(width, eps=eps)
        self.o = nn.Linear(width, config.vocab_size)

    @property
    def head(self) -> nn.Module:
        return self.o

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.check_tokens(tokens, state, cu_seqlens)
        x = self.e(tokens)
        grows = growth(tokens, state.tokens_seen, state.layers[0].q.shape[1], cu_seqlens)
        call = Call(tokens, x, cu_seqlens, growth=grows)
        layers, v_first = [], None
        for i, before in enumerate(state.layers, 1):
            part = self.get_submodule
            normed = part(f"ln{i}a")(x)
            mixed, att_shift, wkv, v_first = part(f"rwkv{i}")(normed, before.att_shift, before.wkv, v_first, cu_seqlens)
            retrieved, history = part(f"rosa{i}")(part(f"ln{i}c")(x), History(*before[3:]), call)
            x = x + mixed + retrieved
            mixed, ffn_shift = part(f"ffn{i}")(part(f"ln{i}b")(x), before.ffn_shift, cu_seqlens)
            x = x + mixed
            layers.append(LayerState(att_shift, wkv, ffn_shift, *history))
        read = cu_seqlens.diff() if cu_seqlens is not None else tokens.shape[1]
        return self.lno(x), State(tuple(layers), state.tokens_seen + read, self.config)

    def init_state(self, batch: int = 1) -> State:
        like = self.e.weight
        history = RosaMix.empty(like, batch, self.config.hidden_size)
        wkv = like.new_zeros(batch, *self.config.wkv_shape, dtype=torch.promote_types(like.dtype, torch.float32))
        layer = LayerState(history.shift, wkv, history.shift, *history)
        tokens_seen = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return State((layer,) * self.config.num_hidden_layers, tokens_seen, self.config)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self.e.weight, self.lno.weight

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        No training code of these models is published: RWKV-7's and ROSA's values, embedding and head as torch has them.

        | parameter | value |
        |---|---|
        | `rwkv*`, `ffn*` | as in RWKV-7, "v7-2025-05" |
        | `rosa*` | as in the ROSA language models |
        | `e.weight` | N(0, 1) |
        | `o.weight` | U(−1 / √width, 1 / √width) |
        | `o.bias` | 0 |
        | norms | 1, biases 0 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()
        for layer in range(config.num_hidden_layers):
            parts = {"att": f"rwkv{layer + 1}", "ffn": f"ffn{layer + 1}", "rosa": f"rosa{layer + 1}"}
            block = nn.ModuleDict({name: self.get_submodule(here) for name, here in parts.items()})
            rho1, d = place(config, layer)[1:3]
            set_vectors(block, initial_2025_05(config, layer) | initial_mix(rho1, d, "rosa."))
            set_matrices(block, MATRIX_GAIN | mix_gains("rosa."), generator)
            self.get_submodule(f"rwkv{layer + 1}.ln_x").weight.fill_(((1 + layer) / config.num_hidden_layers) ** 0.7)
        normal_(self.e.weight, 1.0, generator)
        uniform_(self.o.weight, config.hidden_size**-0.5, generator)
        self.o.bias.zero_()
