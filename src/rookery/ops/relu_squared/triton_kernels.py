"""Triton kernels of ReLU²."""

import triton
import triton.language as tl

from rookery.ops.triton_tiles import load, numbers, store


@triton.jit
def square(x, y, count, BLOCK: tl.constexpr):
    at = numbers(tl.program_id(0), count, BLOCK)
    kept = tl.maximum(load(x, at), 0.0)
    store(y, at, kept * kept)


@triton.jit
def square_backward(x, grad_y, grad_x, count, BLOCK: tl.constexpr):
    at = numbers(tl.program_id(0), count, BLOCK)
    store(grad_x, at, 2 * tl.maximum(load(x, at), 0.0) * load(grad_y, at))
