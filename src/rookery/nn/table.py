"""Token tables that stay on disk: RWKV-7a, 7b and 8 keep most of their weights in tables, and a token needs one row.

`open_checkpoint` maps safetensors files lazily, so that reading a row reads a page of the file:

    checkpoint = open_checkpoint("rwkv7a.safetensors")
    model = rookery.load(checkpoint.path)
    keep_on_disk(model, checkpoint)
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from rookery.nn.language_model import LanguageModel
from rookery.state import from_numpy


class MappedTable(nn.Module):
    """An embedding without a parameter: rows are read from `rows` [v, n], usually a memory map, when needed."""

    def __init__(self, rows: np.ndarray, like: Tensor) -> None:
        """Values get the dtype and device of `like`, the weight that this table replaces."""
        super().__init__()
        self.rows = rows
        self.register_buffer("like", like.detach().new_zeros(0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        read = from_numpy(np.asarray(self.rows[tokens.cpu().numpy()]))
        return read.to(device=self.like.device, dtype=self.like.dtype)


def keep_on_disk(model: LanguageModel, weights: Mapping[str, np.ndarray]) -> list[str]:
    """Replaces the token tables of a model's blocks by rows of `weights` (an open checkpoint); names those replaced.

    Frees their memory. The model then serves for inference only: the tables have no gradient and are not saved.
    """
    names = [name for name, module in model.named_modules() if "." in name and isinstance(module, nn.Embedding)]
    for name in names:
        parent, _, last = name.rpartition(".")
        table = MappedTable(weights[f"{name}.weight"], model.get_parameter(f"{name}.weight"))
        setattr(model.get_submodule(parent), last, table)
    return [f"{name}.weight" for name in names]
