"""ROSA, "Rapid Online Suffix Automaton" (RWKV-8, core.md 1.8): retrieval by the longest match of discretised signals.

Channels become bits by their sign, `bits` neighbours of them one symbol; every symbol string is searched on its own.
"""

# b batch, p positions so far and new, t new ones, c channels, g symbols of a position, n = b·g strings

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rookery.ops.rosa.match import match

FLIPS = 1 << 22
"""Numbers of one table of flipped strings: the gradient works through more flips in turns."""


def rosa_tokens(x: Int[Tensor, "b p"]) -> Int[Tensor, "b p"]:
    """ROSA of whole strings of tokens: what followed the latest longest match, −1 where nothing matches."""
    index = match(x, x, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), x.shape[1])
    return torch.where(index >= 0, x.gather(1, index.clamp(min=0)), -1)


def rosa(
    *,
    q: Float[Tensor, "b p c"],
    k: Float[Tensor, "b p c"],
    v: Float[Tensor, "b p c"],
    start: Int[Tensor, " b"] | None = None,
    time: int | None = None,
    bits: int = 1,
    tau: float = 1e-3,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"]]:
    """Where the retrieved bit is one and where it is zero, as numbers 1 and 0; neither where nothing matches.

    q, k and v hold every position from the first, so that a cut into calls changes nothing: `start` [b] is each row's
    first new position, `time` how many answers each gets (all that there are, where left out). Entries and answers
    beyond a row's end mean nothing.

    The gradient is the published one, a finite difference over bits. Flipping a bit of q, k or v changes
    φ = Σ (what arrives) · (what was retrieved), and d = (φ(bit 1) − φ(bit 0)) / (2 max(|x|, τ)). O(p²) a flip.
    """
    return _call(q, k, v, start, time, bits, tau, tied=False)


def rosa_self(
    *, x: Float[Tensor, "b p c"], bits: int = 1, tau: float = 1e-3
) -> tuple[Float[Tensor, "b p c"], Float[Tensor, "b p c"]]:
    """`rosa` of whole rows with x as query, key and value. A flip for the gradient changes all three at once."""
    return _call(x, x, x, None, None, bits, tau, tied=True)


def _call(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, time: int | None, bits: int, tau: float, *, tied: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = q.shape
    if not 1 <= bits <= 8 or channels % bits:
        raise ValueError(f"bits must be 1 to 8 and divide the {channels} channels, got {bits}")
    if q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must be alike, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    if start is None:
        start = torch.zeros(batch, dtype=torch.int64, device=q.device)
    if time is None:
        time = length - int(start.min()) if batch else length
    return _Rosa.apply(q, k, v, start, time, bits, tau, tied)


class _Rosa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, start, time, bits, tau, tied):
        strings = start.repeat_interleave(q.shape[2] // bits)
        index = match(_symbols(q, bits), _symbols(k, bits), strings, time)
        ctx.save_for_backward(q, k, v, strings, index)
        ctx.bits, ctx.tau, ctx.tied = bits, tau, tied
        ones, zeros = _bits_at(_symbols(v, bits), index, bits)
        batch = q.shape[0]
        return _as_channels(ones, batch).to(q.dtype), _as_channels(zeros, batch).to(q.dtype)

    @staticmethod
    def backward(ctx, to_ones, to_zeros):
        q, k, v, start, index = ctx.saved_tensors
        bits, batch = ctx.bits, q.shape[0]
        wide = torch.promote_types(q.dtype, torch.float32)
        arrives = tuple(_as_strings(g.to(wide), bits) for g in (to_ones, to_zeros))
        strings = tuple(_symbols(x, bits) for x in (q, k, v))
        parts = "x" if ctx.tied else "qk"
        changes = [_as_channels(_changes(part, strings, start, index, arrives), batch) for part in parts]
        if ctx.tied:
            changes += [None, None]
        else:
            taken = (index >= 0)[..., None] * (arrives[0] - arrives[1])
            where = index.clamp(min=0)[..., None].expand_as(taken)
            rises = taken.new_zeros(*strings[2].shape, bits).scatter_add(1, where, taken)
            changes.append(_as_channels(rises, batch))
        gradients = [
            None if rise is None else (rise / (2 * x.to(wide).abs().clamp(min=ctx.tau))).to(x.dtype)
            for x, rise in zip((q, k, v), changes, strict=True)
        ]
        return *gradients, None, None, None, None, None


def _changes(
    part: str, strings: tuple[Tensor, ...], start: Tensor, index: Tensor, arrives: tuple[Tensor, Tensor]
) -> Tensor:
    """φ(bit 1) − φ(bit 0) of every bit of `part` ("q", "k" or "x", all three), [n, p, bits]."""
    rows, length = strings[0].shape
    time, bits = arrives[0].shape[1:]
    base = _score(strings[2], index, arrives)
    rises = arrives[0].new_zeros(rows, length, bits)
    for places in _turns(length, rows * length):
        here = torch.arange(len(places), device=base.device)
        for bit in range(bits):
            flipped = []
            for name, symbols in zip("qkv", strings, strict=True):
                many = symbols[:, None].repeat(1, len(places), 1)  # [n, flips, p]
                if part in ("x", name):
                    many[:, here, places.start + here] ^= 1 << bit
                flipped.append(many.flatten(0, 1))
            again = match(flipped[0], flipped[1], start.repeat_interleave(len(places)), time)
            expanded = tuple(g.repeat_interleave(len(places), dim=0) for g in arrives)
            score = _score(flipped[2], again, expanded).view(rows, len(places))
            source = strings["qkx".index(part) % 2][:, places.start : places.stop]
            sign = 1 - 2 * ((source >> bit) & 1).to(score.dtype)
            rises[:, places.start : places.stop, bit] = sign * (score - base[:, None])
    return rises


def _turns(length: int, size: int) -> Iterator[range]:
    step = max(1, FLIPS // max(1, size))
    for first in range(0, length, step):
        yield range(first, min(length, first + step))


def _score(values: Tensor, index: Tensor, arrives: tuple[Tensor, Tensor]) -> Tensor:
    """φ of each string, [n]."""
    ones, zeros = _bits_at(values, index, arrives[0].shape[2])
    return (ones * arrives[0] + zeros * arrives[1]).sum(dim=(1, 2))


def _bits_at(values: Tensor, index: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bits of the symbols at `index` [n, t] that are one, and that are zero: bool [n, t, bits] each."""
    if not values.shape[1]:
        nothing = torch.zeros(*index.shape, bits, dtype=torch.bool, device=index.device)
        return nothing, nothing
    symbol = values.gather(1, index.clamp(min=0))[..., None]
    one = ((symbol >> torch.arange(bits, device=symbol.device, dtype=symbol.dtype)) & 1).bool()
    found = (index >= 0)[..., None]
    return one & found, ~one & found


def _as_strings(x: Tensor, bits: int) -> Tensor:
    """[b, t, c] as [b·g, t, bits]."""
    return x.unflatten(2, (-1, bits)).transpose(1, 2).flatten(0, 1)


def _as_channels(x: Tensor, batch: int) -> Tensor:
    """[b·g, t, bits] as [b, t, c]."""
    return x.unflatten(0, (batch, x.shape[0] // max(batch, 1))).transpose(1, 2).flatten(2)


def _symbols(x: Tensor, bits: int) -> Tensor:
    """Signs of `bits` neighbouring channels as one symbol, the first channel its lowest bit: uint8 [n, p]."""
    weights = 1 << torch.arange(bits, device=x.device)
    return (_as_strings(x > 0, bits) * weights).sum(dim=2).to(torch.uint8)
