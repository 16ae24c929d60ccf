"""Triton kernels of wkv7_output: a program works on one head of TOKENS tokens."""

import triton
import triton.language as tl

from rookery.ops.triton_tiles import load, store, tile, vector


@triton.jit
def normed(x, channels, eps, SIZE: tl.constexpr):
    """(x − mean) / deviation over a head's channels, and 1 / deviation."""
    # what lies beside the head must not count
    centred = tl.where(channels[2][None, :], x - (tl.sum(x, axis=1) / SIZE)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / SIZE + eps)
    return centred * scale[:, None], scale


@triton.jit
def finish(
    y, r, k, v, gate, r_k, weight, bias,
    out,
    tokens, heads, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64) * TOKENS
    at, channels = tile(first, tokens, head, heads, SIZE, TOKENS, BLOCK), vector(head, SIZE, BLOCK)
    norm, _ = normed(load(y, at), channels, eps, SIZE)
    bonus = tl.sum(load(r, at) * load(k, at) * load(r_k, channels)[None, :], axis=1)
    inner = norm * load(weight, channels)[None, :] + load(bias, channels)[None, :] + bonus[:, None] * load(v, at)
    store(out, at, inner * load(gate, at))


@triton.jit
def finish_backward(
    y, r, k, v, gate, r_k, weight, bias, grad_out,
    grad_y, grad_r, grad_k, grad_v, grad_gate, grad_parameters,
    tokens, heads, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Computes all again; `grad_parameters` [blocks of tokens, 3, c] gets the parts of r_k's, weight's and bias's."""
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads
    at, channels = (
        tile(block.to(tl.int64) * TOKENS, tokens, head, heads, SIZE, TOKENS, BLOCK),
        vector(head, SIZE, BLOCK),
    )
    norm, scale = normed(load(y, at), channels, eps, SIZE)
    query, key, value = load(r, at), load(k, at), load(v, at)
    by, affine = load(r_k, channels)[None, :], load(weight, channels)[None, :]
    bonus = tl.sum(query * key * by, axis=1)[:, None]
    out_grad = load(grad_out, at)
    store(grad_gate, at, out_grad * (norm * affine + load(bias, channels)[None, :] + bonus * value))
    inner_grad = out_grad * load(gate, at)
    store(grad_v, at, inner_grad * bonus)
    bonus_grad = tl.sum(inner_grad * value, axis=1)[:, None]
    store(grad_r, at, bonus_grad * key * by)
    store(grad_k, at, bonus_grad * query * by)
    grad = inner_grad * affine
    mean, along = tl.sum(grad, axis=1) / SIZE, tl.sum(grad * norm, axis=1) / SIZE
    store(grad_y, at, (grad - mean[:, None] - norm * along[:, None]) * scale[:, None])
    parts = 3 * block * heads + head
    store(grad_parameters, vector(parts, SIZE, BLOCK), tl.sum(bonus_grad * query * key, axis=0))
    store(grad_parameters, vector(parts + heads, SIZE, BLOCK), tl.sum(inner_grad * norm, axis=0))
    store(grad_parameters, vector(parts + 2 * heads, SIZE, BLOCK), tl.sum(inner_grad, axis=0))
