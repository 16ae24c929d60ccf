"""GoldFinch against its equations written out a second time, and what its cache and its short prefill promise."""

import numpy as np
import pytest
import torch
from support.equations import layer_norm, sigmoid, weights_of
from support.language import assert_close, assert_same_state, randomised, some_state, some_tokens

from rookery.errors import BadState
from rookery.models import create_model
from rookery.registry import list_models

# C width, H heads, n channel, l layer, L layers, T tokens

PRESETS = list_models("goldfinch-*test")


def norm(p, name, x):
    return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])


def rms(x):
    return x / (np.sqrt((x**2).sum()) / np.sqrt(len(x)) + 1e-8)


def low_rank(p, name, x):
    return np.tanh(x @ p[f"{name}_w1"]) @ p[f"{name}_w2"]


def trunk_mix(p, xs, heads):
    """The time mix of a trunk block on all tokens xs [T, C]."""
    S, ys = 0, []
    for t, x in enumerate(xs):
        step = (xs[t - 1] if t else 0) - x
        z = np.tanh((x + step * p["time_maa_x"]) @ p["time_maa_w1"]).reshape(5, -1)
        moves = zip(["r", "k", "v", "w", "v2"], z, p["time_maa_w2"])
        of = {n: x + step * (p[f"time_maa_{n}"] + inner @ factor) for n, inner, factor in moves}
        w = np.exp(-np.exp(p["time_decay"] + low_rank(p, "time_decay", of["w"])))
        r, k, v = (p[f"{m}.weight"] @ of[n] for m, n in (("receptance", "r"), ("key", "k"), ("value", "v")))
        r, w, k, v = (part.reshape(heads, -1) for part in (r, w, k * (1 - w), v))
        o = np.einsum("hk,hkv->hv", r, S + np.zeros((heads, r.shape[1], r.shape[1]))).ravel()
        S = S * w[:, :, None] + k[:, :, None] * v[:, None, :]
        v2 = p["value.weight"] @ of["v2"] + low_rank(p, "time_value2", of["v2"])
        ys.append(p["output.weight"] @ norm(p, "ln_x", o + v2))
    return np.array(ys)


def gold_mix(p, xs, keys, x0s, heads):
    """GOLD attention of all tokens."""
    C, k, v, ys = xs.shape[1], [], [], []
    xo = np.array([rms(x0) for x0 in x0s])
    for t, x in enumerate(xs):
        step = (xo[t - 1] if t else 0) - xo[t]
        z = np.tanh((xo[t] + step * p["time_maa_v_cache"]) @ p["time_maa_kv_w1"]).reshape(2, -1)
        mk, mv = (z[i] @ p["time_maa_kv_w2"][i] for i in range(2))
        new_k = keys[t] + ((keys[t - 1] if t else 0) - keys[t]) * (p["time_maa_k"] + mk)
        new_v = xo[t] + step * (p["time_maa_v"] + mv)
        k.append(norm(p, "ln_k", new_k + low_rank(p, "time_key", new_k)))
        v.append(norm(p, "ln_v", new_v + low_rank(p, "time_value", new_v)))
        step = (xs[t - 1] if t else 0) - x
        mq = low_rank(p, "time_maa_q", x + step * p["time_maa_x"])
        q = norm(p, "ln_q", p["query.weight"] @ (x + step * (p["time_maa_q"] + mq)))
        y = []
        for h in range(heads):
            own = slice(h * C // heads, (h + 1) * C // heads)
            scores = np.array(k)[:, own] @ q[own] / np.sqrt(C / heads)
            weights = np.exp(scores - scores.max())
            y.append(weights / weights.sum() @ np.array(v)[:, own])
        ys.append(p["output.weight"] @ norm(p, "ln_x", np.concatenate(y)))
    return np.array(ys)


def channel_mix(p, xs):
    ys = []
    for t, x in enumerate(xs):
        step = (xs[t - 1] if t else 0) - x
        hidden = np.maximum(p["key.weight"] @ (x + step * p["time_maa_k"]), 0) ** 2
        ys.append(sigmoid(p["receptance.weight"] @ (x + step * p["time_maa_r"])) * (p["value.weight"] @ hidden))
    return np.array(ys)


def equations(p, tokens, trunk, layers, heads):
    """Logits [T, V]."""
    p = {name: value.ravel() if value.shape[:2] == (1, 1) else value for name, value in p.items()}
    x0 = x = np.array([norm(p, "blocks.0.ln0", p["emb.weight"][t]) for t in tokens])
    keys = None
    for i in range(layers):
        b = {n.removeprefix(f"blocks.{i}."): v for n, v in p.items() if n.startswith(f"blocks.{i}.")}
        att, ffn = ({n.removeprefix(m): v for n, v in b.items() if n.startswith(m)} for m in ("att.", "ffn."))
        if i == trunk:
            c = x @ p["w_kv_cache_a.weight"].T
            keys = np.array([rms(p["w_kv_cache_b.weight"] @ np.concatenate(both)) for both in zip(x0, c)])
        normed = np.array([norm(b, "ln1", row) for row in x])
        x = x + (trunk_mix(att, normed, heads) if i < trunk else gold_mix(att, normed, keys, x0, heads))
        x = x + channel_mix(ffn, np.array([norm(b, "ln2", row) for row in x]))
    return np.array([p["head.weight"] @ norm(p, "ln_out", row) for row in x])


@torch.no_grad()
def test_the_model_computes_the_published_equations():
    model = randomised("goldfinch-test")
    tokens = some_tokens(model, 1, 40)
    want = equations(weights_of(model), tokens[0].tolist(), 2, 4, model.config.num_heads)
    assert_close(model(tokens)[0][0], torch.from_numpy(want), "logits")


@torch.no_grad()
@pytest.mark.parametrize("keep", ["compressed", "keys", "all"])
def test_what_the_cache_keeps_changes_its_size_and_nothing_else(keep):
    usual, other = randomised("goldfinch-test"), randomised("goldfinch-test", keep=keep, block_size=7)
    tokens, more = some_tokens(usual, 2, 50), some_tokens(usual, 2, 20, seed=5)
    mask = torch.tensor([[1] * 20, [0] * 9 + [1] * 11])
    _, state = usual(tokens)
    want, _ = usual(more, state, mask=mask)
    _, state = other(tokens)
    assert state.nbytes == state.expected_nbytes(50)
    got, after = other(more, state, mask=mask)
    assert after.tokens_seen.tolist() == [70, 61]
    assert_close(got, want, keep)


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_every_way_to_read_a_text_gives_the_same(name):
    model = randomised(name)
    tokens = some_tokens(model, 2, 40)
    whole, after = model(tokens)
    for piece in (1, 3, 7, 20):
        state, logits = None, []
        for part in tokens.split(piece, dim=1):
            some, state = model(part, state)
            logits.append(some)
        assert_close(torch.cat(logits, dim=1), whole, f"pieces of {piece}")
        assert_same_state(state, after, f"pieces of {piece}")


@torch.no_grad()
def test_the_number_of_gold_layers_does_not_change_what_a_token_costs():
    for gold in (1, 2, 4):
        state = create_model("goldfinch-test", num_gold_layers=gold).init_state(1)
        assert state.expected_nbytes(1001) - state.expected_nbytes(1000) == 4 + 4 * 4


# the short prefill


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("gold", [1, 2, 3])
def test_a_short_prefill_gives_the_state_and_last_features_of_a_full_one(name, gold):
    model = randomised(name, num_gold_layers=gold)
    for before in (None, some_state(model, 2, 9)):
        tokens = some_tokens(model, 2, 30)
        features, after = model.features(tokens, before)
        for count in (0, 1, 3, 40):
            last, state = model.last_features(tokens, before, count)
            assert last.shape[1] == min(count, 30)
            assert_close(last, features[:, 30 - last.shape[1] :], f"last {count}")
            assert_same_state(state, after, f"after {count}")


@torch.no_grad()
@pytest.mark.parametrize("gold", [2, 3])
def test_a_shorter_prefill_would_be_wrong(gold):
    model = randomised("goldfinch-test", num_gold_layers=gold)
    tokens = some_tokens(model, 1, 30)
    features, after = model.features(tokens)

    def short(last):
        state = model.init_state(1)
        x = model.embed(tokens)
        return model.run(x, state, model.call(tokens, x, state, None)._replace(last=last))

    got, state = short(2 * gold - 1)
    assert_same_state(state, after, "2G − 1 tokens")
    assert not torch.allclose(got[:, -1], features[:, -1])
    assert not torch.allclose(short(2 * gold - 2)[1].layers[-1].ffn_shift, after.layers[-1].ffn_shift)


@torch.no_grad()
def test_a_short_prefill_does_not_pass_all_tokens_through_attention(monkeypatch):
    model, seen = randomised("goldfinch-test"), []
    attend = type(model.blocks[-1].att).queries

    def counted(self, x, *rest):
        seen.append(x.shape[1])
        return attend(self, x, *rest)

    monkeypatch.setattr(type(model.blocks[-1].att), "queries", counted)
    model.last_features(some_tokens(model, 1, 60), None, 1)
    assert seen == [4, 4]


# what reaches the attention


@torch.no_grad()
def test_attention_sees_past_tokens_only_through_what_the_cache_keeps():
    model = randomised("goldfinch-test")
    tokens, more = some_tokens(model, 1, 30), some_tokens(model, 1, 6, seed=5)
    _, state = model(tokens)
    # four more tokens flush the shifts; another past that left the same cache cannot be told apart by GOLD blocks
    other = state.layers[:2] + tuple(layer._replace(att_shift=layer.att_shift + 1) for layer in state.layers[2:])
    changed = type(state)(other, state.tokens_seen, state.config, state.shared)
    usual, shifted = model(more, state)[0], model(more, changed)[0]
    assert not torch.allclose(usual[:, 0], shifted[:, 0])
    assert_close(shifted[:, 4:], usual[:, 4:], "after 2G tokens")


@torch.no_grad()
def test_cached_tokens_have_no_order_but_for_the_one_before():
    """Without positions the rows of keys and values may be permuted as pairs."""
    model = randomised("goldfinch-test")
    att = model.blocks[-1].att
    q, k, v = (torch.randn(1, n, 32, dtype=torch.float64) for n in (1, 9, 9))
    order = torch.randperm(9)
    there = torch.tensor([[8]])
    usual, permuted = att.attend(q, k, v, 0, there, False), att.attend(q, k[:, order], v[:, order], 0, there, False)
    assert_close(permuted[0], usual[0])


@torch.no_grad()
def test_a_fresh_model_mixes_keys_and_values_by_fixed_weights():
    model = create_model("goldfinch-test", dtype=torch.float64)
    att = model.blocks[-1].att
    key, x = torch.randn(2, 1, 12, 32, dtype=torch.float64)
    k, v = att.keys_and_values(key, x)
    for got, made, mix, own in ((k, key, att.time_maa_k, att.ln_k), (v, x, att.time_maa_v, att.ln_v)):
        assert_close(got, own(made[:, 1:] * (1 - mix) + made[:, :-1] * mix))


@torch.no_grad()
def test_the_embedding_is_the_first_half_of_the_compressed_pair():
    model = randomised("goldfinch-test")
    x0, c = torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    weight = model.w_kv_cache_b.weight
    made = x0 @ weight[:, :32].T + c @ weight[:, 32:].T
    want = made / (made.square().mean(-1, keepdim=True).sqrt() + 1e-8)
    assert_close(model.key_of(x0, c), want, "key")


@torch.no_grad()
def test_each_ablation_computes_something_else():
    tokens = torch.arange(20)[None]
    settings = [{}, {"has_second_value": False}, {"has_fading_keys": False}, {"rope_theta": 1e4}]
    settings += [{"rope_theta": 1e4, "rope_scale": 4.0}]
    logits = [randomised("goldfinch-test", **chosen)(tokens)[0] for chosen in settings]
    assert all(not torch.allclose(a, b) for i, a in enumerate(logits) for b in logits[:i])


def test_vectors_start_at_their_published_values():
    model = create_model("goldfinch-test")
    n, L = torch.arange(32) / 32, 4
    for layer, block in enumerate(model.blocks):
        rho, rho1 = layer / (L - 1), 1 - layer / L
        slow, query, later = 1 - n**rho1, 1 - n ** (rho1 / 2), 1 - (n**rho1 + 0.3 * rho)
        want = {"x": slow, "k": slow, "v": later}
        want |= {"v_cache": slow, "q": query} if layer >= 2 else {"w": slow, "r": query, "v2": later}
        for name, value in want.items():
            torch.testing.assert_close(getattr(block.att, f"time_maa_{name}").flatten(), value)
        torch.testing.assert_close(block.att.ln_x.weight, torch.full((32,), ((1 + layer) / L) ** 0.7))


def test_a_state_of_another_kind_of_cache_is_refused(tmp_path):
    usual, other = create_model("goldfinch-test"), create_model("goldfinch-test", keep="keys")
    state = some_state(usual, 1)
    with pytest.raises(BadState, match="the state keeps 'compressed', this model 'keys'; read the text again"):
        other(torch.tensor([[1]]), state)
    state.save(tmp_path / "story.state", usual)
    with pytest.raises(BadState, match=r"shared\.compressed"):
        type(state).load(tmp_path / "story.state", other)


def test_a_frozen_trunk_leaves_the_cache_what_it_was():
    model = randomised("goldfinch-test")
    tokens = some_tokens(model, 2, 20)
    before = model(tokens)[1].shared
    trained = model.freeze_trunk()
    assert {name.split(".")[0] for name in trained} == {"blocks", "ln_out", "head"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"2", "3"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens)[0].square().mean().backward()
    optimizer.step()
    assert torch.equal(model(tokens)[1].shared.compressed, before.compressed)
