"""States kept in 16 bits: half the bytes, a small error, and nothing else changes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.engine.half_state import halved
from rookery.engine.llm import LLM
from rookery.engine.position import Position
from rookery.engine.runners.native import FAMILIES
from rookery.engine.runners.torch import TorchRunner
from rookery.engine.state_cache import StateCache, read_prompt
from rookery.errors import UnknownName
from rookery.models import save_model

PROMPT = [1 + i * i % 50 for i in range(60)]
STEPS = {"bfloat16": 2**-8, "float16": 2**-11}
"""Half the distance between neighbouring numbers, relative to them."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_model(randomised(f"{family}-test", dtype=torch.float32, vocab_size=64), folder / f"{family}.safetensors")
    return folder


def resumed(llm, dtype, folder=None):
    """Sessions that have read the prompt: the first time, and from the cache; and the cache."""
    cache = StateCache(folder=folder, dtype=dtype)
    first = read_prompt(llm, PROMPT, cache)
    if folder is not None:
        cache.close()
        cache = StateCache(folder=folder, dtype=dtype)
    return first, read_prompt(llm, PROMPT, cache), cache


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_take_half_and_are_rounded_once(files, tmp_path, family, on_disk, dtype):
    llm = LLM(files / f"{family}.safetensors", threads=1)
    first, again, cache = resumed(llm, dtype, tmp_path / "cache" if on_disk else None)
    np.testing.assert_array_equal(first._at.logits, again._at.logits)  # what follows the prompt itself is exact
    exact, rounded = first._at.state.tensors(), again._at.state.tensors()
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert rounded[name].dtype == tensor.dtype
        np.testing.assert_allclose(rounded[name], tensor, rtol=STEPS[dtype], atol=1e-7, err_msg=name)
    kept = halved(first._at.state, dtype)
    assert kept.tokens_seen == len(PROMPT)
    assert kept.nbytes == first.nbytes // 2
    assert cache.nbytes < 0.6 * first.nbytes + first._at.logits.nbytes + 4 * len(PROMPT)
    assert not np.array_equal(exact["layers.0.wkv"], rounded["layers.0.wkv"])


@pytest.mark.parametrize("dtype", STEPS)
def test_rounding_a_state_again_changes_nothing(files, dtype):
    llm = LLM(files / "rwkv7.safetensors", threads=1)
    _, again, _ = resumed(llm, dtype)
    once = halved(again._at.state, dtype).tensors()
    for name, tensor in again._at.state.tensors().items():
        np.testing.assert_array_equal(once[name].astype(tensor.dtype), tensor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", STEPS)
def test_what_follows_is_nearly_the_same(files, family, dtype):
    llm = LLM(files / f"{family}.safetensors", threads=1)
    first, again, _ = resumed(llm, dtype)
    expected, got = (llm.runner.forward([5, 6, 7], s._at.state, "all") for s in (first, again))
    assert np.abs(got - expected).max() < 8 * STEPS[dtype] * np.abs(expected).max()


def test_numbers_beyond_the_range_stay_as_they_are():
    class Large:
        tokens_seen = 1

        def tensors(self):
            fits, large = np.array([[1.001]], np.float32), np.array([[-1e38, 1.001]], np.float32)
            return {"fits": fits, "large": large, "count": np.array([3]), "tokens_seen": np.array([1])}

    kept = halved(Large(), "float16").tensors()
    assert [kept[name].dtype for name in ("fits", "large", "count")] == [np.float16, np.float32, np.int64]
    assert kept["large"][0, 1] == np.float32(1.001)
    assert halved(Large(), "bfloat16").tensors()["large"].dtype == ml_dtypes.bfloat16


def test_torch_models_keep_halves_too():
    for dtype in (torch.float32, torch.bfloat16):
        llm = LLM.from_runner(TorchRunner(randomised("rwkv7-test", dtype=dtype, vocab_size=64)))
        first, again, _ = resumed(llm, "float16")
        assert halved(first._at.state, "float16").nbytes < first.nbytes
        assert again._at.state.tensors()["layers.0.wkv"].dtype == np.float32
        assert again.tokens_seen == len(PROMPT)
        assert len(again.llm.runner.forward([3], again._at.state)) == 1


def test_float32_keeps_every_bit(files):
    llm = LLM(files / "rwkv7.safetensors", threads=1)
    first, again, _ = resumed(llm, "float32")
    assert (first._at.state.numbers == again._at.state.numbers).all()


def test_other_types_are_refused():
    with pytest.raises(UnknownName, match="states are kept in float32, bfloat16 or float16, not in 'int8'"):
        StateCache(dtype="int8")


def test_what_is_found_is_the_callers_own(files):
    llm = LLM(files / "rwkv7.safetensors", threads=1)
    _, again, cache = resumed(llm, "bfloat16")
    before = again._at.state.copy()
    again.feed([9])
    other: Position = cache.find(PROMPT).position
    assert (other.state.numbers == before.numbers).all()


def test_an_exact_cache_leaves_rounded_files_alone(files, tmp_path):
    llm = LLM(files / "rwkv7.safetensors", threads=1)
    for dtype in STEPS:
        cache = StateCache(folder=tmp_path, dtype=dtype)
        read_prompt(llm, PROMPT, cache)
        cache.close()
    exact = StateCache(folder=tmp_path)
    exact.bind(llm.runner)
    assert exact.find(PROMPT).length == 0
    read_prompt(llm, PROMPT, exact)
    exact.close()
    assert len([*tmp_path.iterdir()]) == 2
    again = StateCache(folder=tmp_path, dtype="float16")
    again.bind(llm.runner)
    assert again.find(PROMPT).length == len(PROMPT)
    assert again.disk_nbytes in {file.stat().st_size for file in tmp_path.iterdir()}
