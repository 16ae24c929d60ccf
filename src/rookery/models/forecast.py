"""Forecasters: a series is cut into patches, a causal model reads them, every token predicts the patches after it.

One frame (Timer, arXiv 2402.02368, without its mixers), four bodies: RWKV-7 blocks (`Rimer`), the block that
BlackGoose Rimer released, a post-norm transformer (`Timer`), and RWKV-5.1 blocks under a flat head (`RWKVTS`).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention, softplus

from rookery.families.forecast import median_of
from rookery.families.rimer import RimerConfig
from rookery.families.rimer_released import RimerReleasedConfig
from rookery.families.rwkv_ts import RWKVTSConfig
from rookery.families.timer import TimerConfig
from rookery.models import rwkv5, rwkv7
from rookery.nn.initial import normal_, orthogonal_
from rookery.nn.patches import Scale, check_series, patches_of, scale_of
from rookery.nn.rwkv import Block, Call, LayerState, set_matrices, set_vectors
from rookery.state import State, fingerprint_of

# b series, l points, n patches, p points of a patch, k points predicted, q values a point, c width


class Forecaster(nn.Module):
    """Base of the forecasters: a family defines `encode`, `body`, `empty_layer` and `init_weights`."""

    family: str
    config: Any
    streams = True
    """True if a state can be carried from patch to patch."""
    fingerprinted = ("embed.weight", "ln_out.weight")
    """The parameters that name a model in state files."""

    def forward(self, patches: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What follows each of the `patches` [b, n, p], as [b, n, k, q], and the state after them.

        Patches are scaled (see `Scale`) and NaN where nothing was observed; k is `output_patches` · p. Values of a
        point rise with the quantile level. The state given is never changed.
        """
        if patches.dim() != 3 or patches.shape[2] != self.config.patch_length:
            raise ValueError(
                f"patches must be [batch, patches, {self.config.patch_length}], got shape {list(patches.shape)}"
            )
        state = self.init_state(patches.shape[0]) if state is None else state
        state.check_model(self.config)
        x = self.dropout(self.encode(patches, state))
        x, layers = self.body(x, state)
        predicted = self.head(self.dropout(x)).unflatten(-1, (-1, self.config.outputs))
        return in_order(predicted, self.config.levels), State(layers, state.tokens_seen + patches.shape[1], self.config)

    def encode(self, patches: Tensor, state: State) -> Tensor:
        """The residual stream before the first block, [b, n, c]."""
        raise NotImplementedError

    def body(self, x: Tensor, state: State) -> tuple[Tensor, tuple[NamedTuple, ...]]:
        """The blocks and the last norm: output [b, n, c] and the layers' states."""
        raise NotImplementedError

    def empty_layer(self, batch: int) -> NamedTuple:
        """What one block remembers before the first patch."""
        raise NotImplementedError

    def init_state(self, batch: int = 1) -> State:
        """The state before the first patch, for `batch` series."""
        tokens_seen = torch.zeros(batch, dtype=torch.int64, device=self.like.device)
        return State((self.empty_layer(batch),) * self.config.num_hidden_layers, tokens_seen, self.config)

    @property
    def like(self) -> Tensor:
        """A parameter, for its dtype and device."""
        return next(self.parameters())

    def fingerprint(self) -> str:
        """Names these weights in state files."""
        named = dict(self.named_parameters())
        return fingerprint_of(self.family, self.config, *(named[name] for name in self.fingerprinted))

    def cut(self, context: Tensor) -> Tensor:
        """Patches [b, n, p] of scaled series [b, l]."""
        return patches_of(context, self.config.patch_length)

    @torch.no_grad()
    def forecast(self, series: Tensor, horizon: int, mode: Literal["stream", "window"] = "stream") -> Tensor:
        """The next `horizon` points of each series [b, l] (or one [l]), as [b, horizon, q] in their units.

        NaN marks missing points; series shorter than others are filled with NaN on the left. "stream" keeps the scale
        of the history and goes on from its state, so that a patch costs the same however much came before; "window"
        looks at the last `context_length` points afresh, predictions included, for every step, as Timer does. Raises
        ValueError for infinite values, a series without any observation, and a horizon below 1.
        """
        series = check_series(series).to(self.like)
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 point, got {horizon}")
        ahead = self.rolled if mode == "stream" and self.streams else self.slid
        out = series.new_empty(series.shape[0], horizon, self.config.outputs)
        for rows in alike(series, self.config.patch_length):
            observed = (~series[rows].isnan()).any(dim=0).nonzero()
            first = int(observed[0]) if len(observed) else 0
            out[rows] = ahead(series[rows][:, first:], horizon)
        return out

    def pairs(self, windows: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """What is predicted and what came, scaled: [b, n, k, q] and [b, n, k], NaN where the window has no more points.

        Every token after `context` points of the `windows` [b, l] and before says what follows it. The scale is that of
        the context, as when forecasting; tokens inside the context thereby know its level (timeseries.md 7.3).
        """
        scale = self.scale(windows[:, :context])
        series = scale.into(windows)
        predicted, _ = self(self.cut(series[:, :context]))
        tokens, points = predicted.shape[1:3]
        ends = context - self.config.patch_length * torch.arange(tokens - 1, -1, -1, device=series.device)
        place = ends[:, None] + torch.arange(points, device=series.device)
        beyond = max(0, int(place.max()) + 1 - series.shape[1])
        return predicted, pad(series, (0, beyond), value=math.nan)[:, place]

    def scale(self, history: Tensor) -> Scale:
        """What the series [b, l] are shifted and divided by before they are read."""
        return scale_of(history)

    def rolled(self, series: Tensor, horizon: int) -> Tensor:
        """`forecast` of series [b, l] of one length in "stream" mode."""
        scale = self.scale(series)
        predicted, state = self(self.cut(scale.into(series)))
        return scale.out_of(self.continued(predicted[:, -1], state, horizon))

    def continued(self, ahead: Tensor, state: State, horizon: int) -> Tensor:
        """What is `ahead` of a state, [b, k, q], and what follows where its medians come true: [b, horizon, q]."""
        pieces = [ahead]
        while sum(piece.shape[1] for piece in pieces) < horizon:
            points = middle(pieces[-1], self.config.levels)
            predicted, state = self(points.unflatten(1, (-1, self.config.patch_length)), state)
            pieces.append(predicted[:, -1])
        return torch.cat(pieces, dim=1)[:, :horizon]

    def slid(self, series: Tensor, horizon: int) -> Tensor:
        """`forecast` of series [b, l] of one length in "window" mode."""
        pieces: list[Tensor] = []
        while sum(piece.shape[1] for piece in pieces) < horizon:
            context = series[:, -self.config.context_length :]
            scale = self.scale(context)
            predicted, _ = self(self.cut(scale.into(context)))
            pieces.append(scale.out_of(predicted[:, -1]))
            series = torch.cat([series, middle(pieces[-1], self.config.levels)], dim=1)
        return torch.cat(pieces, dim=1)[:, :horizon]


def alike(series: Tensor, patch_length: int) -> list[Tensor]:
    """Rows of `series` [b, l] in groups whose observed parts have the same length, counted back from the end.

    Patches that nothing was observed of would be tokens like others to a model, so a short series must not have them.
    """
    observed = ~series.isnan()
    first = observed.to(torch.uint8).argmax(dim=1).where(observed.any(dim=1), series.shape[1] - 1)
    return [(first == start).nonzero()[:, 0] for start in first.unique()]


def middle(predicted: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The median [b, k] of what is predicted [b, k, q], or the one value that is."""
    return predicted[..., median_of(levels)]


def in_order(raw: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Values [..., q] that rise with the level: the median, and steps away from it that are never negative."""
    if not levels:
        return raw
    at = levels.index(0.5)
    centre = raw[..., at : at + 1]
    above = centre + softplus(raw[..., at + 1 :]).cumsum(dim=-1)
    below = centre - softplus(raw[..., :at]).flip(-1).cumsum(dim=-1).flip(-1)
    return torch.cat([below, centre, above], dim=-1)


def sinusoid(start: Tensor, count: int, width: int) -> Tensor:
    """Positions [b, count, width] from `start` [b] on: sines on even channels, cosines on odd ones, base 10000."""
    place = (start[:, None] + torch.arange(count, device=start.device))[..., None]
    frequency = torch.exp(torch.arange(0, width, 2, device=start.device) * (-math.log(10000.0) / width))
    angle = place * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


class Recurrent(Forecaster):
    """RWKV blocks as they are in the language models, over patches instead of tokens."""

    def __init__(self, config: Any, inputs: int, features: int, points: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(features, points * config.outputs)
        self.dropout = nn.Dropout(config.dropout)

    def block(self, layer: int) -> Block:
        """Block `layer`."""
        raise NotImplementedError

    def body(self, x: Tensor, state: State) -> tuple[Tensor, tuple[NamedTuple, ...]]:
        x, layers, v_first = self.blocks[0].ln0(x), [], None
        for block, before in zip(self.blocks, state.layers, strict=True):
            y, after, v_first = block(x, before, v_first, Call(x, x, None))
            x = x + self.dropout(y - x)
            layers.append(after)
        return self.ln_out(x), tuple(layers)

    def empty_layer(self, batch: int) -> LayerState:
        return recurrent_state(self, batch)

    def init_ends(self, generator: torch.Generator) -> None:
        """Embedding and head: N(0, 1 / √inputs) and N(0, 0.02), biases 0; norms are the identity."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()
        normal_(self.embed.weight, self.embed.in_features**-0.5, generator)
        normal_(self.head.weight, 0.02, generator)
        self.embed.bias.zero_()
        self.head.bias.zero_()


def recurrent_state(model: Forecaster, batch: int) -> LayerState:
    """What an RWKV block remembers before the first patch."""
    like = model.like
    shift = like.new_zeros(batch, model.config.hidden_size)
    wide = torch.promote_types(like.dtype, torch.float32)
    return LayerState(shift, like.new_zeros(batch, *model.config.wkv_shape, dtype=wide), shift)


class Rimer(Recurrent):
    """RWKV-7 over patches: the state has one size after any history."""

    family = "rimer"

    def __init__(self, config: RimerConfig) -> None:
        # every point comes with a mark that says whether it was observed
        super().__init__(
            config, 2 * config.patch_length, config.hidden_size, config.output_patches * config.patch_length
        )

    def block(self, layer: int) -> Block:
        sizes = self.config.blocks
        mixers = rwkv7.TimeMix(sizes, layer), rwkv7.ChannelMix(sizes)
        return Block(*mixers, sizes.hidden_size, sizes.layer_norm_eps, first=layer == 0)

    def encode(self, patches: Tensor, state: State) -> Tensor:
        missing = patches.isnan()
        return self.embed(torch.cat([patches.nan_to_num(nan=0.0), missing.to(patches.dtype)], dim=-1))

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """RWKV-7's published initial values in the blocks; embedding N(0, 1 / √inputs), head N(0, 0.02), biases 0."""
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_ends(generator)
        for layer, block in enumerate(self.blocks):
            set_vectors(block, rwkv7.initial_2025_05(self.config.blocks, layer))
            set_matrices(block, rwkv7.MATRIX_GAIN, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / len(self.blocks)) ** 0.7)


class RimerReleased(Forecaster):
    """What BlackGoose Rimer released: sine positions, one RWKV-7 time mix, one linear layer, no last norm."""

    family = "rimer-released"
    fingerprinted = ("embed.weight", "norm2.weight")

    def __init__(self, config: RimerReleasedConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed = nn.Linear(config.patch_length, width, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = rwkv7.TimeMix(config.blocks, 0)
        self.mlp = nn.Linear(width, width)
        self.head = nn.Linear(width, config.output_patches * config.patch_length)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, patches: Tensor, state: State) -> Tensor:
        x = self.embed(patches.nan_to_num(nan=0.0))
        return x + sinusoid(state.tokens_seen, x.shape[1], x.shape[2]).to(x)

    def body(self, x: Tensor, state: State) -> tuple[Tensor, tuple[NamedTuple, ...]]:
        (before,) = state.layers
        mixed, shift, wkv, _ = self.att(self.norm1(x), before.att_shift, before.wkv, None, None)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), (before._replace(att_shift=shift, wkv=wkv),)

    def empty_layer(self, batch: int) -> LayerState:
        return recurrent_state(self, batch)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """RWKV-7's published initial values in the time mix; other matrices orthogonal or N(0, 0.02), biases 0.

        The authors' own start, with every mix and `k_k` at zero, normalises a zero vector (timeseries.md 10).
        """
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        for module in (self.norm1, self.norm2, self.att.ln_x, self.mlp, self.head):
            module.weight.fill_(1)
            module.bias.zero_()
        normal_(self.embed.weight, self.embed.in_features**-0.5, generator)
        vectors = rwkv7.initial_2025_05(self.config.blocks, 0)
        mixer = {n.removeprefix("att."): v for n, v in vectors.items() if n.startswith("att.")}
        set_vectors(self.att, mixer)
        set_matrices(self.att, {n.removeprefix("att."): g for n, g in rwkv7.MATRIX_GAIN.items()}, generator)
        orthogonal_(self.mlp.weight, 0.1, generator)
        normal_(self.head.weight, 0.02, generator)


class KeyValues(NamedTuple):
    """One layer's cache: [b, h, n, d] each."""

    keys: Tensor
    values: Tensor


class TimerBlock(nn.Module):
    """Causal attention and an MLP, each followed (in Timer) or preceded by a norm."""

    def __init__(self, config: TimerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width))
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValues) -> tuple[Tensor, KeyValues]:
        before = self.config.norm_first
        mixed, cache = self.attend(self.norm1(x) if before else x, cache)
        x = x + self.dropout(mixed)
        x = x if before else self.norm1(x)
        x = x + self.dropout(self.down(gelu(self.up(self.norm2(x) if before else x))))
        return (x if before else self.norm2(x)), cache

    def attend(self, x: Tensor, cache: KeyValues) -> tuple[Tensor, KeyValues]:
        q, k, v = (
            project(x).unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        cached, new = cache.keys.shape[2], x.shape[1]
        cache = KeyValues(torch.cat([cache.keys, k], dim=2), torch.cat([cache.values, v], dim=2))
        seen = torch.ones(new, cached + new, dtype=torch.bool, device=x.device).tril(cached) if cached else None
        y = scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=seen, is_causal=seen is None)
        return self.output(y.transpose(1, 2).flatten(2)), cache


class Timer(Forecaster):
    """The transformer that the others are measured against; a missing point is read as the mean."""

    family = "timer"

    def __init__(self, config: TimerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_length, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(TimerBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.output_patches * config.patch_length * config.outputs)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, patches: Tensor, state: State) -> Tensor:
        x = self.embed(patches.nan_to_num(nan=0.0))
        return x + sinusoid(state.tokens_seen, x.shape[1], x.shape[2]).to(x)

    def body(self, x: Tensor, state: State) -> tuple[Tensor, tuple[NamedTuple, ...]]:
        layers = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x, after = block(x, before)
            layers.append(after)
        return self.ln_out(x), tuple(layers)

    def empty_layer(self, batch: int) -> KeyValues:
        empty = self.head.weight.new_zeros(batch, self.config.num_attention_heads, 0, self.config.head_dim)
        return KeyValues(empty, empty)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Matrices N(0, 1 / √inputs), the head N(0, 0.02), biases 0, norms the identity."""
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                normal_(parameter, 0.02 if name == "head.weight" else parameter.shape[1] ** -0.5, generator)
            else:
                parameter.fill_(1 if name.endswith("weight") else 0)


class RWKVTS(Recurrent):
    """RWKV-5.1 over overlapping patches; one head reads all of them and predicts a fixed horizon at once."""

    family = "rwkv-ts"
    streams = False

    def __init__(self, config: RWKVTSConfig) -> None:
        super().__init__(config, config.patch_length, config.tokens * config.hidden_size, config.horizon)

    def block(self, layer: int) -> Block:
        sizes = self.config.blocks
        mixers = rwkv5.TimeMix(sizes, layer), rwkv5.ChannelMix(sizes.hidden_size, sizes.intermediate_size)
        return Block(*mixers, sizes.hidden_size, sizes.layer_norm_eps, first=layer == 0)

    def encode(self, patches: Tensor, state: State) -> Tensor:
        return self.embed(patches.nan_to_num(nan=0.0))

    def forward(self, patches: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What follows the `patches` [b, tokens, p] of a whole context, as [b, 1, horizon, q]."""
        expected = [self.config.tokens, self.config.patch_length]
        if state is not None or list(patches.shape[1:]) != expected:
            raise ValueError(f"RWKV-TS reads {expected} patches in one call and takes no state")
        state = self.init_state(patches.shape[0])
        x, layers = self.body(self.dropout(self.encode(patches, state)), state)
        predicted = self.head(self.dropout(x.flatten(1))).unflatten(-1, (-1, self.config.outputs))[:, None]
        return in_order(predicted, self.config.levels), State(layers, state.tokens_seen + x.shape[1], self.config)

    def cut(self, context: Tensor) -> Tensor:
        """Overlapping patches of scaled series [b, l], which are drawn out at their end by repeating the last value."""
        missing = max(0, self.config.context_length - context.shape[1])
        context = pad(context[:, -self.config.context_length :], (missing, 0), value=math.nan)
        return pad(context, (0, self.config.stride), mode="replicate").unfold(
            1, self.config.patch_length, self.config.stride
        )

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """RWKV-5's published initial values in the blocks; embedding N(0, 1 / √inputs), head N(0, 0.02), biases 0."""
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.init_ends(generator)
        for layer, block in enumerate(self.blocks):
            set_vectors(block, rwkv5.initial_vectors(self.config.blocks, layer))
            set_matrices(block, rwkv5.MATRIX_GAIN, generator)
            block.att.ln_x.weight.fill_(((1 + layer) / len(self.blocks)) ** 0.7)
