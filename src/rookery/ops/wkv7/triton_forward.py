"""Triton kernels of WKV-7 forward; the equations and their names are in triton.py."""

# A program works on one chunk of one head, or on one head and some of its values. Sizes in capitals are known when a
# kernel is compiled: KEY, VALUE channels of a head, BLOCK_K, BLOCK_V the powers of two that hold them, DTYPE of what is
# multiplied, PRECISION of products of float32.

import triton
import triton.language as tl

from rookery.ops.triton_tiles import chunk_bounds, dot, load, matrix, store, tile, triangle, vector


@triton.jit
def solve(lower, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I − lower)⁻¹ of a matrix with nothing on or above its diagonal, float32."""
    # Forward substitution in all diagonal blocks of 16 at once, then products for what lies below them. Powers of the
    # whole matrix would need no substitution, but where a key repeats they grow to 10¹⁷ before they cancel.
    BLOCKS: tl.constexpr = CHUNK // 16
    rows = tl.arange(0, CHUNK)
    block, row = rows // 16, tl.arange(0, 16)
    inside = tl.where(block[:, None] == block[None, :], lower, 0.0)
    blocks = tl.sum(tl.reshape(inside, [BLOCKS, 16, BLOCKS, 16]), axis=2)
    inverse = blocks  # less the identity; rows up to i are done
    for i in range(1, 16):
        here = (row == i)[None, :, None]
        line = tl.sum(tl.where(here, blocks, 0.0), axis=1)
        line += tl.sum(line[:, :, None] * inverse, axis=1)
        inverse = tl.where(here, line[:, None, :], inverse)
    wide = tl.reshape(tl.broadcast_to(inverse[:, :, None, :], [BLOCKS, 16, BLOCKS, 16]), [CHUNK, CHUNK])
    solved = tl.where(block[:, None] == block[None, :], wide, 0.0)
    solved = tl.where(rows[:, None] == rows[None, :], 1.0, solved)
    if BLOCKS > 1:
        # with D the blocks' inverse and N = D (lower − inside), nilpotent: (I − N)⁻¹ D = (I + N) (I + N²) D
        below = tl.dot(solved, lower - inside, input_precision=PRECISION)
        if BLOCKS > 2:
            square = tl.dot(below, below, input_precision=PRECISION)
            solved += tl.dot(square, solved, input_precision=PRECISION)
        solved += tl.dot(below, solved, input_precision=PRECISION)
    return solved


@triton.jit
def prepare(
    log_w, k, v, a, b, table,
    reach, removed, k_hat, b_hat, decay, inverse,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything of a chunk that does not need the state before it: T, T Ã, T A_ak V, K̂, B̂ and G of its last token."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    keys = tile(first, last, head, heads, KEY, CHUNK, BLOCK_K)
    values = tile(first, last, head, heads, VALUE, CHUNK, BLOCK_V)
    decays = load(log_w, keys)
    upto, total = tl.cumsum(decays, axis=0), tl.sum(decays, axis=0)
    # exponents are counted from the middle of the chunk's range, which halves it
    growth = tl.exp(total * 0.5 - upto)
    k_chunk, b_chunk = load(k, keys), load(b, keys)
    a_fall = load(a, keys) * tl.exp(upto - decays)
    a_mid = a_fall * tl.exp(-0.5 * total)
    by_b = triangle(dot(a_mid, tl.trans(b_chunk * growth), DTYPE, PRECISION), CHUNK, False)
    by_k = triangle(dot(a_mid, tl.trans(k_chunk * growth), DTYPE, PRECISION), CHUNK, False)
    solved = solve(by_b, CHUNK, PRECISION)
    written = dot(by_k, load(v, values), DTYPE, PRECISION)
    # where a key repeats T takes differences of sums over the chunk, which would not survive rounding to bfloat16
    store(reach, keys, dot(solved, a_fall, tl.float32, PRECISION))
    store(removed, values, dot(solved, written, tl.float32, PRECISION))
    to_end = tl.exp(total - upto)
    store(k_hat, keys, k_chunk * to_end)
    store(b_hat, keys, b_chunk * to_end)
    chunk = slot * heads + head
    store(decay, vector(chunk, KEY, BLOCK_K), total)
    if KEEP:
        store(inverse, matrix(chunk, CHUNK, CHUNK, CHUNK, CHUNK), solved)


@triton.jit
def scan(
    begin, direct, by_direct, reach, through, by_through, decay, table, slots_of_row,
    states, end,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carries X from chunk to chunk: Q = Q + `reach` Xᵀ and X = X diag(Γ) + Pᵀ `by_direct` + Qᵀ `by_through`.

    P is `direct`, Q `through`. Forward X is the state and Q becomes U; with REVERSE it is the state's gradient and Q
    becomes Z. `states` gets the X before each chunk. The rows of X, its values, do not depend on each other: a program
    has BLOCK_V of them.
    """
    blocks: tl.constexpr = (VALUE + BLOCK_V - 1) // BLOCK_V
    head, row = tl.program_id(0) // blocks % heads, tl.program_id(0) // blocks // heads
    value = tl.program_id(0) % blocks * BLOCK_V
    if PACKED:
        low, high = tl.load(slots_of_row + row).to(tl.int32), tl.load(slots_of_row + row + 1).to(tl.int32)
    else:
        low, high = row * tl.cdiv(time, CHUNK), (row + 1) * tl.cdiv(time, CHUNK)
    at = matrix(row * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K, value)
    x = tl.trans(load(begin, at))  # [key, value]: Hopper multiplies 64 rows at once, and the keys are more
    for i in range(0, high - low):
        slot = high - 1 - i if REVERSE else low + i
        first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
        keys = tile(first, last, head, heads, KEY, CHUNK, BLOCK_K)
        values = tile(first, last, head, heads, VALUE, CHUNK, BLOCK_V, value)
        chunk = slot * heads + head
        store(states, matrix(chunk, VALUE, KEY, BLOCK_V, BLOCK_K, value), tl.trans(x))
        q = load(through, values) + dot(load(reach, keys), x, DTYPE, PRECISION)
        store(through, values, q)
        x *= tl.exp(load(decay, vector(chunk, KEY, BLOCK_K)))[:, None]
        x += dot(tl.trans(load(by_direct, keys)), load(direct, values), DTYPE, PRECISION)
        x += dot(tl.trans(load(by_through, keys)), q, DTYPE, PRECISION)
    store(end, at, tl.trans(x))


@triton.jit
def output(
    r, log_w, k, v, b, removed, states, table,
    y,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = R̃ S0ᵀ + A_rk V + A_rb U of a chunk."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    keys = tile(first, last, head, heads, KEY, CHUNK, BLOCK_K)
    values = tile(first, last, head, heads, VALUE, CHUNK, BLOCK_V)
    decays = load(log_w, keys)
    upto, total = tl.cumsum(decays, axis=0), tl.sum(decays, axis=0)
    growth = tl.exp(total * 0.5 - upto)
    r_fall = load(r, keys) * tl.exp(upto)
    r_mid = r_fall * tl.exp(-0.5 * total)
    at = matrix(slot * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K)
    out = dot(r_fall, tl.trans(load(states, at)), DTYPE, PRECISION)
    by_k = triangle(dot(r_mid, tl.trans(load(k, keys) * growth), DTYPE, PRECISION), CHUNK, True)
    out += dot(by_k, load(v, values), DTYPE, PRECISION)
    by_b = triangle(dot(r_mid, tl.trans(load(b, keys) * growth), DTYPE, PRECISION), CHUNK, True)
    out += dot(by_b, load(removed, values), DTYPE, PRECISION)
    store(y, values, out)


@triton.jit
def step(
    r, log_w, k, v, a, b, state,
    y, next_state,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token: the state is read and written once, all else stays in registers."""
    blocks: tl.constexpr = (VALUE + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // blocks  # counted over the whole batch
    value = tl.program_id(0) % blocks * BLOCK_V
    at, keys = matrix(head, VALUE, KEY, BLOCK_V, BLOCK_K, value), vector(head, KEY, BLOCK_K)
    values = vector(head, VALUE, BLOCK_V, value)
    s = load(state, at)
    gone = tl.sum(s * load(a, keys)[None, :], axis=1)
    s = s * tl.exp(load(log_w, keys))[None, :] + gone[:, None] * load(b, keys)[None, :]
    s += load(v, values)[:, None] * load(k, keys)[None, :]
    store(next_state, at, s)
    store(y, values, tl.sum(s * load(r, keys)[None, :], axis=1))
