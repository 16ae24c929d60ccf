"""Triton kernels of Bi-WKV; the equations and their names are in triton.py, sums and their exponents wkv4's."""

# A program works on BLOCK channels of one chunk of a row. With REVERSE, "before" means after: tokens are read from the
# last to the first.

import triton
import triton.language as tl

from rookery.ops.triton_tiles import load, store
from rookery.ops.wkv4.triton_kernels import NOTHING, add, bounded, join, load_sums, places, store_sums


@triton.jit
def chunk_of(time, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk of a program, its first token and the end of its tokens, and its channels."""
    blocks, per_row = tl.cdiv(width, BLOCK), tl.cdiv(time, CHUNK)
    slot = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = (slot // per_row).to(tl.int64)
    first = row * time + (slot % per_row) * CHUNK
    return slot, first, tl.minimum(first + CHUNK, (row + 1) * time), channels


@triton.jit
def chunk_sums(
    omega, k, v,
    states,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The sums over a chunk's own tokens, seen from the token behind it."""
    slot, first, last, channels = chunk_of(time, width, CHUNK, BLOCK)
    decay = bounded(-load(omega, (0, channels, channels < width)))
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    high, low = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i if REVERSE else first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, value, key * 0 + 1.0, key, key * 0)
    store_sums(states, slot, channels, width, a, b, high, low)


@triton.jit
def carry(
    omega,
    states,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replaces each chunk's own sums by those over all tokens before it. A program has BLOCK channels of a row."""
    blocks, per_row = tl.cdiv(width, BLOCK), tl.cdiv(time, CHUNK)
    row, channels = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    decay = bounded(-load(omega, (0, channels, channels < width)))
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    high, low = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(0, per_row):
        chunk = per_row - 1 - i if REVERSE else i
        slot = row * per_row + chunk
        own_a, own_b, own_high = load_sums(states, slot, channels, width)
        store_sums(states, slot, channels, width, a, b, high, low)
        tokens = tl.minimum(CHUNK, time - chunk * CHUNK)
        high, low = add(high, low, bounded(decay * tokens.to(tl.float32)))
        a, b, high, low = join(a, b, high, low, own_a, own_b, own_high, own_high * 0)


@triton.jit
def token_sums(
    omega, k, v, states,
    sums,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The sums before each token of a chunk [b, t, 3, c], from those before the chunk."""
    slot, first, last, channels = chunk_of(time, width, CHUNK, BLOCK)
    decay = bounded(-load(omega, (0, channels, channels < width)))
    a, b, high = load_sums(states, slot, channels, width)
    low = tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i if REVERSE else first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            store_sums(sums, token, channels, width, a, b, high, low)
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, value, key * 0 + 1.0, key, key * 0)


@triton.jit
def average(a, b, top, own_a, own_b, own_top, exponent, value):
    """The mean over two pairs of sums and the token itself, the total weight and its unit, and the token's weight."""
    highest = tl.maximum(tl.maximum(top, own_top), exponent)
    one, two, own = tl.exp(top - highest), tl.exp(own_top - highest), tl.exp(exponent - highest)
    total = one * b + two * own_b + own
    return (one * a + two * own_a + own * value) / total, total, highest, own


@triton.jit
def output(
    omega, mu, k, v, past, future,
    y,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The averages of a chunk, from the sums before each token and those after the chunk."""
    slot, first, last, channels = chunk_of(time, width, CHUNK, BLOCK)
    inside = (0, channels, channels < width)
    decay, bonus = bounded(-load(omega, inside)), load(mu, inside)
    a, b, high = load_sums(future, slot, channels, width)
    low = tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            past_a, past_b, top = load_sums(past, token, channels, width)
            mean, _, _, _ = average(past_a, past_b, top, a + a * low, b + b * low, high, bonus + key, value)
            store(y, here, mean)
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, value, key * 0 + 1.0, key, key * 0)


@triton.jit
def output_gradients(
    omega, mu, k, v, past, future, grad_y,
    grads,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What the outputs of a chunk say to numerator and denominator, as sums seen from the token behind the chunk."""
    slot, first, last, channels = chunk_of(time, width, CHUNK, BLOCK)
    inside = (0, channels, channels < width)
    decay, bonus = bounded(-load(omega, inside)), load(mu, inside)
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    high, low = tl.full([BLOCK], NOTHING, tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i if REVERSE else first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            past_a, past_b, top = load_sums(past, token, channels, width)
            next_a, next_b, next_top = load_sums(future, token, channels, width)
            mean, total, highest, _ = average(past_a, past_b, top, next_a, next_b, next_top, bonus + key, value)
            grad = load(grad_y, here) / total
            high, low = add(high, low, decay)
            a, b, high, low = join(a, b, high, low, grad, -grad * mean, -highest, key * 0)
    store_sums(grads, slot, channels, width, a, b, high, low)


@triton.jit
def gradients(
    omega, mu, k, v, past, future, grad_y, grads,
    grad_omega, grad_mu, grad_k, grad_v, part_k, part_v,
    time, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk: with REVERSE the part of the outputs after each token, which the other run adds to."""
    slot, first, last, channels = chunk_of(time, width, CHUNK, BLOCK)
    inside = (0, channels, channels < width)
    decay, bonus = bounded(-load(omega, inside)), load(mu, inside)
    a, b, high = load_sums(grads, slot, channels, width)
    low = tl.zeros([BLOCK], tl.float32)
    decay_grad, bonus_grad = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(CHUNK):
        token = first + CHUNK - 1 - i if REVERSE else first + i
        if token < last:
            here = places(token, channels, width)
            key, value = load(k, here), load(v, here)
            past_a, past_b, top = load_sums(past, token, channels, width)
            next_a, next_b, next_top = load_sums(future, token, channels, width)
            mean, total, highest, own = average(past_a, past_b, top, next_a, next_b, next_top, bonus + key, value)
            grad = load(grad_y, here) / total
            # the exponents of sums and gradients cancel: none of these is above 0, but for rounding
            through = tl.exp((high + key) + low)
            k_grad, v_grad = through * (a * value + b), through * a
            high, low = add(high, low, decay)
            if REVERSE:
                by_bonus = own * grad * (value - mean)
                bonus_grad += by_bonus
                store(part_k, here, k_grad + by_bonus)
                store(part_v, here, v_grad + own * grad)
                decay_grad -= tl.exp((high + top) + low) * (past_a * a + past_b * b)
            else:
                store(grad_k, here, k_grad + load(part_k, here))
                store(grad_v, here, v_grad + load(part_v, here))
                decay_grad -= tl.exp((high + next_top) + low) * (next_a * a + next_b * b)
            a, b, high, low = join(a, b, high, low, grad, -grad * mean, -highest, key * 0)
    at = places(slot, channels, width)
    if REVERSE:
        store(grad_omega, at, decay_grad)
        store(grad_mu, at, bonus_grad)
    else:
        store(grad_omega, at, decay_grad + load(grad_omega, at))
