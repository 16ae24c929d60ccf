"""RWKV-4 against its equations and its published initial values, both written out here a second time."""

import numpy as np
import pytest
import torch
from support.equations import assert_vectors, forward, gain_of, rms_error, sigmoid, weights_of
from support.language import assert_close, randomised, some_tokens

from rookery.models import create_model

# n channel, C width, l layer, L layers (the names of the published formulas)

SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 256}


def time_mix(p, x, before, kept):
    """Equations 11-18; the sums are over all tokens since the first, without any frame."""
    xk, xv, xr = (x * p[f"time_mix_{j}"] + before * (1 - p[f"time_mix_{j}"]) for j in "kvr")
    r, k, v = sigmoid(p["receptance.weight"] @ xr), p["key.weight"] @ xk, p["value.weight"] @ xv
    w, u = -np.exp(p["time_decay"]), p["time_first"]
    past = kept.setdefault("tokens", [])
    weights = [np.exp((len(past) - 1 - i) * w + ki) for i, (ki, _) in enumerate(past)]
    weighted = sum((e * vi for e, (_, vi) in zip(weights, past)), np.exp(u + k) * v)
    total = sum(weights, np.exp(u + k))
    past.append((k, v))
    after = [np.exp((len(past) - 1 - i) * w + ki) for i, (ki, _) in enumerate(past)]
    kept["sums"] = np.stack([sum(e * vi for e, (_, vi) in zip(after, past)), sum(after)])
    return p["output.weight"] @ (r * weighted / total)


def channel_mix(p, x, before):
    """Equations 19-21."""
    xk, xr = (x * p[f"time_mix_{j}"] + before * (1 - p[f"time_mix_{j}"]) for j in "kr")
    hidden = np.maximum(p["key.weight"] @ xk, 0) ** 2
    return sigmoid(p["receptance.weight"] @ xr) * (p["value.weight"] @ hidden)


@torch.no_grad()
def test_the_model_computes_the_published_equations():
    model = randomised("rwkv4-test")
    tokens = some_tokens(model, 1, 20)
    want, memory = forward(weights_of(model), tokens[0].tolist(), time_mix, channel_mix)
    logits, state = model(tokens)
    assert_close(logits[0], torch.from_numpy(want), "logits")
    for i, (layer, kept) in enumerate(zip(state.layers, memory, strict=True)):
        assert_close(layer.att_shift[0], torch.from_numpy(kept["att_shift"]), f"layer {i} att_shift")
        assert_close(layer.ffn_shift[0], torch.from_numpy(kept["ffn_shift"]), f"layer {i} ffn_shift")
        sums = layer.wkv[0, :2] * layer.wkv[0, 2].exp()
        assert_close(sums, torch.from_numpy(kept["sums"]), f"layer {i} sums")


def published_vectors(layer):
    C, L = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    n = np.arange(C)
    depth, depth1 = layer / (L - 1), 1 - layer / L
    return {
        "att.time_decay": -5 + 8 * (n / (C - 1)) ** (0.7 + 1.3 * depth),
        "att.time_first": np.log(0.3) + 0.5 * ((n + 1) % 3 - 1),
        "att.time_mix_k": (n / C) ** depth1,
        "att.time_mix_v": (n / C) ** depth1 + 0.3 * depth,
        "att.time_mix_r": (n / C) ** (0.5 * depth1),
        "ffn.time_mix_k": (n / C) ** depth1,
        "ffn.time_mix_r": (n / C) ** depth1,
    }


def test_vectors_start_at_their_published_values():
    assert_vectors(create_model("rwkv4-test", **SIZES), published_vectors)


def test_matrices_start_at_zero_or_orthogonal_with_their_published_gains():
    model = create_model("rwkv4-test", **SIZES)
    for block in model.blocks:
        assert gain_of(block.att.value.weight) == pytest.approx(1)
        assert gain_of(block.ffn.key.weight) == pytest.approx(2)  # 256 × 64: √(rows / columns)
        for zero in (block.att.key, block.att.receptance, block.att.output, block.ffn.value, block.ffn.receptance):
            assert not zero.weight.any()
    assert gain_of(model.head.weight) == pytest.approx(0.5 * (200 / 64) ** 0.5)
    embedding = model.emb.weight.detach()
    assert embedding.abs().max() <= 6e-4
    assert embedding.std() == pytest.approx(6e-4 / 3**0.5, rel=0.03)


@torch.no_grad()
def test_bfloat16_costs_less_than_a_percent_and_a_half():
    exact = randomised("rwkv4", **SIZES)
    narrow = create_model("rwkv4", dtype=torch.bfloat16, **SIZES)
    narrow.load_state_dict(exact.state_dict())
    exact.load_state_dict(narrow.state_dict())  # the same, rounded weights
    tokens = some_tokens(exact, 2, 256)
    error = rms_error(narrow(tokens)[0], exact(tokens)[0])
    assert error < 0.015, error
