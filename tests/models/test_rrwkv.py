"""RRWKV against its equations written out a second time, and against RWKV-4 where mediums do nothing."""

import math

import numpy as np
import pytest
import torch
from support.equations import layer_norm, sigmoid, weights_of
from support.language import assert_close, assert_same_state, randomise, randomised, some_tokens

from rookery.families.rrwkv import FAMILY, RRWKVConfig
from rookery.models import create_model
from rookery.models.rrwkv import RRWKV, log_total
from rookery.ops.wkv4 import empty_state
from rookery.registry import list_models, recognise

# C width, S interval, T tokens

NAMES = list_models("rrwkv-*test")


def mediums_of(p, xs, weights):
    """M_t for every token, and the mediums that are finished."""
    S = len(weights)
    finished, seen = [], []
    for t in range(len(xs)):
        seen.append(finished[-1] if finished else np.zeros(xs.shape[1]))
        if t % S == S - 1:
            pooled = sum(w * x for w, x in zip(weights, xs[t - S + 1 : t + 1]))
            finished.append(pooled * 2 * sigmoid(np.maximum(pooled @ p["rr_e1"], 0) @ p["rr_e2"]))
    return seen, finished


def time_mix(p, xs, weights):
    seen, mediums = mediums_of(p, xs, weights)
    S, w, ys, pairs = len(weights), np.exp(p["time_decay"]), [], []
    kappa = [p["key.weight"] @ m + p["rr_um"] for m in mediums]
    values = [p["value.weight"] @ m for m in mediums]
    fade = np.exp(p["rr_fade"]) if "rr_fade" in p else 0
    for t, x in enumerate(xs):
        before = xs[t - 1] if t else np.zeros_like(x)
        of = {n: p[f"time_mix_{n}"] * x + (1 - p[f"time_mix_{n}"]) * before + p[f"rr_rho_{n}"] * seen[t] for n in "kvr"}
        k, v = p["key.weight"] @ of["k"], p["value.weight"] @ of["v"]
        num, den = np.exp(p["time_first"] + k) * v, np.exp(p["time_first"] + k)
        for i, (ki, vi) in enumerate(pairs):
            weight = np.exp(ki - (t - 1 - i) * w)
            num, den = num + weight * vi, den + weight
        for j in range(t // S):
            weight = np.exp(kappa[j] - (t // S - 1 - j) * fade)
            num, den = num + weight * values[j], den + weight
        pairs.append((k, v))
        ys.append(p["output.weight"] @ (sigmoid(p["receptance.weight"] @ of["r"]) * num / den))
    return np.array(ys)


def channel_mix(p, xs, weights):
    seen, _ = mediums_of(p, xs, weights)
    ys = []
    for t, x in enumerate(xs):
        before = xs[t - 1] if t else np.zeros_like(x)
        of = {n: p[f"time_mix_{n}"] * x + (1 - p[f"time_mix_{n}"]) * before + p[f"rr_rho_{n}"] * seen[t] for n in "kr"}
        hidden = np.maximum(p["key.weight"] @ of["k"], 0) ** 2
        ys.append(sigmoid(p["receptance.weight"] @ of["r"]) * (p["value.weight"] @ hidden))
    return np.array(ys)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_its_equations(name):
    model = randomised(name)
    tokens, weights = some_tokens(model, 1, 30), model.config.medium_weights
    p = {n: value.ravel() if value.shape[:2] == (1, 1) else value for n, value in weights_of(model).items()}
    norm = lambda b, n, rows: np.array([layer_norm(x, b[f"{n}.weight"], b[f"{n}.bias"]) for x in rows])  # noqa: E731
    x = norm(p, "blocks.0.ln0", p["emb.weight"][tokens[0].numpy()])
    for i in range(model.config.num_hidden_layers):
        b = {n.removeprefix(f"blocks.{i}."): v for n, v in p.items() if n.startswith(f"blocks.{i}.")}
        att, ffn = ({n.removeprefix(m): v for n, v in b.items() if n.startswith(m)} for m in ("att.", "ffn."))
        x = x + time_mix(att, norm(b, "ln1", x), weights)
        x = x + channel_mix(ffn, norm(b, "ln2", x), weights)
    want = norm(p, "ln_out", x) @ p["head.weight"].T
    assert_close(model(tokens)[0][0], torch.from_numpy(want), "logits")


@torch.no_grad()
def test_without_a_finished_interval_this_is_rwkv4_bit_for_bit():
    plain = randomised("rwkv4-test")
    model = RRWKV.from_rwkv4(plain, um=0.0, interval=50)
    randomise_mediums(model)
    tokens = some_tokens(plain, 2, 50)
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    longer = some_tokens(plain, 2, 60)
    assert not torch.equal(model(longer)[0][:, 51:], plain(longer)[0][:, 51:])


def randomise_mediums(model):
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if ".rr_" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@torch.no_grad()
def test_mediums_of_no_weight_change_no_bit():
    plain = randomised("rwkv4-test")
    model = RRWKV.from_rwkv4(plain, um=-math.inf, interval=8)
    tokens = some_tokens(plain, 2, 40)
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    # what from_rwkv4 gives by default hardly counts
    model = RRWKV.from_rwkv4(plain, interval=8)
    assert (model(tokens)[0] - plain(tokens)[0]).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_within_an_interval_or_at_its_edge_changes_nothing(name):
    model = randomised(name)
    tokens = some_tokens(model, 2, 33)
    whole, after = model(tokens)
    interval = model.config.interval
    for cuts in ([interval], [interval - 1, interval + 1], [1, 2, 3], list(range(1, 33))):
        state, logits = None, []
        for part in tokens.tensor_split(cuts, dim=1):
            some, state = model(part, state)
            logits.append(some)
        assert_close(torch.cat(logits, dim=1), whole, str(cuts))
        assert_same_state(state, after, str(cuts))


@torch.no_grad()
def test_an_interval_does_not_see_its_own_medium():
    model = randomised("rrwkv-test")  # intervals of 8
    made = []
    look_back = type(model.blocks[0].att).look_back
    for length in (8, 9, 16, 17):
        x = torch.randn(1, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        state = model.init_state(1)
        call = model.call(torch.zeros(1, length, dtype=torch.int64), x, state, None)
        layer = state.layers[0]
        mediums, seen, _, _ = look_back(model.blocks[0].att, x, layer.att_pool, layer.att_medium, call.growth)
        assert not seen[0, :8].any()
        for t in range(8, length):
            assert torch.equal(seen[0, t], mediums[0, t // 8 - 1])
        made.append(mediums)


@torch.no_grad()
def test_large_keys_do_not_overflow():
    model = randomised("rrwkv-test", dtype=torch.float32)
    exact = randomised("rrwkv-test")
    for each in (model, exact):
        for block in each.blocks:
            block.att.rr_um.fill_(60.0)
            block.att.time_first.fill_(60.0)
    exact.load_state_dict(model.state_dict())
    tokens = some_tokens(model, 1, 40)
    logits = model(tokens)[0]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, exact(tokens)[0].float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_total_of_the_weights_is_that_of_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    log_w, u = -torch.rand(5, generator=generator).double() * 20, torch.randn(5, generator=generator).double()
    k = torch.randn(2, 37, 5, generator=generator).double() * 10
    got = log_total(log_w, u, k, empty_state(2, 5, like=k))
    for t in (0, 1, 15, 16, 36):
        past = [k[:, i] + (t - 1 - i) * log_w for i in range(t)]
        assert_close(got[:, t], torch.stack([*past, u + k[:, t]]).logsumexp(0))


def test_a_state_is_twelve_numbers_a_channel_whatever_was_read():
    model = create_model("rrwkv-test")
    state = model(some_tokens(model, 1, 21))[1]
    assert state.nbytes == state.expected_nbytes(21) == state.expected_nbytes(10**6) == 3 * 12 * 32 * 4


def test_weights_of_rwkv4_fit_and_lack_exactly_the_mediums():
    plain, model = create_model("rwkv4-test"), create_model("rrwkv-test")
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {name for name, _ in model.named_parameters() if ".rr_" in name}


@pytest.mark.parametrize("preset", FAMILY.presets)
def test_sizes_are_read_off_the_tensors(preset):
    config = FAMILY.presets[preset]
    shapes = FAMILY.tensor_shapes(config)
    assert recognise(shapes) is FAMILY
    assert FAMILY.config_from_shapes(shapes, interval=config.interval, pool=config.pool) == config


@torch.no_grad()
def test_ways_to_pool_differ_and_weigh_as_they_say():
    tokens = torch.arange(30)[None]
    logits = []
    for pool in ("mean", "last", "ema"):
        config = RRWKVConfig(interval=4, pool=pool)
        assert sum(config.medium_weights) == pytest.approx(1)
        assert len(config.medium_weights) == 4
        logits.append(randomise(create_model("rrwkv-test", pool=pool).double())(tokens)[0])
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])
    with pytest.raises(ValueError, match="interval must be at least 2, got 1"):
        RRWKVConfig(interval=1)
