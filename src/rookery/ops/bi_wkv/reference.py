"""Bi-WKV by its definition: all pairs of tokens. Every other backend must agree with it."""

# b batch, t queries of a part, i keys, c channels

import torch
from jaxtyping import Float
from torch import Tensor

PART = 32
"""Queries at a time; the released kernel's number of chunks."""


def bi_wkv(
    *,
    omega: Float[Tensor, " c"],
    mu: Float[Tensor, " c"],
    k: Float[Tensor, "b t c"],
    v: Float[Tensor, "b t c"],
    compat: str = "exact",
) -> Float[Tensor, "b t c"]:
    dtype, wide = v.dtype, torch.promote_types(k.dtype, torch.float32)
    omega, mu, k, v = (x.to(wide) for x in (omega, mu, k, v))
    tokens = k.shape[1]
    if not tokens:
        return v.clone()
    part, average = (PART, _average) if compat == "exact" else (-(-tokens // PART), _released)
    parts = [average(omega, mu, k, v, start, min(start + part, tokens)) for start in range(0, tokens, part)]
    return torch.cat(parts, dim=1).to(dtype)


def _average(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> Tensor:
    """The outputs of tokens `start` to `end`."""
    away = _distances(k, start, end).abs()[..., None]  # [t, i, 1]
    exponents = torch.where(away == 0, mu, -omega * (away - 1)) + k[:, None]
    return (exponents.softmax(2) * v[:, None]).sum(2)


def _released(omega: Tensor, mu: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> Tensor:
    """What the released CUDA kernel gives for its chunk `start` to `end`.

    Only tokens of the chunk before the query have the decay of the definition; all others one more factor e^−ω. For
    tokens of the chunk but the first, up to the query, there is also (1 − e^ω) e^(k_i + ω (t − i)).
    """
    behind = _distances(k, start, end)[..., None]  # t − i
    token = torch.arange(k.shape[1], device=k.device)[:, None]
    exact = (token >= start) & (behind > 0)
    exponents = torch.where(behind == 0, mu, -omega * (behind.abs() - exact.to(k.dtype))) + k[:, None]
    leaks = ((token > start) & (behind >= 0)).expand_as(exponents[0])
    leak = (k[:, None] + omega * behind).where(leaks, -torch.inf)
    highest = torch.maximum(exponents, torch.maximum(leak, leak + omega)).amax(2, keepdim=True).detach()
    weights = (exponents - highest).exp() + ((leak - highest).exp() - (leak + omega - highest).exp())
    return (weights * v[:, None]).sum(2) / (weights.sum(2) + 1e-6)


def _distances(k: Tensor, start: int, end: int) -> Tensor:
    """t − i [t, i] for the queries `start` to `end` and all keys."""
    place = torch.arange(k.shape[1], device=k.device, dtype=k.dtype)
    return place[start:end, None] - place
