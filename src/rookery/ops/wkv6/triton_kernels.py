"""Triton kernels of WKV-6; the equations and their names are in triton.py."""

# A program works on one chunk of one head, on one block of SUB tokens in it, or on one head and some of its values.
# Sizes in capitals are known when a kernel is compiled: KEY, VALUE channels of a head, BLOCK_K, BLOCK_V the powers of
# two that hold them, DTYPE of what is multiplied, PRECISION of products of float32.

import triton
import triton.language as tl

from rookery.ops.triton_tiles import chunk_bounds, dot, load, matrix, store, tile, vector

SUB = tl.constexpr(16)
"""Tokens of a block, the fewest that `tl.dot` takes."""


@triton.jit
def earlier(lo, hi, head, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """As `tile`, every row one token earlier, the first empty."""
    start, offsets, inside = tile(lo - 1, hi - 1, head, heads, SIZE, SUB, BLOCK)
    return start, offsets, inside & (tl.arange(0, SUB) > 0)[:, None]


@triton.jit
def later(lo, hi, head, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """As `tile`, every row one token later, the last empty."""
    return tile(lo + 1, hi, head, heads, SIZE, SUB, BLOCK)


@triton.jit
def write_block(
    s, log_w, k, v, lo, last, head, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a block of tokens, and the sum of its log_w; both as they were where there is no token."""
    hi = tl.minimum(lo + SUB, last)
    keys, values = tile(lo, hi, head, heads, KEY, SUB, BLOCK_K), tile(lo, hi, head, heads, VALUE, SUB, BLOCK_V)
    total = tl.sum(load(log_w, keys), axis=0)
    to_end = tl.cumsum(load(log_w, later(lo, hi, head, heads, KEY, BLOCK_K)), axis=0, reverse=True)
    written = dot(tl.trans(load(v, values)), load(k, keys) * tl.exp(to_end), DTYPE, PRECISION)
    return s * tl.exp(total)[None, :] + written, total


@triton.jit
def read_block(
    g, r, log_w, grad_y, lo, last, head, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a block of tokens from that after it, and the sum of log_w."""
    hi = tl.minimum(lo + SUB, last)
    keys, values = tile(lo, hi, head, heads, KEY, SUB, BLOCK_K), tile(lo, hi, head, heads, VALUE, SUB, BLOCK_V)
    total = tl.sum(load(log_w, keys), axis=0)
    before = tl.cumsum(load(log_w, earlier(lo, hi, head, heads, KEY, BLOCK_K)), axis=0)
    read = dot(tl.trans(load(grad_y, values)), load(r, keys) * tl.exp(before), DTYPE, PRECISION)
    return g * tl.exp(total)[None, :] + read, total


@triton.jit
def chunk_sums(
    r_or_k, log_w, y_or_v, table,
    states, decay,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, of k and v; with REVERSE to the state's gradient, of r and the outputs'."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    s, sum_log_w = tl.zeros([BLOCK_V, BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for i in range(CHUNK // SUB):
        if REVERSE:
            lo = first + CHUNK - SUB * (i + 1)
            s, total = read_block(
                s, r_or_k, log_w, y_or_v, lo, last, head, heads, KEY, VALUE, BLOCK_K, BLOCK_V, DTYPE, PRECISION
            )
        else:
            lo = first + SUB * i
            s, total = write_block(
                s, log_w, r_or_k, y_or_v, lo, last, head, heads, KEY, VALUE, BLOCK_K, BLOCK_V, DTYPE, PRECISION
            )
        sum_log_w += total
    chunk = slot * heads + head
    store(states, matrix(chunk, VALUE, KEY, BLOCK_V, BLOCK_K), s)
    store(decay, vector(chunk, KEY, BLOCK_K), sum_log_w)


@triton.jit
def carry(
    begin, decay, table, slots_of_row,
    states, end,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replaces what each chunk adds by the sum of all before it: X = X diag(Γ) + what the chunk adds."""
    blocks: tl.constexpr = (VALUE + BLOCK_V - 1) // BLOCK_V
    head, row = tl.program_id(0) // blocks % heads, tl.program_id(0) // blocks // heads
    value = tl.program_id(0) % blocks * BLOCK_V
    if PACKED:
        low, high = tl.load(slots_of_row + row).to(tl.int32), tl.load(slots_of_row + row + 1).to(tl.int32)
    else:
        low, high = row * tl.cdiv(time, CHUNK), (row + 1) * tl.cdiv(time, CHUNK)
    at = matrix(row * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K, value)
    x = load(begin, at)
    for i in range(0, high - low):
        slot = high - 1 - i if REVERSE else low + i
        chunk = slot * heads + head
        here = matrix(chunk, VALUE, KEY, BLOCK_V, BLOCK_K, value)
        added = load(states, here)
        store(states, here, x)
        x = x * tl.exp(load(decay, vector(chunk, KEY, BLOCK_K)))[None, :] + added
    store(end, at, x)


@triton.jit
def output(
    r, log_w, k, v, u, states, table,
    y,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = A V + R̃ S0ᵀ of a block."""
    BLOCKS: tl.constexpr = CHUNK // SUB
    index, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    slot, block = index // BLOCKS, index % BLOCKS
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    lo = first + SUB * block
    if lo >= last:
        return
    hi = tl.minimum(lo + SUB, last)
    s = load(states, matrix(slot * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K))
    for i in range(0, block):
        at = first + SUB * i
        s, _ = write_block(s, log_w, k, v, at, last, head, heads, KEY, VALUE, BLOCK_K, BLOCK_V, DTYPE, PRECISION)
    keys, values = tile(lo, hi, head, heads, KEY, SUB, BLOCK_K), tile(lo, hi, head, heads, VALUE, SUB, BLOCK_V)
    queries = load(r, keys)
    rows, columns = tl.arange(0, SUB)[:, None], tl.arange(0, SUB)[None, :]
    diagonal = tl.sum(queries * load(u, vector(head, KEY, BLOCK_K))[None, :] * load(k, keys), axis=1)
    weights = tl.where(rows == columns, diagonal[:, None], 0.0)
    between = tl.full([SUB, BLOCK_K], 1.0, tl.float32)  # e^D of every token from the key's
    for i in range(1, SUB):
        j = SUB - 1 - i
        passed = tl.exp(load(log_w, key_of(lo + j + 1, hi, head, heads, KEY, BLOCK_K)))
        between = tl.where(rows > j + 1, between * passed[None, :], 1.0)
        key = load(k, key_of(lo + j, hi, head, heads, KEY, BLOCK_K))
        weight = tl.sum(queries * between * key[None, :], axis=1)
        weights = tl.where((columns == j) & (rows > j), weight[:, None], weights)
    before = tl.cumsum(load(log_w, earlier(lo, hi, head, heads, KEY, BLOCK_K)), axis=0)
    out = dot(weights, load(v, values), DTYPE, PRECISION)
    store(y, values, out + dot(queries * tl.exp(before), tl.trans(s), DTYPE, PRECISION))


@triton.jit
def key_of(token, last, head, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where one token lies in a tensor [tokens, heads, SIZE]; nowhere from `last` on."""
    columns = tl.arange(0, BLOCK)
    return (token * heads + head) * SIZE, columns, (columns < SIZE) & (token < last)


@triton.jit
def gradients(
    r, log_w, k, v, u, grad_y, states, grad_states, table,
    grad_r, grad_log_w, grad_k, grad_v, grad_u,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a block; `grad_u` gets one part for each."""
    BLOCKS: tl.constexpr = CHUNK // SUB
    index, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    slot, block = index // BLOCKS, index % BLOCKS
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    lo = first + SUB * block
    if lo >= last:
        return
    hi = tl.minimum(lo + SUB, last)
    chunk = matrix(slot * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K)
    s, g = load(states, chunk), load(grad_states, chunk)
    for i in range(0, block):
        at = first + SUB * i
        s, _ = write_block(s, log_w, k, v, at, last, head, heads, KEY, VALUE, BLOCK_K, BLOCK_V, DTYPE, PRECISION)
    for i in range(block + 1, BLOCKS):
        at = first + SUB * (BLOCKS + block - i)
        g, _ = read_block(g, r, log_w, grad_y, at, last, head, heads, KEY, VALUE, BLOCK_K, BLOCK_V, DTYPE, PRECISION)
    keys, values = tile(lo, hi, head, heads, KEY, SUB, BLOCK_K), tile(lo, hi, head, heads, VALUE, SUB, BLOCK_V)
    queries, key_rows, decays = load(r, keys), load(k, keys), load(log_w, keys)
    value_rows, y_grad = load(v, values), load(grad_y, values)
    before = tl.cumsum(load(log_w, earlier(lo, hi, head, heads, KEY, BLOCK_K)), axis=0)
    to_end = tl.cumsum(load(log_w, later(lo, hi, head, heads, KEY, BLOCK_K)), axis=0, reverse=True)
    r_grad = dot(y_grad, s, DTYPE, PRECISION) * tl.exp(before)
    k_grad = dot(value_rows, g, DTYPE, PRECISION) * tl.exp(to_end)

    # what a decay gets from tokens after it reading the state, and from those before it writing it: rows moved by one
    # token make the sums exclusive, which a difference would leave without digits
    next_r = load(r, later(lo, hi, head, heads, KEY, BLOCK_K))
    next_y = load(grad_y, later(lo, hi, head, heads, VALUE, BLOCK_V))
    read = next_r * dot(next_y, s, DTYPE, PRECISION) * tl.exp(tl.cumsum(decays, axis=0))
    last_k = load(k, earlier(lo, hi, head, heads, KEY, BLOCK_K))
    last_v = load(v, earlier(lo, hi, head, heads, VALUE, BLOCK_V))
    written = last_k * dot(last_v, g, DTYPE, PRECISION) * tl.exp(tl.cumsum(decays, axis=0, reverse=True))
    decay_grad = tl.cumsum(read, axis=0, reverse=True) + tl.cumsum(written, axis=0)
    decay_grad += (tl.exp(tl.sum(decays, axis=0)) * tl.sum(s * g, axis=0))[None, :]

    rows, columns = tl.arange(0, SUB)[:, None], tl.arange(0, SUB)[None, :]
    bonus = load(u, vector(head, KEY, BLOCK_K))
    weights = tl.where(rows == columns, tl.sum(queries * bonus[None, :] * key_rows, axis=1)[:, None], 0.0)
    own = tl.sum(y_grad * value_rows, axis=1)[:, None]
    r_grad += own * bonus[None, :] * key_rows
    k_grad += own * bonus[None, :] * queries
    store(grad_u, vector(index * heads + head, KEY, BLOCK_K), tl.sum(own * queries * key_rows, axis=0))
    by_weight = dot(y_grad, tl.trans(value_rows), DTYPE, PRECISION)
    by_next = dot(next_y, tl.trans(value_rows), DTYPE, PRECISION)
    next_r *= tl.exp(decays)
    between = tl.full([SUB, BLOCK_K], 1.0, tl.float32)
    for i in range(1, SUB):
        j = SUB - 1 - i
        passed = tl.exp(load(log_w, key_of(lo + j + 1, hi, head, heads, KEY, BLOCK_K)))
        between = tl.where(rows > j + 1, between * passed[None, :], 1.0)
        key = load(k, key_of(lo + j, hi, head, heads, KEY, BLOCK_K))[None, :]
        weight = tl.sum(queries * between * key, axis=1)
        weights = tl.where((columns == j) & (rows > j), weight[:, None], weights)
        grad = tl.sum(tl.where((columns == j) & (rows > j), by_weight, 0.0), axis=1)[:, None] * between
        r_grad += grad * key
        k_grad = tl.where(rows == j, k_grad + tl.sum(grad * queries, axis=0)[None, :], k_grad)
        grad = tl.sum(tl.where((columns == j) & (rows > j), by_next, 0.0), axis=1)[:, None] * between
        decay_grad += tl.where(rows > j, tl.cumsum(grad * next_r * key, axis=0, reverse=True), 0.0)
    store(grad_r, keys, r_grad)
    store(grad_k, keys, k_grad)
    store(grad_log_w, keys, decay_grad)
    v_grad = dot(tl.trans(weights), y_grad, DTYPE, PRECISION)
    store(grad_v, values, v_grad + dot(key_rows * tl.exp(to_end), tl.trans(g), DTYPE, PRECISION))


@triton.jit
def step(
    r, log_w, k, v, u, state,
    y, next_state,
    heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token: the state is read and written once, all else stays in registers."""
    blocks: tl.constexpr = (VALUE + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // blocks  # counted over the whole batch
    value = tl.program_id(0) % blocks * BLOCK_V
    at, keys = matrix(head, VALUE, KEY, BLOCK_V, BLOCK_K, value), vector(head, KEY, BLOCK_K)
    values = vector(head, VALUE, BLOCK_V, value)
    s, key = load(state, at), load(k, keys)
    query, bonus = load(r, keys), load(u, vector(head % heads, KEY, BLOCK_K))
    written = load(v, values)[:, None]
    store(y, values, tl.sum((s + written * (bonus * key)[None, :]) * query[None, :], axis=1))
    store(next_state, at, s * tl.exp(load(log_w, keys))[None, :] + written * key[None, :])
