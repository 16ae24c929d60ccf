"""Guessed hidden units (oracles of RWKV-Lite's second technique)."""

from copy import deepcopy

import pytest
import torch
from support.language import randomised
from torch import nn

from rookery.compress.sparsity import (
    Guess,
    Oracle,
    Predictor,
    Shadow,
    collect,
    pack_bits,
    quality,
    share_of_zeros,
    sparsify,
    train_predictor,
    unpack_bits,
)

TOKENS = torch.arange(60).reshape(2, 30) * 7 % 61


@pytest.fixture(scope="module")
def model():
    return randomised("rwkv7-test", dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def copy(model):
    return deepcopy(model)


def predictor_of(key, seed=0):
    torch.manual_seed(seed)
    return Predictor(key.in_features, key.out_features, 5).requires_grad_(False)


def test_a_guess_of_all_units_changes_nothing(model):
    for guess in (
        lambda key: Guess(predictor_of(key), threshold=0.0),
        lambda key: Guess(None, Shadow.of(key.weight, 1), quantile=0.0),
    ):
        dense = deepcopy(model)
        sparsify(dense, [guess(block.ffn.key) for block in dense.blocks])
        assert torch.equal(dense(TOKENS)[0], model(TOKENS)[0])


def test_guesses_that_are_always_right_change_nothing(model, copy):
    sparsify(copy, [Oracle(block.ffn.key) for block in copy.blocks])
    assert torch.equal(copy(TOKENS)[0], model(TOKENS)[0])


def test_lower_thresholds_find_all_that_higher_ones_find(model):
    key = model.blocks[1].ffn.key
    inputs = collect(model, TOKENS)[1]
    predictor, shadow = predictor_of(key), Shadow.of(key.weight, 2)
    found = None
    for threshold, quantile in ((1.0, 1.0), (0.7, 0.95), (0.5, 0.6), (0.2, 0.3), (0.0, 0.0)):
        more = Guess(predictor, shadow, threshold=threshold, quantile=quantile)(inputs)
        assert found is None or bool((more | ~found).all())
        found = more
    assert bool(found.all())
    assert not bool(Guess(predictor, shadow, threshold=1.0, quantile=1.0)(inputs).any())


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_a_shadow_chooses_the_same_number_for_every_token(model, quantile):
    key = model.blocks[0].ffn.key
    found = Guess(None, Shadow.of(key.weight, 1), quantile=quantile)(torch.randn(9, key.in_features))
    assert set(found.sum(-1).tolist()) == {round((1 - quantile) * key.out_features)}


def test_both_guesses_together_find_what_either_finds(model):
    key, x = model.blocks[0].ffn.key, torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    predictor, shadow = predictor_of(key), Shadow.of(key.weight, 1)
    both = Guess(predictor, shadow, threshold=0.55, quantile=0.9)(x)
    assert torch.equal(both, Guess(predictor, threshold=0.55)(x) | Guess(None, shadow, quantile=0.9)(x))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_shadow_is_the_weights_rounded_to_even_levels(bits):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    shadow = Shadow.of(weight, bits)
    lowest, highest = weight.aminmax()
    scale = (highest - lowest) / (2**bits - 1)
    assert (lowest + scale * shadow.codes - weight).abs().max() <= scale / 2 * 1.0001
    assert torch.equal(unpack_bits(pack_bits(shadow.codes, bits), 30), shadow.codes)


def test_a_shadow_of_rows_has_means_of_their_weights_as_levels():
    weight = torch.tensor([[1.0, 2.0, 7.0, 8.0, 9.0], [-4.0, -2.0, 0.0, 1.0, 3.0]])
    shadow = Shadow.of(weight, 1, "row")
    assert shadow.codes.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]  # above the row's median
    levels = torch.tensor([[10 / 3] * 3 + [8.5] * 2, [-2.0] * 3 + [2.0] * 2])
    x = torch.tensor([[1.0, -1.0, 0.5, 2.0, 0.25]])
    torch.testing.assert_close(shadow(x), x @ levels.T)
    with pytest.raises(ValueError, match="are for 1 bit, got 2"):
        Shadow.of(weight, 2, "row")


def test_a_trained_predictor_finds_units_that_the_input_decides():
    torch.manual_seed(0)
    basis = torch.randn(4, 24)
    key = nn.Linear(24, 64, bias=False).requires_grad_(False)
    inputs = torch.randn(1500, 4) @ basis
    predictor = train_predictor(key, inputs, rank=16, epochs=60, lr=2e-2)
    found = quality(key, Guess(predictor, threshold=0.5), inputs)
    assert found.recall > 0.95
    assert found.precision > 0.9
    assert found.weighted_recall > 0.99
    assert found.loaded < 0.6
    oracle = quality(key, Oracle(key), inputs, held_out=False)
    assert (oracle.recall, oracle.precision) == (1.0, 1.0)
    assert oracle.loaded == pytest.approx(1 - share_of_zeros(key, inputs), abs=1e-6)


def test_inputs_are_collected_layer_by_layer(model):
    found = collect(model, TOKENS, most=40)
    assert [tuple(inputs.shape) for inputs in found] == [(40, 32)] * len(model.blocks)
    assert not any(block.ffn.key._forward_pre_hooks for block in model.blocks)
