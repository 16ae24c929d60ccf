"""Factored projections (oracles of RWKV-Lite's first technique)."""

import pytest
import torch
from support.language import randomised

from rookery.compress.low_rank import LowRank, factorise, factors, projections, train_on
from rookery.errors import BadCheckpoint
from rookery.models import create_model

TOKENS = torch.arange(20)[None] % 16


def test_factors_of_full_rank_give_the_matrix():
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    first, second = factors(weight, 12)
    assert (second @ first - weight).norm() <= 1e-5 * weight.norm()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_factors_of_that_rank_are_closer(rank):
    weight = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, second = factors(weight, rank)
    dropped = torch.linalg.svdvals(weight)[rank:]
    torch.testing.assert_close((second @ first - weight).norm(), dropped.square().sum().sqrt())


@pytest.mark.parametrize("family", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_a_model_with_factors_of_full_rank_says_the_same(family):
    model = randomised(f"{family}-test", dtype=torch.float32)
    before = model(TOKENS)[0]
    factorise(model, 1)
    torch.testing.assert_close(model(TOKENS)[0], before, atol=1e-4, rtol=1e-4)


def test_factors_have_two_times_rank_times_width_numbers():
    model = create_model("rwkv5-test")
    width, before = model.config.hidden_size, sum(p.numel() for p in model.parameters())
    found = list(projections(model))
    assert len(found) == 5 * len(model.blocks)  # receptance, key, value, gate, and that of the channel mix
    factorise(model, 4)
    saved = len(found) * (width**2 - 2 * width * (width // 4))
    assert before - sum(p.numel() for p in model.parameters()) == saved


def test_training_on_repairs_what_was_lost():
    model = create_model("rwkv7-test", vocab_size=16)
    tokens = torch.arange(400) % 7
    train_on(model, tokens, steps=12, rows=4, length=16, lr=2e-2)
    factorise(model, 8)
    losses = train_on(model, tokens, steps=12, rows=4, length=16, lr=2e-2)
    assert losses[-1] < 0.7 * losses[0]


def test_the_enhanced_kind_is_for_models_that_start_from_scratch():
    with pytest.raises(ValueError, match="no trained matrix has"):
        factorise(create_model("rwkv7-test"), 4, "enhanced")
    model = create_model("rwkv7-test")
    factorise(model, 4, "enhanced", from_scratch=True)
    low = model.blocks[0].att.key
    assert low.diag.abs().max() <= 1e-4
    x = torch.randn(3, low.first.in_features)
    torch.testing.assert_close(low(x), low.second(low.first(x).relu() ** 2) + low.diag * x)


@pytest.mark.parametrize("divisor", [0, 33])
def test_a_divisor_that_leaves_no_rank_is_refused(divisor):
    with pytest.raises(ValueError, match="must lie between 1 and the width 32"):
        factorise(create_model("rwkv7-test"), divisor)


def test_a_model_is_not_factored_twice():
    model = create_model("rwkv7-test")
    factorise(model, 2)
    with pytest.raises(ValueError, match="has two factors already"):
        factorise(model, 2)


def test_other_kinds_and_families_are_refused():
    with pytest.raises(ValueError, match="neither 'simple' nor 'enhanced'"):
        LowRank(4, 4, 2, "odd")
    with pytest.raises(BadCheckpoint, match="transformer cannot be compressed; rwkv4, rwkv5, rwkv6, rwkv7 can"):
        factorise(create_model("transformer-test"), 2)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="too few for pieces of 17"):
        train_on(create_model("rwkv7-test"), torch.arange(5), steps=1, length=16)
