"""RWKV-7 beside whose matrix state a larger one is read: the kernel-upscaled state of State Tuning (arXiv 2504.05097).

An interpretation; there are no public code, weights or tables to compare with (state_methods.md 1.4). Per head, what
the frozen time mix makes of a token is lifted from n key channels to m features, its likeness to m support vectors:

    φ(x)_i = |x| exp(−2γ (1 − x·u_i / |x|))        (γ = 0 stands for the linear kernel: φ(x) = U x)
    y ← y + gate · wkv7(r = φ(r), w = A w, k = φ(k) or 0, v = v, a = −ψ, b = ψ ⊙ A rate),    ψ = φ(κ̂) / |φ(κ̂)|

with A_in = u_in² / |u_i|², so that decay and rate stay within the base's ranges. All that says how a row is read lies
in the row's own state (`support`, `rule`), so that a batch may hold rows that were tuned apart, and a session's file
needs nothing else. With the state zero this is the base model, bit for bit.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.families.rwkv7 import RWKV7Config
from rookery.models.rwkv7 import RWKV7, Signals
from rookery.nn.language_model import LanguageModel
from rookery.nn.rwkv import RWKV, Block, Call
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7.reference import per_document

# b rows, t time, h heads, n channels of a head, m features

RULE = ("gamma", "fades", "writes", "gate")
"""What the numbers of a head's rule are: the kernel's width (0: linear), whether the state decays and is erased,
whether it is written to, and what its reading is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class KernelStateConfig(RWKV7Config):
    """An RWKV-7 model and the number of features of its upscaled states."""

    features: int = 256
    """Key channels of a head's upscaled state (M)."""

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        """Bytes of RWKV-7's state, of the upscaled one (4·L·C·M in float32), of as many support vectors, and rules."""
        plain = super().state_nbytes(tokens_seen=tokens_seen, batch=batch, itemsize=itemsize)
        numbers = 2 * self.hidden_size * self.features + len(RULE) * self.num_heads
        return plain + self.num_hidden_layers * batch * numbers * max(4, itemsize)


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


def lifted(signals: Signals, support: Tensor, rule: Tensor) -> dict[str, Tensor]:
    """The arguments of `wkv7` for the upscaled state, but for the state: in its dtype."""
    gamma, fades, writes, _ = rule.unbind(-1)
    wide = support.dtype
    rate = signals.rate_logit.to(wide).sigmoid().unflatten(-1, (-1, support.shape[-1]))
    decay = signals.log_w.to(wide).exp()
    mixed = mixing(support)
    removal = phi(-signals.a.to(wide), support, gamma)
    removal = removal / removal.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    fades, writes = fades[:, None, :, None], writes[:, None, :, None]
    rate = fades * torch.einsum("bthn,bhmn->bthm", rate, mixed)
    log_w = fades * torch.einsum("bthn,bhmn->bthm", decay, mixed).log()
    key = phi(signals.k.to(wide), support, gamma) * writes
    read = phi(signals.r.to(wide), support, gamma)
    return {"r": read, "log_w": log_w, "k": key, "v": signals.v.to(wide), "a": -removal, "b": removal * rate}


def evolve(*, moves: bool = True, state: Tensor, cu_seqlens: Tensor | None = None, **call: Tensor):
    """As `wkv7`; where nothing moves (no decay, no erasure, no writing) a product with a matrix that stays what it
    is."""
    if moves:
        return wkv7(**call, state=state, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        return per_document(evolve_still, r=call["r"], state=state, cu_seqlens=cu_seqlens)
    return evolve_still(r=call["r"], state=state)


def evolve_still(*, r: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The reading of a state that stays as it is."""
    return torch.einsum("bthm,bhnm->bthn", r, state), state


class KernelStateBlock(nn.Module):
    """A block of RWKV-7, whose modules it shares, that also reads the upscaled state."""

    recurrence = staticmethod(evolve)
    """What may take the place of `evolve` in one instance, to look at what it is given."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.base = block

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        base, att, cu_seqlens = self.base, self.base.att, call.cu_seqlens
        mixed, att_shift = att.mixed(base.ln1(x), state.att_shift, cu_seqlens)
        signals, v_first = att.signals(mixed, v_first)
        y, wkv = att.recurrence(**signals.inputs(), state=state.wkv, cu_seqlens=cu_seqlens)
        more, kstate = self.read(signals, state, cu_seqlens)
        x = x + att.finish(y + more.to(y.dtype), signals)
        mixed, ffn_shift = base.ffn(base.ln2(x), state.ffn_shift, cu_seqlens)
        return x + mixed, LayerState(att_shift, wkv, ffn_shift, kstate, state.support, state.rule), v_first

    def read(self, signals: Signals, state: LayerState, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the upscaled state adds to the output [b, t, h, n], and the state after the tokens."""
        kstate, support, rule = state.kstate, state.support, state.rule
        if cu_seqlens is not None:
            # packed documents are one row of tokens: features are made for all at once where they are made alike
            if not (_alike(support) and _alike(rule)):
                return self._each(signals, state, cu_seqlens)
            support, rule = support[:1], rule[:1]
        moves = bool((rule[..., 1:3] != 0).any())
        call = lifted(signals, support, rule)
        y, kstate = self.recurrence(**call, moves=moves, state=kstate, cu_seqlens=cu_seqlens)
        return y * rule[:, None, :, 3:], kstate

    def _each(self, signals: Signals, state: LayerState, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            own = Signals(*(part[:, begin:end] for part in signals))
            y, kstate = self.read(own, LayerState(*(part[row : row + 1] for part in state)), None)
            outputs.append(y)
            states.append(kstate)
        return torch.cat(outputs, dim=1), torch.cat(states)


def _alike(values: Tensor) -> bool:
    """True if all rows are the same; views of one row are not looked at."""
    return values.shape[0] < 2 or values.stride(0) == 0 or bool((values == values[:1]).all())


class KernelStateRWKV7(RWKV7):
    """An RWKV-7 model that hosts upscaled states; it shares the weights of the model that it is made from.

    `logits, state = model(tokens, state)` as ever. Its states have three tensors more per block (see LayerState), zero
    in a fresh one, which reads nothing. ValueError for a model of another family.
    """

    def __init__(self, model: RWKV7, features: int) -> None:
        LanguageModel.__init__(self)
        if type(model) is not RWKV7:
            raise ValueError(f"kernel states are read by rwkv7 models, this one is {model.family}; tune a plain state")
        sizes = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
        self.config = KernelStateConfig(**sizes, features=features)
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
