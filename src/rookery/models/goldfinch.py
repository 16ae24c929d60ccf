"""GoldFinch (arXiv 2407.12077): RWKV-6 blocks, whose output, compressed, is all that the attention above them keeps.

x0 = ln0(emb), x = trunk(x0), c = A x, key = rms(B [x0; c]); GOLD blocks make their keys from `key` and their values
from x0 alone. The cache holds a token's id and c. Parameters have the names of the files of recursal/GoldFinch-paper.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from rookery.errors import BadState
from rookery.families.goldfinch import FAMILY, GoldFinchConfig
from rookery.models import rwkv6
from rookery.models.rwkv5 import MATRIX_GAIN, initial_decay_and_bonus
from rookery.models.rwkv6 import ChannelMix
from rookery.models.transformer import rotate
from rookery.nn.growth import Growth, growth
from rookery.nn.initial import uniform_
from rookery.nn.rwkv import RWKV, Block, Call, LayerState, place, set_matrices, set_vectors, through
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv6 import wkv6
from rookery.state import State

# b batch, r rows, t new tokens, p positions so far, n some of them, h heads, c width, m cache_rank


class GoldState(NamedTuple):
    """What a GOLD block remembers: the last inputs of its two mixers, [b, c] each."""

    att_shift: Tensor
    ffn_shift: Tensor


class WholeGoldState(NamedTuple):
    """The same with keep="all": also its keys and values, [r, p, c] each."""

    att_shift: Tensor
    ffn_shift: Tensor
    keys: Tensor
    values: Tensor


class Compressed(NamedTuple):
    """What all GOLD blocks remember: ids int32 [r, p], compressed trunk outputs [r, p, m]."""

    tokens: Tensor
    compressed: Tensor


class Keys(NamedTuple):
    """The same with keep="keys" or "all": the keys [r, p, c] that the compressed outputs stand for."""

    tokens: Tensor
    keys: Tensor


class FinchC2(rwkv6.TimeMix):
    """RWKV-6's time mix without gate and, but for an ablation, without bonus: a second value stands for the token.

    o = S_{t-1} r + v2, v2 = value(x_v2) + tanh(x_v2 W1) W2; keys fade with their decay, k · (1 − w) (section 3.2).
    """

    def __init__(self, config: GoldFinchConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.has_second_value:
            del self.time_faaaa
            self.time_value2_w1 = nn.Parameter(torch.empty(config.hidden_size, config.value_rank))
            self.time_value2_w2 = nn.Parameter(torch.empty(config.value_rank, config.hidden_size))

    def forward(
        self, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        signals, shift = self.interpolate(x, shift, cu_seqlens)
        _, log_w = self.decay(signals["w"], wkv.dtype)
        r, k, v = self.receptance(signals["r"]), self.key(signals["k"]), self.value(signals["v"])
        if self.config.has_fading_keys:
            # 1 − w in float32: slow channels keep 0.9975, and bfloat16 knows three digits
            k = k * -log_w.expm1().to(k.dtype)
        r, log_w, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (r, log_w, k, v))
        u = r.new_zeros(r.shape[2:]) if self.config.has_second_value else self.time_faaaa
        y, wkv = wkv6(r=r, log_w=log_w, k=k, v=v, u=u, state=wkv, cu_seqlens=cu_seqlens)
        y = y.flatten(2)
        if self.config.has_second_value:
            own = signals["v2"]
            y = y + self.value(own) + (own @ self.time_value2_w1).tanh() @ self.time_value2_w2
        y = layer_norm(y, y.shape[-1:], self.ln_x.weight, self.ln_x.bias, self.ln_x.eps)
        return self.output(y), shift, wkv, v_first


def rms(x: Tensor) -> Tensor:
    """x over its root mean square, without a weight."""
    return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8)


class History:
    """Makes what keys and values are made of, for any of the tokens so far: sequences that begin one token early."""

    def __init__(self, model: "GoldFinch", kept: Compressed | Keys, grows: Growth, *, is_fresh: bool) -> None:
        """`is_fresh`: there was nothing before the call."""
        self.model, self.kept, self.grows, self.is_fresh = model, kept, grows, is_fresh

    def __call__(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and scaled embeddings [r, 1 + n, c] of the positions start − 1 to stop − 1; zeros before the first."""
        first = max(0, start - 1)
        return self._made(*(part[:, first:stop] for part in self.kept), is_first=start == 0)

    def new(self) -> tuple[Tensor, Tensor]:
        """The same of each row's new tokens and the one before them."""
        if not self.kept[0].shape[1]:
            return self(0, 0)
        places = torch.cat([self.grows.start[:, None] - 1, self.grows.positions], dim=1).clamp(min=0)
        rows = torch.arange(places.shape[0], device=places.device)[:, None]
        key, embedded = self._made(*(part[rows, places] for part in self.kept), is_first=False)
        there = torch.ones_like(places, dtype=key.dtype)
        there[:, 0] = self.grows.start > 0
        return key * there[..., None], embedded * there[..., None]

    def _made(self, tokens: Tensor, kept: Tensor, is_first: bool) -> tuple[Tensor, Tensor]:
        x0 = self.model.embed(tokens)
        key = self.model.key_of(x0, kept) if isinstance(self.kept, Compressed) else kept
        behind = (0, 0, int(is_first), 0)
        return nn.functional.pad(key, behind), nn.functional.pad(rms(x0), behind)


class GoldAttention(nn.Module):
    """Causal attention whose keys and values cost no projection and no cache of their own (section 3.3)."""

    def __init__(self, config: GoldFinchConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        for name in ("x", "q", "v_cache", "k", "v"):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, width)))
        for name, rank in (("maa_q", config.mix_rank), ("key", config.key_rank), ("value", config.key_rank)):
            setattr(self, f"time_{name}_w1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"time_{name}_w2", nn.Parameter(torch.empty(rank, width)))
        self.time_maa_kv_w1 = nn.Parameter(torch.empty(width, 2 * config.mix_rank))
        self.time_maa_kv_w2 = nn.Parameter(torch.empty(2, config.mix_rank, width))
        self.query = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        for name in "qkvx":
            setattr(self, f"ln_{name}", nn.LayerNorm(width, eps=config.layer_norm_eps))

    def forward(self, x: Tensor, state: NamedTuple, call: Call) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Output [b, t, c], the new shift, and the block's own keys and values where it keeps them."""
        q, shift = self.queries(x, state.att_shift, call.cu_seqlens)
        history, grows = call.past, call.growth
        q, cache = grows.rows(q), ()
        if self.config.keep == "all":
            made = self.keys_and_values(*history.new())
            cache = tuple(history.grows.write(old, new) for old, new in zip(state[2:], made, strict=True))
        is_fresh = history.is_fresh and q.shape[1] == grows.length
        # a call that begins its rows is a triangle; else blocks, so that memory does not grow with what is cached
        step = grows.length if is_fresh else self.config.block_size
        merged = Merge()
        for start in range(0, grows.length if q.shape[1] else 0, max(1, step)):
            stop = min(start + step, grows.length)
            k, v = (part[:, start:stop] for part in cache) if cache else self.keys_and_values(*history(start, stop))
            merged.add(*self.attend(q, k, v, start, grows.positions, is_fresh))
        y = grows.packed(self.ln_x(merged.y if merged.y is not None else q))
        return self.output(y), shift, cache

    def queries(self, x: Tensor, shift: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = torch.cat([self.time_maa_x, torch.ones_like(self.time_maa_x)]).flatten(1)
        (probe, before), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=cu_seqlens)
        moved = (probe @ self.time_maa_q_w1).tanh() @ self.time_maa_q_w2
        return self.ln_q(self.query(x + (before - x) * (self.time_maa_q + moved))), shift

    def keys_and_values(self, key: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """This block's keys and values [r, n, c], from sequences [r, 1 + n, c] that begin one token early."""
        key_step, key = key[:, :-1] - key[:, 1:], key[:, 1:]
        step, x = embedded[:, :-1] - embedded[:, 1:], embedded[:, 1:]
        inner = ((x + step * self.time_maa_v_cache) @ self.time_maa_kv_w1).tanh().unflatten(-1, (2, -1))
        move_k, move_v = torch.einsum("rnsq,sqc->srnc", inner, self.time_maa_kv_w2)
        k, v = key + key_step * (self.time_maa_k + move_k), x + step * (self.time_maa_v + move_v)
        k = self.ln_k(k + (k @ self.time_key_w1).tanh() @ self.time_key_w2)
        return k, self.ln_v(v + (v @ self.time_value_w1).tanh() @ self.time_value_w2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, positions: Tensor, is_fresh: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention [r, t, c] to positions from `start` on, and the logarithm [r, h, t, 1] of its weights' sum."""
        there = torch.arange(start, start + k.shape[1], device=q.device)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for part in (q, k, v))
        if self.config.rope_theta is not None:
            q = rotate(q, positions / self.config.rope_scale, self.config.rope_theta)
            k = rotate(k, (there / self.config.rope_scale)[None], self.config.rope_theta)
        if is_fresh:
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), None
        scores = (q @ k.mT * self.config.head_dim**-0.5).to(torch.promote_types(q.dtype, torch.float32))
        # the lowest number, not −∞: a query that sees nothing of this block must not become NaN. Padding sees entry 0.
        hidden = there > positions.clamp(min=0)[:, None, :, None]
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = scores.logsumexp(-1, keepdim=True)
        y = (scores - weights).exp().to(v.dtype) @ v
        return y.transpose(1, 2).flatten(2), weights


class Merge:
    """Attention to all positions from attention to some of them at a time, weighted by the sums of their weights."""

    def __init__(self) -> None:
        self.y: Tensor | None = None
        self.weights: Tensor | None = None

    def add(self, y: Tensor, weights: Tensor | None) -> None:
        """`y` [r, t, c] and log sums [r, h, t, 1] of further positions; the first must hold one that is seen."""
        if self.y is None:
            self.y, self.weights = y, weights
            return
        together = torch.logaddexp(self.weights, weights)
        heads = weights.shape[1]
        shares = [(part - together).exp().to(y.dtype).transpose(1, 2) for part in (self.weights, weights)]
        old, new = (part.unflatten(-1, (heads, -1)) * share for part, share in zip((self.y, y), shares))
        self.y, self.weights = (old + new).flatten(2), together


class GoldBlock(Block):
    """GOLD attention and channel mix, each on the norm of the residual stream."""

    def forward(
        self, x: Tensor, state: NamedTuple, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, NamedTuple, Tensor | None]:
        mixed, att_shift, cache = self.att(self.ln1(x), state, call)
        x = x + mixed
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, call.cu_seqlens)
        return x + mixed, type(state)(att_shift, ffn_shift, *cache), v_first


class GoldFinch(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    config: GoldFinchConfig

    def __init__(self, config: GoldFinchConfig) -> None:
        super().__init__(config)
        width, rank = config.hidden_size, config.cache_rank
        self.w_kv_cache_a = nn.Linear(width, rank, bias=False)
        self.w_kv_cache_b = nn.Linear(width + rank, width, bias=False)

    def block(self, config: GoldFinchConfig, layer: int) -> Block:
        kind, att = (Block, FinchC2(config, layer))
        if layer >= config.num_trunk_layers:
            kind, att = GoldBlock, GoldAttention(config)
        return kind(att, ChannelMix(config, layer), config.hidden_size, config.layer_norm_eps, first=layer == 0)

    def freeze_trunk(self) -> list[str]:
        """Lets only the GOLD blocks, the last norm and the head be trained, as to reach longer texts; gives the names.

        The paper does so at a third of the cost (section 5); what the cache holds stays what it was.
        """
        kept = ("emb.", "w_kv_cache_", *(f"blocks.{i}." for i in range(self.config.num_trunk_layers)), "blocks.0.ln0.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(kept))
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def key_of(self, x0: Tensor, compressed: Tensor) -> Tensor:
        """The key that all GOLD blocks start from, of the embedding and the compressed output ("TokenCat")."""
        return rms(self.w_kv_cache_b(torch.cat([x0, compressed], dim=-1)))

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        grows = growth(tokens, state.tokens_seen, state.shared.tokens.shape[1], cu_seqlens)
        return Call(tokens, embedded, cu_seqlens, growth=grows, shared=state.shared)

    def stack(
        self, x: Tensor, states: Sequence[NamedTuple], call: Call
    ) -> tuple[Tensor, tuple[NamedTuple, ...], Compressed | Keys]:
        trunk, grows, kept = self.config.num_trunk_layers, call.growth, call.shared
        x, layers = through(self.blocks[:trunk], x, states[:trunk], call)
        is_fresh, new = not kept[0].shape[1], self.w_kv_cache_a(x)
        if self.config.keep != "compressed":
            new = self.key_of(call.embedded, new)
        ids = call.tokens.to(torch.int32)
        kept = type(kept)(*(grows.write(old, grows.rows(part)) for old, part in zip(kept, (ids, new), strict=True)))
        call = call._replace(past=History(self, kept, grows, is_fresh=is_fresh))
        states = list(states[trunk:])
        if call.last is not None and call.last < x.shape[1]:
            # GOLD blocks see past tokens through the cache and through their shifts, one token a shift
            states[0] = states[0]._replace(att_shift=self.blocks[trunk].ln1(x[:, -call.last - 1]))
            x = x[:, -call.last :]
            call = call._replace(growth=grows._replace(positions=grows.positions[:, -call.last :]))
        x, gold = through(self.blocks[trunk:], x, states, call)
        return x, layers + gold, kept

    def last_features(self, tokens: Tensor, state: State | None, count: int) -> tuple[Tensor, State]:
        """`features` of the last `count` tokens: all tokens pass the trunk, the last few the attention (section 3.5).

        What a GOLD block tells the next token goes through two shifts of one token each, so that with G of them the
        last 2G − 1 tokens make the state and 2G + count − 1 the features, exactly.
        """
        state = self.check_tokens(tokens, state, None)
        gold = self.config.num_hidden_layers - self.config.num_trunk_layers
        x = self.embed(tokens)
        call = self.call(tokens, x, state, None)._replace(last=2 * gold + count - 1)
        features, state = self.run(x, state, call)
        return features[:, max(0, features.shape[1] - count) :], state

    def check_tokens(self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None) -> State:
        state = super().check_tokens(tokens, state, cu_seqlens)
        if state.config.keep != self.config.keep:
            raise BadState(
                f"the state keeps {state.config.keep!r}, this model {self.config.keep!r}; read the text again with it"
            )
        return state

    def init_state(self, batch: int = 1) -> State:
        config, like = self.config, self.emb.weight
        seen = torch.zeros(batch, dtype=torch.int64, device=like.device)
        shift, nothing = like.new_zeros(batch, config.hidden_size), like.new_zeros(batch, 0, config.hidden_size)
        wkv = self.empty_wkv(batch, torch.promote_types(like.dtype, torch.float32))
        trunk = (LayerState(shift, wkv, shift),) * config.num_trunk_layers
        gold = GoldState(shift, shift)
        if config.keep == "all":
            gold = WholeGoldState(shift, shift, nothing, nothing)
        ids = seen.new_zeros(batch, 0, dtype=torch.int32)
        kept = Keys(ids, nothing)
        if config.keep == "compressed":
            kept = Compressed(ids, like.new_zeros(batch, 0, config.cache_rank))
        layers = trunk + (gold,) * (config.num_hidden_layers - config.num_trunk_layers)
        return State(layers, seen, config, kept)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value; the same for the same seed.

        ρ = layer / (layers − 1), ρ₁ = 1 − layer / layers over the blocks of both kinds, d = i / width,
        e = i / (width − 1), z = ((i + 1) mod 3) − 1.

        | parameter | value |
        |---|---|
        | `time_maa_x`, `_k`, `_w`, `_v_cache` | 1 − d^ρ₁ |
        | `time_maa_r`, `_q` | 1 − d^(ρ₁ / 2) |
        | `time_maa_v`, `_v2` | 1 − (d^ρ₁ + 0.3ρ) |
        | `time_decay` | −6 + 5 e^(0.7 + 1.3ρ) |
        | `time_faaaa` | ρ (1 − e) + 0.1 z |
        | `time_maa_*_w1`, `time_maa_w1`, `time_decay_w1`, `time_value2_w1`, `time_key_w1`, `time_value_w1` | 0 |
        | `time_maa_*_w2`, `time_maa_w2`, `time_decay_w2`, `time_value2_w2`, `time_key_w2`, `time_value_w2` | U(−0.01, 0.01) |
        | `ffn.time_maa_k`, `ffn.time_maa_r` | 1 − d^(ρ₁³) |
        | `receptance`, `value`, `query`, `ffn.key`, `w_kv_cache_a`, `w_kv_cache_b` | orthogonal, gain 1 |
        | `att.key` | orthogonal, gain 0.1 |
        | `output`, `ffn.value`, `ffn.receptance` | 0 |
        | `ln_x.weight` | ((1 + layer) / layers)^0.7 |
        | `emb` | U(−1e-4, 1e-4) |
        | `head` | orthogonal, gain ½ √(max(1, vocab / width)) |
        | other norms | 1, biases 0 |
        """  # noqa: E501 (one row of the table)
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_norms()
        for layer, block in enumerate(self.blocks):
            own = dict(block.named_parameters())
            set_vectors(block, {n: v for n, v in initial_vectors(self.config, layer).items() if n in own})
            set_matrices(block, MATRIX_GAIN | {"att.query.weight": 1.0}, generator)
            for name, parameter in block.att.named_parameters():
                if name.endswith("_w1"):
                    parameter.zero_()
                elif name.endswith("_w2"):
                    uniform_(parameter, 0.01, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / self.config.num_hidden_layers) ** 0.7)
        set_matrices(self, {"w_kv_cache_a.weight": 1.0, "w_kv_cache_b.weight": 1.0}, generator)
        self.init_embedding_and_head(generator)


def initial_vectors(config: GoldFinchConfig, layer: int) -> dict[str, Tensor]:
    """Vectors of blocks of either kind by name."""
    rho, rho1, d, _ = place(config, layer)
    decay, bonus = initial_decay_and_bonus(config, layer)
    mixes = {
        **dict.fromkeys(("x", "k", "w", "v_cache"), 1 - d**rho1),
        **dict.fromkeys(("r", "q"), 1 - d ** (0.5 * rho1)),
        **dict.fromkeys(("v", "v2"), 1 - (d**rho1 + 0.3 * rho)),
    }
    return {
        "att.time_decay": decay,
        "att.time_faaaa": bonus,
        **{f"att.time_maa_{name}": mix for name, mix in mixes.items()},
        **{f"ffn.time_maa_{name}": 1 - d ** (rho1**3) for name in "kr"},
    }
