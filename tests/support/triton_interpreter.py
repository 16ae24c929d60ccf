"""Repairs Triton's interpreter, which runs kernels on the CPU with NumPy, where it would spoil a comparison.

It knows bfloat16 only as bits: it cuts off where a GPU rounds, and multiplies the bits in `dot`. And NumPy 2.4 does
not turn its scalars, arrays of one number, into the bounds of a loop.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Makes the interpreter of this process round to bfloat16 and multiply it as a GPU does."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    patched_for = set()

    def converted(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding)

    def multiplied(self, x, y, *rest):
        if x.dtype == tl.bfloat16:
            x, y = self.cast_impl(x, tl.float32), self.cast_impl(y, tl.float32)
        return dot(self, x, y, *rest)

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patched(kernel):
        # the original replaces all of triton.language whenever a kernel calls a function, which takes half of the time
        if kernel.__module__ not in patched_for:
            patched_for.add(kernel.__module__)
            patch(kernel)
        return interpreter._LangPatchScope()

    np.seterr(over="ignore")  # a GPU says nothing of e⁹⁰ either
    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = multiplied
    interpreter._patch_lang_tensor = patched_tensor
    interpreter._patch_lang = patched
