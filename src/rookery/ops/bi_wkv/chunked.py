"""Bi-WKV in chunks and in logarithms, in plain torch: any device, any decay.

All pairs inside a chunk, and for what lies before and after it two sums each (of e^k v and of e^k) as multiples of
e^top, where top is the largest exponent in them; `_carry` takes the sums from chunk to chunk.
"""

# b batch, g chunks, m tokens of a chunk (and i its keys), c channels

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

CHUNK = 32
NOTHING = -1e38
"""An exponent: e to it is zero, and sums with it stay finite."""


def why_not(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact") -> str | None:
    """Reason that this call cannot run, or None."""
    return None if compat == "exact" else f"it computes the exact form, not {compat!r}"


def bi_wkv(*, omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, compat: str = "exact", chunk: int = CHUNK) -> Tensor:
    """As `rookery.ops.bi_wkv.bi_wkv`; `chunk` is the number of tokens of a chunk, fewer where the rows are shorter."""
    dtype, wide, tokens = v.dtype, torch.promote_types(k.dtype, torch.float32), k.shape[1]
    if not k.numel():
        return v.clone()
    chunk = min(chunk, tokens)
    omega, mu, k, v = (x.to(wide) for x in (omega, mu, k, v))
    k, v = (
        pad(x, (0, 0, 0, -tokens % chunk), value=fill).unflatten(1, (-1, chunk)) for x, fill in ((k, NOTHING), (v, 0))
    )
    place = torch.arange(chunk, device=k.device, dtype=wide)[:, None]
    past = _carry(_sums(k - omega * (chunk - 1 - place), v), omega * chunk)
    future = [x.flip(1) for x in _carry([x.flip(1) for x in _sums(k - omega * place, v)], omega * chunk)]
    # all pairs of a chunk are a large tensor: the backward pass computes them again
    run = lambda *call: checkpoint(_chunks, *call, use_reentrant=False) if torch.is_grad_enabled() else _chunks(*call)  # noqa: E731
    return run(omega, mu, k, v, *past, *future).flatten(1, 2)[:, :tokens].to(dtype)


def _sums(exponents: Tensor, v: Tensor) -> list[Tensor]:
    """Σ e^x v, Σ e^x and their unit's exponent, of every chunk [b, g, c]."""
    top = exponents.amax(2).detach()
    weights = (exponents - top[:, :, None]).exp()
    return [(weights * v).sum(2), weights.sum(2), top]


def _carry(sums: list[Tensor], decay: Tensor) -> list[Tensor]:
    """The sums over all chunks before each, seen from its first token."""
    weighted, total, tops = (x.unbind(1) for x in sums)
    a = b = torch.zeros_like(total[0])
    top, carried = torch.full_like(a, NOTHING), []
    for own_a, own_b, own_top in zip(weighted, total, tops):
        carried.append((a, b, top))
        highest = torch.maximum(top - decay, own_top).detach()
        old, new = (top - decay - highest).exp(), (own_top - highest).exp()
        a, b, top = old * a + new * own_a, old * b + new * own_b, highest
    return [torch.stack(x, dim=1) for x in zip(*carried)]


def _chunks(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> Tensor:
    past_v, past, past_top, future_v, future, future_top = (x[:, :, None] for x in sums)
    chunk = k.shape[2]
    place = torch.arange(chunk, device=k.device, dtype=k.dtype)
    away = (place[:, None] - place).abs()[..., None]
    inside = torch.where(away == 0, mu, -omega * (away - 1)) + k[:, :, None]  # [b, g, m, i, c]
    before, after = past_top - omega * place[:, None], future_top - omega * (chunk - 1 - place[:, None])
    highest = torch.maximum(inside.amax(3), torch.maximum(before, after)).detach()
    inside = (inside - highest[:, :, :, None]).exp()
    before, after = (before - highest).exp(), (after - highest).exp()
    weighted = (inside * v[:, :, None]).sum(3) + before * past_v + after * future_v
    return weighted / (inside.sum(3) + before * past + after * future)
