"""How a process that trains on the CPU treats memory that it has freed."""

import ctypes
import sys

# names of glibc's mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30
"""Bytes: larger blocks still go back to the system when they are freed."""


def keep_freed_memory() -> bool:
    """Keeps freed blocks for the next step in place of giving them back to the system; False where that cannot be set.

    Every step takes and frees the same activations. Given back and taken again, their pages are zeroed by the kernel
    each time: 3 to 5% of a step. For the whole process, so it is the command line that asks for it, not the loop.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has no such function
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, -1))
