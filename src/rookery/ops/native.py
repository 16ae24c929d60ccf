"""What the element-wise operators' native backends share: which tensors they take, and the settings of a call."""

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
