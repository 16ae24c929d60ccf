"""Triton kernels of WKV-4; the equations and their names are in triton.py."""

# A program works on BLOCK channels of one chunk, or of one row. Sums are multiples of e^top, where top is the largest
# exponent in them, so that every exponential taken here is of a number ≤ 0. top has two parts, `high` and `low`: a slow
# decay is added to it once per token, and in one float32 would be rounded every time in the same direction.

import triton
import triton.language as tl

from rookery.ops.triton_tiles import chunk_bounds, load, store

NOTHING = tl.constexpr(-1e38)
"""An exponent: e to it is zero, and sums with it stay finite."""


@triton.jit
def bounded(log_w):
    """A log decay may be −∞, which has no place in the arithmetic of `add`."""
    return tl.maximum(log_w, -1e37)


@triton.jit
def add(high, low, step):
    """(high + low) + step, exactly but for the rounding of the lower part."""
    y = step + low
    total = high + y
    moved = total - high
    return total, (high - (total - moved)) + (y - moved)


@triton.jit
def join(a, b, high, low, other_a, other_b, other_high, other_low):
    """The sum of two pairs of sums, each of them multiples of its own e^top."""
    gap = (high - other_high) + (low - other_low)
    small = tl.exp(-tl.abs(gap))
    first, second = tl.where(gap > 0, 1.0, small), tl.where(gap > 0, small, 1.0)
    high, low = tl.where(gap > 0, high, other_high), tl.where(gap > 0, low, other_low)
    return first * a + second * other_a, first * b + second * other_b, high, low


@triton.jit
def places(index, channels, width):
    """Where the vector `index` of a tensor [..., width] lies, for these channels."""
    return index.to(tl.int64) * width, channels, channels < width


@triton.jit
def load_sums(tensor, index, channels, width):
    """Two sums and their exponent, of a tensor [..., 3, width]."""
    index = index.to(tl.int64) * 3
    a, b = load(tensor, places(index, channels, width)), load(tensor, places(index + 1, channels, width))
    return a, b, load(tensor, places(index + 2, channels, width))


@triton.jit
def store_sums(tensor, index, channels, width, a, b, high, low):
    # e^low = 1 + low, as low is no more than a rounding of high; the sum itself would round low away
    index = index.to(tl.int64) * 3
    store(tensor, places(index, channels, width), a + a * low)
    store(tensor, places(index + 1, channels, width), b + b * low)
    store(tensor, places(index + 2, channels, width), high)


@triton.jit
def chunk_sums(
    log_w, k, v, table,
    states,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sums of a chunk's own tokens."""
    blocks = tl.cdiv(width, BLOCK)
    slot, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    decay = bounded(load(log_w, (0, channels, channels < width)))
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    high, low = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, value, key * 0 + 1.0, key, key * 0)
    store_sums(states, slot, channels, width, a, b, high, low)


@triton.jit
def carry(
    begin, log_w, table, slots_of_row,
    states, end,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replaces each chunk's own sums by those of all tokens before it; with REVERSE of all after it."""
    blocks = tl.cdiv(width, BLOCK)
    row, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if PACKED:
        bottom, top = tl.load(slots_of_row + row).to(tl.int32), tl.load(slots_of_row + row + 1).to(tl.int32)
    else:
        bottom, top = row * tl.cdiv(time, CHUNK), (row + 1) * tl.cdiv(time, CHUNK)
    decay = bounded(load(log_w, (0, channels, channels < width)))
    a, b, high = load_sums(begin, row, channels, width)
    low = tl.zeros([BLOCK], tl.float32)
    for i in range(0, top - bottom):
        slot = top - 1 - i if REVERSE else bottom + i
        first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
        own_a, own_b, own_high = load_sums(states, slot, channels, width)
        store_sums(states, slot, channels, width, a, b, high, low)
        high, low = add(high, low, bounded(decay * (last - first).to(tl.float32)))
        a, b, high, low = join(a, b, high, low, own_a, own_b, own_high, own_high * 0)
    store_sums(end, row, channels, width, a, b, high, low)


@triton.jit
def output(
    log_w, u, k, v, states, table,
    y,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The averages of a chunk."""
    blocks = tl.cdiv(width, BLOCK)
    slot, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    decay, bonus = bounded(load(log_w, (0, channels, channels < width))), load(u, (0, channels, channels < width))
    a, b, high = load_sums(states, slot, channels, width)
    low = tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            weighted, total, _, _ = join(a, b, high, low, value, key * 0 + 1.0, bonus + key, key * 0)
            store(y, here, weighted / total)
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, value, key * 0 + 1.0, key, key * 0)


@triton.jit
def chunk_gradients(
    log_w, u, k, v, grad_y, states, table,
    before, grad_states,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sums before each token of a chunk, and what its outputs say to the sums before the chunk."""
    blocks = tl.cdiv(width, BLOCK)
    slot, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    decay, bonus = bounded(load(log_w, (0, channels, channels < width))), load(u, (0, channels, channels < width))
    a, b, high = load_sums(states, slot, channels, width)
    low = tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            store_sums(before, token, channels, width, a, b, high, low)
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, value, key * 0 + 1.0, key, key * 0)
    tl.debug_barrier()  # what was stored is read again
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    high, low = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            sums_a, sums_b, top = load_sums(before, token, channels, width)
            grad, mean, _, highest = quotient_gradient(sums_a, sums_b, top, bonus + key, value, load(grad_y, here))
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, grad, -grad * mean, -highest, key * 0)
    store_sums(grad_states, slot, channels, width, a, b, high, low)


@triton.jit
def quotient_gradient(a, b, top, own_key, value, grad_y):
    """Of y = (a + e v) / (b + e): the gradient of its numerator as a multiple of e^−highest, y, e and `highest`."""
    highest = tl.maximum(top, own_key)
    past, own = tl.exp(top - highest), tl.exp(own_key - highest)
    total = past * b + own
    return grad_y / total, (past * a + own * value) / total, own, highest


@triton.jit
def gradients(
    log_w, u, k, v, grad_y, before, grad_states, table,
    grad_log_w, grad_u, grad_k, grad_v,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk; `grad_log_w` and `grad_u` get one part for each."""
    blocks = tl.cdiv(width, BLOCK)
    slot, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    decay, bonus = bounded(load(log_w, (0, channels, channels < width))), load(u, (0, channels, channels < width))
    a, b, high = load_sums(grad_states, slot, channels, width)  # of the sums after the token, by e^−(their top)
    low = tl.zeros([BLOCK], tl.float32)
    decay_grad, bonus_grad = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            sums_a, sums_b, top = load_sums(before, token, channels, width)
            grad, mean, own, highest = quotient_gradient(sums_a, sums_b, top, bonus + key, value, load(grad_y, here))
            by_bonus = own * grad * (value - mean)
            bonus_grad += by_bonus
            # the exponents of sums and gradients cancel: none of these is above 0, but for rounding
            later = tl.exp((high + key) + low)
            store(grad_v, here, own * grad + later * a)
            store(grad_k, here, by_bonus + later * (a * value + b))
            high, low = add(high, low, decay)
            decay_grad += tl.exp((high + top) + low) * (sums_a * a + sums_b * b)
            a, b, high, low = join(a, b, high, low, grad, -grad * mean, -highest, key * 0)
    store(grad_log_w, places(slot, channels, width), decay_grad)
    store(grad_u, places(slot, channels, width), bonus_grad)
