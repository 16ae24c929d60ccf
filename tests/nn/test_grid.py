"""Tokens on a grid: it is true that …"""

import pytest
import torch

from rookery.nn.grid import ORDERS, b_shift, q_shift, scan, shift, unscan
from rookery.ops.wkv7 import wkv7
from rookery.ops.wkv7.cases import Case, make

GRID = (3, 5)


def image(channels=10, batch=2, grid=GRID):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, grid[0] * grid[1], channels, generator=generator)


def turned(x, dims, grid=GRID):
    return x.unflatten(1, grid).flip(dims).flatten(1, 2)


def test_a_dot_moves_to_the_cell_whose_neighbour_it_is():
    # two channels of ten each from the left, the right, above and below; two stay
    x = torch.zeros(1, 15, 10)
    x[0, 7] = 1  # the middle: row 1, column 2
    moved = q_shift(x, GRID)
    for channel, cell in zip(range(0, 10, 2), (8, 6, 12, 2, 7)):
        assert moved[0, :, channel : channel + 2].nonzero()[:, 0].tolist() == [cell, cell]


def test_nothing_comes_in_from_outside():
    ones = torch.ones(1, 15, 8)
    moved = q_shift(ones, GRID).unflatten(1, GRID)[0]
    assert not moved[:, 0, :2].any()
    assert not moved[:, -1, 2:4].any()
    assert not moved[0, :, 4:6].any()
    assert not moved[-1, :, 6:].any()
    assert moved.sum() == 2 * (3 * 4 + 3 * 4 + 2 * 5 + 2 * 5)


@pytest.mark.parametrize(("dims", "groups"), [((2,), (1, 0, 2, 3)), ((1,), (0, 1, 3, 2))])
def test_flips_of_the_image_swap_groups_of_channels(dims, groups):
    x = image(8)
    order = torch.cat([torch.arange(2) + 2 * group for group in groups])
    torch.testing.assert_close(q_shift(turned(x, dims)[..., order], GRID), turned(q_shift(x, GRID), dims)[..., order])


def test_in_heads_every_head_is_shifted_alone():
    x = image(24)
    alone = torch.cat([q_shift(part, GRID) for part in x.split(8, dim=2)], dim=2)
    assert torch.equal(q_shift(x, GRID, heads=3), alone)
    assert torch.equal(q_shift(x, GRID, heads=1), q_shift(x, GRID))


def test_a_shift_by_no_pixel_changes_nothing_and_one_by_many_leaves_zeros():
    x = image(8)
    assert torch.equal(q_shift(x, GRID, pixels=0), x)
    assert not q_shift(x, GRID, pixels=7).any()
    two = q_shift(x, GRID, pixels=2).unflatten(1, GRID)
    assert torch.equal(two[:, :, 2:, :2], x.unflatten(1, GRID)[:, :, :-2, :2])


def test_tokens_of_a_text_come_from_both_sides():
    x = image(12)
    moved = b_shift(x, heads=2)
    for head in (0, 6):
        assert torch.equal(moved[:, 1:, head : head + 3], x[:, :-1, head : head + 3])
        assert torch.equal(moved[:, :-1, head + 3 : head + 6], x[:, 1:, head + 3 : head + 6])
        assert not moved[:, 0, head : head + 3].any()
        assert not moved[:, -1, head + 3 : head + 6].any()
    assert torch.equal(shift(x)[:, 1:], x[:, :-1])
    assert not shift(x)[:, 0].any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_scan_can_be_undone(order):
    x = image()
    assert torch.equal(unscan(scan(x, order, GRID), order, GRID), x)


def test_scans_go_through_rows_and_columns_in_both_directions():
    x = torch.arange(15.0)[None, :, None]
    first = [scan(x, order, GRID)[0, :4, 0].tolist() for order in ORDERS]
    assert first == [[0, 1, 2, 3], [14, 13, 12, 11], [0, 5, 10, 1], [14, 9, 4, 13]]


@pytest.mark.parametrize("order", ORDERS)
def test_the_recurrence_sees_only_what_its_order_has_read(order):
    call = make(Case(batch=1, time=15, heads=1, key=16, value=16), torch.Generator().manual_seed(1), torch.float32)
    tokens = [name for name in call if name not in ("state", "cu_seqlens")]

    def run(call):
        ordered = {name: scan(call[name], order, GRID) for name in tokens}
        return unscan(wkv7(**ordered, state=call["state"])[0], order, GRID)

    y = run(call)
    changed = run(call | {"v": call["v"] + (torch.arange(15) == 7)[None, :, None, None]})
    reached = (y != changed).flatten(2).any(2)[0]
    place = scan(torch.arange(15)[None, :, None], order, GRID)[0, :, 0].tolist()
    assert reached.tolist() == [place.index(cell) >= place.index(7) for cell in range(15)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a grid of 3 × 4 has 12 tokens, there are 15"):
        q_shift(image(), (3, 4))
    with pytest.raises(ValueError, match="q_shift needs a share of 0 to 0.25 and heads that divide 10: 0.3, 1"):
        q_shift(image(), GRID, share=0.3)
    with pytest.raises(ValueError, match="q_shift needs a share of 0 to 0.25 and heads that divide 10: 0.25, 4"):
        q_shift(image(), GRID, heads=4)
    with pytest.raises(ValueError, match="b_shift needs heads of an even number of channels; 10 in 2 heads are not"):
        b_shift(image(), heads=2)
