"""Converted transformers against their equations (adaptation.md A.2, B.2), written again in NumPy token by token."""

import numpy as np
import pytest
import torch
from support.equations import below, group_norm, sigmoid, silu, weights_of
from support.language import randomised

from rookery.models import create_model, load, save_model

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]
MODES = [
    ("arwkv-test", {}),
    ("arwkv-test", {"gate": "none"}),
    ("arwkv-test", {"gate": "delta", "has_group_norm": True, "tie_word_embeddings": True}),
    ("rad-rwkv6-test", {}),
    ("rad-rwkv6-test", {"gate": "low-rank", "gate_rank": 6, "balance_state": False, "qkv_bias": False}),
    ("rad-rwkv6-test", {"gate": "none", "num_key_value_heads": 4}),
    ("rad-rwkv7-test", {}),
    ("rad-rwkv7-test", {"balance_state": False, "has_group_norm": True}),
    ("rad-rwkv7-test", {"rope_theta": None, "head_dim": 8, "num_key_value_heads": 1}),
]
ids = [f"{name}-{'-'.join(map(str, mode.values()))}" for name, mode in MODES]


def rms_norm(x, weight, eps=1e-6):
    return x / np.sqrt((x * x).mean() + eps) * weight


def unit(x):
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)


def arwkv(p, x, kept, first, t, config):
    shifted = {c: x + (kept["shift"] - x) * p[f"x_{c}"] for c in ("rwkvag" if config.gate != "none" else "rwkva")}
    kept["shift"] = x
    r, k, v = (p[f"{n}.weight"] @ shifted[n[0]] for n in ("receptance", "key", "value"))
    decay = np.exp(-np.exp(-np.logaddexp(0, -(p["w0"] + np.tanh(shifted["w"] @ p["w1"]) @ p["w2"])) - 0.5))
    rate = sigmoid(p["a0"] + shifted["a"] @ p["a1"] @ p["a2"])
    if "v" in first:
        v = v + (first["v"] - v) * sigmoid(p["v0"] + shifted["v"] @ p["v1"] @ p["v2"])
    first.setdefault("v", v)
    heads = (config.num_heads, config.head_dim)
    kappa = unit((k * p["k_k"]).reshape(heads))
    k = (k * (1 + (rate - 1) * p["k_a"])).reshape(heads)
    r, v, decay, rate = (part.reshape(heads) for part in (r, v, decay, rate))
    for h in range(heads[0]):
        s = kept["wkv"][h]
        kept["wkv"][h] = s * decay[h] - np.outer(s @ kappa[h], kappa[h] * rate[h]) + np.outer(v[h], k[h])
    y = np.einsum("hvk,hk->hv", kept["wkv"], r)
    if config.has_group_norm:
        y = group_norm(y, p["ln_x.weight"], p["ln_x.bias"], 64e-5).reshape(heads)
    y = (y + (r * k * p["r_k"]).sum(1, keepdims=True) * v).ravel()
    if config.gate != "none":
        gate = sigmoid(shifted["g"] @ p["g1"]) @ p["g2"]
        y = y * (gate if config.gate == "sigmoid" else 1 + gate)
    return p["output.weight"] @ y


def projected(p, name, x, config):
    y = p[f"{name}_proj.weight"] @ x + p.get(f"{name}_proj.bias", 0)
    return y.reshape(-1, config.head_dim)


def grouped(x, config):
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return np.stack([x[h * groups // heads] for h in range(heads)])


def rad_rwkv6(p, x, kept, first, t, config):
    step = kept["shift"] - x
    kept["shift"] = x
    inner = np.tanh((x + step * p["time_maa_x"]) @ p["time_maa_w1"]).reshape(5, -1)
    mixed = {c: x + step * (p[f"time_maa_{c}"] + inner[i] @ p["time_maa_w2"][i]) for i, c in enumerate("rkvwg")}
    q = projected(p, "q", mixed["r"], config)
    k, v = (grouped(projected(p, c, mixed[c], config), config) for c in "kv")
    raw = p["time_decay"] + np.tanh(mixed["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
    decay = np.exp(np.maximum(-np.exp(raw), -5)).reshape(q.shape)
    if config.balance_state:
        k = k * (1 - decay)
    kept["wkv"] = kept["wkv"] * decay[:, None] + v[:, :, None] * k[:, None]
    y = np.einsum("hvk,hk->hv", kept["wkv"], q).ravel() / np.sqrt(config.head_dim)
    if config.gate != "none":
        g = p["gate.weight"] @ mixed["g"] if config.gate == "full" else mixed["g"] @ p["g1"] @ p["g2"]
        y = y * sigmoid(g)
    return p["o_proj.weight"] @ y


def turned(x, position, theta):
    half = x.shape[1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def rad_rwkv7(p, x, kept, first, t, config):
    q, k, v = (projected(p, c, x, config) for c in "qkv")
    if config.rope_theta is not None:
        q, k = turned(q, t, config.rope_theta), turned(k, t, config.rope_theta)
    k, v = grouped(k, config), grouped(v, config)
    if "v" in first:
        v = v + (first["v"] - v) * sigmoid(p["v0"] + x @ p["v1"] @ p["v2"]).reshape(v.shape)
    first.setdefault("v", v)
    rate = sigmoid(p["a0"] + x @ p["a1"] @ p["a2"]).reshape(q.shape)
    decay = np.exp(-np.exp(-0.5) * sigmoid(p["w0"] + np.tanh(x @ p["w1"]) @ p["w2"])).reshape(q.shape)
    if config.balance_state:
        kappa = k / (np.sqrt((k * k).sum(1, keepdims=True)) + 1e-12)
        k = k * (1 - decay + rate)
    else:
        kappa = unit(k * p["k_k"].reshape(q.shape))
        k = k * (1 + (rate - 1) * p["k_a"].reshape(q.shape))
    for h in range(len(q)):
        s = kept["wkv"][h]
        kept["wkv"][h] = s * decay[h] - np.outer(s @ kappa[h], kappa[h] * rate[h]) + np.outer(v[h], k[h])
    y = np.einsum("hvk,hk->hv", kept["wkv"], q)
    if config.has_group_norm:
        y = group_norm(y, p["ln_x.weight"], p["ln_x.bias"], 1e-5 * config.head_dim)
    else:
        y = y.ravel() / np.sqrt(config.head_dim)
    return p["o_proj.weight"] @ (y * (sigmoid(x @ p["g1"]) @ p["g2"]))


MIXERS = {
    "arwkv": (arwkv, "self_attn.time_mixer."),
    "rad-rwkv6": (rad_rwkv6, "self_attn."),
    "rad-rwkv7": (rad_rwkv7, "self_attn."),
}


def written_out(model, tokens):
    """Logits [t, V] of the equations."""
    config, (mixer, prefix) = model.config, MIXERS[model.family]
    p = {name: w.ravel() if w.shape[:2] == (1, 1) else w for name, w in weights_of(model).items()}
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    kept = [
        {"shift": np.zeros(config.hidden_size), "wkv": np.zeros(config.wkv_shape)}
        for _ in range(config.num_hidden_layers)
    ]
    rows = []
    for t, token in enumerate(tokens):
        x, first = p["model.embed_tokens.weight"][token], {}
        for i, memory in enumerate(kept):
            q = below(p, f"model.layers.{i}.")
            normed = rms_norm(x, q["input_layernorm.weight"])
            x = x + mixer(below(q, prefix), normed, memory, first, t, config)
            h = rms_norm(x, q["post_attention_layernorm.weight"])
            x = x + q["mlp.down_proj.weight"] @ (silu(q["mlp.gate_proj.weight"] @ h) * (q["mlp.up_proj.weight"] @ h))
        rows.append(head @ rms_norm(x, p["model.norm.weight"]))
    return np.stack(rows)


@pytest.mark.parametrize(("name", "mode"), MODES, ids=ids)
def test_the_model_computes_its_equations(name, mode):
    model = randomised(name, **mode)
    with torch.no_grad():
        logits, state = model(torch.tensor([TOKENS]))
        whole, _ = model(torch.tensor([TOKENS[:4]]))
        step = model(torch.tensor([TOKENS[:3]]))[1]
        last, _ = model(torch.tensor([TOKENS[3:4]]), step)
    turns = getattr(model.config, "rope_theta", None) is not None
    tolerance = 1e-5 if turns else 1e-9  # the library keeps angles in float32
    np.testing.assert_allclose(logits[0], written_out(model, TOKENS), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(last[0, -1], whole[0, -1], rtol=1e-9, atol=1e-10)
    assert state.nbytes == state.expected_nbytes(9) == state.expected_nbytes(10**6)


@pytest.mark.parametrize(("name", "mode"), MODES, ids=ids)
def test_a_saved_model_comes_back(tmp_path, name, mode):
    model = randomised(name, dtype=torch.float32, **mode)
    save_model(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.config == model.config
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key


def test_published_sizes_have_the_parameters_of_their_shapes():
    """Qwen2.5-7B has 7,615,616,512 parameters; RAD-RWKV6 adds its shift, decay and gate matrices to them."""
    model = create_model("rad-rwkv6-7b", device="meta")
    extra = 28 * (6 * 3584 + 3584 * 480 + 5 * 96 * 3584 + 3584 + 2 * 3584 * 96 + 3584 * 3584)
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512 + extra


def test_a_new_arwkv_takes_nothing_from_its_attention_and_rad_begins_without_shift():
    model = create_model("arwkv-test", dtype=torch.float64)
    mixer = model.model.layers[1].self_attn.time_mixer
    assert mixer.receptance.weight.abs().max() <= 32**-0.5
    assert (mixer.k_k == 0.85).all()
    assert (mixer.r_k == 0).all()
    rad = create_model("rad-rwkv6-test", dtype=torch.float64)
    tokens = torch.tensor([TOKENS])
    _, state = rad(tokens)
    shifted = state.with_tensors(
        {name: torch.ones_like(t) if "shift" in name else t for name, t in state.tensors().items()}, state.tokens_seen
    )
    torch.testing.assert_close(rad(tokens[:, :2], shifted)[0], rad(tokens[:, :2], state)[0])
