"""Smaller tuned states and mixtures: it is true that …"""

import numpy as np
import pytest
import torch
from support.language import randomised, some_tokens

from rookery.adapt.kernel_state import KernelStart
from rookery.adapt.state_tuning import StartState, load_start, save_start
from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.safetensors import write_safetensors
from rookery.checkpoints.tuned_state import read_tuned_state, save_tuned_state
from rookery.checkpoints.tuned_state_arithmetic import compress, mix, spectrum
from rookery.engine.llm import LLM
from rookery.errors import BadCheckpoint, BadState
from rookery.models import create_model, save_model
from rookery.state import State


def model_of(name="rwkv7-test"):
    return randomised(name, dtype=torch.float32).requires_grad_(False).eval()


def written(folder, seed, model, rank=None, kernel=False, scale=1.0):
    """A file with a random start state, whose heads have this rank."""
    start = KernelStart(model, features=40) if kernel else StartState(model)
    generator = torch.Generator().manual_seed(seed)
    if kernel:
        start.calibrate(some_tokens(model, 2, 30, seed=seed))
    with torch.no_grad():
        for wkv in start.wkv:
            drawn = torch.randn(wkv.shape, generator=generator)
            if rank:
                drawn = drawn[..., :rank] @ torch.randn(*wkv.shape[:-2], rank, wkv.shape[-1], generator=generator)
            wkv.copy_(scale * drawn)
    save_start(start, folder / f"{seed}.safetensors", model)
    return folder / f"{seed}.safetensors"


@pytest.mark.parametrize("kernel", [False, True])
def test_the_rank_that_a_state_has_loses_nothing(kernel, tmp_path):
    model = model_of()
    path = written(tmp_path, 1, model, rank=3, kernel=kernel)
    lost = compress(path, tmp_path / "small.safetensors", rank=3)
    assert lost < 1e-10
    assert (tmp_path / "small.safetensors").stat().st_size < 0.7 * path.stat().st_size
    tokens, one, two = (
        some_tokens(model, 1, 9),
        load_start(path, model),
        load_start(tmp_path / "small.safetensors", model),
    )
    with torch.no_grad():
        torch.testing.assert_close(two.model[0](tokens, two(1))[0], one.model[0](tokens, one(1))[0])
    assert [int((part > 1e-9).sum()) for part in spectrum(read_tuned_state(path))] == [3, 3, 3]


def test_a_smaller_rank_loses_what_it_says(tmp_path):
    path = written(tmp_path, 1, model_of())
    lost = compress(path, tmp_path / "small.safetensors", rank=4)
    before, after = read_tuned_state(path).tensors, read_tuned_state(tmp_path / "small.safetensors").tensors
    gone = sum(np.square(before[name] - after[name]).sum() for name in before)
    assert lost == pytest.approx(gone / sum(np.square(values).sum() for values in before.values()), rel=1e-4)
    whole = compress(path, tmp_path / "whole.safetensors", rank=16)
    assert whole < 1e-10
    assert read_tuned_state(tmp_path / "whole.safetensors").metadata["family"] == "rwkv7"


def test_the_compiled_runtime_starts_from_a_small_one(tmp_path):
    model = model_of()
    save_model(model, tmp_path / "model.safetensors")
    path = written(tmp_path, 1, model, rank=2)
    compress(path, tmp_path / "small.safetensors", rank=2)
    llm = LLM(tmp_path / "model.safetensors")
    assert llm.runner.name == "native"
    told = []
    for state in (path, tmp_path / "small.safetensors"):
        session = llm.session(state=state)
        session.feed([3, 4])
        told.append(list(session.stream_tokens(5, temperature=0, ignore_eos=True)))
    assert told[0] == told[1]


def test_a_mixture_is_the_weighted_sum(tmp_path):
    model = model_of()
    paths = [written(tmp_path, seed, model) for seed in (1, 2)]
    one, two = (read_tuned_state(path).tensors for path in paths)
    mix(paths, tmp_path / "mixed.safetensors", weights=[0.3, 0.9])
    mixed = read_tuned_state(tmp_path / "mixed.safetensors")
    for name in one:
        np.testing.assert_allclose(mixed.tensors[name], 0.3 * one[name] + 0.9 * two[name], rtol=1e-5, atol=1e-6)
    mix(paths, tmp_path / "even.safetensors")
    even = read_tuned_state(tmp_path / "even.safetensors").tensors
    np.testing.assert_allclose(
        even["layers.0.wkv"], (one["layers.0.wkv"] + two["layers.0.wkv"]) / 2, rtol=1e-5, atol=1e-6
    )
    load_start(tmp_path / "mixed.safetensors", model)


def test_what_cannot_be_done_is_told(tmp_path):
    model, other = model_of(), model_of("rwkv6-test")
    path = written(tmp_path, 1, model)
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        compress(path, tmp_path / "x", rank=0)
    with pytest.raises(BadState, match="different models or forms; they cannot be mixed"):
        mix([path, written(tmp_path, 2, other)], tmp_path / "x")
    with pytest.raises(ValueError, match="1 states need as many weights, got 2"):
        mix([path], tmp_path / "x", weights=[1, 2])
    with pytest.raises(ValueError, match="nothing to mix"):
        mix([], tmp_path / "x")
    kernels = [written(tmp_path, seed, model, kernel=True) for seed in (3, 4)]
    with pytest.raises(BadState, match="read through different kernels"):
        mix(kernels, tmp_path / "x")
    vectors = StartState(create_model("rwkv4-test"))
    save_start(vectors, tmp_path / "v4.safetensors", create_model("rwkv4-test"))
    with pytest.raises(BadState, match="holds vectors, as RWKV-4 does"):
        compress(tmp_path / "v4.safetensors", tmp_path / "x", rank=2)


def test_half_a_product_is_refused(tmp_path):
    left = {f"blocks.{i}.att.time_state_left": np.zeros((2, 16, 2), np.float32) for i in range(3)}
    write_safetensors(tmp_path / "half.safetensors", left, {})
    with pytest.raises(BadState, match="time_state_left' has no second factor that fits it"):
        read_tuned_state(tmp_path / "half.safetensors")


@pytest.mark.parametrize("kernel", [False, True])
def test_as_a_model_it_is_refused_by_what_it_is(kernel, tmp_path):
    path = written(tmp_path, 1, model_of(), rank=2, kernel=kernel)
    compress(path, tmp_path / "small.safetensors", rank=2)
    for state in (path, tmp_path / "small.safetensors"):
        with pytest.raises(BadCheckpoint, match=r"this is a tuned state \(3 layers of 2 × 16"):
            open_checkpoint(state)


@torch.no_grad()
def test_a_state_saved_key_by_value_gives_the_same_logits(tmp_path):
    """As flash-linear-attention keeps them (state_methods.md 1.9.9)."""
    model = model_of()
    path, tokens = written(tmp_path, 1, model), some_tokens(model, 1, 9)
    tuned = read_tuned_state(path)
    turned = {f"blocks.{n.split('.')[1]}.att.time_state": v.swapaxes(-1, -2).copy() for n, v in tuned.tensors.items()}
    write_safetensors(tmp_path / "fla.safetensors", turned, {})
    other = read_tuned_state(tmp_path / "fla.safetensors", order="key_value")
    want = model(tokens, State.load(path, model))[0]
    save_tuned_state(tmp_path / "back.safetensors", other.tensors, model.config)
    assert torch.equal(model(tokens, State.load(tmp_path / "back.safetensors", model))[0], want)
    rows = State.load(path, model).select([0, 0, 0, 0])
    torch.testing.assert_close(model(tokens.expand(4, -1), rows)[0], want.expand(4, -1, -1))
