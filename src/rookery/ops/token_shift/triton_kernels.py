"""Triton kernels of token_shift: a program works on BLOCK channels of TOKENS tokens, counted over the whole batch."""

import triton
import triton.language as tl

from rookery.ops.triton_tiles import load, rows, store


@triton.jit
def row_beginning(token, inside, begins, time, PACKED: tl.constexpr):
    """The row that begins with each token, −1 where none does."""
    if PACKED:
        return tl.load(begins + token, mask=inside, other=-1).to(tl.int64)
    return tl.where(inside & (token % time == 0), token // time, -1)


@triton.jit
def row_ending(token, inside, ends, time, PACKED: tl.constexpr):
    """The row that ends with each token, −1 where none does."""
    if PACKED:
        return tl.load(ends + token, mask=inside, other=-1).to(tl.int64)
    return tl.where(inside & (token % time == time - 1), token // time, -1)


@triton.jit
def shift(
    x, mix, previous, begins,
    out,
    tokens, time,
    MIXES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    channels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    row = row_beginning(token, inside, begins, time, PACKED)
    now = load(x, rows(token, inside, channels, SIZE))
    before = load(x, rows(token - 1, inside & (row < 0), channels, SIZE))
    before += load(previous, rows(row, row >= 0, channels, SIZE))
    for j in tl.static_range(MIXES):
        share = load(mix, (j * SIZE, channels, channels < SIZE))
        store(out, rows(token + j * tokens, inside, channels, SIZE), now + (before - now) * share[None, :])


@triton.jit
def shift_backward(
    x, mix, previous, begins, ends, grad_out, grad_last,
    grad_x, grad_mix, grad_previous,
    tokens, time,
    MIXES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`grad_mix` [blocks of tokens, MIXES, SIZE] gets the parts of mix, still to be added."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    channels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(0) // blocks
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    row, last_of = row_beginning(token, inside, begins, time, PACKED), row_ending(token, inside, ends, time, PACKED)
    change = load(x, rows(token - 1, inside & (row < 0), channels, SIZE)) - load(x, rows(token, inside, channels, SIZE))
    change += load(previous, rows(row, row >= 0, channels, SIZE))
    grad = load(grad_last, rows(last_of, last_of >= 0, channels, SIZE))
    to_before = tl.zeros([TOKENS, BLOCK], tl.float32)
    for j in tl.static_range(MIXES):
        share = load(mix, (j * SIZE, channels, channels < SIZE))[None, :]
        arrived = load(grad_out, rows(token + j * tokens, inside, channels, SIZE))
        grad += arrived * (1 - share)
        # the next token reads this one, unless it is another row's
        grad += load(grad_out, rows(token + j * tokens + 1, inside & (last_of < 0), channels, SIZE)) * share
        to_before += arrived * share
        part = (block.to(tl.int64) * (MIXES * SIZE) + j * SIZE, channels, channels < SIZE)
        store(grad_mix, part, tl.sum(arrived * change, axis=0))
    store(grad_x, rows(token, inside, channels, SIZE), grad)
    store(grad_previous, rows(row, row >= 0, channels, SIZE), to_before)
