"""What the Triton backends share: which tensors they take, how many a program gets, and where chunks of tokens lie."""

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


def chunk_table(cu_seqlens: Tensor, chunk: int, slots: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Bounds of every chunk [slots, 2] and the first chunk of every document [d + 1], without waiting for the GPU."""
    # bounds that lie are at least kept inside the tensors
    cu_seqlens = cu_seqlens.to(torch.int64).clamp(0, tokens)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    first_slot = torch.nn.functional.pad(((ends - starts + chunk - 1) // chunk).cumsum(0), (1, 0))
    slot = torch.arange(slots, device=cu_seqlens.device)
    document = torch.searchsorted(first_slot[1:], slot, right=True).clamp(max=len(starts) - 1)
    first = torch.minimum(starts[document] + (slot - first_slot[document]) * chunk, ends[document])
    return torch.stack([first, torch.minimum(first + chunk, ends[document])], dim=1), first_slot


def check_documents(r: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuses packed rows that do not fit, where that can be seen without waiting for the GPU."""
    if cu_seqlens is None:
        return
    batch, tokens = r.shape[:2]
    bounds = cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else [0, tokens]
    if batch != 1 or bounds[0] != 0 or bounds[-1] != tokens or any(x > y for x, y in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} in a batch of 1; it is {bounds}, the batch {batch}")
