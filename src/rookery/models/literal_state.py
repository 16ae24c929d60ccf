"""The kernel-upscaled state of State Tuning as its description is printed: a square state of features, for study alone.

Every vector goes through φ(x)_i = exp(−γ |x − u_i|²), the state is [m, m], and a fixed Q [n, m] brings what is read
back: Q S φ(r). Whatever the state begins with, the pretrained function is lost (state_methods.md 1.1); the form that
keeps it is in `rookery.models.kernel_state`. Two things are ours, without which it diverges or is not RWKV-7's:
what is removed is κ̂, and its features have length 1. An interpretation; there is no public code to compare with.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rookery.models.kernel_state import KernelStateModel
from rookery.models.rwkv7 import RWKV7, Signals
from rookery.nn.rwkv import RWKV, Block, Call
from rookery.ops.wkv7 import wkv7


class LayerState(NamedTuple):
    """What one block remembers; RWKV-7's own matrix is written to, but not read."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor
    kstate: Tensor
    """[b, h, m, m]"""


def gaussian(x: Tensor, support: Tensor, gamma: Tensor) -> Tensor:
    """exp(−γ |x − u_i|²), [b, t, h, m], of x [b, t, h, n]; `support` [h, m, n], `gamma` [h]."""
    squares = x.square().sum(-1, keepdim=True) + support.square().sum(-1)
    apart = squares - 2 * torch.einsum("bthn,hmn->bthm", x, support)
    return (-gamma[:, None] * apart.clamp(min=0)).exp()


class LiteralBlock(nn.Module):
    """A block of RWKV-7, whose modules it shares, that reads the square state instead of its own."""

    recurrence = staticmethod(wkv7)
    support: Tensor
    gamma: Tensor
    back: Tensor
    """Q, [h, n, m]"""

    def __init__(self, block: Block, heads: int, size: int, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = block
        self.register_buffer("support", torch.zeros(heads, features, size, dtype=dtype))
        self.register_buffer("gamma", torch.ones(heads, dtype=dtype))
        self.register_buffer("back", torch.zeros(heads, size, features, dtype=dtype))

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, call: Call
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        base, att, cu_seqlens = self.base, self.base.att, call.cu_seqlens
        mixed, att_shift = att.mixed(base.ln1(x), state.att_shift, cu_seqlens)
        signals, v_first = att.signals(mixed, v_first)
        _, wkv = att.recurrence(**signals.inputs(), state=state.wkv, cu_seqlens=cu_seqlens)
        read, kstate = self.recurrence(**self.lifted(signals), state=state.kstate, cu_seqlens=cu_seqlens)
        y = torch.einsum("hnm,bthm->bthn", self.back, read).to(signals.v.dtype)
        x = x + att.finish(y, signals)
        mixed, ffn_shift = base.ffn(base.ln2(x), state.ffn_shift, cu_seqlens)
        return x + mixed, LayerState(att_shift, wkv, ffn_shift, kstate), v_first

    def lifted(self, signals: Signals) -> dict[str, Tensor]:
        """The arguments of `wkv7` for the square state, but for the state."""
        wide = self.support.dtype

        def phi(x: Tensor) -> Tensor:
            return gaussian(x.to(wide), self.support, self.gamma)

        removal = nn.functional.normalize(phi(-signals.a), dim=-1)
        rate = phi(signals.rate_logit.sigmoid().unflatten(-1, signals.r.shape[-2:]))
        # a decay of zero has no logarithm
        log_w = phi(signals.log_w.exp()).clamp(min=1e-12).log()
        plain = {name: phi(getattr(signals, name)) for name in "rkv"}
        return {**plain, "log_w": log_w, "a": -removal, "b": removal * rate}

    @torch.no_grad()
    def fit(self, values: Tensor, ridge: float = 1e-3) -> None:
        """Chooses Q so that Q φ(v) is near v, by ridge regression on values [p, h, n]."""
        v = values.to(self.support).transpose(0, 1)  # [h, p, n]
        features = gaussian(v.transpose(0, 1)[None], self.support, self.gamma)[0].transpose(0, 1)  # [h, p, m]
        gram = features.mT @ features + ridge * torch.eye(features.shape[-1], dtype=v.dtype, device=v.device)
        self.back.copy_(torch.linalg.solve(gram, features.mT @ v).mT)


class LiteralStateModel(KernelStateModel):
    """RWKV-7 that reads a square state of features; it shares the weights of the model that it is made from."""

    def __init__(self, model: RWKV7, features: int) -> None:
        if type(model) is not RWKV7:
            raise ValueError(f"the literal form is that of RWKV-7, this model is {model.family}")
        super().__init__(model, features)
        config = model.config
        wide = torch.promote_types(model.emb.weight.dtype, torch.float32)
        sizes = config.num_heads, config.head_dim, features, wide
        self.blocks = nn.ModuleList(LiteralBlock(block, *sizes) for block in model.blocks)

    def empty_layer(self, batch: int) -> LayerState:
        plain, features = RWKV.empty_layer(self, batch), self.config.features
        return LayerState(*plain, plain.wkv.new_zeros(batch, self.config.num_heads, features, features))
