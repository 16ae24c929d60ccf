"""Triton kernels of wkv7_inputs: a program works on one head of TOKENS tokens."""

import triton
import triton.language as tl

from rookery.ops.triton_tiles import load, store, tile, vector


@triton.jit
def prepare(
    k, decay_logit, rate_logit, k_k, k_a,
    log_w, k_out, a, b,
    tokens, heads, scale, floor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64) * TOKENS
    at, channels = tile(first, tokens, head, heads, SIZE, TOKENS, BLOCK), vector(head, SIZE, BLOCK)
    key, rate = load(k, at), tl.sigmoid(load(rate_logit, at))
    scaled = key * load(k_k, channels)[None, :]
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))
    removal = scaled / tl.maximum(norm, floor)[:, None]
    store(log_w, at, scale * tl.sigmoid(load(decay_logit, at)))
    store(k_out, at, key * (1 + (rate - 1) * load(k_a, channels)[None, :]))
    store(a, at, -removal)
    store(b, at, removal * rate)


@triton.jit
def prepare_backward(
    k, decay_logit, rate_logit, k_k, k_a, grad_log_w, grad_k_out, grad_a, grad_b,
    grad_k, grad_decay_logit, grad_rate_logit, grad_parameters,
    tokens, heads, scale, floor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Computes all again; `grad_parameters` [blocks of tokens, 2, c] gets the parts of k_k's and k_a's."""
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads
    at, channels = (
        tile(block.to(tl.int64) * TOKENS, tokens, head, heads, SIZE, TOKENS, BLOCK),
        vector(head, SIZE, BLOCK),
    )
    key, rate = load(k, at), tl.sigmoid(load(rate_logit, at))
    by_k, by_a = load(k_k, channels)[None, :], load(k_a, channels)[None, :]
    scaled = key * by_k
    norm = tl.sqrt(tl.sum(scaled * scaled, axis=1))
    removal = scaled / tl.maximum(norm, floor)[:, None]
    kept = tl.sigmoid(load(decay_logit, at))
    store(grad_decay_logit, at, load(grad_log_w, at) * scale * kept * (1 - kept))
    out_grad, b_grad = load(grad_k_out, at), load(grad_b, at)
    rate_grad = b_grad * removal + out_grad * key * by_a
    store(grad_rate_logit, at, rate_grad * rate * (1 - rate))
    grad = b_grad * rate - load(grad_a, at)
    # below the floor the norm is a constant
    along = tl.where(norm >= floor, tl.sum(removal * grad, axis=1), 0.0)
    grad = (grad - removal * along[:, None]) / tl.maximum(norm, floor)[:, None]
    store(grad_k, at, out_grad * (1 + (rate - 1) * by_a) + grad * by_k)
    store(grad_parameters, vector(2 * block * heads + head, SIZE, BLOCK), tl.sum(grad * key, axis=0))
    part = tl.sum(out_grad * key * (rate - 1), axis=0)
    store(grad_parameters, vector((2 * block + 1) * heads + head, SIZE, BLOCK), part)
