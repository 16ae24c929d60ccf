"""RWKV-7 against its equations and its published initial values, both written out here a second time."""

import numpy as np
import pytest
import torch
from support.language import assert_close, randomised, some_tokens

from rookery.models import create_model

# n channel, C width, N channels of a head, l layer, L layers, V vocabulary (the names of the published formulas)

SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 256}


def published_vectors(preset: str, layer: int) -> dict[str, np.ndarray]:
    C, N, L = SIZES["hidden_size"], SIZES["head_dim"], SIZES["num_hidden_layers"]
    n = np.arange(C)
    depth, depth1, d = layer / (L - 1), 1 - layer / L, n / C
    lin = n / (C - 1) - 0.5
    t = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zz = t * np.abs(t)
    vectors = {
        "att.x_r": 1 - d ** (0.2 * depth1),
        "att.x_g": 1 - d ** (0.2 * depth1),
        "att.x_w": 1 - d ** (0.9 * depth1),
        "att.x_a": 1 - d ** (0.9 * depth1),
        "ffn.x_k": 1 - d ** (depth1**4),
        "att.ln_x.weight": np.full(C, ((1 + layer) / L) ** 0.7),
    }
    if preset == "v7-2025-05":
        vectors |= {
            "att.x_k": 1 - d ** (0.7 * depth1),
            "att.x_v": 1 - d ** (0.7 * depth1),
            "att.w0": -6 + 6 * (n / (C - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zz,
            "att.a0": -0.19 + 0.3 * zz + 0.4 * lin,
            "att.v0": 0.73 - 0.4 * lin,
            "att.k_k": 0.71 - 0.1 * lin,
            "att.k_a": np.full(C, 1.02),
            "att.r_k": np.full(C, -0.04),
        }
    else:
        vectors |= {
            "att.x_k": 1 - (d ** (0.9 * depth1) + 0.4 * depth),
            "att.x_v": 1 - (d ** (0.4 * depth1) + 0.6 * depth),
            "att.w0": -7 + 5 * (n / (C - 1)) ** (0.85 + depth**0.5) + 0.5,
            "att.a0": np.zeros(C),
            "att.v0": np.ones(C),
            "att.k_k": np.full(C, 0.85),
            "att.k_a": np.ones(C),
            "att.r_k": np.zeros(C),
        }
    if layer == 0:
        del vectors["att.v0"]
    return vectors


@pytest.mark.parametrize("preset", ["v7-2025-05", "v7-2024"])
def test_vectors_start_at_their_published_values(preset):
    model = create_model("rwkv7-test", init=preset, **SIZES)
    for layer, block in enumerate(model.blocks):
        for name, value in published_vectors(preset, layer).items():
            got = block.get_parameter(name).detach().numpy().ravel()
            np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-7, err_msg=f"layer {layer} {name}")


def test_the_presets_differ_in_vectors_only():
    newer, older = (create_model("rwkv7-test", init=init, **SIZES).state_dict() for init in ("v7-2025-05", "v7-2024"))
    changed = {name.split(".")[-1] for name in newer if not torch.equal(newer[name], older[name])}
    assert changed == {"x_k", "x_v", "w0", "a0", "v0", "k_k", "k_a", "r_k"}
    assert torch.equal(newer["blocks.2.ffn.x_k"], older["blocks.2.ffn.x_k"])


def gain_of(weight: torch.Tensor) -> float:
    """s of a matrix that is s times an orthonormal one; fails if it is none."""
    weight = weight.detach().double()
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    square = gram.diagonal().mean()
    torch.testing.assert_close(gram, square * torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=float(square) * 1e-5)
    return float(square.sqrt())


def test_matrices_start_orthogonal_with_their_published_gains():
    model = create_model("rwkv7-test", **SIZES)
    for layer, block in enumerate(model.blocks):
        att, ffn = block.att, block.ffn
        assert gain_of(att.receptance.weight) == pytest.approx(1)
        assert gain_of(att.value.weight) == pytest.approx(1)
        assert gain_of(att.key.weight) == pytest.approx(0.1)
        assert gain_of(ffn.key.weight) == pytest.approx(1)  # 256 × 64: the columns are orthonormal
        for zero in (att.output.weight, ffn.value.weight, att.w1, att.a1, att.g1, *([att.v1] if layer else [])):
            assert not zero.any()
        for factor in (att.w2, att.a2, att.g2, *([att.v2] if layer else [])):
            assert gain_of(factor) == pytest.approx(0.1)


@pytest.mark.parametrize(("vocabulary", "gain"), [(256, 1.0), (64, 0.5), (16, 0.5)])
def test_the_head_starts_larger_for_a_vocabulary_beyond_the_width(vocabulary, gain):
    model = create_model("rwkv7-test", **SIZES | {"vocab_size": vocabulary})
    assert gain_of(model.head.weight) == pytest.approx(gain)


def test_embedding_and_norms_start_at_their_published_values():
    model = create_model("rwkv7-test", **SIZES)
    embedding = model.emb.weight.detach()
    assert embedding.abs().max() <= 1e-4
    assert embedding.std() == pytest.approx(1e-4 / 3**0.5, rel=0.03)
    assert embedding.mean().abs() < 3e-6
    for norm in (model.ln_out, *(n for b in model.blocks for n in (b.ln1, b.ln2)), model.blocks[0].ln0):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    assert not any(block.att.ln_x.bias.any() for block in model.blocks)


def test_a_bare_family_name_takes_sizes():
    model = create_model("rwkv7", hidden_size=128, num_hidden_layers=2, vocab_size=300, device="meta")
    assert model.config.num_heads == 2
    assert model.emb.weight.shape == (300, 128)
    assert model.blocks[1].att.g1.shape == (128, 64)


# the equations


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def published_forward(p: dict[str, np.ndarray], tokens: list[int], layers: int, heads: int) -> tuple[np.ndarray, dict]:
    """Logits [t, V] and the state, one token and one head at a time, from the published equations."""
    C = p["ln_out.weight"].shape[0]
    N = C // heads
    p = {name: value.ravel() if value.ndim == 3 else value for name, value in p.items()}
    att_prev, ffn_prev, S = np.zeros((layers, C)), np.zeros((layers, C)), np.zeros((layers, heads, N, N))
    rows = []
    for token in tokens:
        x = layer_norm(p["emb.weight"][token], p["blocks.0.ln0.weight"], p["blocks.0.ln0.bias"])
        v_first = None
        for i in range(layers):
            q = {
                name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")
            }
            a_ = {name.removeprefix("att."): value for name, value in q.items()}
            h = layer_norm(x, q["ln1.weight"], q["ln1.bias"])
            xr, xw, xk, xv, xa, xg = (h + (att_prev[i] - h) * a_[f"x_{j}"] for j in "rwkvag")
            att_prev[i] = h
            r, k, v = a_["receptance.weight"] @ xr, a_["key.weight"] @ xk, a_["value.weight"] @ xv
            w = np.exp(-np.exp(-0.5) * sigmoid(a_["w0"] + np.tanh(xw @ a_["w1"]) @ a_["w2"]))
            if i == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(a_["v0"] + (xv @ a_["v1"]) @ a_["v2"])
            a = sigmoid(a_["a0"] + (xa @ a_["a1"]) @ a_["a2"])
            g = sigmoid(xg @ a_["g1"]) @ a_["g2"]
            removal = k * a_["k_k"]
            k = k * (1 + (a - 1) * a_["k_a"])
            y = np.zeros(C)
            for head in range(heads):
                at = slice(head * N, (head + 1) * N)
                hat = removal[at] / max(np.linalg.norm(removal[at]), 1e-12)
                S[i, head] = (
                    S[i, head] @ np.diag(w[at]) + np.outer(S[i, head] @ -hat, hat * a[at]) + np.outer(v[at], k[at])
                )
                y[at] = S[i, head] @ r[at]
                y[at] = layer_norm(y[at], a_["ln_x.weight"][at], a_["ln_x.bias"][at], 64e-5)
                y[at] += (r[at] * k[at] * a_["r_k"][head]).sum() * v[at]
            x = x + a_["output.weight"] @ (y * g)
            h = layer_norm(x, q["ln2.weight"], q["ln2.bias"])
            xk = h + (ffn_prev[i] - h) * q["ffn.x_k"]
            ffn_prev[i] = h
            x = x + q["ffn.value.weight"] @ np.maximum(q["ffn.key.weight"] @ xk, 0) ** 2
        rows.append(p["head.weight"] @ layer_norm(x, p["ln_out.weight"], p["ln_out.bias"]))
    return np.stack(rows), {"att_shift": att_prev, "wkv": S, "ffn_shift": ffn_prev}


@torch.no_grad()
def test_the_model_computes_the_published_equations():
    model = randomised("rwkv7-test")
    tokens = some_tokens(model, 1, 20)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    want, want_state = published_forward(
        weights, tokens[0].tolist(), model.config.num_hidden_layers, model.config.num_heads
    )
    logits, state = model(tokens)
    assert_close(logits[0], torch.from_numpy(want), "logits")
    for i, layer in enumerate(state.layers):
        for name, value in want_state.items():
            assert_close(getattr(layer, name)[0], torch.from_numpy(value[i]), f"layer {i} {name}")


@torch.no_grad()
def test_the_group_norm_keeps_its_epsilon_whatever_the_head_size():
    for head_dim in (16, 32):
        assert create_model("rwkv7-test", head_dim=head_dim).blocks[0].att.ln_x.eps == 64e-5
