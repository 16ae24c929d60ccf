"""What Triton kernels share: places in tensors, which `load` and `store` take.

A place is a tuple: where it starts, the offsets from there, and which of them exist.
"""

import triton
import triton.language as tl


@triton.jit
def tile(first, last, head, heads, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, column=0):
    """Where tokens `first` to `last`, at most CHUNK, lie in a tensor [tokens, heads, SIZE], from `column` on."""
    rows, columns = tl.arange(0, CHUNK), column + tl.arange(0, BLOCK)
    # counted in int64 up to the tile's first number; what is left fits into int32, in half of the registers
    offsets = rows[:, None] * (heads * SIZE) + columns[None, :]
    return (first * heads + head) * SIZE, offsets, (first + rows < last)[:, None] & (columns < SIZE)[None, :]


@triton.jit
def matrix(index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, row=0):
    """Where the matrix `index` of a tensor [..., ROWS, COLUMNS] lies, from `row` on."""
    rows, columns = row + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    return index.to(tl.int64) * (ROWS * COLUMNS), offsets, (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]


@triton.jit
def vector(index, SIZE: tl.constexpr, BLOCK: tl.constexpr, start=0):
    """Where the vector `index` of a tensor [..., SIZE] lies, from `start` on."""
    numbers = start + tl.arange(0, BLOCK)
    return index.to(tl.int64) * SIZE, numbers, numbers < SIZE


@triton.jit
def load(tensor, place):
    """What lies there in float32, zero where nothing does."""
    return tl.load(tensor + place[0] + place[1], mask=place[2], other=0.0).to(tl.float32)


@triton.jit
def store(tensor, place, x):
    tl.store(tensor + place[0] + place[1], x, mask=place[2])


@triton.jit
def numbers(block, count, BLOCK: tl.constexpr):
    """Where the numbers of a `block` lie in a tensor of `count` numbers."""
    offsets = tl.arange(0, BLOCK)
    start = block.to(tl.int64) * BLOCK
    return start, offsets, start + offsets < count


@triton.jit
def rows(index, inside, columns, SIZE: tl.constexpr):
    """Where `columns` of those rows `index` (int64) of a tensor [..., SIZE] lie that are `inside`."""
    return 0, index[:, None] * SIZE + columns[None, :], inside[:, None] & (columns < SIZE)[None, :]


@triton.jit
def chunk_bounds(slot, table, time, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """First token of a chunk and the end of what it may read, counted over the whole batch."""
    if PACKED:
        first = tl.load(table + 2 * slot)
        last = tl.load(table + 2 * slot + 1)
    else:
        per_row = tl.cdiv(time, CHUNK)
        row = (slot // per_row).to(tl.int64)
        first = row * time + (slot % per_row) * CHUNK
        last = tl.minimum(first + CHUNK, (row + 1) * time)
    return first, last


@triton.jit
def dot(x, y, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(x.to(DTYPE), y.to(DTYPE), input_precision=PRECISION)


@triton.jit
def triangle(x, CHUNK: tl.constexpr, DIAGONAL: tl.constexpr):
    """The part below the diagonal, or with it."""
    rows = tl.arange(0, CHUNK)
    keep = rows[:, None] >= rows[None, :] if DIAGONAL else rows[:, None] > rows[None, :]
    return tl.where(keep, x, 0.0)
