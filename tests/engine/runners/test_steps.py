"""States before every token of a call, as speculation needs them."""

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery import _native
from rookery.engine.runners.native import FAMILIES, NativeRunner
from rookery.models import save_model


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised(f"{request.param}-test", dtype=torch.bfloat16, vocab_size=40), path)
    return path


def ids_of(count):
    return np.random.default_rng(1).integers(40, size=count).tolist()


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(("read", "steps", "threads"), [(1, 0, 1), (1, 1, 1), (3, 5, 2), (290, 280, 1)])
def test_every_state_is_that_of_reading_so_far(path, isa, read, steps, threads):
    runner = NativeRunner(path, isa=isa, threads=threads)
    begin, ids = runner.init_state(), ids_of(7 + read + steps)
    runner.forward(ids[:7], begin)
    before = begin.copy()
    logits, states = runner.forward_steps(ids[7:], begin, steps)
    assert (begin.numbers == before.numbers).all()
    assert (len(logits), len(states), begin.tokens_seen) == (steps + 1, steps + 1, 7)
    expected = runner.forward(ids[7 : 7 + read], before)
    for i in range(steps + 1):
        np.testing.assert_array_equal(logits[i], expected[0], err_msg=f"logits {i}")
        np.testing.assert_array_equal(states[i].numbers, before.numbers, err_msg=f"state {i}")
        assert states[i].tokens_seen == before.tokens_seen == 7 + read + i
        if i < steps:
            expected = runner.forward([ids[7 + read + i]], before)


def test_steps_must_leave_a_token(path):
    runner = NativeRunner(path, threads=1)
    with pytest.raises(ValueError, match="steps must lie between 0 and 1 for 2 tokens, got 2"):
        runner.forward_steps([1, 2], runner.init_state(), 2)
