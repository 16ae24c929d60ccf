"""The variants of RWKV-7 against their equations, token by token (core.md 1.6-1.8)."""

import torch
from support.language import assert_close, randomised, some_tokens
from torch.nn.functional import layer_norm

LENGTH = 9


def captured(module, model, tokens):
    """What a module is given and gives while the model reads."""
    calls = []
    hook = module.register_forward_hook(lambda _, given, made: calls.append((given, made)))
    model(tokens)
    hook.remove()
    return calls[0]


def normed(x, norm):
    return layer_norm(x, x.shape, norm.weight, norm.bias)


def embedded(model, token):
    return normed(model.emb.weight[token], model.blocks[0].ln0)


@torch.no_grad()
def test_hidden_units_of_7a_are_gated_by_the_form_of_their_token():
    model = randomised("rwkv7a-test")
    tokens, ffn, rank = some_tokens(model, 1, LENGTH), model.blocks[1].ffn, model.config.embed_rank
    given, (made, _) = captured(ffn, model, tokens)
    before = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for t, (token, x) in enumerate(zip(tokens[0], given[0][0], strict=True)):
        hidden = (ffn.key.weight @ (x + (before - x) * ffn.x_k.flatten())).relu() ** 2
        form = (ffn.s_emb.weight[token] + ffn.s_emb_x.weight @ embedded(model, token)).view(rank, rank)
        gate = (x @ ffn.s1) @ form @ ffn.s2 + ffn.s0
        assert_close(made[0, t], ffn.value.weight @ (hidden * gate), f"token {t}")
        before = x


@torch.no_grad()
def test_the_attention_of_7b_is_that_of_its_equations():
    model = randomised("rwkv7b-test")
    tokens, qkv = some_tokens(model, 1, LENGTH), model.blocks[1].qkv
    given, (made, _) = captured(qkv, model, tokens)
    raw = {"q": [], "k": [], "v": []}
    for token, x in zip(tokens[0], given[0][0], strict=True):
        known = embedded(model, token)
        raw["q"].append(qkv.qq.weight @ x)
        raw["k"].append(x @ qkv.k1 @ qkv.k2 * (qkv.k_emb.weight[token] + qkv.k_emb_x.weight @ known))
        raw["v"].append((x @ qkv.v1 @ qkv.v2).tanh() * (qkv.v_emb.weight[token] + qkv.v_emb_x.weight @ known))
    made_of = {}
    for name, values in raw.items():
        mix, norm = getattr(qkv, f"x_{name}").flatten(), getattr(qkv, f"ln{name}")
        before = [torch.zeros_like(values[0]), *values]
        made_of[name] = [normed(x + (b - x) * mix, norm) for x, b in zip(values, before, strict=False)]
    for i in range(LENGTH):
        scores = torch.stack([64 * torch.tanh(made_of["q"][i] @ made_of["k"][j] / 1024) for j in range(i + 1)])
        want = sum(p * v for p, v in zip(scores.softmax(dim=0), made_of["v"], strict=False))
        assert_close(made[0, i], want, f"token {i}")


@torch.no_grad()
def test_the_channel_mix_of_8_is_scaled_by_the_vector_of_its_token():
    model = randomised("rwkv8-test")
    tokens, ffn = some_tokens(model, 1, LENGTH), model.blocks[1].ffn
    given, (made, _) = captured(ffn, model, tokens)
    before = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for t, (token, x) in enumerate(zip(tokens[0], given[0][0], strict=True)):
        hidden = (ffn.key.weight @ (x + (before - x) * ffn.x_k.flatten())).relu() ** 2
        assert_close(made[0, t], (ffn.value.weight @ hidden) * ffn.enn.weight[token], f"token {t}")
        before = x


@torch.no_grad()
def test_the_attention_of_the_hybrid_is_that_of_its_equations():
    model = randomised("rwkv8-hybrid-test")
    tokens, qkv = some_tokens(model, 1, LENGTH), model.blocks[1].qkv
    given, (made, _) = captured(qkv, model, tokens)
    keys, values = [], []
    for i, (token, x) in enumerate(zip(tokens[0], given[0][0], strict=True)):
        q = normed(qkv.qq.weight @ x, qkv.lnq)
        keys.append(normed(qkv.kkup.weight @ (qkv.kk.weight @ x) * qkv.ennk.weight[token], qkv.lnk))
        values.append(normed((qkv.vvup.weight @ (qkv.vv.weight @ x)).tanh() * qkv.emm.weight[token], qkv.lnv))
        scores = torch.stack([32 * torch.tanh(q @ k / 512) for k in keys])
        assert_close(made[0, i], sum(p * v for p, v in zip(scores.softmax(dim=0), values, strict=True)), f"token {i}")
