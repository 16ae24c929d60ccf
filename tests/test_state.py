"""States as values, on hand-made ones: a fixed matrix, a growing cache and something that belongs to no layer."""

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from rookery.checkpoints.state_file import write_state
from rookery.errors import BadState
from rookery.models import create_model
from rookery.state import State, cat, from_numpy, to_numpy


class Layer(NamedTuple):
    wkv: Tensor
    keys: Tensor


class Shared(NamedTuple):
    evicted: Tensor


@dataclass(frozen=True)
class Config:
    width: int = 2

    def state_nbytes(self, *, tokens_seen: int, batch: int, itemsize: int) -> int:
        return batch * (2 * max(4, itemsize) + tokens_seen * itemsize + 8)


def made(rows: int, length: int, dtype=torch.float32, start: float = 0.0) -> State:
    numbers = torch.arange(rows * (2 + length), dtype=torch.float32).view(rows, -1) + start
    layer = Layer(numbers[:, :2].to(torch.promote_types(dtype, torch.float32)), numbers[:, 2:].to(dtype))
    return State((layer,), torch.full((rows,), length), Config(), Shared(torch.arange(rows) + int(start)))


def test_tensors_have_the_names_of_state_files():
    assert list(made(1, 3).tensors()) == ["layers.0.wkv", "layers.0.keys", "shared.evicted"]


def test_size_counts_every_tensor_but_the_token_counts():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = made(3, 5, dtype)
        assert state.nbytes == state.expected_nbytes(5)


def test_a_clone_shares_nothing():
    state = made(2, 3)
    copy = state.clone()
    for tensor in (*copy.tensors().values(), copy.tokens_seen):
        tensor.zero_()
    assert state.layers[0].keys[1, 2] == 9
    assert state.shared.evicted.tolist() == [0, 1]
    assert state.tokens_seen.tolist() == [3, 3]


def test_detach_cuts_the_graph_and_keeps_the_values():
    state = made(1, 3)
    state.layers[0].wkv.requires_grad_()
    grown = state.map(lambda t: t * 2)
    assert grown.layers[0].wkv.requires_grad
    assert not grown.detach().layers[0].wkv.requires_grad
    assert torch.equal(grown.detach().layers[0].wkv, grown.layers[0].wkv)


def test_select_takes_rows_of_everything():
    state = made(3, 2).select([2, 0, 2])
    assert state.batch == 3
    assert state.shared.evicted.tolist() == [2, 0, 2]
    assert state.layers[0].wkv[:, 0].tolist() == [8, 0, 8]
    assert made(3, 2).select(torch.tensor([1])).batch == 1
    assert made(3, 2).select([]).batch == 0
    with pytest.raises(IndexError):
        made(3, 2).select([3])


def test_cat_fills_shorter_caches_up():
    joined = cat([made(1, 3), made(2, 1, start=100), made(1, 0)])
    assert joined.tokens_seen.tolist() == [3, 1, 1, 0]
    assert joined.layers[0].keys.tolist() == [[2, 3, 4], [102, 0, 0], [105, 0, 0], [0, 0, 0]]
    assert joined.shared.evicted.tolist() == [0, 100, 101, 0]


def test_cat_refuses_nothing_and_strangers():
    with pytest.raises(ValueError, match="there is no state to join"):
        cat([])
    with pytest.raises(BadState, match="the state belongs to another model: width 2 against 3"):
        cat([made(1, 1), State(made(1, 1).layers, torch.ones(1), Config(width=3), made(1, 1).shared)])


def test_to_keeps_accumulators_wide_and_counts_whole():
    narrow = made(2, 3).to(dtype=torch.bfloat16)
    assert (narrow.layers[0].wkv.dtype, narrow.layers[0].keys.dtype) == (torch.float32, torch.bfloat16)
    assert (narrow.shared.evicted.dtype, narrow.tokens_seen.dtype) == (torch.int64, torch.int64)
    wide = narrow.to(dtype=torch.float64)
    assert (wide.layers[0].wkv.dtype, wide.layers[0].keys.dtype) == (torch.float64, torch.float64)
    moved = wide.to("meta")
    assert {t.device.type for t in (*moved.tensors().values(), moved.tokens_seen)} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_values_survive_numpy(dtype):
    tensor = torch.tensor([[0.5, -2, 1e-3], [3, 7, 9]]).to(dtype).T  # not contiguous
    array = to_numpy(tensor)
    assert array.shape == (3, 2)
    back = from_numpy(array)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_read_only_arrays_are_copied():
    array = np.array([1, 2], dtype=ml_dtypes.bfloat16)
    array.flags.writeable = False
    tensor = from_numpy(array)
    tensor.zero_()
    assert array.tolist() == [1, 2]


def test_a_file_with_other_tensors_is_refused(tmp_path):
    model, path = create_model("rwkv7-test"), tmp_path / "story.state"
    state = model.init_state(1)
    for arrays in (
        {name: to_numpy(t) for name, t in state.tensors().items()},
        {"tokens_seen": np.zeros(1, np.int64), "layers.0.keys": np.zeros((1, 2), np.float32)},
    ):
        write_state(path, arrays, model=model.fingerprint())
        with pytest.raises(BadState, match="holds .* this model's state is .*'layers.0.wkv'.*'tokens_seen'"):
            State.load(path, model)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadState, match=r"there is no state file .*nothing\.state"):
        State.load(tmp_path / "nothing.state", create_model("rwkv7-test"))
