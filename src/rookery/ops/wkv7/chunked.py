"""WKV-7 in chunks of tokens, as matrix products in plain torch: any device, float32 or float64 arithmetic.

Inside a chunk the decay since its start is a factor e^G on every token, so all products with older tokens become
triangular matrices, and what the state removes from itself (u_t = S_{t-1} a_t) is the solution of a triangular system
(arXiv 2406.06484 for delta rules; the algebra with decay is in the comments here). From chunk to chunk the state goes
through one matrix each, S ← S M + N, which is the only loop.
"""

# g groups (rows, or 1 for packed documents), c chunks, h heads, m tokens of a chunk, k key channels, v value channels

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64
LOWEST_LOG_W = -2.5
"""e^G spans e^(64 · 2.5) in a chunk; centred, its ends e^±80 still fit float32. RWKV-7 stays above −0.61."""


def why_not(*, log_w: Tensor, **call: Any) -> str | None:
    """Reason that this call cannot run, or None. Numbers are looked at where that costs nothing: on the CPU."""
    if log_w.device.type == "cpu" and log_w.numel() and not torch.compiler.is_compiling():
        lowest = float(log_w.detach().min())
        if lowest < LOWEST_LOG_W:
            return f"log_w goes down to {lowest:.4g}, and chunks of {CHUNK} tokens need {LOWEST_LOG_W} or more"
    return None


def wkv7(
    *,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `rookery.ops.wkv7.wkv7`; `chunk` is the number of tokens of a chunk, fewer where the rows are shorter."""
    time = r.shape[1]
    chunk = max(1, min(chunk, time))
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    places = None if ends is None else _places(ends, chunk, time)

    def cut(x: Tensor) -> Tensor:  # [b, t, h, n] to [g, c, h, m, n]; zeros, which change nothing, fill the last chunk
        if places is None:
            x = pad(x, (0, 0, 0, 0, 0, -time % chunk))
        else:
            x = pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, places.to(x.device))
        return x.to(state.dtype).unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()

    cuts = None if ends is None else _chunk_cuts(ends, chunk)
    y, state = _Chunks.apply(*(cut(x) for x in (r, log_w, k, v, a, b)), state, cuts)
    y = y.transpose(2, 3).flatten(1, 2)
    y = y[:, :time] if places is None else y[:, (places < time).to(y.device)]
    return y.to(v.dtype), state


def _chunk_cuts(ends: list[int], chunk: int) -> list[int]:
    """First chunk of each document, which has chunks of its own, and the number of chunks."""
    cuts = [0]
    for begin, end in pairwise(ends):
        cuts.append(cuts[-1] - (begin - end) // chunk)
    return cuts


def _places(ends: list[int], chunk: int, time: int) -> Tensor:
    """The token at every place of the chunks, `time` where there is none."""
    places = torch.full((chunk * _chunk_cuts(ends, chunk)[-1],), time)
    for first, (begin, end) in zip(_chunk_cuts(ends, chunk), pairwise(ends)):
        places[first * chunk : first * chunk + end - begin] = torch.arange(begin, end)
    return places


class _Factors(NamedTuple):
    """What forward and backward both need of all chunks, from the inputs without v."""

    rise: Tensor
    """e^G with G = Σ log_w up to and with the token, [g, c, h, m, k]"""
    rise_before: Tensor
    """The same without the token: e^(G − log_w)"""
    fall: Tensor
    """e^(G_last − G), what is left at the end of the chunk"""
    centred: tuple[Tensor, Tensor, Tensor]
    """rise, rise_before and 1 / rise relative to the middle of the chunk's decay, so that none overflows"""
    rk: Tensor
    """How much of an older token's v a token reads, [g, c, h, m, m]"""
    rb: Tensor
    """How much of an older token's u a token reads"""
    ak: Tensor
    """How much of an older token's v a token removes"""
    inverse: Tensor
    """(I − ab)^−1: what is removed from what was written by removal"""
    removal: Tensor
    """inverse · (a ⊙ rise_before): u = removal S₀ᵀ + inverse ak v"""
    step: Tensor
    """S at the end of the chunk = S₀ step + what the chunk writes, [g, c, h, k, k]"""


def _factors(r: Tensor, log_w: Tensor, k: Tensor, a: Tensor, b: Tensor) -> _Factors:
    total = log_w.cumsum(-2)
    before, last = total - log_w, total[..., -1:, :]
    rise, rise_before, fall = total.exp(), before.exp(), (last - total).exp()
    up, up_before, down = centred = (total - last / 2).exp(), (before - last / 2).exp(), (last / 2 - total).exp()
    k_down, b_down = (k * down).mT, (b * down).mT
    eye = torch.eye(r.shape[-2], dtype=r.dtype, device=r.device)
    ab = ((a * up_before) @ b_down).tril(-1)
    inverse = torch.linalg.solve_triangular(eye - ab, eye.expand_as(ab), upper=False, unitriangular=True)
    removal = inverse @ (a * rise_before)
    return _Factors(
        rise=rise,
        rise_before=rise_before,
        fall=fall,
        centred=centred,
        rk=((r * up) @ k_down).tril(),
        rb=((r * up) @ b_down).tril(),
        ak=((a * up_before) @ k_down).tril(-1),
        inverse=inverse,
        removal=removal,
        step=removal.mT @ (b * fall) + torch.diag_embed(last[..., 0, :].exp()),
    )


def _scan(step: Tensor, add: Tensor, state: Tensor, cuts: list[int] | None, backward: bool) -> tuple[Tensor, Tensor]:
    """state ← state · step + add, chunk by chunk or from the last one back: on entry to each chunk, and at the end."""
    entries, ends = torch.empty_like(add), torch.empty_like(state)
    # packed documents: one group, whose chunks belong to one row of the state after the other
    documents = [slice(None)] if cuts is None else [slice(*bounds) for bounds in pairwise(cuts)]
    for row, chunks in enumerate(documents):
        rows = slice(None) if cuts is None else slice(row, row + 1)
        now = state[rows]
        order = range(add.shape[1])[chunks]
        for i in reversed(order) if backward else order:
            entries[:, i] = now
            now = add[:, i] + now @ step[:, i]
        ends[rows] = now
    return entries, ends


class _Chunks(torch.autograd.Function):
    """All chunks at once but for the scan over states; the backward pass computes the factors again."""

    @staticmethod
    def forward(ctx, r, log_w, k, v, a, b, state, cuts):
        f = _factors(r, log_w, k, a, b)
        own = f.inverse @ (f.ak @ v)  # the part of u that comes from the chunk itself
        add = v.mT @ (k * f.fall) + own.mT @ (b * f.fall)
        entries, last = _scan(f.step, add, state, cuts, backward=False)
        u = f.removal @ entries.mT + own
        y = (r * f.rise) @ entries.mT + f.rk @ v + f.rb @ u
        ctx.save_for_backward(r, log_w, k, v, a, b, entries, u)
        ctx.cuts = cuts
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, d_last):
        r, log_w, k, v, a, b, entries, u = ctx.saved_tensors
        f = _factors(r, log_w, k, a, b)
        up, up_before, down = f.centred
        k_end, b_end = k * f.fall, b * f.fall
        du = f.rb.mT @ dy
        adjoints, d_state = _scan(f.step.mT, dy.mT @ (r * f.rise) + du.mT @ f.removal, d_last, ctx.cuts, backward=True)
        # z is the adjoint of u's right-hand side, before the triangular system
        z = f.inverse.mT @ (du + b_end @ adjoints.mT)
        d_rk, d_rb = (dy @ v.mT).tril(), (dy @ u.mT).tril()
        d_ak, d_ab = (z @ v.mT).tril(-1), (z @ u.mT).tril(-1)
        dk_end, db_end = v @ adjoints, u @ adjoints
        dv = f.rk.mT @ dy + k_end @ adjoints.mT + f.ak.mT @ z
        dr = (dy @ entries) * f.rise + (d_rk @ (k * down) + d_rb @ (b * down)) * up
        da = (z @ entries) * f.rise_before + (d_ak @ (k * down) + d_ab @ (b * down)) * up_before
        dk = (d_rk.mT @ (r * up) + d_ak.mT @ (a * up_before)) * down + dk_end * f.fall
        db = (d_rb.mT @ (r * up) + d_ab.mT @ (a * up_before)) * down + db_end * f.fall
        # log_w of a token is in G of itself and of all later ones, and in G − log_w of the later ones
        d_total, d_before = r * dr - k * dk - b * db, a * da
        d_total[..., -1, :] += (k_end * dk_end + b_end * db_end).sum(-2)
        d_total[..., -1, :] += f.rise[..., -1, :] * (adjoints * entries).sum(-2)
        d_log_w = (d_total + d_before).flip(-2).cumsum(-2).flip(-2) - d_before
        return dr, d_log_w, dk, dv, da, db, d_state, None
