"""RRWKV (arXiv 2306.05176, withdrawn by its author): RWKV-4 that looks back at mediums. Experimental.

Of the paper only the idea could be read: summaries of past tokens ("mediums") at regular intervals, used in both mixers
to shorten the way from far tokens. What follows is our own (hybrids.md 6.3):

    p_j = mean of the inputs x of interval j      m_j = p_j ⊙ 2σ(relu(p_j e1) e2)      M_t = the last finished m, or 0
    x_i = μ_i x_t + (1 − μ_i) x_{t−1} + ρ_i M_t   for i in k, v, r (time mix) and k, r (channel mix)
    y_t = (a_{t−1} + e^{u+k_t} v_t + Σ_j e^{κ_j} Wv m_j) / (b_{t−1} + e^{u+k_t} + Σ_j e^{κ_j}),      κ_j = Wk m_j + um

over all finished intervals j: mediums do not decay, so that a token reaches any later one through at most `interval`
decaying steps and one more. Intervals lie at fixed positions of the text. Parameters are RWKV-4's and those called rr_.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rrwkv import FAMILY, RRWKVConfig, around, medium_shapes
from rookery.models import build, rwkv4
from rookery.models.rwkv4 import RWKV4
from rookery.nn.growth import Growth, growth
from rookery.nn.initial import normal_
from rookery.nn.rwkv import Block, Call
from rookery.ops.token_shift import token_shift
from rookery.ops.wkv4 import NOTHING_YET, wkv4
from rookery.state import State

# b batch, r rows, t time, c width, j intervals that the tokens of a call lie in

STEPS = 16
"""Tokens of a part, see `log_total`."""


class LayerState(NamedTuple):
    """What one block remembers: RWKV-4's state and, for each mixer, the open interval's sum and the last medium."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    att_pool: Tensor
    """[b, c], float32 at least"""
    att_medium: Tensor
    """[b, c]"""
    mediums: Tensor
    """[b, 3, c], float32 at least: sums over all mediums of e^κ v and e^κ, both divided by e^top, and top"""
    ffn_pool: Tensor
    ffn_medium: Tensor


class Intervals(NamedTuple):
    """How the tokens of a call fall into intervals; numbers count from the interval that was open before the call."""

    grows: Growth
    number: Tensor
    """int64 [r, t], of each token's interval"""
    weights: Tensor
    """[r, t, 1], how much each token counts in its medium; 0 at padding"""
    finished: Tensor
    """int64 [r], intervals that the call finishes"""
    count: int
    """j"""


def intervals(grows: Growth, weights: Tensor) -> Intervals:
    """`weights` [interval] are those of the places in an interval."""
    interval, real = len(weights), grows.positions >= 0
    open_one = grows.start // interval
    number = torch.where(real, grows.positions // interval - open_one[:, None], 0)
    counts = weights[grows.positions.clamp(min=0) % interval] * real
    finished = (grows.start + real.sum(dim=1)) // interval - open_one
    count = int(number.max()) + 1 if number.numel() else 1
    return Intervals(grows, number, counts[..., None], finished, count)


class Mediums(nn.Module):
    """Squeeze and excite: what the mixers of a block make mediums with."""

    rr_e1: nn.Parameter
    rr_e2: nn.Parameter

    def add_parameters(self, config: RRWKVConfig, mixer: str) -> None:
        for name, shape in medium_shapes(config).items():
            if name.startswith(mixer):
                setattr(self, name.removeprefix(mixer), nn.Parameter(torch.empty(shape)))

    def look_back(
        self, x: Tensor, pool: Tensor, medium: Tensor, at: Intervals
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mediums of the intervals [r, j, c], each token's M in the call's layout, the new pool and last medium."""
        rows = at.grows.rows(x).to(pool.dtype)
        sums = pool.new_zeros(len(pool), at.count, pool.shape[1])
        sums = sums.scatter_add(1, _wide(at.number, rows), at.weights * rows)
        sums = torch.cat([sums[:, :1] + pool[:, None], sums[:, 1:]], dim=1)
        p = sums.to(x.dtype)
        made = p * 2 * ((p @ self.rr_e1).relu() @ self.rr_e2).sigmoid()
        line = torch.cat([medium[:, None], made], dim=1)  # line[i] is what tokens of interval i see
        seen = at.grows.packed(line.gather(1, _wide(at.number, line)))
        pool = torch.cat([sums, torch.zeros_like(sums[:, :1])], dim=1)  # a new interval begins empty
        return made, seen, _pick(pool, at.finished), _pick(line, at.finished)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, like.shape[-1])


def _pick(line: Tensor, index: Tensor) -> Tensor:
    """line[r, index[r]]."""
    return line[torch.arange(len(index), device=index.device), index]


class TimeMix(rwkv4.TimeMix, Mediums):
    """RWKV-4's average of values, with mediums among them that never fade."""

    def __init__(self, config: RRWKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.add_parameters(config, "att.")

    def forward(self, x: Tensor, state: LayerState, at: Intervals, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        made, seen, pool, medium = self.look_back(x, state.att_pool, state.att_medium, at)
        mix = 1 - torch.cat([self.time_mix_k, self.time_mix_v, self.time_mix_r]).flatten(1)
        mixed, shift = token_shift(x=x, mix=mix, previous=state.att_shift, cu_seqlens=call.cu_seqlens)
        xk, xv, xr = (part + getattr(self, f"rr_rho_{n}") * seen for part, n in zip(mixed, "kvr"))
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr).sigmoid()
        wide = state.wkv.dtype
        log_w, u = -self.time_decay.to(wide).exp(), self.time_first.to(wide)
        y, wkv = wkv4(log_w=log_w, u=u, k=k, v=v, state=state.wkv, cu_seqlens=call.cu_seqlens)

        line = self.remembered(made, state.mediums, at)  # [r, 1 + j, 3, c]
        there = at.number[..., None, None].expand(*at.number.shape, *line.shape[2:])
        weighted, total, top = at.grows.packed(line.gather(1, there)).unbind(-2)
        tokens = at.grows.packed(log_total(log_w, u, at.grows.rows(k).to(wide), state.wkv))
        mediums = total.where(total > 0, 1)  # before the first, top says that there is nothing
        # how much weight the mediums have beside the tokens, as a difference of logarithms: nothing overflows
        share = top + mediums.log() - tokens
        y = (-share).sigmoid() * y.to(wide) + share.sigmoid() * weighted / mediums
        return self.output(r * y.to(x.dtype)), (shift, wkv, pool, medium, _pick(line, at.finished))

    def remembered(self, made: Tensor, before: Tensor, at: Intervals) -> Tensor:
        """Sums over all mediums that tokens of each interval see, [r, 1 + j, 3, c]."""
        keys = (self.key(made) + self.rr_um).to(before.dtype)
        values = self.value(made).to(before.dtype)
        fade = -self.rr_fade.to(before.dtype).exp() if hasattr(self, "rr_fade") else 0.0
        line = [before]
        for j in range(at.count):
            weighted, total, top = line[-1].unbind(1)
            highest = torch.maximum(top + fade, keys[:, j]).detach()
            past, now = (top + fade - highest).exp(), (keys[:, j] - highest).exp()
            grown = torch.stack([past * weighted + now * values[:, j], past * total + now, highest], dim=1)
            line.append(torch.where((at.finished > j)[:, None, None], grown, line[-1]))
        return torch.stack(line, dim=1)


def log_total(log_w: Tensor, u: Tensor, k: Tensor, state: Tensor) -> Tensor:
    """Logarithm of what RWKV-4 divides by at each token, [r, t, c], for k [r, t, c] and the state before them.

    Parts of STEPS tokens go through side by side, then what came before each is added.
    """
    rows, time, width = k.shape
    parts = -(-time // STEPS)
    k_parts = nn.functional.pad(k, (0, 0, 0, parts * STEPS - time), value=NOTHING_YET).view(rows, parts, STEPS, width)
    inside = [torch.full_like(k_parts[:, :, 0], NOTHING_YET)]
    for step in range(STEPS):
        inside.append(torch.logaddexp(inside[-1] + log_w, k_parts[:, :, step]))
    held = state[:, 1].where(state[:, 1] > 0, 1).log() + state[:, 2].detach()
    carried = []
    for part in range(parts):
        carried.append(held)
        held = torch.logaddexp(held + STEPS * log_w, inside[-1][:, part])
    if not carried:
        return k
    faded = torch.stack(carried, dim=1)[:, :, None] + log_w * torch.arange(STEPS, device=k.device)[:, None]
    before = torch.logaddexp(faded, torch.stack(inside[:-1], dim=2))
    return torch.logaddexp(before.flatten(1, 2)[:, :time], u + k)


class ChannelMix(rwkv4.ChannelMix, Mediums):
    """RWKV-4's channel mix on inputs that the last medium is added to."""

    def __init__(self, config: RRWKVConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size)
        self.add_parameters(config, "ffn.")

    def forward(self, x: Tensor, state: LayerState, at: Intervals, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        _, seen, pool, medium = self.look_back(x, state.ffn_pool, state.ffn_medium, at)
        mix = 1 - torch.cat([self.time_mix_k, self.time_mix_r]).flatten(1)
        (xk, xr), shift = token_shift(x=x, mix=mix, previous=state.ffn_shift, cu_seqlens=call.cu_seqlens)
        return self.mixed(xk + self.rr_rho_k * seen, xr + self.rr_rho_r * seen), (shift, pool, medium)


class MediumBlock(Block):
    """A block whose mixers look back."""

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        mixed, (att_shift, wkv, att_pool, att_medium, mediums) = self.att(self.ln1(x), state, call.growth, call)
        x = x + mixed
        mixed, (ffn_shift, ffn_pool, ffn_medium) = self.ffn(self.ln2(x), state, call.growth, call)
        after = LayerState(att_shift, wkv, ffn_shift, att_pool, att_medium, mediums, ffn_pool, ffn_medium)
        return x + mixed, after, v_first


class RRWKV(RWKV4):
    """The language model: `logits, state = model(tokens, state)`."""

    family = FAMILY.name
    static_step = False

    @classmethod
    @torch.no_grad()
    def from_rwkv4(cls, model: RWKV4, *, um: float = -20.0, **own: object) -> "RRWKV":
        """`model` with mediums that hardly count yet (e^um each); `own` are fields of the config, as interval=16."""
        made = build(FAMILY, around(model.config, **own))
        made.init_weights(0)
        made = made.to(model.head.weight)
        missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
        assert not unexpected
        assert all(".rr_" in name for name in missing)
        for block in made.blocks:
            block.att.rr_um.fill_(um)
        return made

    def block(self, config: RRWKVConfig, layer: int) -> MediumBlock:
        mixes = TimeMix(config, layer), ChannelMix(config)
        return MediumBlock(*mixes, config.hidden_size, config.layer_norm_eps, first=layer == 0)

    def call(self, tokens: Tensor, embedded: Tensor, state: State, cu_seqlens: Tensor | None) -> Call:
        grows = growth(tokens, state.tokens_seen, 0, cu_seqlens)
        wide = torch.promote_types(embedded.dtype, torch.float32)
        weights = torch.tensor(self.config.medium_weights, dtype=wide, device=tokens.device)
        return Call(tokens, embedded, cu_seqlens, growth=intervals(grows, weights))

    def empty_layer(self, batch: int) -> LayerState:
        shift, wkv, _ = super().empty_layer(batch)
        pool = wkv.new_zeros(batch, self.config.hidden_size)
        return LayerState(shift, wkv, shift, pool, shift, self.empty_wkv(batch, wkv.dtype), pool, shift)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Gives every parameter its initial value; the same for the same seed.

        | parameter | value |
        |---|---|
        | `att.time_*`, `att.*.weight`, `ffn.time_*`, `ffn.*.weight`, `emb`, `head` | as in RWKV-4 |
        | `rr_e1` | N(0, 1 / √width) |
        | `rr_e2`, `rr_rho_*` | 0: mediums are the pooled inputs, and enter through the time mix alone |
        | `rr_um` | −2 |
        | `rr_fade` | −3: a medium fades by 5% with each new one |
        | norms | 1, biases 0 |
        """
        super().init_weights(seed)
        generator = torch.Generator().manual_seed(4 + (seed or 0))
        for name, parameter in self.named_parameters():
            if name.endswith("rr_e1"):
                normal_(parameter, self.config.hidden_size**-0.5, generator)
            elif ".rr_" in name:
                parameter.fill_({"rr_um": -2.0, "rr_fade": -3.0}.get(name.rpartition(".")[2], 0.0))
