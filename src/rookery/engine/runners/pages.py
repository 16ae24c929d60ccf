"""Weights in large pages of memory, which the processor reads faster than those of a mapped file."""

import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PAGE = 2 << 20
"""Bytes of a large page."""
LINE = 64


def in_large_pages(arrays: Mapping[str, np.ndarray], threads: int) -> dict[str, np.ndarray]:
    """The same arrays, those that lie in a mapped file copied to memory of large pages, where the system has them.

    A page of the file is let go as soon as it has been copied, so that memory holds the weights once.
    """
    mapped = {name: array for name, array in arrays.items() if _file_of(array) is not None}
    places, total = {}, 0
    for name, array in mapped.items():
        places[name], total = total, total + -(-array.nbytes // LINE) * LINE
    if not total:
        return dict(arrays)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # memory that is shared, as mmap makes it unasked, has none
        memory = mmap.mmap(-1, total + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, total + PAGE)
    block = np.frombuffer(memory, np.uint8)
    start = -block.ctypes.data % PAGE

    def copied(name: str) -> np.ndarray:
        array, at = mapped[name], start + places[name]
        copy = block[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(copy, array)
        _let_go(array)
        return copy

    with ThreadPoolExecutor(threads) as pool:
        return dict(arrays) | dict(zip(mapped, pool.map(copied, mapped)))


def _file_of(array: np.ndarray) -> mmap.mmap | None:
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def _let_go(array: np.ndarray) -> None:
    """Takes the array's pages of its file out of this process; they are read again where they are needed again."""
    file = _file_of(array)
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = np.frombuffer(file, np.uint8).ctypes.data
    begin = array.ctypes.data - first
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        file.madvise(mmap.MADV_DONTNEED, begin, end - begin)
