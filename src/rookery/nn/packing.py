"""Rows of unequal length as one packed row, and back. One mechanism serves padding masks and packed documents."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Real tokens of a padded batch, laid one row after the other."""

    tokens: Tensor
    """[1, n]"""
    cu_seqlens: Tensor
    """int64 [rows + 1]: row i is tokens[:, cu_seqlens[i]:cu_seqlens[i + 1]]; rows may be empty."""
    mask: Tensor
    """bool [b, t], where the tokens came from."""


def pack(tokens: Tensor, mask: Tensor) -> Packed:
    """Takes the tokens [b, t] where `mask` [b, t] is true."""
    if mask.shape != tokens.shape:
        raise ValueError(f"mask is {list(mask.shape)}, tokens are {list(tokens.shape)}; they must be alike")
    mask = mask.bool()
    ends = mask.sum(dim=1).cumsum(dim=0)
    return Packed(tokens[mask][None], torch.cat([ends.new_zeros(1), ends]), mask)


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Puts packed values [1, n, ...] back where `mask` [b, t] is true; zeros elsewhere."""
    rows = values.new_zeros(*mask.shape, *values.shape[2:])
    return rows.masked_scatter(mask.view(*mask.shape, *[1] * (values.dim() - 2)), values)


def row_mask(cu_seqlens: Tensor) -> Tensor:
    """bool [documents, longest]: where the documents of a packed row stand when each gets a row of its own."""
    lengths = cu_seqlens.diff()
    columns = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    return columns < lengths[:, None]
