"""The transformer against its equations, its variants, and a trained model whose quality is known."""

import importlib.util

import numpy as np
import pytest
import torch
from support.data import shared
from support.language import assert_close, assert_same_state, randomise, randomised, some_tokens

from rookery.checkpoints.llama2c import read_llama2c
from rookery.models import build, create_model
from rookery.registry import families
from rookery.state import from_numpy

VARIANTS = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "every query its key": {"num_key_value_heads": 4},
    "biases": {"qkv_bias": True},
    "tied head": {"tie_word_embeddings": True},
    "no positions": {"rope_theta": None},
    "another base": {"rope_theta": 1e6},
    "wide heads": {"head_dim": 14},
    "encoder": {"is_causal": False},
}


def published_forward(p: dict[str, np.ndarray], tokens: list[int], config) -> np.ndarray:
    """Logits [t, V] from the equations, one head and one query at a time, rotations as complex numbers."""
    count, d, groups = len(tokens), config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def rotated(x):  # [t, d]
        if config.rope_theta is None:
            return x
        angle = np.arange(count)[:, None] * config.rope_theta ** (-2 * np.arange(d // 2) / d)
        turned = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = p["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        q = {name.removeprefix(f"model.layers.{i}."): value for name, value in p.items()}
        h = norm(x, q["input_layernorm.weight"])
        parts = {}
        for name in "qkv":
            parts[name] = h @ q[f"self_attn.{name}_proj.weight"].T + q.get(f"self_attn.{name}_proj.bias", 0)
        out = np.zeros((count, config.num_attention_heads * d))
        for head in range(config.num_attention_heads):
            own, common = slice(head * d, (head + 1) * d), slice(head // groups * d, (head // groups + 1) * d)
            queries, keys, values = rotated(parts["q"][:, own]), rotated(parts["k"][:, common]), parts["v"][:, common]
            for t in range(count):
                seen = t + 1 if config.is_causal else count
                score = np.exp(keys[:seen] @ queries[t] / d**0.5)
                out[t, own] = score @ values[:seen] / score.sum()
        x = x + out @ q["self_attn.o_proj.weight"].T
        h = norm(x, q["post_attention_layernorm.weight"])
        gate = h @ q["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ q["mlp.up_proj.weight"].T)) @ q["mlp.down_proj.weight"].T
    return norm(x, p["model.norm.weight"]) @ p["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_computes_the_published_equations(variant):
    model = randomised("transformer-test", **VARIANTS[variant])
    tokens = some_tokens(model, 1, 13)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    want = published_forward(weights, tokens[0].tolist(), model.config)
    # angles are float32 on purpose
    torch.testing.assert_close(model(tokens)[0][0], torch.from_numpy(want), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "encoder"])
def test_every_variant_can_be_cut_padded_and_packed(variant):
    model = randomised("transformer-test", **VARIANTS[variant])
    tokens = some_tokens(model, 1, 9)
    whole, after = model(tokens)
    first, state = model(tokens[:, :4])
    second, state = model(tokens[:, 4:], state)
    assert_close(torch.cat([first, second], dim=1), whole, "cut")
    assert_same_state(state, after)
    packed, _ = model(tokens, cu_seqlens=torch.tensor([0, 4, 9]))
    assert_close(packed[:, :4], first, "first document")
    assert_close(packed[:, 4:], model(tokens[:, 4:])[0], "second document")
    padded, _ = model(tokens.repeat(2, 1), mask=torch.tensor([[1] * 9, [0] * 5 + [1] * 4]))
    assert_close(padded[:1], whole, "row without padding")
    assert_close(padded[1:, 5:], model(tokens[:, 5:])[0], "padded row")


@torch.no_grad()
def test_a_tied_head_is_the_embedding():
    model = create_model("transformer-test", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@torch.no_grad()
def test_an_encoder_sees_the_whole_row_and_nothing_else():
    model = randomised("transformer-test", is_causal=False)
    tokens = some_tokens(model, 1, 9)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.vocab_size
    assert (model(tokens)[0][:, 0] - model(changed)[0][:, 0]).abs().max() > 1e-6
    packed, _ = model(tokens, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    assert_close(packed[:, :4], model(tokens[:, :4])[0], "first document")
    assert_close(packed[:, 4:], model(tokens[:, 4:])[0], "last document")
    padded, _ = model(tokens.repeat(2, 1), mask=torch.tensor([[1] * 9, [1] * 3 + [0] * 6]))
    assert_close(padded[1:, :3], model(tokens[:, :3])[0], "padded row")


def test_an_encoder_takes_no_state():
    model = create_model("transformer-test", is_causal=False)
    tokens = some_tokens(model, 1, 3)
    with pytest.raises(ValueError, match=r"an encoder \(is_causal=False\) reads whole rows and takes no state"):
        model(tokens, model(tokens)[1])


def test_weights_start_from_the_documented_distribution():
    model = create_model("transformer-test", hidden_size=128, intermediate_size=512, qkv_bias=True, vocab_size=500)
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * model.config.num_hidden_layers) ** 0.5 if residual else 0.02
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(value.mean().item()) < 5 * std / value.numel() ** 0.5, name


def baby_llama():
    config, weights = read_llama2c(shared("models/babyllama/model5000.bin"))
    model = build(families()["transformer"], config)
    tensors = {name: from_numpy(weight) for name, weight in weights.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model.eval()


@pytest.mark.data
@torch.no_grad()
def test_a_trained_model_predicts_its_story_as_well_as_published():
    model = baby_llama()
    lines = shared("models/babyllama/tok105.vocab").read_text(encoding="utf-8").splitlines()
    ids = {line.split("\t")[0].replace("\u2581", " "): i for i, line in enumerate(lines)}
    story = (
        " Once upon a time, there was a big dog named Max. Max loved to play in the park with his friends."
        " One day, he saw a small cat in a tree."
    )
    tokens = torch.tensor([[1, *(ids[character] for character in story)]])
    logits, _ = model(tokens[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    assert nats.item() == pytest.approx(0.248, abs=5e-4)


@torch.no_grad()
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="Hugging Face transformers is not installed"
)
def test_the_model_agrees_with_hugging_face():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = randomise(create_model("transformer-test"), seed=6).double()
    config = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
        )
    ).double()
    theirs.load_state_dict(model.state_dict())
    tokens = some_tokens(model, 2, 15)
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"):
        create_model("transformer-test", num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"head_dim \(7\) must be even for rotary embeddings"):
        create_model("transformer-test", head_dim=7)
    create_model("transformer-test", head_dim=7, rope_theta=None)
