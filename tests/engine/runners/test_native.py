import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.language import as_runtime, randomise

from rookery import _native
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.convert import convert
from rookery.engine.runners import native
from rookery.engine.runners.native import NativeRunner
from rookery.engine.runners.pages import in_large_pages
from rookery.engine.runners.torch import TorchRunner
from rookery.errors import BackendUnavailable, BadState, UnknownName
from rookery.models import create_model, load, save_model
from rookery.state import State

ISAS = [*_native.available_isas(), *_native.imitated_isas()]
ODD = {
    "hidden_size": 96,
    "head_dim": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 201,
    "decay_rank": 5,
    "rate_rank": 7,
    "value_rank": 3,
    "gate_rank": 9,
    "vocab_size": 77,
}
MODELS = {"test": {}, "odd": ODD, "one layer": {"num_hidden_layers": 1}, "one word": {"vocab_size": 1}}
LENGTH = 37
"""Tokens of a row: no chunk divides it."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file for each model and type of weights."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name, overrides in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = randomise(create_model("rwkv7-test", **overrides)).to(dtype)
            paths[name, dtype] = folder / f"{name}-{dtype}.safetensors"
            save_model(model, paths[name, dtype])
    return paths


def some_ids(runner, count=LENGTH, seed=5):
    return np.random.default_rng(seed).integers(runner.config.vocab_size, size=count).tolist()


def equal_states(a, b):
    return a.tokens_seen == b.tokens_seen and (a.numbers == b.numbers).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_state_are_those_of_the_torch_model_in_float32(files, name, dtype, isa):
    # weights are widened exactly, so the bound is that of float32 arithmetic for every type of weights
    runner = NativeRunner(files[name, dtype], isa=isa, threads=1)
    ids = some_ids(runner)
    state = runner.init_state()
    logits = runner.forward(ids, state, "all")
    expected, expected_state, bound = as_runtime(load(files[name, dtype]), ids, dtype, isa)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=bound, atol=bound)
    tensors = state.tensors()
    for field, tensor in expected_state.arrays().items():
        np.testing.assert_allclose(
            tensors[field], tensor, rtol=bound, atol=bound * max(1, abs(tensor).max()), err_msg=field
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuts_and_threads_do_not_change_a_bit(files, name, dtype, isa):
    runner = NativeRunner(files[name, dtype], isa=isa, threads=1)
    ids = some_ids(runner)
    whole_state = runner.init_state()
    whole = runner.forward(ids, whole_state, "all")
    for threads in (1, 2, 3):
        runner = NativeRunner(files[name, dtype], isa=isa, threads=threads)
        for cut in (1, 3, 17, LENGTH):
            state = runner.init_state()
            parts = [runner.forward(ids[i : i + cut], state, "all") for i in range(0, LENGTH, cut)]
            np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"{threads} threads, cut {cut}")
            assert equal_states(state, whole_state)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_a_row_in_a_batch_is_the_row_alone(files, rows, threads, isa):
    runner = NativeRunner(files["odd", torch.bfloat16], isa=isa, threads=threads)
    states, alone = [], []
    for row in range(rows):
        state = runner.init_state()
        runner.forward(some_ids(runner, 1 + row, seed=row), state, "none")
        states.append(state)
        alone.append(state.copy())
    for seed in (1, 2):
        ids = some_ids(runner, rows, seed=seed)
        together = runner.forward_batch(ids, states)
        for row in range(rows):
            np.testing.assert_array_equal(together[row], runner.forward([ids[row]], alone[row])[0])
    assert all(map(equal_states, states, alone))


def test_a_prompt_longer_than_the_working_memory_is_read_in_pieces(files):
    runner = NativeRunner(files["odd", torch.float32], threads=2)
    ids = some_ids(runner, 600)
    whole, parts = runner.init_state(), runner.init_state()
    logits = runner.forward(ids, whole, "all")
    runner.forward(ids[:333], parts, "none")
    np.testing.assert_array_equal(runner.forward(ids[333:], parts), logits[-1:])
    assert equal_states(whole, parts)


def test_calls_from_several_threads_do_not_disturb_each_other(files):
    runner = NativeRunner(files["odd", torch.bfloat16], threads=2)

    def read(seed):
        state = runner.init_state()
        return [runner.forward(some_ids(runner, 3, seed), state) for _ in range(20)]

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(read, range(6)))
    for seed, logits in enumerate(together):
        np.testing.assert_array_equal(logits, read(seed))


def test_columns_of_hidden_units_that_are_zero_are_not_read(files):
    runner = NativeRunner(files["odd", torch.float32])
    runner.forward([1], runner.init_state())
    read, there = runner._model.ffn_reads
    assert there == ODD["num_hidden_layers"] * ODD["intermediate_size"]
    assert 0.2 * there < read < 0.8 * there


def test_only_the_logits_asked_for_come_back(files):
    runner = NativeRunner(files["odd", torch.float32])
    ids = some_ids(runner)
    whole = runner.forward(ids, runner.init_state(), "all")
    for wanted, rows in {"none": 0, "last": 1, "all": LENGTH}.items():
        state = runner.init_state()
        logits = runner.forward(ids, state, wanted)
        assert (logits.dtype, logits.shape) == (np.float32, (rows, 77))
        np.testing.assert_array_equal(logits, whole[LENGTH - rows :])
        assert state.tokens_seen == LENGTH


def test_no_tokens_change_nothing(files):
    runner = NativeRunner(files["odd", torch.float32])
    state = runner.init_state()
    runner.forward(some_ids(runner), state, "none")
    before = state.copy()
    for wanted in ("none", "last", "all"):
        assert runner.forward([], state, wanted).shape == (0, 77)
    assert runner.forward_batch([], []).shape == (0, 77)
    assert equal_states(state, before)


@pytest.mark.parametrize("wrong", [-1, 77, 2**40])
def test_an_unknown_token_is_refused_before_anything_is_touched(files, wrong):
    runner = NativeRunner(files["odd", torch.float32])
    state, other = runner.init_state(), runner.init_state()
    with pytest.raises(ValueError, match=f"token id {wrong} is not in the model's vocabulary of 77"):
        runner.forward([1, wrong], state)
    with pytest.raises(ValueError, match=f"token id {wrong} is not in"):
        runner.forward_batch([1, wrong], [state, other])
    assert equal_states(state, runner.init_state())
    assert equal_states(other, runner.init_state())


def test_a_batch_needs_one_state_for_each_token(files):
    runner = NativeRunner(files["odd", torch.float32])
    state = runner.init_state()
    with pytest.raises(ValueError, match="2 tokens for 1 states"):
        runner.forward_batch([1, 2], [state])
    with pytest.raises(ValueError, match="twice"):
        runner.forward_batch([1, 2], [state, state])
    with pytest.raises(ValueError, match=r"one row of ids, got shape \[1, 2\]"):
        runner.forward([[1, 2]], state)


def test_a_copied_state_stays_while_the_other_goes_on(files):
    runner = NativeRunner(files["odd", torch.float32])
    state = runner.init_state()
    ids = some_ids(runner)
    runner.forward(ids[:10], state)
    kept = state.copy()
    first = runner.forward(ids[10:], state)
    assert (kept.tokens_seen, state.tokens_seen) == (10, LENGTH)
    np.testing.assert_array_equal(runner.forward(ids[10:], kept), first)


def test_both_runners_share_states(files, tmp_path):
    path = files["odd", torch.float32]
    native, torch_runner, model = NativeRunner(path), TorchRunner(load(path)), load(path)
    assert native.fingerprint() == torch_runner.fingerprint()
    ids = some_ids(native)
    state = native.init_state()
    native.forward(ids[:20], state)
    again = native.init_state(state.tensors())
    assert equal_states(again, state)
    assert again.nbytes == state.nbytes == torch_runner.init_state().nbytes
    expected = native.forward(ids[20:], state, "all")
    moved = torch_runner.init_state(again.tensors())
    assert moved.tokens_seen == 20
    np.testing.assert_allclose(torch_runner.forward(ids[20:], moved, "all"), expected, rtol=1e-4, atol=1e-4)
    # through a file, and back
    moved.state.save(tmp_path / "state", model)
    returned = native.init_state(State.load(tmp_path / "state", model).arrays())
    np.testing.assert_allclose(native.forward([1], returned), native.forward([1], state), rtol=1e-4, atol=1e-4)


def test_another_models_state_is_refused(files):
    runner = NativeRunner(files["odd", torch.float32])
    state = runner.init_state().tensors()
    with pytest.raises(BadState, match="this model's state is"):
        runner.init_state(NativeRunner(files["one layer", torch.float32]).init_state().tensors())
    with pytest.raises(BadState, match=r"layers.1.wkv has shape \[2, 2, 48, 48\]"):
        runner.init_state(state | {"layers.1.wkv": np.zeros((2, 2, 48, 48), np.float32)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_can_be_kept_in_another_type(files, dtype):
    runner = NativeRunner(files["odd", torch.float32], dtype=dtype)
    dtype = getattr(torch, dtype)
    ids = some_ids(runner)
    expected, _, bound = as_runtime(load(files["odd", torch.float32], dtype=dtype), ids, dtype, runner.isa)
    logits = runner.forward(ids, runner.init_state(), "all")
    np.testing.assert_allclose(logits, expected.numpy(), rtol=bound, atol=bound)


def test_weights_of_other_types_become_float32(tmp_path, files):
    model = load(files["odd", torch.float32], dtype=torch.float64)
    save_model(model, tmp_path / "wide.safetensors")
    ids = some_ids(NativeRunner(files["odd", torch.float32]))
    runner = NativeRunner(tmp_path / "wide.safetensors")
    expected = NativeRunner(files["odd", torch.float32]).forward(ids, runner.init_state())
    np.testing.assert_array_equal(runner.forward(ids, runner.init_state()), expected)


def test_settings_that_do_not_exist_are_refused(files, tmp_path):
    path = files["odd", torch.float32]
    assert NativeRunner(path).isa == _native.available_isas()[-1]
    assert NativeRunner(path, isa="portable").isa == "portable"
    available = ", ".join(_native.available_isas())
    with pytest.raises(UnknownName, match=f"isa 'mmx' is not one of this machine's: {available}"):
        NativeRunner(path, isa="mmx")
    with pytest.raises(UnknownName, match="dtype 'int3' is not one of float32"):
        NativeRunner(path, dtype="int3")
    save_model(create_model("transformer-test"), tmp_path / "t.safetensors")
    with pytest.raises(
        BackendUnavailable, match="runs rwkv4, rwkv5, rwkv6, rwkv7, .* is a model of the family transformer"
    ):
        NativeRunner(tmp_path / "t.safetensors")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_in_large_pages_give_the_same_bits(files, tmp_path, quantize):
    path = files["odd", torch.bfloat16]
    if quantize:
        path = tmp_path / "packed.safetensors"
        convert(files["odd", torch.bfloat16], path, dtype=quantize)
    mapped, loaded = NativeRunner(path), NativeRunner(path, preload=True)
    ids = some_ids(mapped)
    states = [runner.init_state() for runner in (mapped, loaded)]
    np.testing.assert_array_equal(mapped.forward(ids, states[0], "all"), loaded.forward(ids, states[1], "all"))
    assert equal_states(*states)


def test_what_is_copied_to_large_pages_is_what_lies_in_a_mapped_file(tmp_path):
    numbers = np.arange(3 << 20, dtype=np.float32)
    numbers.tofile(tmp_path / "numbers")
    mapped = np.memmap(tmp_path / "numbers", dtype=np.uint8, mode="r").view(np.ndarray)
    parts = {"first": mapped[4:4004].view(np.float32), "rest": mapped[4004:].view(np.float32).reshape(-1, 1)}
    own = np.ones(4)
    copied = in_large_pages(parts | {"own": own}, 2)
    assert copied["own"] is own
    assert list(copied) == ["first", "rest", "own"]
    for name, part in parts.items():
        assert copied[name].ctypes.data % 64 == 0
        assert not np.shares_memory(copied[name], part)
        np.testing.assert_array_equal(copied[name], part)  # the file's pages come back when they are asked for
    assert in_large_pages({"own": own}, 2) == {"own": own}


def test_large_weights_stay_where_they_lie_and_alive(files, monkeypatch):
    arrays = {}

    def remembered(tensor, wanted):
        array = usable(tensor, wanted)
        arrays[array.ctypes.data] = weakref.ref(array)
        return array

    usable = native._usable
    monkeypatch.setattr(native, "_usable", remembered)
    checkpoint = open_checkpoint(files["odd", torch.bfloat16])
    runner = NativeRunner(checkpoint)
    gc.collect()
    alive = {address for address, array in arrays.items() if array() is not None}
    in_place = {name for name in checkpoint if checkpoint[name].ctypes.data in alive}
    assert in_place == set(runner._model.in_place)
    large = {"emb", "head", "att.receptance", "att.key", "att.value", "att.output", "ffn.key"}
    assert {name for name in checkpoint if name.endswith(tuple(f"{part}.weight" for part in large))} <= in_place
