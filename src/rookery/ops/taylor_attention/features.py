"""The features φ whose product is 1 + u + u²/2 for u = q·k / √d.

φ(x) = [1, x_i / d^¼, x_i² / √(2 d), x_i x_j / √d for i < j]. Published code keeps all d² products x_i x_j / √(2 d);
x_i x_j and x_j x_i are the same number, so that each pair is held once here, times √2: 153 numbers for d = 16 instead
of 273, and the same sums.
"""

import torch
from torch import Tensor

# d channels of a query or key, f features


def size(dim: int) -> int:
    """Features of `dim` channels."""
    return 1 + dim + dim * (dim + 1) // 2


def features(x: Tensor) -> Tensor:
    """φ(x) [..., f] for x [..., d]."""
    dim = x.shape[-1]
    first, second = torch.triu_indices(dim, dim, device=x.device)
    scale = torch.full((len(first),), dim**-0.5, dtype=x.dtype, device=x.device)
    scale = torch.where(first == second, scale * 0.5**0.5, scale)
    pairs = x[..., first] * x[..., second] * scale
    return torch.cat([torch.ones_like(x[..., :1]), x * dim**-0.25, pairs], dim=-1)


def unpacked(state: Tensor, dim: int) -> Tensor:
    """A state [..., f] in the layout of published code, [..., 1 + d + d²]: every product of two channels apart."""
    first, second = torch.triu_indices(dim, dim, device=state.device)
    square = state.new_zeros(*state.shape[:-1], dim, dim)
    pairs = state[..., 1 + dim :]
    pairs = torch.where(first == second, pairs, pairs * 0.5**0.5)
    square[..., first, second] = pairs
    square[..., second, first] = pairs
    return torch.cat([state[..., : 1 + dim], square.flatten(-2)], dim=-1)


def packed(state: Tensor, dim: int) -> Tensor:
    """The inverse of `unpacked`."""
    first, second = torch.triu_indices(dim, dim, device=state.device)
    square = state[..., 1 + dim :].unflatten(-1, (dim, dim))
    pairs = square[..., first, second]
    pairs = torch.where(first == second, pairs, pairs * 2**0.5)
    return torch.cat([state[..., : 1 + dim], pairs], dim=-1)
