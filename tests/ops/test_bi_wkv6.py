"""Bi-WKV6 beyond the contract of all operators (test_contract.py): it is true that …"""

import torch
from support import contract

from rookery.ops.bi_wkv6 import OP, bi_wkv6
from rookery.ops.wkv6.cases import Case


def arguments(dtype=torch.float64, **settings):
    return contract.arguments_of("bi_wkv6", Case(**settings), dtype)


def test_without_decay_and_with_a_bonus_of_one_all_tokens_read_one_state():
    call = arguments(time=20)
    call |= {"log_w": torch.zeros_like(call["log_w"]), "u": torch.ones_like(call["u"])}
    state = torch.einsum("bihk,bihv->bhkv", call["k"], call["v"])
    for backend in OP.backends:
        want = torch.einsum("bthk,bhkv->bthv", call["r"], state)
        torch.testing.assert_close(bi_wkv6(**call, backend=backend), want)


def test_a_decay_to_nothing_leaves_the_token_and_its_neighbours():
    call = arguments(time=12) | {"log_w": torch.full((2, 12, 3, 32), -1000.0, dtype=torch.float64)}
    beside = ((torch.arange(12)[:, None] - torch.arange(12)).abs() == 1).double()
    own = torch.einsum("bthk,hk,bthk->bth", call["r"], call["u"], call["k"])[..., None] * call["v"]
    pairs = torch.einsum("bthk,bihk->bhti", call["r"], call["k"]) * beside
    want = own + torch.einsum("bhti,bihv->bthv", pairs, call["v"])
    for backend in OP.backends:
        torch.testing.assert_close(bi_wkv6(**call, backend=backend), want)


def test_reversed_tokens_have_reversed_outputs():
    call = arguments(time=33)
    turned = {name: x if name == "u" else x.flip(1) for name, x in call.items()}
    for backend in OP.backends:
        torch.testing.assert_close(bi_wkv6(**turned, backend=backend).flip(1), bi_wkv6(**call, backend=backend))


def test_outputs_are_linear_in_the_values():
    call = arguments(time=9)
    torch.testing.assert_close(bi_wkv6(**call | {"v": 3 * call["v"]}), 3 * bi_wkv6(**call))
