"""RWKV-6 and its variants against their equations and published initial values, both written out a second time."""

import numpy as np
import pytest
import torch
from support.equations import (
    assert_vectors,
    forward,
    gain_of,
    group_norm,
    layer_norm,
    rms_error,
    sigmoid,
    silu,
    weights_of,
)
from support.language import assert_close, randomised, some_tokens

from rookery.models import create_model

# n channel, C width, H heads, l layer, L layers (the names of the published formulas)

SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 224}
RANKS = {"mix_rank": 4, "decay_rank": 6, "gate_rank": 5}
VARIANTS = {
    "x060": {},
    "x060 damped": {"damp_keys": True},
    "x060a": {"variant": "x060a"},
    "x060b": {"variant": "x060b", "group_norm_eps": 1e-5},
    "x060c": {"variant": "x060c", "group_norm_eps": 1e-5},
}


def interpolated(p, x, before):
    """Inputs by letter: x + δ ⊙ (μ + tanh((x + δ ⊙ μ_x) W1) W2), δ from the token to the one before it."""
    few = "time_maa_rkvw_w1" in p
    letters, factors = ("rkvw", "time_maa_rkvw_w") if few else ("wkvrg", "time_maa_w")
    step = before - x
    inner = np.tanh((x + step * p["time_maa_x"]) @ p[f"{factors}1"]).reshape(len(letters), -1)
    return {
        letter: x + step * (p[f"time_maa_{letter}"] + inner[i] @ p[f"{factors}2"][i])
        for i, letter in enumerate(letters)
    }


def time_mix(variant, heads):
    def mix(p, x, before, kept):
        xs = interpolated(p, x, before)
        raw = p["time_decay"] + np.tanh(xs["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
        w = np.exp(-np.exp(raw))
        r, k, v = p["receptance.weight"] @ xs["r"], p["key.weight"] @ xs["k"], p["value.weight"] @ xs["v"]
        if variant == "x060c":
            k = k * (1 - w)
        if variant == "x060 damped":
            k = k * np.exp(np.minimum(raw, 0))
        r, w, k, v = (part.reshape(heads, -1) for part in (r, w, k, v))
        S = kept.setdefault("wkv", np.zeros((heads, v.shape[1], k.shape[1])))  # value, key
        y = np.zeros_like(v)
        for h in range(heads):
            written = np.outer(v[h], k[h])
            y[h] = (S[h] + written * p["time_faaaa"][h]) @ r[h]
            S[h] = S[h] * w[h] + written
        if variant in ("x060b", "x060c"):
            return p["output.weight"] @ layer_norm(y.ravel(), p["ln_x.weight"], p["ln_x.bias"])
        y = group_norm(y, p["ln_x.weight"], p["ln_x.bias"], 64e-5)
        if variant == "x060a":
            return p["output.weight"] @ (y * (np.tanh(xs["g"] @ p["gate_w1"]) @ p["gate_w2"]))
        return p["output.weight"] @ (y * silu(p["gate.weight"] @ xs["g"]))

    return mix


def channel_mix(p, x, before):
    xk, xr = (x + (before - x) * p[f"time_maa_{j}"] for j in "kr")
    hidden = np.maximum(p["key.weight"] @ xk, 0) ** 2
    return sigmoid(p["receptance.weight"] @ xr) * (p["value.weight"] @ hidden)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_computes_the_published_equations(variant):
    model = randomised("rwkv6-test", **VARIANTS[variant])
    tokens = some_tokens(model, 1, 20)
    mix = time_mix(variant, model.config.num_heads)
    want, memory = forward(weights_of(model), tokens[0].tolist(), mix, channel_mix)
    logits, state = model(tokens)
    assert_close(logits[0], torch.from_numpy(want), "logits")
    for i, (layer, kept) in enumerate(zip(state.layers, memory, strict=True)):
        for name, value in kept.items():
            assert_close(getattr(layer, name)[0], torch.from_numpy(value), f"layer {i} {name}")


@torch.no_grad()
def test_every_variant_computes_something_else():
    tokens = torch.arange(20)[None]
    logits = {}
    for variant, settings in VARIANTS.items():
        model = randomised("rwkv6-test", **settings)
        logits[variant] = model(tokens)[0]
    names = list(logits)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert not torch.allclose(logits[first], logits[second]), f"{first} runs as {second}"


def test_damped_keys_are_a_setting_and_no_weight():
    plain, damped = create_model("rwkv6-test"), create_model("rwkv6-test", damp_keys=True)
    assert list(plain.state_dict()) == list(damped.state_dict())
    assert not plain.config.damp_keys


def published_vectors(variant):
    def vectors(layer):
        C, L = SIZES["hidden_size"], SIZES["num_hidden_layers"]
        n = np.arange(C)
        depth, depth1, d = layer / (L - 1), 1 - layer / L, n / C
        values = {
            "att.time_decay": -6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * depth),
            "att.time_faaaa": depth * (1 - n / (C - 1)) + 0.1 * ((n + 1) % 3 - 1),
            "att.time_maa_x": 1 - d**depth1,
            "att.time_maa_w": 1 - d**depth1,
            "att.time_maa_k": 1 - d**depth1,
            "att.time_maa_v": 1 - (d**depth1 + 0.3 * depth),
            "att.time_maa_r": 1 - d ** (0.5 * depth1),
            "att.time_maa_g": 1 - d ** (0.5 * depth1),
            "att.ln_x.weight": np.full(C, ((1 + layer) / L) ** 0.7),
            "att.ln_x.bias": np.zeros(C),
            "ffn.time_maa_k": 1 - d ** (depth1**3),
            "ffn.time_maa_r": 1 - d ** (depth1**3),
        }
        if variant in ("x060b", "x060c"):
            del values["att.time_maa_g"]
        return values

    return vectors


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_start_at_their_published_values(variant):
    model = create_model("rwkv6-test", **SIZES, **RANKS, **VARIANTS[variant])
    assert_vectors(model, published_vectors(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_start_at_their_published_values(variant):
    model = create_model("rwkv6-test", **SIZES, **RANKS, **VARIANTS[variant])
    for block in model.blocks:
        att = block.att
        assert gain_of(att.receptance.weight) == pytest.approx(1)
        assert gain_of(att.value.weight) == pytest.approx(1)
        assert gain_of(att.key.weight) == pytest.approx(0.1)
        assert gain_of(block.ffn.key.weight) == pytest.approx(1)
        if hasattr(att, "gate"):
            assert gain_of(att.gate.weight) == pytest.approx(0.1)
        for zero in (att.output, block.ffn.value, block.ffn.receptance):
            assert not zero.weight.any()
        factors = {name: value for name, value in att.named_parameters() if name.endswith(("_w1", "_w2"))}
        assert len(factors) == (6 if variant == "x060a" else 4)
        for name, value in factors.items():
            if name.endswith("1"):
                assert not value.any(), name
            else:
                assert 0.0095 < value.abs().max() <= 0.01, name
    assert gain_of(model.head.weight) == pytest.approx(0.5 * (200 / 64) ** 0.5)
    assert model.emb.weight.detach().abs().max() <= 1e-4


@torch.no_grad()
def test_a_decay_that_underflows_leaves_logits_finite():
    model = randomised("rwkv6", dtype=torch.float32, **SIZES)
    for block in model.blocks:
        block.att.time_decay[..., ::2] = 5.5  # log decay −245
        block.att.time_decay[..., ::8] = 100.0  # −∞
    tokens = some_tokens(model, 2, 70)
    with torch.enable_grad():
        logits, _ = model(tokens)
        logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    exact = create_model("rwkv6", dtype=torch.float64, **SIZES)
    exact.load_state_dict(model.state_dict())
    assert rms_error(logits, exact(tokens)[0]) < 1e-4


@torch.no_grad()
def test_bfloat16_costs_less_than_a_percent_and_a_half():
    exact = randomised("rwkv6", **SIZES)
    narrow = create_model("rwkv6", dtype=torch.bfloat16, **SIZES)
    narrow.load_state_dict(exact.state_dict())
    exact.load_state_dict(narrow.state_dict())  # the same, rounded weights
    tokens = some_tokens(exact, 2, 256)
    error = rms_error(narrow(tokens)[0], exact(tokens)[0])
    assert error < 0.015, error
