"""WKV-6 in plain torch, chunk by chunk: products of matrices instead of a step per token, on any device.

In a chunk of M tokens, rows being tokens, with D_ti the sum of log_w from token i + 1 to t − 1:

    A_ti = Σ_n r_tn k_in e^(D_tin)  for i < t        A_tt = Σ_n r_tn u_n k_tn
    Y = A V + (R ∘ e^(D_t0)) S0                      S1 = diag(Γ) S0 + (K ∘ e^(D_(M+1)i))ᵀ V

The decay has no lower bound, so e^(−D) would overflow, and a difference of two cumulative sums would lose the digits of
a slow decay behind a fast one. D is therefore summed up for every pair of tokens, and no exponent here is above 0.
"""

# b batch, g chunks, h heads, m tokens of a chunk, k key channels, v value channels

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rookery.ops.wkv7.reference import per_document

CHUNK = 16
PAIRS = 1 << 24
"""Numbers of D at a time."""


def wkv6(
    *, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv6.wkv6`, computed in the dtype of the state."""
    u = u.to(state.dtype)  # before anything is cut: gradients of pieces add up in this dtype
    if cu_seqlens is not None:
        run = partial(wkv6, u=u)
        return per_document(run, r=r, log_w=log_w, k=k, v=v, state=state, cu_seqlens=cu_seqlens)
    batch, tokens, heads, key = r.shape
    if not tokens:
        return v.new_zeros(v.shape), state
    chunk = min(CHUNK, tokens)
    step = max(1, PAIRS // max(1, batch * heads * chunk * chunk * key)) * chunk
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, log_w, k, v, u, state))
    outputs = []
    for start in range(0, tokens, step):
        part = [x[:, start : start + step] for x in (r, log_w, k, v)]
        # D is large: the backward pass computes it again
        run = partial(checkpoint, _chunks, use_reentrant=False) if keep else _chunks
        y, state = run(*part, u, state, chunk)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _chunks(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Some chunks, one after the other only where the state is passed on."""
    tokens, dtype = r.shape[1], v.dtype
    r, log_w, k, v = (_in_chunks(x.to(state.dtype), chunk) for x in (r, log_w, k, v))
    between = _sums_between(log_w)  # [b, g, h, m + 1, m + 1, k]
    decays = between[..., 1:, :].exp()
    before = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril(-1)
    weights = torch.einsum("bghtk,bghik,bghtik->bghti", r, k, decays[..., :-1, :, :])
    weights = weights.where(before, 0) + torch.diag_embed((r * u[:, None] * k).sum(-1))
    y = weights @ v
    reads = r * between[..., :-1, 0, :].exp()
    writes = (k * decays[..., -1, :, :]).mT @ v  # [b, g, h, k, v]
    kept = between[..., -1, 0, :].exp()
    s, carried = state.mT, []
    for g in range(r.shape[1]):
        carried.append(s)
        s = kept[:, g, ..., None] * s + writes[:, g]
    y = y + reads @ torch.stack(carried, dim=1)
    return y.transpose(2, 3).flatten(1, 2)[:, :tokens].to(dtype), s.mT


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[b, t, h, n] as [b, g, h, m, n]; the tokens that are added keep and write nothing new."""
    padding = -x.shape[1] % chunk
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).transpose(2, 3)


def _sums_between(log_w: Tensor) -> Tensor:
    """D [..., t, i, k] for t = 1 … m + 1 and i = 0 … m of log_w [..., m, k]; 0 where t ≤ i + 1."""
    m = log_w.shape[-2]
    places = torch.arange(m + 1, device=log_w.device)
    shifted = torch.nn.functional.pad(log_w, (0, 0, 1, 0))[..., None, :]  # what token t adds to D_t is log_w of t − 1
    inside = (places[:, None] > places)[..., None]
    return shifted.where(inside, 0).cumsum(-3)
