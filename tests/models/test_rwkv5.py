"""RWKV-5.0, 5.1 and 5.2 against their equations and published initial values, both written out a second time."""

import numpy as np
import pytest
import torch
from support.equations import assert_vectors, forward, gain_of, group_norm, rms_error, sigmoid, silu, weights_of
from support.language import assert_close, randomised, some_tokens

from rookery.models import create_model

# n channel, h head, C width, H heads, l layer, L layers (the names of the published formulas)

SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 224}
VERSIONS = {
    "5.0": {"decay": "head", "has_gate": False, "bonus": "time_first"},
    "5.0 r2": {"decay": "head", "has_gate": False},
    "5.1": {"decay": "head"},
    "5.2": {},
}


def time_mix(heads, eps):
    def mix(p, x, before, kept):
        gated = "gate.weight" in p
        mixed = {j: x * p[f"time_mix_{j}"] + before * (1 - p[f"time_mix_{j}"]) for j in ("kvrg" if gated else "kvr")}
        r, k, v = ((p[f"{name}.weight"] @ mixed[name[0]]).reshape(heads, -1) for name in ("receptance", "key", "value"))
        per_head = p["time_decay"].reshape(heads, -1)  # [H, 1] or [H, N]
        w = np.exp(-np.exp(per_head))
        u = np.exp(p["time_first"]) if "time_first" in p else p["time_faaaa"]
        u = u.reshape(heads, -1)
        S = kept.setdefault("wkv", np.zeros((heads, v.shape[1], k.shape[1])))  # value, key
        y = np.zeros_like(v)
        for h in range(heads):
            written = np.outer(v[h], k[h])
            y[h] = (S[h] + written * u[h]) @ r[h]
            S[h] = S[h] * w[h] + written
        out = group_norm(y, p["ln_x.weight"], p["ln_x.bias"], eps)
        if gated:
            out = out * silu(p["gate.weight"] @ mixed["g"])
        return p["output.weight"] @ out

    return mix


def channel_mix(p, x, before):
    xk, xr = (x * p[f"time_mix_{j}"] + before * (1 - p[f"time_mix_{j}"]) for j in "kr")
    hidden = np.maximum(p["key.weight"] @ xk, 0) ** 2
    return sigmoid(p["receptance.weight"] @ xr) * (p["value.weight"] @ hidden)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_computes_the_published_equations(version):
    model = randomised("rwkv5-test", **VERSIONS[version])
    tokens = some_tokens(model, 1, 20)
    mix = time_mix(model.config.num_heads, 64e-5)
    want, memory = forward(weights_of(model), tokens[0].tolist(), mix, channel_mix)
    logits, state = model(tokens)
    assert_close(logits[0], torch.from_numpy(want), "logits")
    for i, (layer, kept) in enumerate(zip(state.layers, memory, strict=True)):
        for name, value in kept.items():
            assert_close(getattr(layer, name)[0], torch.from_numpy(value), f"layer {i} {name}")


@torch.no_grad()
def test_dividing_by_eight_before_the_norm_is_a_larger_epsilon():
    # the official code divides and has 1e-5; rwkv.cpp has 1e-5 and does not divide
    model, cpp = randomised("rwkv5-test"), randomised("rwkv5-test", group_norm_eps=1e-5)
    tokens = some_tokens(model, 1, 20)
    p = weights_of(model)
    halved = {name: value / 8 if name.endswith("att.value.weight") else value for name, value in p.items()}
    want, _ = forward(halved, tokens[0].tolist(), time_mix(2, 1e-5), channel_mix)
    assert_close(model(tokens)[0][0], torch.from_numpy(want), "logits")
    assert not torch.allclose(cpp(tokens)[0], model(tokens)[0], rtol=1e-4)


@torch.no_grad()
def test_one_decay_per_head_is_the_same_decay_in_all_its_channels():
    coarse = randomised("rwkv5-test", **VERSIONS["5.1"])
    fine = randomised("rwkv5-test")
    weights = dict(coarse.state_dict())
    for name in weights:
        if name.endswith(("time_decay", "time_faaaa")):
            weights[name] = weights[name][:, None].expand(-1, 16)
    fine.load_state_dict(weights)
    tokens = some_tokens(fine, 1, 30)
    assert_close(coarse(tokens)[0], fine(tokens)[0])


def published_vectors(version):
    def vectors(layer):
        C, L, H = SIZES["hidden_size"], SIZES["num_hidden_layers"], SIZES["hidden_size"] // SIZES["head_dim"]
        n, h = np.arange(C), np.arange(H)
        depth, depth1 = layer / (L - 1), 1 - layer / L
        values = {
            "att.time_decay": -6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * depth),
            "att.time_faaaa": depth * (1 - n / (C - 1)) + 0.1 * ((n + 1) % 3 - 1),
            "att.time_mix_k": (n / C) ** depth1,
            "att.time_mix_v": (n / C) ** depth1 + 0.3 * depth,
            "att.time_mix_r": (n / C) ** (0.5 * depth1),
            "att.time_mix_g": (n / C) ** (0.5 * depth1),
            "att.ln_x.weight": np.full(C, ((1 + layer) / L) ** 0.7),
            "att.ln_x.bias": np.zeros(C),
            "ffn.time_mix_k": (n / C) ** depth1,
            "ffn.time_mix_r": (n / C) ** depth1,
        }
        if version != "5.2":
            values["att.time_decay"] = -6 + 5 * (h / (H - 1)) ** (0.7 + 1.3 * depth)
            values["att.time_faaaa"] = depth * (1 - h / (H - 1))
        if version == "5.0":
            values["att.time_first"] = np.full(H, -3)
            del values["att.time_faaaa"]
        if version.startswith("5.0"):
            del values["att.time_mix_g"]
        return values

    return vectors


@pytest.mark.parametrize("version", VERSIONS)
def test_vectors_start_at_their_published_values(version):
    assert_vectors(create_model("rwkv5-test", **SIZES, **VERSIONS[version]), published_vectors(version))


def test_matrices_start_at_zero_or_orthogonal_with_their_published_gains():
    model = create_model("rwkv5-test", **SIZES)
    for block in model.blocks:
        assert gain_of(block.att.receptance.weight) == pytest.approx(1)
        assert gain_of(block.att.value.weight) == pytest.approx(1)
        assert gain_of(block.att.key.weight) == pytest.approx(0.1)
        assert gain_of(block.att.gate.weight) == pytest.approx(0.1)
        assert gain_of(block.ffn.key.weight) == pytest.approx(1)  # 224 × 64, and still 1
        for zero in (block.att.output, block.ffn.value, block.ffn.receptance):
            assert not zero.weight.any()
    assert gain_of(model.head.weight) == pytest.approx(0.5 * (200 / 64) ** 0.5)
    embedding = model.emb.weight.detach()
    assert embedding.abs().max() <= 1e-4
    assert embedding.std() == pytest.approx(1e-4 / 3**0.5, rel=0.03)


@torch.no_grad()
def test_bfloat16_costs_less_than_a_percent_and_a_half():
    exact = randomised("rwkv5", **SIZES)
    narrow = create_model("rwkv5", dtype=torch.bfloat16, **SIZES)
    narrow.load_state_dict(exact.state_dict())
    exact.load_state_dict(narrow.state_dict())  # the same, rounded weights
    tokens = some_tokens(exact, 2, 256)
    error = rms_error(narrow(tokens)[0], exact(tokens)[0])
    assert error < 0.015, error
