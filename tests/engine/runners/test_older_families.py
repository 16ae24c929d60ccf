"""RWKV-4, 5 and 6 in the compiled runtime; what does not depend on the family is in test_native.py."""

import numpy as np
import pytest
import torch
from support.data import shared
from support.language import as_runtime, randomise

from rookery import _native
from rookery.engine.runners.native import NativeRunner
from rookery.engine.runners.torch import TorchRunner
from rookery.errors import BackendUnavailable
from rookery.models import create_model, load, save_model
from rookery.nn.rwkv import rescale
from rookery.state import State

ISAS = _native.available_isas()
FAMILIES = ("rwkv4", "rwkv5", "rwkv5-5.1", "rwkv5-5.0", "rwkv6", "rwkv6-a", "rwkv6-b", "rwkv6-c")
ODD = {"hidden_size": 80, "num_hidden_layers": 3, "intermediate_size": 201, "vocab_size": 77}
HEADS = {"head_dim": 40}
"""No instruction set has vectors of which this is a multiple but the smallest."""
RANKS = {"mix_rank": 3, "decay_rank": 5, "gate_rank": 7}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTH = 37
"""Tokens of a row: no chunk divides it."""


def model_of(family):
    own = ODD | (HEADS if family != "rwkv4" else {}) | (RANKS if family.startswith("rwkv6") else {})
    return randomise(create_model(f"{family}-test", **own))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file for each family and type of weights."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for family in FAMILIES:
        model = model_of(family)
        for dtype in DTYPES:
            paths[family, dtype] = folder / f"{family}-{dtype}.safetensors"
            save_model(model.to(dtype), paths[family, dtype])
    return paths


def some_ids(runner, count=LENGTH, seed=5):
    return np.random.default_rng(seed).integers(runner.config.vocab_size, size=count).tolist()


def equal_states(a, b):
    return a.tokens_seen == b.tokens_seen and (a.numbers == b.numbers).all()


def meaning(tensors):
    """What states say: the sums of RWKV-4 without the unit in which they are measured."""
    meant = {}
    for name, tensor in tensors.items():
        if name.endswith(".wkv") and tensor.ndim == 3:
            weighted, total, _ = np.moveaxis(tensor, 1, 0)
            tensor = weighted / np.maximum(total, 1e-9)
        meant[name] = tensor
    return meant


def assert_as_torch(runner, model, dtype=torch.float32):
    """Logits and state after some tokens are those of the torch model."""
    ids = some_ids(runner)
    state = runner.init_state()
    logits = runner.forward(ids, state, "all")
    expected, expected_state, bound = as_runtime(model, ids, dtype, runner.isa)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=bound, atol=bound)
    tensors, wanted = meaning(state.tensors()), meaning(expected_state.arrays())
    assert tensors.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(
            tensors[name], wanted[name], rtol=bound, atol=bound * max(1, abs(wanted[name]).max()), err_msg=name
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_state_are_those_of_the_torch_model_in_float32(files, family, dtype, isa):
    # weights are widened exactly, so the bound is that of float32 arithmetic for every type of weights
    assert_as_torch(NativeRunner(files[family, dtype], isa=isa, threads=1), load(files[family, dtype]), dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_and_threads_do_not_change_a_bit(files, family, isa):
    for dtype in (torch.float32, torch.bfloat16):
        runner = NativeRunner(files[family, dtype], isa=isa, threads=1)
        ids = some_ids(runner)
        whole_state = runner.init_state()
        whole = runner.forward(ids, whole_state, "all")
        for threads in (1, 2):
            runner = NativeRunner(files[family, dtype], isa=isa, threads=threads)
            for cut in (1, 3, 17, LENGTH):
                state = runner.init_state()
                parts = [runner.forward(ids[i : i + cut], state, "all") for i in range(0, LENGTH, cut)]
                np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"{threads} threads, cut {cut}")
                assert equal_states(state, whole_state)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_is_the_row_alone(files, family, isa):
    for threads, rows in ((1, 2), (2, 7)):
        runner = NativeRunner(files[family, torch.bfloat16], isa=isa, threads=threads)
        states = [runner.init_state() for _ in range(rows)]
        for row, state in enumerate(states):
            runner.forward(some_ids(runner, 1 + row, seed=row), state, "none")
        alone = [state.copy() for state in states]
        for seed in (1, 2):
            ids = some_ids(runner, rows, seed=seed)
            together = runner.forward_batch(ids, states)
            for row in range(rows):
                np.testing.assert_array_equal(together[row], runner.forward([ids[row]], alone[row])[0])
        assert all(map(equal_states, states, alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_longer_than_the_working_memory_is_read_in_pieces(files, family):
    runner = NativeRunner(files[family, torch.float32], threads=2)
    ids = some_ids(runner, 300)
    whole, parts = runner.init_state(), runner.init_state()
    logits = runner.forward(ids, whole, "all")
    runner.forward(ids[:133], parts, "none")
    np.testing.assert_array_equal(runner.forward(ids[133:], parts), logits[-1:])
    assert equal_states(whole, parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_runners_share_states(files, family, tmp_path):
    path = files[family, torch.float32]
    native, model = NativeRunner(path), load(path)
    torch_runner = TorchRunner(model)
    assert native.fingerprint() == torch_runner.fingerprint()
    fresh, expected = native.init_state(), torch_runner.init_state()
    for name, tensor in expected.tensors().items():
        np.testing.assert_array_equal(fresh.tensors()[name], tensor, err_msg=name)
    ids = some_ids(native)
    state = native.init_state()
    native.forward(ids[:20], state)
    again = native.init_state(state.tensors())
    assert equal_states(again, state)
    assert again.nbytes == state.nbytes == torch_runner.init_state().nbytes
    expected = native.forward(ids[20:], state, "all")
    moved = torch_runner.init_state(again.tensors())
    np.testing.assert_allclose(torch_runner.forward(ids[20:], moved, "all"), expected, rtol=1e-4, atol=1e-4)
    # through a file, and back
    moved.state.save(tmp_path / "state", model)
    returned = native.init_state(State.load(tmp_path / "state", model).arrays())
    np.testing.assert_allclose(native.forward([1], returned), native.forward([1], state), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_of_hidden_units_that_are_zero_are_not_read(files, family):
    runner = NativeRunner(files[family, torch.float32])
    runner.forward([1], runner.init_state())
    read, there = runner._model.ffn_reads
    assert there == ODD["num_hidden_layers"] * ODD["intermediate_size"]
    assert 0.2 * there < read < 0.8 * there


@pytest.mark.parametrize("family", ["rwkv4", "rwkv5", "rwkv6"])
@pytest.mark.parametrize("raw", [-20.0, 3.0, 100.0])
def test_decays_of_one_and_of_zero_are_those_of_the_torch_model(family, raw, tmp_path):
    model = model_of(family)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_decay.fill_(raw)
    save_model(model, tmp_path / "model.safetensors")
    for isa in ISAS:
        assert_as_torch(NativeRunner(tmp_path / "model.safetensors", isa=isa), model)


@pytest.mark.parametrize("isa", ISAS)
def test_large_exponents_do_not_overflow(isa, tmp_path):
    model = model_of("rwkv4")
    with torch.no_grad():
        for block in model.blocks:
            block.att.key.weight.mul_(100)
    save_model(model, tmp_path / "model.safetensors")
    runner = NativeRunner(tmp_path / "model.safetensors", isa=isa)
    ids = some_ids(runner)
    with torch.no_grad():
        expected = model.double()(torch.tensor([ids]))[0][0].numpy()
    # what a difference of 1e-5 between two exponents of a few hundred makes
    np.testing.assert_allclose(runner.forward(ids, runner.init_state(), "all"), expected, rtol=1e-2, atol=1e-2)


def test_a_stream_that_is_halved_and_keys_that_are_damped_are_read_as_the_torch_model_does(tmp_path):
    for family in ("rwkv4", "rwkv5", "rwkv6"):
        model = model_of(family)
        rescale(model, 2)
        save_model(model, tmp_path / "halved.safetensors")
        assert_as_torch(NativeRunner(tmp_path / "halved.safetensors"), load(tmp_path / "halved.safetensors"))
    damped = randomise(create_model("rwkv6-test", damp_keys=True))
    save_model(damped, tmp_path / "damped.safetensors")
    runner = NativeRunner(tmp_path / "damped.safetensors")
    assert runner.config.damp_keys
    assert_as_torch(runner, damped)


def test_heads_that_the_recurrence_of_rwkv7_cannot_take_are_refused(tmp_path):
    save_model(create_model("rwkv7-test", head_dim=8), tmp_path / "model.safetensors")
    with pytest.raises(BackendUnavailable, match="heads of 8 channels, .* a multiple of 16; run it with torch"):
        NativeRunner(tmp_path / "model.safetensors")


# rwkv.cpp's models (core.md 4.1): logits after three bytes; twice the error of an implementation that dequantises

PROMPT = [0x22, 0x69, 0x6E]
SIZES = {"4v0": "660K", "5v2": "730K", "7v0": "834K"}
ERRORS = {
    "4v0": {"FP32": 5e-6, "FP16": 2 * 1.6e-3, "Q5_0": 2 * 0.123, "Q5_1": 2 * 0.096},
    "5v2": {"FP32": 5e-6, "FP16": 2 * 2.5e-3, "Q5_0": 2 * 0.510, "Q5_1": 2 * 0.371},
    "7v0": {"FP32": 5e-6, "FP16": 5e-6, "Q5_0": 2 * 3.7e-3, "Q5_1": 2 * 4.2e-3},
}


@pytest.mark.data
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, errors in ERRORS.items() for kind in errors])
def test_the_reference_logits_of_rwkv_cpp_are_reproduced(name, kind, isa):
    want = np.fromfile(shared(f"models/rwkv_cpp/expected-logits-{name}-{SIZES[name]}.bin"), "<f4")
    runner = NativeRunner(shared(f"models/rwkv_cpp/tiny-rwkv-{name}-{SIZES[name]}-{kind}.bin"), isa=isa)
    got = runner.forward(PROMPT, runner.init_state())[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=ERRORS[name][kind])
