"""BASED (arXiv 2402.18668) in the paper's order: Taylor linear attention, sliding window, short convolution, model.

Parameters have the names of the released models (see `rookery.families.based`). Everything that a row remembers has a
fixed size: sums of features, a ring of keys and values, the last inputs of the convolutions. Two things differ from
the published code: the sums are float32 in a bfloat16 model, where a count of tokens would stand still at 256, and
rotary angles are computed in float64, so that a million tokens cost no precision.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from rookery.families.based import FAMILY, BasedConfig
from rookery.models.transformer import rotate
from rookery.nn.initial import normal_, uniform_
from rookery.nn.language_model import LanguageModel
from rookery.nn.recent import Recent, recent
from rookery.ops.taylor_attention import taylor_attention
from rookery.state import State

# b batch, r rows, t new tokens, c width, h heads, d channels of a head, w keys of a window, f features


class Call(NamedTuple):
    """What every mixer of one call is told."""

    cu_seqlens: Tensor | None
    recent: Recent


class LinearState(NamedTuple):
    """Sums over all tokens so far."""

    wkv: Tensor
    """[r, h, d + 1, f], float32 at least; see `rookery.ops.taylor_attention`"""


class TaylorAttention(nn.Module):
    """Linear attention over everything a row has read; short queries and keys become long features (section 4.1)."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.config = config
        width, queries = config.hidden_size, config.num_heads * config.feature_dim
        self.proj_q = nn.Linear(width, queries, bias=False)
        self.proj_k = nn.Linear(width, queries, bias=False)
        self.proj_v = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: LinearState, call: Call) -> tuple[Tensor, LinearState]:
        heads = self.config.num_heads
        q, k, v = (proj(x).unflatten(-1, (heads, -1)) for proj in (self.proj_q, self.proj_k, self.proj_v))
        y, wkv = taylor_attention(q=q, k=k, v=v, state=state.wkv, cu_seqlens=call.cu_seqlens)
        return self.out_proj(y.flatten(2)), LinearState(wkv)

    def empty(self, rows: int) -> LinearState:
        config, like = self.config, self.out_proj.weight
        shape = (rows, config.num_heads, config.head_dim + 1, config.num_features)
        return LinearState(like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32)))


class WindowState(NamedTuple):
    """The last w tokens; the one at position p of its row stands at p mod w."""

    ring: Tensor
    """[r, w, 2, h, d], keys, turned to their positions, and values"""


class WindowAttention(nn.Module):
    """Softmax attention over the last w tokens, with rotary positions (section 4.2)."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.config = config
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: WindowState, call: Call) -> tuple[Tensor, WindowState]:
        layout, window = call.recent, self.config.window
        q, k, v = layout.rows(self.Wqkv(x).unflatten(-1, (3, self.config.num_heads, -1))).unbind(2)  # [r, t, h, d]
        # float64, whose angles are right at any position that a text can have
        places = (layout.seen[:, None] + torch.arange(q.shape[1], device=x.device)).double()
        q, k = (rotate(part.transpose(1, 2), places, self.config.rope_theta).transpose(1, 2) for part in (q, k))
        new = torch.stack([k, v], dim=2)
        if layout.real is None and q.shape[1] == 1:
            y, ring = step(q, new, state.ring, layout.seen)
        else:
            history = torch.cat([layout.in_order(state.ring), new], dim=1)  # [r, w + t, 2, h, d]
            ring = layout.in_ring(layout.last(history, window))
            y = windowed(q.transpose(1, 2), *history.permute(2, 0, 3, 1, 4), window, layout.seen).transpose(1, 2)
        return self.out_proj(layout.packed(y.flatten(2))), WindowState(ring)

    def empty(self, rows: int) -> WindowState:
        config = self.config
        return WindowState(self.out_proj.weight.new_zeros(rows, config.window, 2, config.num_heads, config.head_dim))


def step(q: Tensor, new: Tensor, ring: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [r, 1, h, d] of one query a row over its ring, and the ring after its key and value, [r, 1, 2, h, d].

    What `windowed` computes, on keys as they lie: softmax does not ask for their order.
    """
    window = ring.shape[1]
    place = seen % window
    ring = ring.scatter(1, place.view(-1, 1, 1, 1, 1).expand_as(new), new)
    age = (place[:, None] - torch.arange(window, device=q.device)) % window
    keys, values = ring.permute(2, 0, 3, 1, 4)
    y = scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=(age <= seen[:, None])[:, None, None])
    return y.transpose(1, 2), ring


def windowed(q: Tensor, keys: Tensor, values: Tensor, window: int, seen: Tensor) -> Tensor:
    """Attention [r, h, t, d] of queries [r, h, t, d] over histories [r, h, w + t, d] that end in their own keys.

    Query i sees the entries i + 1 to i + w, of which the first w − seen [r] are no tokens. Queries go in blocks, each
    against the keys that any of its queries sees: the work grows with t · w, not with t².
    """
    rows, tokens = q.shape[0], q.shape[2]
    if not tokens:
        return q
    block = min(tokens, max(window, 64))
    blocks, span = -(-tokens // block), block + window - 1
    behind = blocks * block - tokens
    q = pad(q, (0, 0, 0, behind)).unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        pad(x, (0, 0, 0, behind))[:, :, 1:].unfold(2, span, block).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (keys, values)
    )
    query, key = torch.arange(block, device=q.device)[:, None], torch.arange(span, device=q.device)
    near = (key >= query) & (key < query + window)
    entry = 1 + block * torch.arange(blocks, device=q.device)[:, None] + key  # [blocks, span]
    visible = near & (entry >= (window - seen)[:, None, None])[:, :, None]  # [r, blocks, block, span]
    y = scaled_dot_product_attention(q, keys, values, attn_mask=visible.flatten(0, 1)[:, None])
    return y.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


class ConvState(NamedTuple):
    """The last inputs of the convolution."""

    inputs: Tensor
    """[r, conv_width − 1, 2 c]"""


class ShortConv(nn.Module):
    """The published place of the kernel in the names: "mixer.conv.conv.weight"."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=False)


class BaseConv(nn.Module):
    """A short causal convolution of every channel, gated by another projection of the token (section 4.3)."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.in_proj = nn.Linear(width, 4 * width)
        self.conv = ShortConv(2 * width, config.conv_width)
        self.out_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, state: ConvState, call: Call) -> tuple[Tensor, ConvState]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        history = torch.cat([state.inputs, call.recent.rows(u)], dim=1)
        tokens = history.shape[1] - state.inputs.shape[1]
        taps = self.conv.conv.weight[:, 0].unbind(-1)  # the last is for the present token
        mixed = sum(history[:, i : i + tokens] * tap for i, tap in enumerate(taps))
        y = self.out_proj(silu(call.recent.packed(mixed)) * gate)
        return y, ConvState(call.recent.last(history, state.inputs.shape[1]))

    def empty(self, rows: int) -> ConvState:
        shape = (rows, self.config.conv_width - 1, 2 * self.config.hidden_size)
        return ConvState(self.out_proj.weight.new_zeros(shape))


MIXERS = {"linear": TaylorAttention, "window": WindowAttention, "conv": BaseConv}


class MLP(nn.Module):
    """Gated MLP (SwiGLU, arXiv 2002.05202) with both halves in one matrix."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * silu(gate))


class Block(nn.Module):
    """One of the three mixers, and the MLP, each on the norm of the residual stream."""

    def __init__(self, config: BasedConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[config.mixer(layer)](config)
        if config.intermediate_size:
            self.norm2 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = MLP(config)

    def forward(self, x: Tensor, state: NamedTuple, call: Call) -> tuple[Tensor, NamedTuple]:
        mixed, state = self.mixer(self.norm1(x), state, call)
        x = x + mixed
        return (x + self.mlp(self.norm2(x)) if hasattr(self, "mlp") else x), state


class Embeddings(nn.Module):
    """The published place of the table: "embeddings.word_embeddings.weight". There are no position embeddings."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)


class Body(nn.Module):
    """Everything whose published names start with "transformer."."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class TiedHead(nn.Module):
    """The embedding as read-out; it has no weights of its own that a move could part from the table."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = [table]  # a list hides it from state_dict and parameters

    @property
    def weight(self) -> Tensor:
        return self.table[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Based(LanguageModel):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = True

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Body(config)
        self.head = TiedHead(self.transformer.embeddings.word_embeddings)

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.check_tokens(tokens, state, cu_seqlens)
        call = Call(cu_seqlens, recent(tokens, state.tokens_seen, cu_seqlens))
        x, layers = self.transformer.embeddings.word_embeddings(tokens), []
        for block, before in zip(self.transformer.layers, state.layers, strict=True):
            x, after = block(x, before, call)
            layers.append(after)
        return self.transformer.ln_f(x), State(tuple(layers), state.tokens_seen + call.recent.read, self.config)

    def init_state(self, batch: int = 1) -> State:
        layers = tuple(block.mixer.empty(batch) for block in self.transformer.layers)
        tokens_seen = torch.zeros(batch, dtype=torch.int64, device=self.head.weight.device)
        return State(layers, tokens_seen, self.config)

    def fingerprint_weights(self) -> tuple[Tensor, Tensor]:
        return self.head.weight, self.transformer.ln_f.weight

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its published initial value; the same for the same seed.

        | parameter | value |
        |---|---|
        | norms | 1 |
        | biases: `in_proj.bias`, `out_proj.bias` | 0 |
        | `conv.conv.weight` | U(−1/√width, 1/√width) for the width of the kernel |
        | `out_proj.weight`, `fc2.weight` | N(0, σ / √(2 · layers)) (GPT-2) |
        | every other matrix | N(0, σ) for σ = `initializer_range`, as published 0.02 |
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        std = self.config.initializer_range
        residual = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1)
            elif name.endswith("conv.weight"):
                uniform_(parameter, self.config.conv_width**-0.5, generator)
            else:
                normal_(parameter, residual if name.endswith(("out_proj.weight", "fc2.weight")) else std, generator)
