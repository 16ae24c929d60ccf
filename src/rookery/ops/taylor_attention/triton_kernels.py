"""Triton kernel of one step of Taylor attention."""

import triton
import triton.language as tl

from rookery.ops.triton_tiles import load, matrix, store, vector


@triton.jit
def features(x, head, KEY: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """φ of one head's vector, [BLOCK]; zero beyond SIZE. The pair (i, j ≥ i) stands at i (2 d − i + 1) / 2 + j − i."""
    number = tl.arange(0, BLOCK)
    pair = tl.maximum(number - 1 - KEY, 0)
    # the row of a pair, by counting the rows that begin at or before it: exact, unlike a square root
    first = tl.zeros((BLOCK,), tl.int32)
    for row in range(1, KEY):
        first += (row * (2 * KEY - row + 1) // 2 <= pair).to(tl.int32)
    second = pair - first * (2 * KEY - first + 1) // 2 + first
    is_pair = (number > KEY) & (number < SIZE)
    is_single = (number > 0) & (number <= KEY)
    at = head.to(tl.int64) * KEY
    one = tl.load(x + at + tl.where(is_single, number - 1, first), mask=is_pair | is_single, other=1.0).to(tl.float32)
    two = tl.load(x + at + second, mask=is_pair, other=1.0).to(tl.float32)
    single, pairs = KEY**-0.25, KEY**-0.5
    scale = tl.where(is_pair, tl.where(first == second, pairs * 0.5**0.5, pairs), tl.where(is_single, single, 1.0))
    return tl.where(number < SIZE, one * two * scale, 0.0)


@triton.jit
def step(
    q,
    k,
    v,
    state,
    y,
    after,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some value rows of one head; every program sums the denominators, the first one writes them."""
    pieces = tl.cdiv(VALUE, ROWS)
    head, row = tl.program_id(0) // pieces, tl.program_id(0) % pieces * ROWS
    queries = features(q, head, KEY, SIZE, BLOCK)
    keys = features(k, head, KEY, SIZE, BLOCK)
    counts = vector(head * (VALUE + 1) + VALUE, SIZE, BLOCK)
    denominators = load(state, counts) + keys
    if row == 0:
        store(after, counts, denominators)
    rows, columns = row + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    values = vector(head, VALUE, ROWS, start=row)
    start, offsets, _ = matrix(head, VALUE + 1, SIZE, ROWS, BLOCK, row)
    place = start, offsets, (rows < VALUE)[:, None] & (columns < SIZE)[None, :]
    sums = load(state, place) + load(v, values)[:, None] * keys[None, :]
    store(after, place, sums)
    read = tl.sum(sums * queries[None, :], axis=1) / tl.sum(denominators * queries)
    store(y, values, read)
