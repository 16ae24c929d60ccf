"""Tokens that lie on a grid, row after row: orders to scan them in, and shifts between neighbours.

A shift moves nothing in: outside of the grid are zeros.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

# b batch, t tokens, c channels; a grid is (rows, columns) with rows · columns = t

Order = Literal["rows", "rows backwards", "columns", "columns backwards"]
ORDERS: tuple[Order, ...] = ("rows", "rows backwards", "columns", "columns backwards")
"""Ways through a grid, in the turns that layers take."""


def scan(x: Tensor, order: Order, grid: tuple[int, int]) -> Tensor:
    """The tokens [b, t, ...] of a grid in the order in which a layer reads them."""
    check_grid(x, grid)
    if order.startswith("columns"):
        x = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return x.flip(1) if order.endswith("backwards") else x


def unscan(x: Tensor, order: Order, grid: tuple[int, int]) -> Tensor:
    """Undoes `scan`."""
    check_grid(x, grid)
    x = x.flip(1) if order.endswith("backwards") else x
    if order.startswith("columns"):
        x = x.unflatten(1, (grid[1], grid[0])).transpose(1, 2).flatten(1, 2)
    return x


def q_shift(x: Tensor, grid: tuple[int, int], *, heads: int = 1, pixels: int = 1, share: float = 0.25) -> Tensor:
    """Each token [b, t, c] with its neighbours in its place (arXiv 2403.02308, eq. 4): Vision-RWKV's token shift.

    In every head of n channels the first int(n · share) come from the neighbour on the left, as many each from the
    right, from above and from below; the rest stays. `pixels` is the distance of the neighbour; 0 leaves `x` as it is.
    ValueError for a share above a fourth, a grid or heads that do not fit.
    """
    check_grid(x, grid)
    channels = x.shape[2] // heads
    if x.shape[2] % heads or not 0 <= share <= 0.25:
        raise ValueError(f"q_shift needs a share of 0 to 0.25 and heads that divide {x.shape[2]}: {share}, {heads}")
    moved, (height, width) = int(channels * share), grid
    if not pixels:
        return x
    parts = x.reshape(x.shape[0], height, width, heads, channels).split([moved] * 4 + [channels - 4 * moved], dim=-1)
    down, right = min(pixels, height), min(pixels, width)
    shifted = [
        pad(parts[0][:, :, : width - right], (0, 0, 0, 0, right, 0)),
        pad(parts[1][:, :, right:], (0, 0, 0, 0, 0, right)),
        pad(parts[2][:, : height - down], (0, 0, 0, 0, 0, 0, down, 0)),
        pad(parts[3][:, down:], (0, 0, 0, 0, 0, 0, 0, down)),
        parts[4],
    ]
    return torch.cat(shifted, dim=-1).reshape(x.shape)


def b_shift(x: Tensor, *, heads: int = 1) -> Tensor:
    """Each token [b, t, c] with its neighbours in its place: RWKV-CLIP's token shift for texts (arXiv 2406.06973).

    In every head the first half of the channels comes from the token before, the second from the one after.
    """
    if x.shape[2] % (2 * heads):
        raise ValueError(f"b_shift needs heads of an even number of channels; {x.shape[2]} in {heads} heads are not")
    if not x.shape[1]:
        return x
    before, after = x.unflatten(2, (heads, 2, -1)).unbind(3)
    before, after = pad(before[:, :-1], (0, 0, 0, 0, 1, 0)), pad(after[:, 1:], (0, 0, 0, 0, 0, 1))
    return torch.stack([before, after], dim=3).flatten(2)


def shift(x: Tensor) -> Tensor:
    """The token before each one of [b, t, c]."""
    return pad(x[:, :-1], (0, 0, 1, 0)) if x.shape[1] else x


def check_grid(x: Tensor, grid: tuple[int, int]) -> None:
    if grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f"a grid of {grid[0]} × {grid[1]} has {grid[0] * grid[1]} tokens, there are {x.shape[1]}")
