"""What the element-wise operators' Triton backends share: which tensors they take, and how many a program gets."""

import torch
from torch import Tensor

from rookery.ops.dispatch import triton_why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAM = 2048
"""Numbers of one tensor that a program works on: 16 a thread, which are loaded at once."""


def elementwise_why_not(*tensors: Tensor, parameters: tuple[Tensor, ...] = ()) -> str | None:
    """Reason that the kernels cannot take these tensors, or None. `parameters` may have a dtype of their own."""
    if reason := triton_why_not(*tensors, *parameters, dtypes=DTYPES):
        return reason
    if len(found := sorted({str(x.dtype).removeprefix("torch.") for x in tensors})) > 1:
        return f"it takes tensors of one dtype, these have {' and '.join(found)}"
    return None


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`: Triton's tiles come in no other sizes."""
    return 1 << (size - 1).bit_length()
