"""WuNeng (arXiv 2504.19191): every block has attention heads, RWKV-7 state heads, and heads that mix one of each.

The paper is known from its abstract, its introduction and a review (hybrids.md 4): the equations here are our reading
of it, and so are all names. Attention is the transformer's, the state RWKV-7's, and both see the same keys, the state
before rotary positions turn them. Nothing here was ever compared with the authors' model.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rookery.families import wuneng
from rookery.families.wuneng import FAMILY, WuNengConfig
from rookery.models.arwkv import norm_of_heads
from rookery.models.rwkv7 import ChannelMix, initial_2024
from rookery.models.transformer import MLP, Transformer, rotate
from rookery.nn.growth import Growth, growth
from rookery.nn.initial import normal_, orthogonal_, uniform_
from rookery.nn.recent import recent
from rookery.nn.rwkv import RWKV, Call
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7.reference import per_document
from rookery.ops.wkv7_inputs import wkv7_inputs
from rookery.ops.wkv7_output import wkv7_output
from rookery.state import State

# b batch, r rows, t new tokens, p positions so far and new, c width, h heads, n channels of a head, m state_window


class LayerState(NamedTuple):
    """What one block remembers."""

    att_shift: Tensor
    """[r, c], the heads' last input; [r, 0] in a transformer's block"""
    wkv: Tensor
    """[r, h, value, key], float32 at least"""
    ffn_shift: Tensor
    """[r, c], the channel mix's last input; [r, 0] in a transformer's block"""
    queries: Tensor
    """[r, m − 1, c], the state heads' last queries"""
    keys: Tensor
    """[r, p, h, n], turned to their positions"""
    values: Tensor
    """[r, p, h, n]"""


def attend(q: Tensor, keys: Tensor, values: Tensor, grows: Growth) -> Tensor:
    """Causal attention [r, t, h, n] of q [r, t, h, n] over keys and values [r, p, h, n] of whole rows."""
    if not q.shape[1]:
        return q
    # padding sees entry 0, because a softmax over nothing is NaN
    visible = torch.arange(keys.shape[1], device=q.device) <= grows.positions.clamp(min=0)[..., None]
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None]).transpose(1, 2)


def read_twice(*, r: Tensor, state: Tensor, cu_seqlens: Tensor | None = None, **rows: Tensor) -> tuple[Tensor, Tensor]:
    """`wkv7` with the output Sᵀ (S r): the state is read again with what it gave. Token by token."""
    if cu_seqlens is not None:
        return per_document(read_twice, r=r, state=state, cu_seqlens=cu_seqlens, **rows)
    outputs = [r[:, :0]]
    for t in range(r.shape[1]):
        y, state = wkv7(r=r[:, t : t + 1], state=state, **{name: x[:, t : t + 1] for name, x in rows.items()})
        outputs.append((state.mT @ y.to(state.dtype)[:, 0, :, :, None])[:, None, ..., 0].to(y.dtype))
    return torch.cat(outputs, dim=1), state


class StateHeads(nn.Module):
    """RWKV-7's matrix, written with the attention's keys, read with queries of its own."""

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, n = config.hidden_size, config.num_heads, config.head_dim
        self.alpha = nn.Parameter(torch.empty(heads))
        self.r_k = nn.Parameter(torch.empty(heads, n))
        self.k_k = nn.Parameter(torch.empty(1, 1, width))
        self.k_a = nn.Parameter(torch.empty(1, 1, width))
        for name, rank in (("w", config.decay_rank), ("a", config.rate_rank)):
            setattr(self, f"{name}0", nn.Parameter(torch.empty(1, 1, width)))
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, width)))
        if config.state_window > 1:
            self.recency = nn.Parameter(torch.empty(heads, config.state_window))
        self.query = nn.Linear(width, width, bias=False)
        if config.value_source == "attn":
            self.coupling = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(heads, width, eps=config.group_norm_eps)

    def forward(
        self, inputs: tuple[Tensor, Tensor, Tensor], k: Tensor, u: Tensor, state: LayerState, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [b, t, h, n], the new matrix and last queries; `inputs` [b, t, c] for query, decay and rate."""
        config, (xh, xw, xa) = self.config, inputs
        heads = (-1, config.head_dim)
        query, queries = self.lately(self.query(xh), state.queries, call)
        if config.value_source == "attn":
            u = self.coupling(u)
        log_w, k, a, b = wkv7_inputs(
            k=k,
            decay_logit=self.w0 + (xw @ self.w1).tanh() @ self.w2,
            rate_logit=self.a0 + xa @ self.a1 @ self.a2,
            k_k=self.k_k.flatten(),
            k_a=self.k_a.flatten(),
            head_dim=config.head_dim,
        )
        if config.iclr_scale != 1.0:
            b = b * config.iclr_scale
        r, u = query.unflatten(-1, heads), u.unflatten(-1, heads)
        run = wkv7 if config.state_read == "single" else read_twice
        y, wkv = run(r=r, log_w=log_w, k=k, v=u, a=a, b=b, state=state.wkv, cu_seqlens=call.cu_seqlens)
        scale = self.alpha.repeat_interleave(config.head_dim).expand_as(query)  # stands where RWKV-7 has its gate
        norm = self.ln_x
        y = wkv7_output(y=y, r=r, k=k, v=u, gate=scale, r_k=self.r_k, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        return y.unflatten(-1, heads), wkv, queries

    def lately(self, query: Tensor, kept: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Weighted means of the last m queries, [b, t, c], as many as there are; and the last m − 1."""
        last = self.config.state_window
        if last == 1:
            return query, kept
        layout = recent(call.tokens, call.growth.start, call.cu_seqlens)
        history = torch.cat([kept, layout.rows(query)], dim=1)  # [r, m − 1 + t, c]
        tokens = history.shape[1] - kept.shape[1]
        weights = self.recency.softmax(dim=-1)  # [h, m]
        each = weights.repeat_interleave(self.config.head_dim, dim=0).T  # [m, c]
        total = sum(history[:, last - 1 - j : last - 1 - j + tokens] * each[j] for j in range(last))
        # a row's first tokens have fewer before them; zeros stand there, and the weights of the others are made whole
        there = weights.cumsum(dim=-1).T.repeat_interleave(self.config.head_dim, dim=1)
        total = total / there[call.growth.positions.clamp(0, last - 1)]
        return layout.packed(total), layout.last(history, last - 1)


class Gated(nn.Module):
    """g A + (1 − g) R with one gate for all heads; g = ½ at first."""

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * config.head_dim, config.head_dim)

    def forward(self, attended: Tensor, read: Tensor) -> Tensor:
        gate = self.gate(torch.cat([attended, read], dim=-1)).sigmoid()
        return read.lerp(attended.to(read.dtype), gate.to(read.dtype))  # under autocast states are wider than products


class Additive(nn.Module):
    """A + β ∘ (W R) for every head; A alone at first."""

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__()
        heads, n = config.num_heads, config.head_dim
        self.beta = nn.Parameter(torch.empty(heads, n))
        self.lift = nn.Parameter(torch.empty(heads, n, n))

    def forward(self, attended: Tensor, read: Tensor) -> Tensor:
        return attended + self.beta * torch.einsum("hij,bthj->bthi", self.lift, read)


class Concat(nn.Module):
    """W [A; R] for every head."""

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__()
        n = config.head_dim
        self.join = nn.Parameter(torch.empty(config.num_heads, n, 2 * n))

    def forward(self, attended: Tensor, read: Tensor) -> Tensor:
        return torch.einsum("hij,bthj->bthi", self.join, torch.cat([attended, read], dim=-1))


MIDDLES = {"gated": Gated, "additive": Additive, "concat": Concat}


class Fusion(nn.Module):
    """Middle heads, and the output projection over the heads of all kinds."""

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__()
        self.adds = config.out_mode == "sum"
        self.middle = MIDDLES[config.middle](config) if config.middle != "none" else None
        kinds = 1 if self.adds else 2 if self.middle is None else 3
        self.output = nn.Linear(kinds * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, attended: Tensor, read: Tensor) -> Tensor:
        kinds = [x.flatten(2) for x in self.kinds(attended, read)]
        return self.output(sum(kinds) if self.adds else torch.cat(kinds, dim=-1))

    def kinds(self, attended: Tensor, read: Tensor) -> list[Tensor]:
        """Outputs of the attention, state and (where there are any) middle heads, [b, t, h, n] each."""
        return [attended, read] + ([] if self.middle is None else [self.middle(attended, read)])


class Heads(nn.Module):
    """All heads of one block."""

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        if config.base == "rwkv7":
            for name in "qkvhwa":
                setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, width)))
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        if config.attn_norm:
            self.ln_a = nn.GroupNorm(config.num_heads, width, eps=config.group_norm_eps)
        self.state = StateHeads(config)
        self.fusion = Fusion(config)

    def forward(self, x: Tensor, state: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        xq, xk, xv, *inputs = [x] * 6
        shift = state.att_shift
        if self.config.base == "rwkv7":
            mix = torch.cat([getattr(self, f"x_{name}") for name in "qkvhwa"]).flatten(1)
            (xq, xk, xv, *inputs), shift = token_shift(x=x, mix=mix, previous=shift, cu_seqlens=call.cu_seqlens)
        q, k, v = self.query(xq), self.key(xk), self.value(xv)
        attended, keys, values = self.attended(q, k, v, state, call.growth)
        u = v if self.config.value_source == "x" else attended.flatten(2)
        read, wkv, queries = self.state(inputs, k, u, state, call)
        if self.config.attn_norm:
            attended = norm_of_heads(self.ln_a, attended)
        return self.fusion(attended, read), LayerState(shift, wkv, state.ffn_shift, queries, keys, values)

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState, grows: Growth
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attention heads' outputs [b, t, h, n], and all keys and values."""
        q, k, v = (grows.rows(x.unflatten(-1, (-1, self.config.head_dim))) for x in (q, k, v))
        if (theta := self.config.rope_theta) is not None:
            q, k = (rotate(x.transpose(1, 2), grows.positions, theta).transpose(1, 2) for x in (q, k))
        keys, values = grows.write(state.keys, k), grows.write(state.values, v)
        return grows.packed(attend(q, keys, values, grows)), keys, values


class WuNengBlock(nn.Module):
    """The heads, and the base's channel mix or MLP, each on the norm of the residual stream."""

    def __init__(self, config: WuNengConfig, layer: int) -> None:
        super().__init__()
        if layer == 0 and config.base == "rwkv7":
            self.ln0 = norm(config)
        self.ln1, self.ln2 = norm(config), norm(config)
        self.att = Heads(config)
        self.ffn = ChannelMix(config) if config.base == "rwkv7" else MLP(config)

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        mixed, state = self.att(self.ln1(x), state, call)
        x = x + mixed
        if isinstance(self.ffn, MLP):
            return x + self.ffn(self.ln2(x)), state, v_first
        mixed, shift = self.ffn(self.ln2(x), state.ffn_shift, call.cu_seqlens)
        return x + mixed, state._replace(ffn_shift=shift), v_first


def norm(config: WuNengConfig) -> nn.Module:
    """A norm over the width, of the base's kind."""
    kind = nn.LayerNorm if config.base == "rwkv7" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class WuNeng(RWKV):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name

    def __init__(self, config: WuNengConfig) -> None:
        super().__init__(config)
        self.ln_out = norm(config)

    def block(self, config: WuNengConfig, layer: int) -> WuNengBlock:
        return WuNengBlock(config, layer)

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) if self.config.base == "rwkv7" else self.emb(tokens)

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        grows = growth(tokens, state.tokens_seen, state.layers[0].keys.shape[1], cu_seqlens)
        return Call(tokens, embedded, cu_seqlens, growth=grows)

    def empty_layer(self, batch: int) -> LayerState:
        config, like = self.config, self.emb.weight
        shift, wkv, _ = super().empty_layer(batch)
        shift, nothing = shift[:, : config.shift_width], like.new_zeros(batch, 0, config.num_heads, config.head_dim)
        queries = like.new_zeros(batch, config.state_window - 1, config.hidden_size)
        return LayerState(shift, wkv, shift, queries, nothing, nothing)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed. All are ours.

        "As in RWKV-7" means its values of 2024 (`RWKV7.init_weights`).

        | parameter | value |
        |---|---|
        | `x_k`, `x_v`, `x_w`, `x_a`, `ffn.x_k`, `w0`, `a0`, `k_k`, `k_a`, `r_k` | as in RWKV-7 |
        | `x_q`, `x_h` | as RWKV-7's `x_r` |
        | `w1`, `a1`, `output`, `ffn.value` | 0 |
        | `w2`, `a2` | orthogonal, gain 0.1 |
        | `query`, `key`, `value` | U(−½/√width, ½/√width) |
        | `coupling` | the identity |
        | `alpha` | 1 |
        | `recency` | 4 for the token itself, 0 for those before it |
        | `gate.weight`, `gate.bias`, `beta` | 0 |
        | `lift`, `join` | U(−1/√n, 1/√n) for the n channels of a head |
        | `ffn.key` | orthogonal, gain 1 |
        | `gate_proj`, `up_proj`, `down_proj` | N(0, 0.02) |
        | `emb`, `head` | as in RWKV-7 |
        | norms | 1, biases 0 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        for layer, block in enumerate(self.blocks):
            known = initial_2024(self.config, layer)
            known["att.x_q"] = known["att.x_h"] = known["att.x_r"]
            for name, parameter in block.named_parameters():
                if (value := known.get(name.replace("state.", ""))) is not None:
                    parameter.copy_(value.view_as(parameter))
                else:
                    _init(name, parameter, generator)
        self.init_norms()
        self.ln_out.weight.fill_(1)  # of either kind
        self.init_embedding_and_head(generator)


def _init(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """The initial value of a parameter of a block that RWKV-7's table of vectors does not have."""
    last = name.split(".")[-1] if not name.endswith(".weight") else name.split(".")[-2]
    if last in ("query", "key", "value") and name.startswith("att."):
        uniform_(parameter, 0.5 * parameter.shape[1] ** -0.5, generator)
    elif last in ("lift", "join"):
        uniform_(parameter, parameter.shape[1] ** -0.5, generator)
    elif last in ("w2", "a2", "key"):
        orthogonal_(parameter, 1.0 if last == "key" else 0.1, generator)
    elif last.endswith("_proj"):
        normal_(parameter, 0.02, generator)
    elif last == "coupling":
        nn.init.eye_(parameter)
    elif last == "recency":
        parameter.zero_()[:, 0] = 4
    elif last == "alpha" or last.startswith("ln"):
        parameter.fill_(1)
    else:  # w1, a1, output, value, gate, beta
        parameter.zero_()


@torch.no_grad()
def expand_transformer(model: Transformer, **choices: Any) -> WuNeng:
    """A WuNeng model that computes what the transformer `model` does, its state and middle heads silent at first.

    alpha = 0 silences the state heads, a fresh "additive" middle gives A alone, which the output projection does not
    read yet, and there is no norm over attention heads; grouped keys and values are repeated. `choices` are fields of
    `WuNengConfig`, as state_window=3. Train what is new first (names with ".state." and ".fusion."), then everything.
    Raises ValueError for a transformer whose heads do not make up its width.
    """
    given = model.config
    if given.num_attention_heads * given.head_dim != given.hidden_size or given.qkv_bias or not given.is_causal:
        raise ValueError(
            f"{given.num_attention_heads} heads of {given.head_dim} and a width of {given.hidden_size}: WuNeng is made "
            "of causal transformers without biases whose heads make up their width"
        )
    own = {name: getattr(given, name) for name in ("vocab_size", "num_hidden_layers", "head_dim", "rope_theta")}
    own |= {"intermediate_size": given.intermediate_size, "layer_norm_eps": given.rms_norm_eps, "attn_norm": False}
    config = wuneng.create(hidden_size=given.hidden_size, base="transformer", middle="additive", **own, **choices)
    expanded = WuNeng(config)
    expanded.init_weights(0)
    expanded.to(model.lm_head.weight)  # before anything is copied: float64 stays float64
    repeats = given.num_attention_heads // given.num_key_value_heads

    def repeated(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, given.head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)

    expanded.emb.weight.copy_(model.model.embed_tokens.weight)
    expanded.ln_out.weight.copy_(model.model.norm.weight)
    expanded.head.weight.copy_(model.lm_head.weight)
    for block, theirs in zip(expanded.blocks, model.model.layers, strict=True):
        block.ln1.weight.copy_(theirs.input_layernorm.weight)
        block.ln2.weight.copy_(theirs.post_attention_layernorm.weight)
        block.ffn.load_state_dict(theirs.mlp.state_dict())
        attention, heads = theirs.self_attn, block.att
        heads.query.weight.copy_(attention.q_proj.weight)
        heads.key.weight.copy_(repeated(attention.k_proj.weight))
        heads.value.weight.copy_(repeated(attention.v_proj.weight))
        heads.fusion.output.weight[:, : given.hidden_size] = attention.o_proj.weight
        heads.state.alpha.zero_()
    return expanded


@torch.no_grad()
def head_usage(model: WuNeng, tokens: Tensor) -> list[dict[str, float]]:
    """For each block, the share that each kind of heads has of the sum of their norms, over `tokens` [b, t]."""
    names, found = ("attention", "state", "middle"), []

    def look(fusion: Fusion, inputs: tuple[Tensor, Tensor]) -> None:
        sizes = [float(x.float().norm()) for x in fusion.kinds(*inputs)]
        found.append({name: size / sum(sizes) for name, size in zip(names, sizes)})

    hooks = [block.att.fusion.register_forward_pre_hook(look) for block in model.blocks]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found
