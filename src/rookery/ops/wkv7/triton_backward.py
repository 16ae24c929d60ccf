"""Triton kernels of WKV-7 backward; the equations and their names are in triton.py, `scan` is the forward's own."""

import triton
import triton.language as tl

from rookery.ops.triton_tiles import chunk_bounds, dot, load, matrix, store, tile, triangle, vector


@triton.jit
def prepare_backward(
    r, log_w, a, b, grad_y, inverse, table,
    reach, through, r_fall, a_fall, decay,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What of a chunk does not need the state's gradient after it: Tᵀ B̂, Tᵀ A_rbᵀ dY, R̃, Ã and G of its last token."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    keys = tile(first, last, head, heads, KEY, CHUNK, BLOCK_K)
    values = tile(first, last, head, heads, VALUE, CHUNK, BLOCK_V)
    decays = load(log_w, keys)
    upto, total = tl.cumsum(decays, axis=0), tl.sum(decays, axis=0)
    r_chunk, b_chunk = load(r, keys) * tl.exp(upto), load(b, keys)
    store(r_fall, keys, r_chunk)
    store(a_fall, keys, load(a, keys) * tl.exp(upto - decays))
    growth = tl.exp(total * 0.5 - upto)
    by_b = dot(r_chunk * tl.exp(-0.5 * total), tl.trans(b_chunk * growth), DTYPE, PRECISION)
    by_b = triangle(by_b, CHUNK, True)
    chunk = slot * heads + head
    transposed = tl.trans(load(inverse, matrix(chunk, CHUNK, CHUNK, CHUNK, CHUNK)))
    grad_removed = dot(tl.trans(by_b), load(grad_y, values), DTYPE, PRECISION)
    store(through, values, dot(transposed, grad_removed, tl.float32, PRECISION))
    store(reach, keys, dot(transposed, b_chunk * tl.exp(total - upto), tl.float32, PRECISION))
    store(decay, vector(chunk, KEY, BLOCK_K), total)


@triton.jit
def query_gradients(
    r, log_w, k, v, a, b, grad_y, removed, through, states, table,
    grad_r, grad_a, grad_log_w,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dR and dA of a chunk, and what the decays get through them."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    keys = tile(first, last, head, heads, KEY, CHUNK, BLOCK_K)
    values = tile(first, last, head, heads, VALUE, CHUNK, BLOCK_V)
    decays = load(log_w, keys)
    upto, total = tl.cumsum(decays, axis=0), tl.sum(decays, axis=0)
    growth, half = tl.exp(0.5 * total - upto), tl.exp(0.5 * total)
    k_mid, b_mid = load(k, keys) * growth, load(b, keys) * growth
    written, gone = load(v, values), load(removed, values)
    at = matrix(slot * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K)
    s = load(states, at)
    y_grad = load(grad_y, values)
    grad = dot(y_grad, s, DTYPE, PRECISION) * half
    by_k = triangle(dot(y_grad, tl.trans(written), DTYPE, PRECISION), CHUNK, True)
    by_b = triangle(dot(y_grad, tl.trans(gone), DTYPE, PRECISION), CHUNK, True)
    grad += dot(by_k, k_mid, DTYPE, PRECISION) + dot(by_b, b_mid, DTYPE, PRECISION)
    grad *= tl.exp(upto - 0.5 * total)
    store(grad_r, keys, grad)
    total_grad = load(r, keys) * grad
    z = load(through, values)
    grad = dot(z, s, DTYPE, PRECISION) * half
    by_k = triangle(dot(z, tl.trans(written), DTYPE, PRECISION), CHUNK, False)
    by_b = triangle(dot(z, tl.trans(gone), DTYPE, PRECISION), CHUNK, False)
    grad += dot(by_k, k_mid, DTYPE, PRECISION) + dot(by_b, b_mid, DTYPE, PRECISION)
    grad *= tl.exp(upto - decays - 0.5 * total)
    store(grad_a, keys, grad)
    # r feels the decays up to its own token, a those before it
    before = load(a, keys) * grad
    total_grad = tl.cumsum(total_grad + before, axis=0, reverse=True) - before
    store(grad_log_w, keys, total_grad)


@triton.jit
def write_gradients(
    r, log_w, k, v, a, b, grad_y, removed, through, states, grad_states, table,
    grad_k, grad_v, grad_b, grad_log_w,
    time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV and dB of a chunk; what the decays get through them is added to `grad_log_w`."""
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, last = chunk_bounds(slot, table, time, CHUNK, PACKED)
    if first >= last:
        return
    keys = tile(first, last, head, heads, KEY, CHUNK, BLOCK_K)
    values = tile(first, last, head, heads, VALUE, CHUNK, BLOCK_V)
    decays = load(log_w, keys)
    upto, total = tl.cumsum(decays, axis=0), tl.sum(decays, axis=0)
    growth, half = tl.exp(0.5 * total - upto), tl.exp(0.5 * total)
    r_mid = load(r, keys) * tl.exp(upto - 0.5 * total)
    a_mid = load(a, keys) * tl.exp(upto - decays - 0.5 * total)
    y_grad, z = load(grad_y, values), load(through, values)
    at = matrix(slot * heads + head, VALUE, KEY, BLOCK_V, BLOCK_K)
    s_grad = load(grad_states, at)
    total_grad = half * half * tl.sum(s_grad * load(states, at), axis=0)
    chunk = load(k, keys) * growth
    by_r = triangle(dot(r_mid, tl.trans(chunk), DTYPE, PRECISION), CHUNK, True)
    by_a = triangle(dot(a_mid, tl.trans(chunk), DTYPE, PRECISION), CHUNK, False)
    grad_value = dot(tl.trans(by_r), y_grad, DTYPE, PRECISION) + dot(tl.trans(by_a), z, DTYPE, PRECISION)
    grad_value += dot(chunk * half, tl.trans(s_grad), DTYPE, PRECISION)
    store(grad_v, values, grad_value)
    decay_grad = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for of_b in tl.static_range(2):  # v kᵀ, then U bᵀ
        if of_b:
            chunk = load(b, keys) * growth
        written = load(removed if of_b else v, values)
        by_r = triangle(dot(y_grad, tl.trans(written), DTYPE, PRECISION), CHUNK, True)
        by_a = triangle(dot(z, tl.trans(written), DTYPE, PRECISION), CHUNK, False)
        grad = dot(written, s_grad, DTYPE, PRECISION) * half
        total_grad += tl.sum(chunk * grad, axis=0)
        grad += dot(tl.trans(by_r), r_mid, DTYPE, PRECISION) + dot(tl.trans(by_a), a_mid, DTYPE, PRECISION)
        store(grad_b if of_b else grad_k, keys, grad * growth)
        decay_grad += chunk * grad
    through_queries = load(grad_log_w, keys)
    decay_grad = total_grad[None, :] - tl.cumsum(decay_grad, axis=0, reverse=True)
    store(grad_log_w, keys, through_queries + decay_grad)
