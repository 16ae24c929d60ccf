"""Rounding does not add up: a state after very many tokens is that of exact arithmetic, as near as after few."""

import numpy as np
import pytest
import torch
from support.language import randomised

from rookery.engine.llm import EMBEDDED
from rookery.engine.runners.native import NativeRunner
from rookery.engine.runners.torch import TorchRunner
from rookery.models import load, save_model

PIECE = 2000


def drift(path, tokens):
    """The largest error of the logits against float64, relative to the largest logit, after each piece."""
    native = NativeRunner(path, threads=1, dtype="float32")
    exact = TorchRunner(load(path, dtype=torch.float64))
    draw, errors = np.random.default_rng(1), []
    states = native.init_state(), exact.init_state()
    for _ in range(tokens // PIECE):
        ids = draw.integers(native.config.vocab_size, size=PIECE).tolist()
        found, expected = native.forward(ids, states[0])[0], exact.forward(ids, states[1])[0]
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    return errors


@pytest.fixture(scope="module", params=["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(randomised(f"{request.param}-test", dtype=torch.float32, num_hidden_layers=2), path)
    return path


def test_thousands_of_tokens_bring_no_drift(path):
    assert max(drift(path, 3 * PIECE)) < 1e-4


@pytest.mark.slow
def test_a_million_tokens_bring_no_drift(path):
    errors = drift(path, 1_000_000)
    assert max(errors) < 1e-4
    assert np.mean(errors[-50:]) < 3 * np.mean(errors[:50])


@pytest.mark.slow
def test_the_embedded_model_does_not_drift():
    """`benchmarks/drift.py` reads a million tokens and tells the figures."""
    errors = drift(EMBEDDED, 100_000)
    assert max(errors) < 1e-5
    assert np.mean(errors[-10:]) < 3 * np.mean(errors[:10])
