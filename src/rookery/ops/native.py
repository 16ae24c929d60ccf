"""What the native backends share: which tensors they take, where the rows lie, and the settings of a call."""

from typing import Any

import torch
from torch import Tensor

from rookery.ops.dispatch import native_why_not

DTYPES = (torch.float32, torch.bfloat16)


def elementwise_why_not(*tensors: Tensor, parameters: tuple[Tensor, ...] = ()) -> str | None:
    """Reason that the kernels cannot take these tensors, or None. `parameters` may have a dtype of their own."""
    if reason := native_why_not(*tensors, *parameters, dtypes=DTYPES):
        return reason
    if len(found := sorted({str(x.dtype).removeprefix("torch.") for x in tensors})) > 1:
        return f"it takes tensors of one dtype, these have {' and '.join(found)}"
    return None


def settings(x: Tensor, isa: str) -> dict[str, Any]:
    """Keyword arguments of every kernel: the storage type, the number of threads and the instruction set."""
    return {"bfloat16": x.dtype == torch.bfloat16, "threads": torch.get_num_threads(), "isa": isa}


def addresses(**tensors: Tensor) -> dict[str, int]:
    """Where the tensors lie; they must be contiguous and outlive the call."""
    return {name: x.data_ptr() for name, x in tensors.items()}


def address(tensor: Tensor) -> tuple[int, bool]:
    """Where a tensor lies, and whether it holds bfloat16: how the recurrences are told of it."""
    return tensor.data_ptr(), tensor.dtype == torch.bfloat16


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous memory for results of these shapes and dtypes."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def empty_checkpoints(
    x: Tensor, state: Tensor, cu_seqlens: Tensor | None, chunk: int, shape: tuple[int, ...], keep: bool
) -> Tensor:
    """Memory for what a recurrence keeps at the start of every `chunk` tokens of x [b, t, …]; none unless `keep`."""
    batch, tokens = x.shape[:2]
    # every document starts a chunk of its own; their number depends on the data, so this is the most there can be
    chunks = batch * -(-tokens // chunk) if cu_seqlens is None else tokens // chunk + state.shape[0]
    empty = state.new_empty if cu_seqlens is None else state.new_zeros  # zeros where nothing will be written
    return empty(chunks if keep else 0, *shape)


def sequence_starts(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """The first token of each row of the state, counted over the whole batch of x [b, t, …], and the number of tokens.

    ValueError unless `cu_seqlens` cuts the one row of `x` into documents.
    """
    batch, tokens = x.shape[:2]
    if cu_seqlens is None:
        return [row * tokens for row in range(batch + 1)]
    starts = cu_seqlens.tolist()
    if batch != 1 or starts[0] != 0 or starts[-1] != tokens or any(x > y for x, y in zip(starts, starts[1:])):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} in a batch of 1; it is {starts}, the batch {batch}")
    return starts
