"""Taylor attention in plain torch, chunk by chunk: products of matrices instead of a step per token, on any device.

Inside a chunk the polynomial is taken of q·k itself, and no features are formed; what came before is read from the
state. With rows being tokens of a chunk and V₁ = [V, 1]:

    Z = tril(1 + U + U²/2) V₁ + φ(Q) S0ᵀ    U = Q Kᵀ / √d        Y = Z without its last column / that column
    S1 = S0 + V₁ᵀ φ(K)
"""

# b batch, t time, h heads, m tokens of a chunk, k key channels, v value channels, f features

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rookery.ops.taylor_attention.features import features
from rookery.ops.wkv7.reference import per_document

CHUNK = 128
"""A token costs (key + value) · CHUNK / 2 inside a chunk and 2 · features · value across: about equal here."""


def taylor_attention(
    *, q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.taylor_attention.taylor_attention`, computed in the dtype of the state."""
    if cu_seqlens is not None:
        return per_document(taylor_attention, q=q, k=k, v=v, state=state, cu_seqlens=cu_seqlens)
    tokens = q.shape[1]
    # one chunk keeps what its gradient needs; more of them compute it again, so that memory does not grow with them
    keep = tokens > CHUNK and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state))
    outputs = [v[:, :0]]
    for start in range(0, tokens, CHUNK):
        part = [x[:, start : start + CHUNK] for x in (q, k, v)]
        y, state = checkpoint(_chunk, *part, state, use_reentrant=False) if keep else _chunk(*part, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    dtype = v.dtype
    q, k, v = (x.to(state.dtype).transpose(1, 2) for x in (q, k, v))  # [b, h, m, ...]
    counted = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    u = q @ k.mT * q.shape[-1] ** -0.5
    read = (1 + u + 0.5 * u * u).tril() @ counted + features(q) @ state.mT
    state = state + counted.mT @ features(k)
    y = read[..., :-1] / read[..., -1:]
    return y.transpose(1, 2).to(dtype), state
