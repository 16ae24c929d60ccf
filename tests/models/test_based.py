"""BASED against its equations, its window and its sizes (hybrids.md 3): it is true that …"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.language import assert_close, assert_same_state, randomised, some_tokens
from torch.nn.functional import scaled_dot_product_attention

from rookery.adapt.peft import target_names
from rookery.engine.llm import LLM
from rookery.engine.runners.torch import TorchRunner
from rookery.models import create_model, load, save_model
from rookery.models.based import Call, WindowAttention, windowed
from rookery.models.transformer import rotate
from rookery.nn.recent import Recent, recent
from rookery.recipes.tiny_test import tiny_test
from rookery.registry import configure, families
from rookery.reproduce.arms import parameters
from rookery.train.config import overlay
from rookery.train.loop import train
from rookery.train.optim import hidden_matrices


def published_forward(p: dict[str, np.ndarray], tokens: list[int], config) -> np.ndarray:
    """Logits [t, V] from the equations of the published code, one query at a time, every sum over all tokens."""
    heads, d, count = config.num_heads, config.head_dim, len(tokens)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def silu(x):
        return x / (1 + np.exp(-x))

    def phi(x):  # the unpacked features of the published code
        return np.concatenate([[1], x / len(x) ** 0.25, np.outer(x, x).ravel() / (2**0.5 * len(x) ** 0.5)])

    def rotated(x):  # [t, d]
        angle = np.arange(count)[:, None] * config.rope_theta ** (-2 * np.arange(d // 2) / d)
        turned = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)

    def conv(q, h):
        u, gate = np.split(h @ q["in_proj.weight"].T + q["in_proj.bias"], 2, axis=1)
        kernel = q["conv.conv.weight"][:, 0]
        mixed = np.zeros_like(u)
        for t in range(count):
            for back in range(min(t + 1, config.conv_width)):
                mixed[t] += kernel[:, -1 - back] * u[t - back]
        return silu(mixed) * gate @ q["out_proj.weight"].T + q["out_proj.bias"]

    def linear(q, h):
        out = np.zeros((count, heads * d))
        for head in range(heads):
            own = slice(head * config.feature_dim, (head + 1) * config.feature_dim)
            value = slice(head * d, (head + 1) * d)
            queries, keys = (h @ q[f"proj_{name}.weight"][own].T for name in "qk")
            values = h @ q["proj_v.weight"][value].T
            for t in range(count):
                weights = np.array([phi(queries[t]) @ phi(keys[i]) for i in range(t + 1)])
                out[t, value] = weights @ values[: t + 1] / weights.sum()
        return out @ q["out_proj.weight"].T

    def window(q, h):
        out = np.zeros((count, heads * d))
        queries, keys, values = np.split(h @ q["Wqkv.weight"].T, 3, axis=1)
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            turned, stored = rotated(queries[:, own]), rotated(keys[:, own])
            for t in range(count):
                first = max(0, t + 1 - config.window)
                score = np.exp(stored[first : t + 1] @ turned[t] / d**0.5)
                out[t, own] = score @ values[first : t + 1, own] / score.sum()
        return out @ q["out_proj.weight"].T

    x = p["transformer.embeddings.word_embeddings.weight"][tokens]
    for i in range(config.num_hidden_layers):
        at = f"transformer.layers.{i}."
        q = {name.removeprefix(at + "mixer."): value for name, value in p.items() if name.startswith(at)}
        mixer = {"conv": conv, "linear": linear, "window": window}[config.mixer(i)]
        x = x + mixer(q, norm(x, q[at + "norm1.weight"]))
        value, gate = np.split(norm(x, q[at + "norm2.weight"]) @ q[at + "mlp.fc1.weight"].T, 2, axis=1)
        x = x + value * silu(gate) @ q[at + "mlp.fc2.weight"].T
    return norm(x, p["transformer.ln_f.weight"]) @ p["transformer.embeddings.word_embeddings.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"conv_width": 2}, {"feature_dim": 5, "window": 1}, {"window": 40}], ids=str)
def test_the_model_computes_its_equations(variant):
    model = randomised("based-test", **variant)
    tokens = some_tokens(model, 1, 30)
    p = {name: value.numpy() for name, value in model.state_dict().items()}
    want = published_forward(p, tokens[0].tolist(), model.config)
    assert_close(model(tokens)[0][0], torch.from_numpy(want))


@torch.no_grad()
@pytest.mark.parametrize("window", [5, 70, 100])
def test_a_window_of_every_length_is_masked_attention_over_all_tokens(window):
    mixer = WindowAttention(configure("based-test", window=window)[1]).double()
    x = torch.randn(2, 150, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    tokens = torch.zeros(2, 150, dtype=torch.int64)
    got, _ = mixer(x, mixer.empty(2), calls(tokens))
    q, k, v = mixer.Wqkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    places = torch.arange(150)
    q, k = (rotate(part, places[None], 10000.0) for part in (q, k))
    seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - window)
    want = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert_close(got, mixer.out_proj(want.transpose(1, 2).flatten(2)))


def calls(tokens):
    return Call(None, recent(tokens, torch.zeros(tokens.shape[0], dtype=torch.int64), None))


@torch.no_grad()
@pytest.mark.parametrize("length", [8, 9, 10, 29])
def test_the_ring_holds_the_last_window_at_places_that_follow_from_positions(length):
    model = randomised("based-test")
    tokens = some_tokens(model, 1, length)
    ring = model(tokens)[1].layers[2].ring[0]
    assert ring.shape[0] == model.config.window == 9
    filled = ring.flatten(1).abs().sum(-1) > 0
    assert int(filled.sum()) == min(length, 9)
    if length < 9:
        assert filled.tolist() == [i < length for i in range(9)]
    _, state = model(tokens)
    stepped = model(tokens[:, :1], state)[1].layers[2].ring[0]
    changed = (ring != stepped).flatten(1).any(-1)
    assert changed.nonzero().flatten().tolist() == [length % 9], "a step writes one place"


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_prompts_shorter_than_the_kernel_are_convolved_like_long_ones(length):
    model = randomised("based-test", num_hidden_layers=1)
    tokens = some_tokens(model, 1, 8)
    whole, after = model(tokens)
    first, state = model(tokens[:, :length])
    rest, state = model(tokens[:, length:], state)
    assert_close(torch.cat([first, rest], 1), whole)
    assert_same_state(state, after)


@torch.no_grad()
def test_positions_far_away_cost_no_precision():
    mixer = WindowAttention(configure("based-test")[1])
    x = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(4))
    outputs = []
    for start in (0, 9 * 10**7):  # both begin a lap of the ring, after nothing that is seen in the last rows
        call = Call(None, Recent(torch.tensor([start]), torch.tensor([30]), None))
        outputs.append(mixer(x, mixer.empty(1), call)[0][:, 9:])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("preset", "count"), [("360m", 362.5e6), ("1b", 1.349e9)])
def test_published_sizes_have_the_published_numbers_of_parameters(preset, count):
    assert parameters(f"based-{preset}", {}) == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "window", "megabytes"), [("360m", 65, 4.7), ("360m", 129, 6.0), ("1b", 65, 11.3), ("1b", 129, 14.5)]
)
def test_the_state_of_published_sizes_has_the_bytes_of_the_table(preset, window, megabytes):
    config = configure(f"based-{preset}", window=window)[1]
    nbytes = config.state_nbytes(tokens_seen=10**6, batch=1, itemsize=2)
    assert nbytes / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_model_without_mlp_has_none():
    model = randomised("based-test", intermediate_size=0)
    assert not [name for name in model.state_dict() if "mlp" in name or "norm2" in name]
    assert model(some_tokens(model, 1, 5))[0].isfinite().all()


def test_padding_is_never_sampled():
    runner = TorchRunner(create_model("based-test", padding_rows=3))
    logits = runner.forward([1, 2, 3], runner.init_state(), "all")
    assert np.isneginf(logits[:, -3:]).all()
    assert np.isfinite(logits[:, :-3]).all()
    [row] = runner.forward_rows([[1, 2, 3]], [runner.init_state()], ["last"])
    assert np.isneginf(row[0, -3:]).all()


def test_a_bare_based_takes_the_published_mix():
    config = families()["based"].create(hidden_size=256, num_hidden_layers=6, vocab_size=4096)
    assert [config.mixer(i) for i in range(6)] == ["conv", "linear", "window", "conv", "conv", "conv"]
    assert (config.num_heads, config.intermediate_size, config.padding_rows) == (4, 512, 0)


@torch.no_grad()
def test_queries_in_blocks_are_queries_alone():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 140, 8, dtype=torch.float64, generator=generator)
    nothing = torch.zeros(1, 2, 7, 8, dtype=torch.float64)
    k, v = (torch.cat([nothing, x], dim=2) for x in (k, v))
    whole = windowed(q, k, v, 7, torch.tensor([0]))
    alone = [
        windowed(q[:, :, t : t + 1], k[:, :, t : t + 8], v[:, :, t : t + 8], 7, torch.tensor([t])) for t in range(140)
    ]
    assert_close(whole, torch.cat(alone, dim=2))


def test_texts_are_generated_and_go_on_after_a_fork(tmp_path):
    save_model(randomised("based-test", vocab_size=256, dtype=torch.float32), tmp_path / "m.safetensors")
    llm = LLM(tmp_path / "m.safetensors", tokenizer="bytes")
    text = llm.generate("abcdefghijk", max_tokens=20, temperature=0.0)
    session = llm.session()
    session.feed("abcdef")
    branch = session.fork()
    branch.feed("ghijk")
    # a last character that is cut is shown as one mark by one of them, as one a byte by the other
    assert "".join(branch.stream(20, 0.0)).rstrip("\ufffd") == text.rstrip("\ufffd")
    assert session.tokens_seen == 6


def test_adapters_and_muon_find_its_matrices():
    model = create_model("based-test")
    found = {name.removeprefix("transformer.layers.") for name in target_names(model, "att")}
    assert {"0.mixer.in_proj", "1.mixer.proj_q", "2.mixer.Wqkv"} <= found
    assert not [name for name in found if "mlp" in name]
    table = model.transformer.embeddings.word_embeddings.weight
    assert id(table) not in hidden_matrices(model)
    assert id(model.transformer.layers[2].mixer.Wqkv.weight) in hidden_matrices(model)


@pytest.mark.parametrize("recompute", [False, True])
def test_it_learns_through_the_trainer(tmp_path, recompute):
    (tmp_path / "text.txt").write_text("the rook sees the rook. " * 200)
    config = replace(tiny_test(), model="based", overrides={"hidden_size": 32, "num_hidden_layers": 3})
    config = overlay(config, {"data": {"path": str(tmp_path / "text.txt")}, "out": str(tmp_path / "run"), "steps": 20})
    config = replace(config, recompute=recompute)
    train(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]
    assert type(load(tmp_path / "run" / "model.safetensors")).__name__ == "Based"


@torch.no_grad()
def test_a_bfloat16_model_still_counts_after_many_tokens():
    model = create_model("based-test", dtype=torch.bfloat16)
    state = None
    for _ in range(3):  # 1,500 equal tokens: a bfloat16 sum would have stopped at 256
        _, state = model(torch.ones(1, 500, dtype=torch.int64), state)
    assert state.layers[1].wkv[0, :, -1, 0].tolist() == [1500.0, 1500.0]
    assert {layer.inputs.dtype for layer in state.layers[:1]} == {torch.bfloat16}
