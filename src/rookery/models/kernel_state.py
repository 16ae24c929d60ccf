"""A model beside whose matrix state a larger one is read: the kernel-upscaled state of State Tuning (arXiv 2504.05097).

An interpretation; there are no public code, weights or tables to compare with (state_methods.md 1.4). Per head, what
the frozen time mix makes of a token is lifted from n key channels to m features, its likeness to m support vectors:

    φ(x)_i = |x| exp(−2γ (1 − x·u_i / |x|))        (γ = 0 stands for the linear kernel: φ(x) = U x)
    y ← y + gate · wkv7(r = φ(r), w = A w, k = φ(k) or 0, v = v, a = −ψ, b = ψ ⊙ A rate),    ψ = φ(κ̂) / |φ(κ̂)|

with A_in = u_in² / |u_i|², so that decay and rate stay within the base's ranges. All that says how a row is read lies
in the row's own state (`support`, `rule`), so that a batch may hold rows that were tuned apart, and a session's file
needs nothing else. With the state zero this is the base model, bit for bit. RWKV-5 and 6 remove nothing: theirs is the
same with `wkv6`, without a and b.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rwkv5 import RWKV5Config
from rookery.families.rwkv6 import RWKV6Config
from rookery.families.rwkv7 import RWKV7Config
from rookery.models.rwkv5 import RWKV5
from rookery.models.rwkv6 import RWKV6
from rookery.models.rwkv7 import RWKV7, TimeMix
from rookery.nn.language_model import LanguageModel
from rookery.nn.rwkv import RWKV, Block, Call
from rookery.ops.wkv6 import wkv6
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7.reference import per_document

# b rows, t time, h heads, n channels of a head, m features

RULE = ("gamma", "fades", "writes", "gate")
"""What the numbers of a head's rule are: the kernel's width (0: linear), whether the state decays and is erased,
whether it is written to, and what its reading is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class Upscaled:
    """What the config of a model that hosts kernel states has besides its family's."""

    features: int = 256
    """Key channels of a head's upscaled state (M)."""

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of the family's state, of the upscaled one (4·L·C·M in float32), of as many support vectors, and
        rules."""
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        numbers = 2 * self.hidden_size * self.features + len(RULE) * self.num_heads
        return plain + self.num_hidden_layers * batch * numbers * max(4, itemsize)


@dataclass(frozen=True, kw_only=True)
class KernelState5Config(Upscaled, RWKV5Config):
    """An RWKV-5 model and the number of features of its upscaled states."""


@dataclass(frozen=True, kw_only=True)
class KernelState6Config(Upscaled, RWKV6Config):
    """An RWKV-6 model and the number of features of its upscaled states."""


@dataclass(frozen=True, kw_only=True)
class KernelState7Config(Upscaled, RWKV7Config):
    """An RWKV-7 model and the number of features of its upscaled states."""


CONFIGS = {RWKV5: KernelState5Config, RWKV6: KernelState6Config, RWKV7: KernelState7Config}
"""Models that host kernel states."""


class LayerState(NamedTuple):
    """What one block remembers: RWKV-7's state, the upscaled one and how it is read, float32 at least."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    kstate: Tensor
    """[b, h, n, m]"""
    support: Tensor
    """[b, h, m, n], never changed"""
    rule: Tensor
    """[b, h, 4], see RULE; never changed"""


def phi(x: Tensor, support: Tensor, gamma: Tensor) -> Tensor:
    """Features [b, t, h, m] of vectors [b, t, h, n]: homogeneous, φ(c x) = c φ(x) for c > 0, and largest where x lies.

    `support` is [b, h, m, n] (unit rows, unless gamma is 0), `gamma` [b, h]; 1 for b stands for all rows.
    """
    products = torch.einsum("bthn,bhmn->bthm", x, support)
    length = x.norm(dim=-1, keepdim=True)
    gamma = gamma[:, None, :, None]
    likeness = products / length.clamp(min=torch.finfo(x.dtype).tiny)
    return torch.where(gamma == 0, products, length * (-2 * gamma * (1 - likeness)).exp())


def mixing(support: Tensor) -> Tensor:
    """A: rows that sum to 1, [b, h, m, n]."""
    squares = support.square()
    return squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(support.dtype).tiny)


def lifted(call: dict[str, Tensor], support: Tensor, rule: Tensor) -> dict[str, Tensor]:
    """The arguments of `wkv7` (without removal: of `wkv6`) for the upscaled state, but for the state: in its dtype.

    `call` has those of the base's own recurrence, and for RWKV-7 the rate [b, t, h, n] that is in its `b`.
    """
    gamma, fades, writes, _ = rule.unbind(-1)
    wide, mixed, tokens = support.dtype, mixing(support), call["r"].shape[:2]
    fades, writes = fades[:, None, :, None], writes[:, None, :, None]
    decay = call["log_w"].to(wide).exp()
    if decay.dim() == 2:  # RWKV-5 has one for all tokens
        decay = decay.expand(*tokens, *decay.shape)
    # a decay of zero has no logarithm
    log_w = fades * torch.einsum("bthn,bhmn->bthm", decay, mixed).clamp(min=torch.finfo(wide).tiny).log()
    key = phi(call["k"].to(wide), support, gamma) * writes
    made = {"r": phi(call["r"].to(wide), support, gamma), "log_w": log_w, "k": key, "v": call["v"].to(wide)}
    if "rate" not in call:
        return {**made, "u": support.new_zeros(support.shape[1:3])}
    removal = phi(-call["a"].to(wide), support, gamma)
    removal = removal / removal.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    rate = fades * torch.einsum("bthn,bhmn->bthm", call["rate"].to(wide), mixed)
    return {**made, "a": -removal, "b": removal * rate}


def evolve(*, moves: bool = True, state: Tensor, cu_seqlens: Tensor | None = None, **call: Tensor):
    """As `wkv7` or `wkv6`, whosever arguments these are; where nothing moves (no decay, no erasure, no writing) a
    product with a matrix that stays what it is."""
    if moves:
        return (wkv7 if "a" in call else wkv6)(**call, state=state, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        return per_document(evolve_still, r=call["r"], state=state, cu_seqlens=cu_seqlens)
    return evolve_still(r=call["r"], state=state)


def evolve_still(*, r: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The reading of a state that stays as it is."""
    return torch.einsum("bthm,bhnm->bthn", r, state), state


class KernelStateBlock(nn.Module):
    """A block of RWKV-5, 6 or 7, whose modules it shares, that also reads the upscaled state."""

    recurrence = staticmethod(evolve)
    """What may take the place of `evolve` in one instance, to look at what it is given."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.base = block

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        base, cu_seqlens = self.base, call.cu_seqlens
        att = self.time_mix if isinstance(base.att, TimeMix) else self.older_time_mix
        mixed, att_shift, (wkv, kstate), v_first = att(base.ln1(x), state, v_first, cu_seqlens)
        x = x + mixed
        mixed, ffn_shift = base.ffn(base.ln2(x), state.ffn_shift, cu_seqlens)
        return x + mixed, LayerState(att_shift, wkv, ffn_shift, kstate, state.support, state.rule), v_first

    def time_mix(self, x: Tensor, state: LayerState, v_first: Tensor | None, cu_seqlens: Tensor | None):
        """RWKV-7's, with what the upscaled state adds before the norm."""
        att = self.base.att
        mixed, shift = att.mixed(x, state.att_shift, cu_seqlens)
        signals, v_first = att.signals(mixed, v_first)
        call = signals.inputs()
        y, wkv = att.recurrence(**call, state=state.wkv, cu_seqlens=cu_seqlens)
        rate = signals.rate_logit.sigmoid().unflatten(-1, call["r"].shape[-2:])
        more, kstate = self.read({**call, "rate": rate}, state, cu_seqlens)
        return att.finish(y + more.to(y.dtype), signals), shift, (wkv, kstate), v_first

    def older_time_mix(self, x: Tensor, state: LayerState, v_first: Tensor | None, cu_seqlens: Tensor | None):
        """RWKV-5's and 6's: the same, from within their own call."""
        att = self.base.att

        def both(*, state: Tensor, cu_seqlens: Tensor | None, **call: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            y, wkv = att.recurrence(**call, state=state, cu_seqlens=cu_seqlens)
            more, kstate = self.read(call, whole, cu_seqlens)
            return y + more.to(y.dtype), (wkv, kstate)

        whole = state
        return att(x, state.att_shift, state.wkv, v_first, cu_seqlens, recurrence=both)

    def read(self, call: dict[str, Tensor], state: LayerState, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the upscaled state adds to the output [b, t, h, n], and the state after the tokens."""
        kstate, support, rule = state.kstate, state.support, state.rule
        if cu_seqlens is not None:
            # packed documents are one row of tokens: features are made for all at once where they are made alike
            if not (_alike(support) and _alike(rule)):
                return self._each(call, state, cu_seqlens)
            support, rule = support[:1], rule[:1]
        moves = bool((rule[..., 1:3] != 0).any())
        made = lifted(call, support, rule)
        y, kstate = self.recurrence(**made, moves=moves, state=kstate, cu_seqlens=cu_seqlens)
        return y * rule[:, None, :, 3:], kstate

    def _each(self, call: dict[str, Tensor], state: LayerState, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            # what has no axis of tokens is the same for all of them
            own = {name: part[:, begin:end] if part.dim() > 2 else part for name, part in call.items()}
            y, kstate = self.read(own, LayerState(*(part[row : row + 1] for part in state)), None)
            outputs.append(y)
            states.append(kstate)
        return torch.cat(outputs, dim=1), torch.cat(states)


def _alike(values: Tensor) -> bool:
    """True if all rows are the same; views of one row are not looked at."""
    return values.shape[0] < 2 or values.stride(0) == 0 or bool((values == values[:1]).all())


class KernelStateModel(RWKV):
    """An RWKV-5, 6 or 7 that hosts upscaled states; it shares the weights of the model that it is made from.

    `logits, state = model(tokens, state)` as ever. Its states have three tensors more per block (see LayerState), zero
    in a fresh one, which reads nothing. ValueError for a model of another family.
    """

    def __init__(self, model: RWKV5 | RWKV6 | RWKV7, features: int) -> None:
        LanguageModel.__init__(self)
        if type(model) not in CONFIGS:
            raise ValueError(
                f"kernel states are read by RWKV-5, 6 and 7, this model is {model.family}; tune a plain state"
            )
        sizes = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
        self.family, self.config = model.family, CONFIGS[type(model)](**sizes, features=features)
        self.base = [model]  # in a list: its parameters are counted once
        self.emb, self.ln_out, self.head = model.emb, model.ln_out, model.head
        self.blocks = nn.ModuleList(KernelStateBlock(block) for block in model.blocks)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.base[0].embed(tokens)

    def fingerprint(self) -> str:
        return self.base[0].fingerprint()

    def known_as(self, fingerprint: str) -> None:
        self.base[0].known_as(fingerprint)

    def empty_layer(self, batch: int) -> LayerState:
        config, plain = self.config, RWKV.empty_layer(self, batch)
        heads, size, features = config.num_heads, config.head_dim, config.features
        new = plain.wkv.new_zeros
        # gamma 1 and a support of zeros: whatever is read is multiplied with a state of zeros
        rule = new(batch, heads, len(RULE)) + new(len(RULE)).index_fill(
            0, torch.tensor([0, 3], device=new(0).device), 1
        )
        return LayerState(*plain, new(batch, heads, size, features), new(batch, heads, features, size), rule)
